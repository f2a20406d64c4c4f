"""A run that goes on with another configuration: what changed is named, and what is done already must stay true.

More stages, other intervals, a smaller batch of the stage that is under way: all that may be. Not so what a finished
stage was trained with, and what the weights and the optimizer of one that is under way go on from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from st_llm_embed.training.configuration import Given
from st_llm_embed.training.run_config import ARGUMENTS, LOSS, MODELS, READS, TEACH, RunConfig, read_run
from st_llm_embed.training.run_folder import TOKENS, without_tokens
from st_llm_embed.training.schema import Part

# Arguments of training that leave the weights as they are.
HARMLESS = (
    "logging_",
    "log_",
    "save_",
    "report_to",
    "disable_tqdm",
    "dataloader_num",
    "dataloader_pin",
    "hub_",
    "run_name",
)
# Those that a stage may go on with from its checkpoint.
BETWEEN = (
    *("per_device_", "gradient_accumulation_steps", "mini_batch_size", "max_steps", "num_train_epochs", "eval_steps"),
    "gradient_checkpointing",
)
EVALUATION = ("eval_data", "eval_tasks", "eval_split", "early_stopping_patience")


def find_changes(given: Given, config: RunConfig, output: Path, before: Any) -> list[str]:
    """What changed, of a run that may go on with a configuration.

    Args:
        given: the configuration as it was given.
        config: the configuration.
        output: the folder of the run.
        before: the configuration that the run has had, as YAML reads it.

    Raises:
        ValueError: naming each change that would make what is done untrue.
    """
    try:
        earlier = read_run(Given(before, given.file))
    except ValueError as error:
        raise ValueError(
            f"{output} holds a run of another configuration, which cannot be read ({error}). Choose another output."
        ) from error
    folders = {stage.name: output / f"{number}-{stage.name}" for number, stage in enumerate(earlier.stages, 1)}
    done = [name for name, folder in folders.items() if (folder / "model").is_dir()]
    begun = [name for name, folder in folders.items() if name in done or any(folder.glob("checkpoint-*"))]
    names_before = [*folders][: max([[*folders].index(name) + 1 for name in begun], default=0)]
    names = [stage.name for stage in config.stages[: len(names_before)]]
    changes, faults = [], []
    if names != names_before:
        faults.append(f"stages began with {', '.join(names_before)}, and begin now with {', '.join(names) or 'none'}")
    of_begun = {
        name for stage in earlier.stages if stage.name in names_before for name in stage.data + stage.eval_data
    }
    old, new = _flat(earlier), _flat(config)
    common = {path[:2] for path in old} & {path[:2] for path in new}
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) == new.get(path):
            continue
        change = f"{'.'.join(path)} was {old.get(path)!r} and is {new.get(path)!r}"
        if names_before and _matters(path, done, names_before, of_begun):
            faults.append(change)
        elif path[:2] in common:
            changes.append(change)
        elif f"{'.'.join(path[:2])} is new" not in changes and path in new:
            changes.append(f"{'.'.join(path[:2])} is new")
    if faults:
        raise ValueError(
            f"{output} holds a run of another configuration: {'; '.join(faults)}. That is done already. Set it back, "
            "or choose another output."
        )
    return changes


def _matters(path: tuple[str, ...], done: list[str], touched: list[str], of_touched: set[str]) -> bool:
    """Whether a change at a path makes what is done untrue."""
    match path:
        case ("stages", name, "arguments", argument):
            return name in touched and not argument.startswith(HARMLESS if name in done else (*HARMLESS, *BETWEEN))
        case ("stages", name, *_):
            return name in touched
        case ("data", name, *_):
            return name in of_touched
        case (key, *_):
            return key == "seed"
    return True


def _flat(config: RunConfig) -> dict[tuple[str, ...], Any]:
    """What a configuration says besides the defaults, by path; of each stage all that holds in it."""
    flat: dict[tuple[str, ...], Any] = {("seed",): config.seed, ("name",): config.name}
    flat |= {("seal",): config.seal, ("evaluate",): config.evaluate}
    for name, settings in config.data.items():
        flat |= _said(("data", name), settings, READS[settings["read"]])
    for stage in config.stages:
        place, model = ("stages", stage.name), config.model_of(stage)
        flat |= _said((*place, "arguments"), {**config.arguments, **stage.arguments}, ARGUMENTS)
        flat |= _said((*place, "model"), model, model_kind(model))
        flat |= _said((*place, "loss"), stage.loss, LOSS)
        flat |= _said((*place, "teach"), asdict(stage.teach), TEACH) if stage.teach else {}
        flat |= {(*place, key): getattr(stage, key) for key in ("data", *EVALUATION)}
    return flat


def _said(place: tuple[str, ...], settings: Mapping[str, Any], kind: type[Part]) -> dict[tuple[str, ...], Any]:
    """What settings say, by path, a path of a file in one spelling."""
    return {
        (*place, key): str(Path(value).resolve()) if isinstance(value, str) and os.path.exists(value) else value
        for key, value in said(settings, kind).items()
    }


def said(settings: Mapping[str, Any], kind: type[Part]) -> dict[str, Any]:
    """The settings of a part that are not at their defaults, without tokens."""
    fields = kind.model_fields
    return {
        key: without_tokens(value)
        for key, value in settings.items()
        if key not in TOKENS and (key not in fields or value != fields[key].default)
    }


def model_kind(model: Mapping[str, Any]) -> type[Part]:
    """The part that a model's settings are of."""
    return MODELS["load" if "load" in model else model.get("recipe", "nv-embed")]
