"""Fold a LoRA adapter into its LLM.

Write a model with its adapter merged, after comparing the embeddings of both: nothing is written if they differ by
more than rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import NEW_FOLDER, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the folder of a model with an adapter")
    parser.add_argument("output", help=NEW_FOLDER)
    parser.add_argument(
        "--tolerance",
        type=float,
        help="the largest difference of a component of an embedding (default: 1e-5, or a half's last bit)",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.files import check_empty
    from st_llm_embed.hub import save_sealed
    from st_llm_embed.hub.teacher import teacher_of
    from st_llm_embed.trust import load_any
    from st_llm_embed.weights import merge_adapter

    check_empty(Path(arguments.output).resolve())
    model = load_any(arguments.source, arguments.trust_remote_code)
    merged = merge_adapter(model, arguments.tolerance)
    print(f"Wrote {save_sealed(merged, arguments.output, teacher=teacher_of(Path(arguments.source)))}.")
