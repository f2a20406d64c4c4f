"""Hold queries of a table back, for development and test.

Write a table of pairs as a retrieval set in BEIR's layout, whose splits train, dev and test have different queries:
what from_beir trains on and evaluate takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import NEW_FOLDER, ROWS, add_columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help=f"the rows: {ROWS}, with the columns anchor and positive, and perhaps title")
    parser.add_argument("output", help=NEW_FOLDER)
    add_columns(parser, "--columns", "the rows, such as anchor=question positive=answer")
    parser.add_argument(
        "--dev",
        type=float,
        default=0.1,
        help="the share of the queries held back for development (default: %(default)s)",
    )
    parser.add_argument(
        "--test", type=float, default=0.1, help="the share of the queries held back for test (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of the draw (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.data import load_rows, write_beir_splits
    from st_llm_embed.files import check_empty

    check_empty(Path(arguments.output).resolve())
    rows = load_rows(arguments.data, columns=dict(arguments.columns))
    shares = {name: getattr(arguments, name) for name in ("dev", "test", "seed")}
    counts = write_beir_splits(rows, arguments.output, **shares)
    print(f"Wrote {arguments.output}: {', '.join(f'{count} queries to {name}' for name, count in counts.items())}.")
