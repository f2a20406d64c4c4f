"""Train a model in stages, as a YAML file says.

Run the stages of a configuration (pretext, retrieval, blended, in any order), saving after each and going on where a
killed run stopped. Several processes: accelerate launch -m st_llm_embed train CONFIG.

The format of CONFIG is in the README.md of the package's folder training, and in help(st_llm_embed.training.stages).
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the YAML file of the configuration")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PATH=VALUE",
        help="values in place of the file's, such as model.num_layers=6 stages.blended.arguments.max_steps=10",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and train nothing")


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.training import train_stages
    from st_llm_embed.training.configuration import read_assignments

    assignments = read_assignments(arguments.set)
    if arguments.dry_run:
        from st_llm_embed.training.plan import describe_run

        print(describe_run(arguments.config, assignments))
    else:
        print(f"Wrote {train_stages(arguments.config, assignments)}.")
