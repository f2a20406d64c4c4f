"""Put a model on the Hugging Face Hub, checked before.

Load a model folder, seal it, check it in a fresh process without this package, and upload it. Log in before with `hf
auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import add_card, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the folder that the trainer, save_pretrained or this package wrote")
    parser.add_argument("repo_id", help="the repository on the Hub, organisation/name")
    parser.add_argument(
        "--adapter", choices=["merge", "only"], help="what to do with a LoRA adapter: fold it in, or publish it alone"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--exist-ok", action="store_true", help="replace what the repository holds")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--revision", help="the branch to commit to (default: main)")
    add_card(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.encoding.ranges import RANGES
    from st_llm_embed.hub import publish
    from st_llm_embed.hub.card import state_card
    from st_llm_embed.hub.teacher import teacher_of
    from st_llm_embed.trust import load_any

    model = load_any(arguments.folder, arguments.trust_remote_code)
    state_card(model, arguments.name, arguments.license)
    names = ("adapter", "private", "exist_ok", "create_pr", "revision", "samples")
    options = {name: getattr(arguments, name) for name in names}
    folder = Path(arguments.folder)
    ranges = folder / RANGES if (folder / RANGES).is_file() else None
    url = publish(model, arguments.repo_id, **options, teacher=teacher_of(folder), ranges=ranges)
    print(f"Published: {url}")
