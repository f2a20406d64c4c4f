"""Evaluate models with mteb, on its tasks or on folders.

Evaluate a model under the prompts saved in it. Results are mteb's files, kept by the model's revision, precision and
attention: an interrupted evaluation goes on. Prints a table. Of several models it has all figures, and the differences
to the first, with 95 % intervals where they can be paired over queries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import MODEL, add_batch_size, add_revision, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="model", help=f"{MODEL}; several are compared with the first")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="the names of mteb's tasks or benchmarks, or folders: BEIR's layout, or SPLIT.jsonl[.gz] with sentence1, "
        "sentence2, score (STS) or label (pairs), or text, label (classes; clusters if there is no train.jsonl)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="the folder of the results (default: %(default)s)"
    )
    parser.add_argument("--split", default="test", help="the split of the folders' data (default: %(default)s)")
    parser.add_argument("--parity", action="store_true", help="compare the ways to run the model instead")
    add_batch_size(parser)
    parser.add_argument("--dtype", help="the precision of the weights, such as bfloat16 (default: as saved)")
    parser.add_argument(
        "--attn-implementation", help="the attention: eager, sdpa or flash_attention_2 (default: the LLM's)"
    )
    parser.add_argument(
        "--max-seq-length", type=int, help="the tokens of the longest text, prompt included (default: as saved)"
    )
    parser.add_argument("--device", help="the device to encode on, such as cuda (default: the best there is)")
    add_revision(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.evaluation import compare, evaluate, parity
    from st_llm_embed.evaluation.parity import as_markdown
    from st_llm_embed.files import check_writable

    sources, tasks, output = arguments.sources, arguments.tasks, arguments.output
    not_settings = {"sources", "tasks", "output", "parity", "run", "debug"}
    settings = {key: value for key, value in vars(arguments).items() if key not in not_settings}
    if len(sources) > 1 and arguments.parity:
        raise ValueError(f"--parity takes one model, not {len(sources)}: leave out {', '.join(sources[1:])}.")
    if len(sources) > 1:
        if settings.pop("revision"):
            raise ValueError(
                f"--revision takes one model, not {len(sources)}. Fix: hf download MODEL --revision REVISION "
                "--local-dir FOLDER, and name the folder."
            )
        compared = compare(sources, tasks, output, **settings)
        print(f"{compared.table}\nThis table is {compared.folder / 'comparison.md'}; mteb's files are beside it.")
    elif arguments.parity:
        check_writable(output)  # as evaluate does by itself
        if chosen := [name for name in ("dtype", "attn_implementation") if settings.pop(name)]:
            raise ValueError(f"--parity compares precisions and attentions itself: leave out {', '.join(chosen)}.")
        table = as_markdown(parity(sources[0], tasks, **settings))
        output.mkdir(parents=True, exist_ok=True)
        (output / "parity.md").write_text(table, encoding="utf-8")
        print(table)
    else:
        evaluated = evaluate(sources[0], tasks, output, **settings)
        print(f"{evaluated.table}\nThis table and mteb's files are in {evaluated.folder}.")
