"""What several commands say alike."""

from __future__ import annotations

import argparse
import sys

NEW_FOLDER = "the folder to write; it must not exist, or be empty"
MODEL = "the folder or Hub id of a sentence-transformers model"
ROWS = "a JSON, CSV, TSV or Parquet file, a folder that save_to_disk wrote, or a Hub id (its split train)"


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The flag of consent to a model's own code."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model's own code; without it, code that this package does not ship is listed and refused",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """The number of texts encoded at once."""
    parser.add_argument(
        "--batch-size", type=int, default=32, help="the number of texts encoded at once (default: %(default)s)"
    )


def add_tokens_per_batch(parser: argparse.ArgumentParser) -> None:
    """The number of tokens encoded at once."""
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        help="the number of tokens encoded at once, padding included (default: 2,048 on a CPU, 32,768 elsewhere)",
    )


def add_card(parser: argparse.ArgumentParser) -> None:
    """What a model's card says."""
    parser.add_argument("--name", help="the name of the model, the title of its card")
    parser.add_argument("--license", help="the licence of the model, such as apache-2.0 (default: its base's)")
    parser.add_argument("--samples", action="store_true", help="leave rows of the training data in the card")


def add_columns(parser: argparse.ArgumentParser, flag: str, of: str) -> None:
    """What columns are called in a file."""
    parser.add_argument(
        flag,
        nargs="+",
        type=_renaming,
        default=[],
        metavar="OURS=THEIRS",
        help=f"what the columns are called in {of}",
    )


def _renaming(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} renames no column. Write OURS=THEIRS, such as anchor=question.")
    return ours, theirs


def add_revision(parser: argparse.ArgumentParser) -> None:
    """The revision of a Hub repository."""
    parser.add_argument("--revision", help="the branch, tag or commit of the Hub repository (default: main)")


def shows_progress() -> bool:
    """Whether standard error is a terminal. If not, it is a log: the bars of the host libraries are off, too."""
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        datasets.disable_progress_bars()
        logging.disable_progress_bar()  # and huggingface_hub's
        return False
    return True
