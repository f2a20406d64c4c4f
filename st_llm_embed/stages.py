"""A whole training run as one configuration: pretext, stage 1, stage 2, in any order, each begun where the last ended.

    output: runs/nv-embed
    model: {base: HuggingFaceTB/SmolLM2-135M, recipe: nv-embed, lora: true, max_seq_length: 256}
    arguments: {per_device_train_batch_size: 64, learning_rate: 2.0e-5}
    data:
      wikipedia: {read: consecutive_texts, documents: wikipedia.jsonl.gz, split: sentences}
      scifact: {read: from_beir, folder: scifact}
      moods: {read: from_class_examples, source: moods.jsonl, instruction: Tell the mood, kind: classification}
    stages:
      - {name: pretext, data: [wikipedia], arguments: {max_steps: 1000}}
      - {name: retrieval, data: [scifact], arguments: {stage: 1, num_train_epochs: 1}}
      - {name: blended, data: [scifact, moods], arguments: {stage: 2, num_train_epochs: 1}}

A data set names its builder in ``st_llm_embed.data`` and that builder's arguments; beside them the settings of its
``Task``, unless ``known_task`` knows its name. ``start: FOLDER`` goes on from the weights of a model that such a run
left, of the same ``model``, and runs that folder's code. Each stage leaves ``output/NUMBER-NAME/model``. A run that
was killed is started again with the same configuration: finished stages are kept, and the one in between goes on from
its last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from sentence_transformers import SentenceTransformer
from transformers import set_seed

from st_llm_embed.card import record_training
from st_llm_embed.data import (
    check_pretext_columns,
    consecutive_texts,
    from_beir,
    from_class_examples,
    from_class_labels,
    from_columns,
    from_judged_queries,
    from_ms_marco,
    from_ms_marco_triples,
    from_nli,
    from_parallel_text,
    from_sts,
    paragraphs,
    sentences,
    windows,
)
from st_llm_embed.data.sources import load_rows
from st_llm_embed.hub import written_beside
from st_llm_embed.losses import PretextLoss
from st_llm_embed.model import build_model
from st_llm_embed.quantized import load_saved
from st_llm_embed.tasks import Task, known_task
from st_llm_embed.trainer import LLMEmbedTrainer
from st_llm_embed.training_args import LLMEmbedTrainingArguments

READERS: dict[str, Callable[..., Any]] = {
    reader.__name__: reader
    for reader in (
        from_beir,
        from_class_examples,
        from_class_labels,
        from_columns,
        from_judged_queries,
        from_ms_marco,
        from_ms_marco_triples,
        from_nli,
        from_parallel_text,
        from_sts,
        load_dataset,
        load_from_disk,
    )
}
PRETEXT = consecutive_texts.__name__
TASK_SETTINGS = {field.name for field in fields(Task)} - {"name", "negatives"}
KEYS = {"output": str, "model": dict, "start": str, "data": dict, "stages": list, "arguments": dict, "seed": int}
STAGE_KEYS = {"name": str, "data": list, "arguments": dict, "loss": dict}


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: of its folder.
        data: names of the configuration's data sets; one of ``consecutive_texts`` makes it a pretext stage.
        arguments: of ``LLMEmbedTrainingArguments``, over those of the configuration.
        loss: of ``PretextLoss``, in a pretext stage.
    """

    name: str
    data: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)


def train_stages(config: str | Path | Mapping[str, Any]) -> Path:
    """Run all stages, or what is left of them.

    Args:
        config: the configuration, or the path of a YAML file with it.

    Returns:
        The folder of the last stage's model, for ``SentenceTransformer(folder, trust_remote_code=True)``.

    Raises:
        ValueError: for a configuration that says something unknown, or whose output belongs to another one; all data
            sets are read and checked before the first step.
    """
    settings = yaml.safe_load(Path(config).read_text(encoding="utf-8")) if isinstance(config, str | Path) else config
    stages = _read_stages(settings)
    start = last = _read_start(settings.get("start"))
    output = Path(settings["output"])
    data = {name: _read_data(name, dict(how)) for name, how in settings["data"].items() if _is_used(name, stages)}
    if int(os.environ.get("RANK", 0)) == 0:
        _claim(output, settings)
    seed = settings.get("seed", 0)
    arguments = _arguments(stages, data, {"report_to": [], "seed": seed, **settings.get("arguments", {})})
    model, done = None, []
    for number, stage in enumerate(stages, 1):
        done.append(_card_row(stage, data, settings.get("arguments", {})))
        folder = output / f"{number}-{stage.name}"
        if not (folder / "model").is_dir():
            if model is None:
                set_seed(seed)
                model = _begin(settings["model"], last)
            set_seed(seed + number)  # adapters' dropout, and nothing else, depends on it
            trainer = _trainer(stage, model, data, LLMEmbedTrainingArguments(str(folder), **arguments[number - 1]))
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
            with trainer.whole_model() as whole:
                if trainer.is_world_process_zero():
                    with written_beside(folder / "model") as staged:
                        whole.save_pretrained(str(staged))
                        record_training(staged / "README.md", done, start and start / "README.md")
            trainer.accelerator.wait_for_everyone()
            if trainer.is_fsdp_enabled:
                model = None  # it stays in shards, and the next stage shards anew
        last = folder / "model"
    return last


def _read_stages(settings: Mapping[str, Any]) -> list[Stage]:
    _check_settings("The configuration", settings, KEYS, ("output", "model", "data", "stages"))
    for name, how in settings["data"].items():
        if not isinstance(how, Mapping):
            raise ValueError(
                f"Data set {name!r} is {how!r}. It takes read, a builder's name, and that builder's arguments: "
                f"{{{name}: {{read: from_beir, folder: ...}}}}."
            )
    stages = []
    for number, entry in enumerate(settings["stages"], 1):
        _check_settings(f"Stage {number}", entry, STAGE_KEYS, ("name", "data"))
        stage = Stage(**entry)
        absent = [name for name in stage.data if name not in list(settings["data"])]
        if absent or not stage.data:
            wrong = f"the data sets {absent}" if absent else "no data set"
            raise ValueError(f"Stage {stage.name!r} names {wrong}. Known: {sorted(settings['data'])}.")
        stages.append(stage)
    return stages


def _read_start(folder: str | None) -> Path | None:
    """The model to go on from."""
    if folder is None:
        return None
    if not (Path(folder) / "modules.json").is_file():
        raise ValueError(f"start={folder!r} is no model. It takes one that a run left, such as OUTPUT/1-NAME/model.")
    return Path(folder)


def _check_settings(what: str, found: Any, kinds: Mapping[str, type], needed: Collection[str]) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} is {found!r}, no mapping. It takes {_described(kinds)}; see st_llm_embed.stages.")
    wrong = [key for key, value in found.items() if not isinstance(value, kinds.get(key, ()))]
    missing = [key for key in needed if key not in found]
    if wrong or missing:
        raise ValueError(
            f"{what} lacks {missing}, and has unknown or misshapen {wrong}. It takes {_described(kinds)}; see "
            "st_llm_embed.stages."
        )


def _described(kinds: Mapping[str, type]) -> str:
    return ", ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())


def _claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the output this configuration's."""
    file, text = output / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=True)
    if file.is_file():
        if file.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{output} holds a run of another configuration ({file}). Choose another output, or remove that one."
            )
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds something that is no run of this command. Choose another output.")
    else:
        with written_beside(file) as staged:
            staged.write_text(text, encoding="utf-8")


def _is_used(name: str, stages: list[Stage]) -> bool:
    return any(name in stage.data for stage in stages)


def _read_data(name: str, how: dict[str, Any]) -> Dataset | IterableDataset | tuple[Dataset, Task]:
    """Pretext rows, or a task's rows and the task."""
    reader = how.pop("read", None)
    if reader == PRETEXT:
        documents = load_rows(how.pop("documents"), streaming=True)
        rows = consecutive_texts(documents, _split(how.pop("split", None)), **how)
        check_pretext_columns(rows, name)
        return rows
    if reader not in READERS:
        raise ValueError(
            f"Data set {name!r} has read={reader!r}. Valid: {', '.join([PRETEXT, *READERS])}, of st_llm_embed.data "
            "and of datasets."
        )
    of_task = {key: how.pop(key) for key in TASK_SETTINGS & set(how)}
    task = Task(name, **of_task) if "instruction" in of_task else replace(known_task(name), **of_task)
    return READERS[reader](**how), task


def _split(name: str | int | None) -> Callable[[str], list[str]]:
    """``paragraphs``, ``sentences``, or windows of so many characters."""
    if isinstance(name, int):
        return windows(name)
    known = {None: paragraphs, "paragraphs": paragraphs, "sentences": sentences}
    if name not in known:
        raise ValueError(f"split={name!r} is unknown. Valid: paragraphs, sentences, or a number of characters.")
    return known[name]


def _arguments(stages: list[Stage], data: Mapping[str, Any], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each stage: its own arguments, and those of the shared ones that are not for other stages only."""
    merged = [{**shared, **stage.arguments} for stage in stages]
    tasks = [[of[1] for of in map(data.get, stage.data) if isinstance(of, tuple)] or None for stage in stages]
    idle = [LLMEmbedTrainingArguments("unused", **own).idle(of, False) for own, of in zip(merged, tasks, strict=True)]
    for stage, own, of, without_effect in zip(stages, merged, tasks, idle, strict=True):
        for name in set(without_effect) & set(own) - set(stage.arguments):
            if not all(name in others for others in idle):
                del own[name]
        LLMEmbedTrainingArguments("unused", **own).demand_effect(of, False)
    return merged


def _trainer(
    stage: Stage, model: SentenceTransformer, data: Mapping[str, Any], args: LLMEmbedTrainingArguments
) -> LLMEmbedTrainer:
    chosen = {name: data[name] for name in stage.data}
    if all(isinstance(of, tuple) for of in chosen.values()):
        rows = {name: of for name, (of, _) in chosen.items()}
        return LLMEmbedTrainer(model, args, rows, tasks=[task for _, task in chosen.values()])
    if len(chosen) > 1:
        raise ValueError(
            f"Stage {stage.name!r} has pretext rows beside others: {stage.data}. Give them one stage each."
        )
    return LLMEmbedTrainer(model, args, *chosen.values(), loss=PretextLoss(model, **stage.loss))


def _card_row(stage: Stage, data: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """A stage in the table of the model card."""
    sizes = {}
    for name in stage.data:
        rows = data[name][0] if isinstance(data[name], tuple) else data[name]
        sizes[name] = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream"
    kind = stage.arguments.get("stage", 1) if isinstance(data[stage.data[0]], tuple) else "pretext (EBAE + EBAR)"
    settings = {key: value for key, value in {**arguments, **stage.arguments}.items() if key != "stage"}
    return {
        "": stage.name,
        "stage": str(kind),
        "data": ", ".join(f"{name} ({size})" for name, size in sizes.items()),
        "arguments": ", ".join(f"`{key}={value!r}`" for key, value in settings.items()),
    }


def _begin(settings: Mapping[str, Any], last: Path | None) -> SentenceTransformer:
    """The model that is to be trained, with the weights and prompts of the last stage."""
    model = build_model(**settings)
    if last is not None:
        load_saved(model, last)
    return model


def _last_checkpoint(folder: Path) -> str | None:
    """The newest one that was written to its end: the trainer's state comes last."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], str(state.parent)))
        except json.JSONDecodeError:  # killed while writing it
            continue
    return max(whole)[1] if whole else None
