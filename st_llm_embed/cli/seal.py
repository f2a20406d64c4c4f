"""Write a model as a folder that loads without this package.

Load a folder that the trainer or save_pretrained wrote, write it with all that it needs, and compare its vectors in a
fresh process: what publish does before it uploads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import NEW_FOLDER, add_card, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="the folder of the model")
    parser.add_argument("output", help=NEW_FOLDER)
    add_card(parser)
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.files import check_empty
    from st_llm_embed.hub import save_sealed
    from st_llm_embed.hub.card import state_card
    from st_llm_embed.hub.teacher import teacher_of
    from st_llm_embed.trust import load_any

    check_empty(Path(arguments.output).resolve())
    model = load_any(arguments.source, arguments.trust_remote_code)
    state_card(model, arguments.name, arguments.license)
    teacher = teacher_of(Path(arguments.source))
    print(f"Wrote {save_sealed(model, arguments.output, samples=arguments.samples, teacher=teacher)}.")
