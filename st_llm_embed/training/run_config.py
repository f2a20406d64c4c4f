"""The configuration of a run, checked whole: its keys, its model, its stages and their arguments, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

from peft import LoraConfig
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_llm_embed.losses import PretextLoss
from st_llm_embed.model import LORA_ARGUMENTS, build_model
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.recipes import RECIPES
from st_llm_embed.training.configuration import checked, declared
from st_llm_embed.training.stage_data import PRETEXT, naming
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

KEYS = {"output": str, "model": dict, "start": str, "data": dict, "stages": list, "arguments": dict, "seed": int}
STAGE_KEYS = {
    "name": str,
    "data": list,
    "eval_data": list,
    "early_stopping_patience": int,
    "arguments": dict,
    "loss": dict,
}
ARGUMENTS = declared(LLMEmbedTrainingArguments)
PRETEXT_LOSS = {name: kind for name, kind in declared(PretextLoss).items() if name != "model"}
PRETEXT_LOSS["lm_head"] = Literal["base"]
MATRYOSHKA = {name: kind for name, kind in declared(MatryoshkaLoss).items() if name not in ("model", "loss")}
LORA = {name: kind for name, kind in declared(LoraConfig).items() if name in LORA_ARGUMENTS}
SET_HERE = ("output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: the name of the stage, and of its folder.
        data: the names of its data sets in the configuration; one of ``consecutive_texts`` makes it a pretext stage.
        arguments: arguments of ``LLMEmbedTrainingArguments``, over those of the configuration.
        loss: in a pretext stage arguments of ``PretextLoss``, of which ``lm_head: base`` takes the LM head of the base
            whose head is not tied to its embeddings. Else those of sentence-transformers' ``MatryoshkaLoss`` around
            the contrastive loss: ``matryoshka_dims``, ...
        eval_data: the names of the data sets to evaluate on, as ``eval_strategy`` and ``eval_steps`` say.
        early_stopping_patience: the number of evaluations without a better loss after which the stage ends.
    """

    name: str
    data: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    eval_data: list[str] = field(default_factory=list)
    early_stopping_patience: int | None = None


def read_settings(configuration: Any) -> tuple[dict[str, Any], list[Stage]]:
    """The configuration with its defaults, and its stages.

    Raises:
        ValueError: naming the part that is missing, unknown, of another type, or impossible, and the valid ones.
    """
    settings = checked("The configuration", configuration, KEYS, ("output", "model", "data", "stages"))
    settings = {"arguments": {}, "seed": 0, **settings}
    settings["model"] = check_model(settings["model"])
    settings["arguments"] = _check_arguments("The configuration", settings["arguments"])
    settings["data"] = {str(name): data_settings for name, data_settings in settings["data"].items()}
    for name, data_settings in settings["data"].items():
        if not isinstance(data_settings, Mapping):
            raise ValueError(
                f"Data set {name!r} is {data_settings!r}. It takes read, a builder's name, and that builder's "
                f"arguments: {{{name}: {{read: from_beir, folder: ...}}}}."
            )
    if not settings["stages"]:
        raise ValueError("The configuration has no stages.")
    stages = [_read_stage(number, entry, settings["data"]) for number, entry in enumerate(settings["stages"], 1)]
    return settings, stages


def check_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``build_model``, with numbers in place of their text.

    Raises:
        ValueError: for a name that neither it nor the backbone nor the recipe's pooling takes, or a value of another
            type.
    """
    recipe = RECIPES.get(str(settings.get("recipe", "nv-embed")))
    kinds = declared(build_model, LLMBackbone, Transformer, *([recipe.pooling] if recipe else []))
    set_by_build_model = ("model_name_or_path", "embedding_dimension")
    kinds = {name: kind for name, kind in kinds.items() if name not in set_by_build_model}
    settings = checked("The model", settings, kinds, ["base"], open_ended=recipe is None)
    if isinstance(settings.get("lora"), Mapping):
        settings["lora"] = checked("The model's lora", settings["lora"], LORA)
    return settings


def _read_stage(number: int, entry: Any, data: Mapping[str, Mapping[str, Any]]) -> Stage:
    """One stage.

    Args:
        number: its place among the stages, from 1.
        entry: what the configuration says of it.
        data: the settings of each data set.
    """
    stage = Stage(**checked(f"Stage {number}", entry, STAGE_KEYS, ("name", "data")))
    names, eval_names = [str(name) for name in stage.data], [str(name) for name in stage.eval_data]
    absent = [name for name in (*stage.data, *stage.eval_data) if str(name) not in data]
    if absent or not names:
        fault = f"the data sets {absent}" if absent else "no data set"
        raise ValueError(f"Stage {stage.name!r} names {fault}. Known: {sorted(data)}.")
    if any(kind(stage.name).name != stage.name for kind in (PurePosixPath, PureWindowsPath)):
        raise ValueError(f"Stage {number} has name={stage.name!r}. It names a folder: no slashes, not empty.")
    place = f"Stage {stage.name!r}"
    pretext = [name for name in names if data[name].get("read") == PRETEXT]
    if pretext and len(names) > 1:
        raise ValueError(f"{place} has pretext rows beside others: {names}. Give them one stage each.")
    other_kind = any(bool(pretext) != (data[name].get("read") == PRETEXT) for name in eval_names)
    if other_kind or (pretext and len(eval_names) > 1):
        raise ValueError(f"{place} has eval_data {eval_names} of another kind than its data {names}.")
    if misplaced := sorted(stage.loss.keys() & (MATRYOSHKA if pretext else PRETEXT_LOSS).keys()):
        reason = "MatryoshkaLoss, and its data are" if pretext else "PretextLoss, and has no data"
        raise ValueError(f"{place}'s loss has {', '.join(misplaced)}, of {reason} of {PRETEXT}. Leave it out.")
    loss = checked(f"{place}'s loss", stage.loss, PRETEXT_LOSS if pretext else MATRYOSHKA)
    if loss and not pretext:
        _check_matryoshka(place, loss)
    arguments = _check_arguments(place, stage.arguments)
    if len(set(names)) < len(names) or len(set(eval_names)) < len(eval_names):
        raise ValueError(f"{place} names a data set twice: {[*names, *eval_names]}.")
    if stage.early_stopping_patience is not None and not (eval_names and stage.early_stopping_patience > 0):
        raise ValueError(
            f"{place} has early_stopping_patience={stage.early_stopping_patience} and eval_data={eval_names}. It "
            "takes a number of evaluations, 1 or more, of eval_data to stop by."
        )
    return replace(stage, data=names, eval_data=eval_names, arguments=arguments, loss=loss)


def _check_matryoshka(place: str, loss: Mapping[str, Any]) -> None:
    dims, weights = loss.get("matryoshka_dims"), loss.get("matryoshka_weights")
    if not isinstance(dims, list) or not dims or not all(type(dim) is int and dim > 0 for dim in dims):
        raise ValueError(f"{place}'s loss has matryoshka_dims={dims!r}. It takes widths, such as [768, 256, 64].")
    numbers = isinstance(weights, list) and all(type(weight) in (int, float) and weight > 0 for weight in weights)
    if weights is not None and not (numbers and len(weights) == len(dims)):
        raise ValueError(f"{place}'s loss has matryoshka_weights={weights!r}. It takes a number for each width.")


def _check_arguments(place: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if refused := [name for name in SET_HERE if name in arguments]:
        raise ValueError(
            f"{place} has the argument {refused[0]!r}, which follows from the output's folder. Leave it out."
        )
    return checked(f"{place}'s arguments", arguments, ARGUMENTS)


def stage_arguments(stages: list[Stage], data: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The training arguments of each stage: its own, and those of the configuration that are not for others only.

    Args:
        stages: the stages.
        data: each data set, as ``read_data`` gives it.
        settings: the configuration, with its ``seed`` and ``arguments``.

    Raises:
        ValueError: naming the stage whose arguments cannot be, or have no effect.
    """
    shared = {"report_to": [], "seed": settings["seed"], **settings["arguments"]}
    merged = [{**_best_model(stage, data), **shared, **stage.arguments} for stage in stages]
    tasks = [[part[1] for part in map(data.get, stage.data) if isinstance(part, tuple)] or None for stage in stages]
    idle = []
    for stage, arguments, stage_tasks in zip(stages, merged, tasks, strict=True):
        with naming(f"Stage {stage.name!r}"):
            idle.append(LLMEmbedTrainingArguments("unused", **arguments).idle(stage_tasks, False))
    for stage, arguments, stage_tasks, without_effect in zip(stages, merged, tasks, idle, strict=True):
        for name in set(without_effect) & set(arguments) - set(stage.arguments):
            if not all(name in others for others in idle):
                del arguments[name]
        with naming(f"Stage {stage.name!r}"):
            args = LLMEmbedTrainingArguments("unused", **arguments)
            args.check_effect(stage_tasks, False)
            if bool(stage.eval_data) != (args.eval_strategy != "no"):
                raise ValueError(
                    f"eval_data={stage.eval_data} and eval_strategy={args.eval_strategy.value!r} do not go together. "
                    "Set both, such as eval_strategy: steps and eval_steps: 100, or neither."
                )
            metrics = [_eval_loss(name, data) for name in stage.eval_data]
            if metrics and f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" not in metrics:
                raise ValueError(
                    f"metric_for_best_model={args.metric_for_best_model!r} is not measured. There are: "
                    f"{', '.join(metrics)}."
                )
    return merged


def _best_model(stage: Stage, data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by which the best model is told: its loss on the first of ``eval_data``."""
    if not stage.eval_data:
        return {}
    best: dict[str, Any] = {"metric_for_best_model": _eval_loss(stage.eval_data[0], data)}
    if stage.early_stopping_patience is not None:
        best["load_best_model_at_end"] = True
        best["restore_callback_states_from_checkpoint"] = True  # a resumed run counts on
    return best


def _eval_loss(name: str, data: Mapping[str, Any]) -> str:
    """The host's name of the loss on a data set: with tasks, data sets come by name."""
    return f"eval_{name}_loss" if isinstance(data[name], tuple) else "eval_loss"
