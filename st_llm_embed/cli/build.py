"""Build an untrained model from an LLM and a recipe.

Write the model that training would begin with, prompts included, as a folder that loads without this package: to
evaluate it before training, or to train it by code of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from st_llm_embed.cli.shared import NEW_FOLDER, add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        help="the Hub id, folder or .gguf file of a decoder-only LLM; or the YAML file of a run, for the model that "
        "it begins with, under the prompts of all its tasks",
    )
    parser.add_argument("output", help=NEW_FOLDER)
    parser.add_argument("--recipe", default="nv-embed", help="the name of the recipe (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="add the LoRA of the recipe's paper")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of build_model, of the backbone and of the pooling, such as num_layers=6 max_seq_length=256",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="the names of public data sets whose prompts the model gets"
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> None:
    from st_llm_embed.files import check_empty
    from st_llm_embed.hub import save_sealed
    from st_llm_embed.model import build_model
    from st_llm_embed.tasks import encoding_prompts, known_task
    from st_llm_embed.training.configuration import read_assignments
    from st_llm_embed.training.run_config import check_model
    from st_llm_embed.training.start import begin_run

    check_empty(Path(arguments.output).resolve())
    if Path(arguments.base).suffix in (".yaml", ".yml"):
        if given := [f"--{name}" for name in ("lora", "tasks") if getattr(arguments, name)]:
            raise ValueError(f"{arguments.base} says what {', '.join(given)} would say. Leave that out.")
        model = begin_run(arguments.base, read_assignments(arguments.set))
        print(f"Wrote {save_sealed(model, arguments.output)}.")
        return
    settings = {"base": arguments.base, "recipe": arguments.recipe, "lora": arguments.lora}
    settings = check_model({**settings, **read_assignments(arguments.set)})
    if arguments.trust_remote_code:
        settings["model_kwargs"] = {**settings.get("model_kwargs", {}), "trust_remote_code": True}
    tasks = [known_task(name) for name in arguments.tasks]
    model = build_model(**settings)
    model.prompts.update(encoding_prompts(tasks, model.prompts, model.default_prompt_name))
    print(f"Wrote {save_sealed(model, arguments.output)}.")
