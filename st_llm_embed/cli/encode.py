"""Encode the texts of a file.

Write the embeddings as one array, (texts, dim) in float32, in the order of the rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import MODEL, ROWS, add_batch_size, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("texts", help=f"the texts: {ROWS}, or .txt files")
    parser.add_argument("--output", type=Path, required=True, help="the .npy file to write")
    parser.add_argument("--column", default="text", help="the column of the texts (default: %(default)s)")
    parser.add_argument("--prompt-name", help="the name of the prompt, such as query (default: the model's own)")
    add_batch_size(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from st_llm_embed.data import load_rows
    from st_llm_embed.data.columns import check_text
    from st_llm_embed.files import check_file_writable, written_beside
    from st_llm_embed.trust import load_trusted

    if arguments.output.suffix != ".npy" or arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is no .npy file. Name one, such as vectors.npy.")
    check_file_writable(arguments.output)
    rows = load_rows(arguments.texts, columns={"text": arguments.column})
    check_text(rows, arguments.texts, ["text"])
    model = load_trusted(arguments.model, arguments.trust_remote_code)
    if arguments.prompt_name is not None and arguments.prompt_name not in model.prompts:
        raise ValueError(
            f"--prompt-name {arguments.prompt_name} is unknown. The model has: {', '.join(model.prompts)}."
        )
    vectors = model.encode(
        list(rows["text"]),
        prompt_name=arguments.prompt_name,
        batch_size=arguments.batch_size,
        show_progress_bar=True,
    )
    with written_beside(arguments.output.resolve()) as staged:
        np.save(staged, vectors.astype(np.float32))
    print(f"Wrote {len(vectors):,} embeddings of {vectors.shape[1]} numbers to {arguments.output}.")
