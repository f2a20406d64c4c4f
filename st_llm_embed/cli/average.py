"""Average the weights of several checkpoints of a model.

Write one model whose weights are the mean of several checkpoints', or lie on the great circles between them. Often
better than the best of them.
"""

from __future__ import annotations

import argparse

from st_llm_embed.cli.shared import NEW_FOLDER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", help="the folders that the trainer or save_pretrained wrote")
    parser.add_argument("--output", required=True, help=NEW_FOLDER)
    parser.add_argument(
        "--base",
        help="the Hub id, folder or .gguf file of the plain LLM that the first was built from, as one more checkpoint",
    )
    parser.add_argument("--method", default="equal", help="the way to average: equal or slerp (default: %(default)s)")
    parser.add_argument(
        "--weights", type=float, nargs="+", help="the weight of each checkpoint, the base's last (default: all equal)"
    )


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.weights import average_checkpoints

    folder = average_checkpoints(
        arguments.checkpoints, arguments.output, arguments.method, arguments.weights, arguments.base
    )
    count = len(arguments.checkpoints) + (arguments.base is not None)
    print(f"Wrote the average of {count} checkpoints to {folder}.")
