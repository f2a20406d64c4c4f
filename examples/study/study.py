"""What all scripts of the study know: ``study.yaml``, and where its data and its results are."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

STUDY = yaml.safe_load(Path(__file__).with_name("study.yaml").read_text(encoding="utf-8"))


def parser_of(script: str | None) -> argparse.ArgumentParser:
    """The command line of a script with this docstring, whose settings all scripts but the report take."""
    parser = argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--size", default="cpu", choices=STUDY["sizes"], help="of study.yaml (default: %(default)s)")
    return parser
