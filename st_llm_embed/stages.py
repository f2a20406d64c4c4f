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
left, of the same ``model``; no code of that folder runs. Each stage leaves ``output/NUMBER-NAME/model``. A run that
was killed is started again with the same configuration: finished stages are kept, and the one in between goes on from
its last checkpoint.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from filelock import FileLock, Timeout
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.modules import Transformer
from transformers import set_seed

from st_llm_embed.card import record_training
from st_llm_embed.configuration import checked, declared, read_yaml, required
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
from st_llm_embed.hub import demand_room, demand_writable, find_damaged, size_of, written_beside
from st_llm_embed.hub.trust import demand_data
from st_llm_embed.losses import PretextLoss
from st_llm_embed.model import RECIPES, build_model
from st_llm_embed.modules import LLMBackbone
from st_llm_embed.tasks import Task, known_task
from st_llm_embed.trainer import LLMEmbedTrainer, load_saved
from st_llm_embed.training_args import OF_TASKS, LLMEmbedTrainingArguments

logger = logging.getLogger(__name__)
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
TASK_KINDS = {name: kind for name, kind in declared(Task).items() if name not in ("name", "negatives")}
KEYS = {"output": str, "model": dict, "start": str, "data": dict, "stages": list, "arguments": dict, "seed": int}
STAGE_KEYS = {"name": str, "data": list, "arguments": dict, "loss": dict}
ARGUMENTS = declared(LLMEmbedTrainingArguments)
LOSS_ARGUMENTS = {name: kind for name, kind in declared(PretextLoss).items() if name not in ("model", "lm_head")}
SET_HERE = ("output_dir", "resume_from_checkpoint")
SHOWN = (  # in cards
    *(name for name in OF_TASKS if name != "stage"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "lr_scheduler_type", "optim", "seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_checkpointing"),
)
TOKENS = ("hub_token", "push_to_hub_token", "token", "use_auth_token")
LOCK = ".lock"
WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")  # whole; FSDP's; DeepSpeed's
WAIT = 10  # seconds; the workers of a killed run outlive it by half of that, and hold its lock


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
        ValueError: for a configuration that says something unknown or impossible, before the first step of any stage
            and before the output is this configuration's: all data sets are read and checked, and every stage's
            trainer is made once. Also if the output belongs to another configuration, or files in it are damaged.
        OSError: if the output cannot be written, or its disk has no room for the model.
        RuntimeError: if another process runs in the output.
    """
    given = read_yaml(Path(config)) if isinstance(config, str | Path) else config
    settings, stages = _read_settings(given)
    start = _read_start(settings.get("start"))
    output = Path(settings["output"])
    folders = [output / f"{number}-{stage.name}" for number, stage in enumerate(stages, 1)]
    text = yaml.safe_dump(_without_tokens(given), sort_keys=True)
    first_process = int(os.environ.get("RANK", 0)) == 0
    if first_process:
        _demand_ours(output, text)
        if (output / LOCK).is_file():  # refused at once, if it is held
            _lock(output).release()
    data = {name: _read_data(name, dict(how)) for name, how in settings["data"].items() if _is_used(name, stages)}
    arguments = _arguments(stages, data, settings)
    model, last, done = None, start, []
    for stage, own, folder in zip(stages, arguments, folders, strict=True):
        if (folder / "model").is_dir():
            _demand_whole(folder / "model")
            last = folder / "model"
            continue
        if model is None:
            set_seed(settings["seed"])
            model = _begin(settings["model"], last)
            demand_room(output, size_of(model))
        _rehearse(stage, model, data, own)
    with _claimed(output, text) if first_process else nullcontext():
        last = start
        for number, (stage, own, folder) in enumerate(zip(stages, arguments, folders, strict=True), 1):
            done.append(_card_row(stage, data, settings["arguments"]))
            if not (folder / "model").is_dir():
                model = model or _begin(settings["model"], last)
                set_seed(settings["seed"] + number)  # adapters' dropout, and nothing else, depends on it
                trainer = _trainer(stage, model, data, LLMEmbedTrainingArguments(str(folder), **own))
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


def _read_settings(given: Any) -> tuple[dict[str, Any], list[Stage]]:
    """The configuration with its defaults, and its stages."""
    settings = checked("The configuration", given, KEYS, ("output", "model", "data", "stages"))
    settings = {"arguments": {}, "seed": 0, **settings}
    recipe = RECIPES.get(str(settings["model"].get("recipe", "nv-embed")))
    kinds = declared(build_model, LLMBackbone, Transformer, *([recipe.pooling] if recipe else []))
    of_the_base = ("model_name_or_path", "embedding_dimension")
    kinds = {name: kind for name, kind in kinds.items() if name not in of_the_base}
    settings["model"] = checked("The model", settings["model"], kinds, ["base"], open_ended=recipe is None)
    settings["arguments"] = _check_arguments("The configuration", settings["arguments"])
    settings["data"] = {str(name): how for name, how in settings["data"].items()}
    for name, how in settings["data"].items():
        if not isinstance(how, Mapping):
            raise ValueError(
                f"Data set {name!r} is {how!r}. It takes read, a builder's name, and that builder's arguments: "
                f"{{{name}: {{read: from_beir, folder: ...}}}}."
            )
    if not settings["stages"]:
        raise ValueError("The configuration has no stages.")
    stages = []
    for number, entry in enumerate(settings["stages"], 1):
        stage = Stage(**checked(f"Stage {number}", entry, STAGE_KEYS, ("name", "data")))
        names = [str(name) for name in stage.data]
        absent = [name for name in stage.data if str(name) not in settings["data"]]
        if absent or not names:
            wrong = f"the data sets {absent}" if absent else "no data set"
            raise ValueError(f"Stage {stage.name!r} names {wrong}. Known: {sorted(settings['data'])}.")
        if any(kind(stage.name).name != stage.name for kind in (PurePosixPath, PureWindowsPath)):
            raise ValueError(f"Stage {number} has name={stage.name!r}. It names a folder: no slashes, not empty.")
        pretext = [name for name in names if settings["data"][name].get("read") == PRETEXT]
        if pretext and len(names) > 1:
            raise ValueError(
                f"Stage {stage.name!r} has pretext rows beside others: {names}. Give them one stage each."
            )
        if stage.loss and not pretext:
            raise ValueError(
                f"Stage {stage.name!r} has loss={stage.loss!r}, of PretextLoss, and no data set of {PRETEXT}. Leave "
                "it out: the contrastive loss takes its settings from the arguments."
            )
        what = f"Stage {stage.name!r}"
        loss = checked(f"{what}'s loss", stage.loss, LOSS_ARGUMENTS)
        stages.append(replace(stage, data=names, arguments=_check_arguments(what, stage.arguments), loss=loss))
    return settings, stages


def _check_arguments(of: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if own := [name for name in SET_HERE if name in arguments]:
        raise ValueError(f"{of} has the argument {own[0]!r}, which follows from the output's folder. Leave it out.")
    return checked(f"{of}'s arguments", arguments, ARGUMENTS)


def _read_start(folder: str | None) -> Path | None:
    """The model to go on from."""
    if folder is None:
        return None
    if not (Path(folder) / "modules.json").is_file():
        raise ValueError(f"start={folder!r} is no model. It takes one that a run left, such as OUTPUT/1-NAME/model.")
    demand_data(Path(folder))
    _demand_whole(Path(folder))
    return Path(folder)


def _demand_whole(folder: Path) -> None:
    if damaged := find_damaged(folder):
        raise ValueError(
            f"The model in {folder} is damaged: cut off or missing are {', '.join(damaged)}. Remove that folder; its "
            "stage then goes on from its last checkpoint."
        )


def _demand_ours(output: Path, text: str) -> None:
    """Check that the output can be written, and holds nothing, or this configuration's run, or one that never began:
    without a checkpoint nothing of it can be lost."""
    demand_writable(output)
    file = output / "config.yaml"
    if file.is_file():
        begun = any(output.glob("*-*/checkpoint-*")) or any(output.glob("*-*/model"))
        if begun and file.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{output} holds a run of another configuration ({file}). Choose another output, or remove that one."
            )
    elif output.is_dir() and any(entry.name != LOCK for entry in output.iterdir()):
        raise ValueError(f"{output} holds something that is no run of this command. Choose another output.")


@contextmanager
def _claimed(output: Path, text: str) -> Iterator[None]:
    """The output, as this configuration's, which no other process can run in meanwhile."""
    output.mkdir(parents=True, exist_ok=True)
    with _lock(output):
        _demand_ours(output, text)
        with written_beside(output / "config.yaml") as staged:
            staged.write_text(text, encoding="utf-8")
        yield


def _lock(output: Path) -> FileLock:
    """Take the operating system's lock on a file in ``output``: it ends with the process, however that ends.

    Raises:
        RuntimeError: if another process holds it.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        logger.warning("Another process is running in %s. Waiting %d s for its end.", output, WAIT)
    try:
        lock.acquire(timeout=WAIT)
    except Timeout as error:
        raise RuntimeError(
            f"Another process is running in {output}. Wait for its end, or choose another output."
        ) from error
    return lock


def _without_tokens(given: Any) -> Any:
    """The configuration as it is written beside its models: others may read it there."""
    if isinstance(given, Mapping):
        return {name: _without_tokens(value) for name, value in given.items() if name not in TOKENS}
    return [_without_tokens(value) for value in given] if isinstance(given, list | tuple) else given


def _is_used(name: str, stages: list[Stage]) -> bool:
    return any(name in stage.data for stage in stages)


def _read_data(name: str, how: dict[str, Any]) -> Dataset | IterableDataset | tuple[Dataset, Task]:
    """Pretext rows, or a task's rows and the task."""
    what = f"Data set {name!r}"
    reader = how.pop("read", None)
    if reader == PRETEXT:
        how = checked(what, how, {**declared(consecutive_texts), "documents": str, "split": str | int}, ["documents"])
        with _named(what):
            documents = load_rows(how.pop("documents"), streaming=True)
            rows = consecutive_texts(documents, _split(how.pop("split", None)), **how)
            check_pretext_columns(rows, name)
            return rows
    if str(reader) not in READERS:
        raise ValueError(
            f"{what} has read={reader!r}. Valid: {', '.join([PRETEXT, *READERS])}, of st_llm_embed.data and of "
            "datasets."
        )
    read = READERS[reader]
    how = checked(what, how, {**declared(read), **TASK_KINDS}, required(read), open_ended=read is load_dataset)
    with _named(what):
        of_task = {key: how.pop(key) for key in TASK_KINDS if key in how}
        task = Task(name, **of_task) if "instruction" in of_task else replace(known_task(name), **of_task)
        rows = read(**how)
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(f"{what} is read as {list(rows)}. Name one of them: split: {next(iter(rows))}.")
    return rows, task


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors that say which part of the configuration they are about."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{what}: {error}") from error


def _split(name: str | int | None) -> Callable[[str], list[str]]:
    """``paragraphs``, ``sentences``, or windows of so many characters."""
    if isinstance(name, int):
        return windows(name)
    known = {None: paragraphs, "paragraphs": paragraphs, "sentences": sentences}
    if name not in known:
        raise ValueError(f"split={name!r} is unknown. Valid: paragraphs, sentences, or a number of characters.")
    return known[name]


def _arguments(stages: list[Stage], data: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each stage: its own arguments, and those of the configuration that are not for other stages only.

    Raises:
        ValueError: naming the stage whose arguments cannot be, or have no effect.
    """
    shared = {"report_to": [], "seed": settings["seed"], **settings["arguments"]}
    merged = [{**shared, **stage.arguments} for stage in stages]
    tasks = [[of[1] for of in map(data.get, stage.data) if isinstance(of, tuple)] or None for stage in stages]
    idle = []
    for stage, own, of in zip(stages, merged, tasks, strict=True):
        with _named(f"Stage {stage.name!r}"):
            idle.append(LLMEmbedTrainingArguments("unused", **own).idle(of, False))
    for stage, own, of, without_effect in zip(stages, merged, tasks, idle, strict=True):
        for name in set(without_effect) & set(own) - set(stage.arguments):
            if not all(name in others for others in idle):
                del own[name]
        with _named(f"Stage {stage.name!r}"):
            LLMEmbedTrainingArguments("unused", **own).demand_effect(of, False)
    return merged


def _trainer(
    stage: Stage, model: SentenceTransformer, data: Mapping[str, Any], args: LLMEmbedTrainingArguments
) -> LLMEmbedTrainer:
    chosen = {name: data[name] for name in stage.data}
    if all(isinstance(of, tuple) for of in chosen.values()):
        rows = {name: of for name, (of, _) in chosen.items()}
        return LLMEmbedTrainer(model, args, rows, tasks=[task for _, task in chosen.values()])
    return LLMEmbedTrainer(model, args, *chosen.values(), loss=PretextLoss(model, **stage.loss))


def _rehearse(stage: Stage, model: SentenceTransformer, data: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Make what the stage will be trained with, and train nothing: whatever refuses its settings does so now.

    Raises:
        ValueError: naming the stage.
    """
    stand_in = copy.copy(model)  # of the same modules; a trainer changes the prompts and the card
    stand_in.prompts = dict(model.prompts)
    stand_in.model_card_data = SentenceTransformerModelCardData()
    stand_in.model_card_data.register_model(stand_in)
    with _named(f"Stage {stage.name!r}"), tempfile.TemporaryDirectory() as scratch:
        args = LLMEmbedTrainingArguments(scratch, **arguments)
        if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
            raise ValueError(f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs} train nothing.")
        args.push_to_hub = False  # it would make the repository
        trainer = _trainer(stage, stand_in, data, args)
        trainer.get_train_dataloader()
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer_and_scheduler(num_training_steps=1)


def _card_row(stage: Stage, data: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """A stage in the table of the model card."""
    sizes = {}
    for name in stage.data:
        rows = data[name][0] if isinstance(data[name], tuple) else data[name]
        sizes[name] = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream"
    kind = stage.arguments.get("stage", 1) if isinstance(data[stage.data[0]], tuple) else "pretext (EBAE + EBAR)"
    # By name, as an argument may be a token or a path of this machine.
    settings = {key: value for key, value in {**arguments, **stage.arguments}.items() if key in SHOWN}
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
    """The newest one that is whole: the trainer's state comes last, but a crash may cut off what came before it."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*[0-9]")}
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        damaged = find_damaged(checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            damaged.append("trainer_state.json")
        if not any(file for pattern in WEIGHTS for file in checkpoint.rglob(pattern)):
            damaged.append("the weights")
        if not damaged:
            return str(checkpoint)
        logger.warning("%s is passed over: cut off or missing are %s.", checkpoint, ", ".join(damaged))
    return None
