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
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, set_seed

from st_llm_embed.files import check_room, size_of, written_beside
from st_llm_embed.hub.card import record_training
from st_llm_embed.losses import PretextLoss
from st_llm_embed.model import build_model
from st_llm_embed.tasks import encoding_prompts
from st_llm_embed.training.configuration import read_yaml
from st_llm_embed.training.run_config import Stage, read_settings, stage_arguments
from st_llm_embed.training.run_folder import (
    LOCK,
    check_ours,
    check_whole,
    claimed,
    last_checkpoint,
    lock_of,
    without_tokens,
)
from st_llm_embed.training.stage_data import naming, read_data
from st_llm_embed.training.trainer import LLMEmbedTrainer
from st_llm_embed.training.training_args import OF_TASKS, LLMEmbedTrainingArguments
from st_llm_embed.trust import check_data
from st_llm_embed.weights.saved import load_saved

SHOWN = (  # in cards
    *(name for name in OF_TASKS if name != "stage"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "lr_scheduler_type", "optim", "seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_checkpointing"),
)


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
    run = prepare_run(config)
    model, previous = None, run.start
    for stage, own_arguments, folder in run.parts():
        if (folder / "model").is_dir():
            check_whole(folder / "model")
            previous = folder / "model"
            continue
        if model is None:
            model = begin(run.settings, previous)
            check_room(run.output, size_of(model))
        with rehearsed(stage, model, run, own_arguments):
            pass
    with claimed(run.output, run.text) if _is_first_process() else nullcontext():
        previous, card_rows = run.start, []
        for number, (stage, own_arguments, folder) in enumerate(run.parts(), 1):
            card_rows.append(_card_row(stage, run.data, run.settings["arguments"]))
            if not (folder / "model").is_dir():
                model = model or begin(run.settings, previous)
                set_seed(run.settings["seed"] + number)  # adapters' dropout, and nothing else, depends on it
                trainer = _trainer(stage, model, run, LLMEmbedTrainingArguments(str(folder), **own_arguments))
                trainer.train(resume_from_checkpoint=last_checkpoint(folder))
                with trainer.whole_model() as whole:
                    if trainer.is_world_process_zero():
                        with written_beside(folder / "model") as staged:
                            whole.save_pretrained(str(staged))
                            start_card = run.start and run.start / "README.md"
                            record_training(staged / "README.md", card_rows, start_card)
                trainer.accelerator.wait_for_everyone()
                if trainer.is_fsdp_enabled:
                    model = None  # it stays in shards, and the next stage shards anew
            previous = folder / "model"
    return run.folders[-1] / "model"


@dataclass(frozen=True)
class Run:
    """A configuration, read and checked, with its data.

    Args:
        settings: the configuration with its defaults.
        output: the folder of the run.
        text: what is written beside the models: the configuration without tokens.
        stages: the stages.
        data: each data set that a stage names, as ``read_data`` gives it.
        arguments: the training arguments of each stage.
        start: the folder of the model whose weights the first stage begins with.
    """

    settings: dict[str, Any]
    output: Path
    text: str
    stages: list[Stage]
    data: dict[str, Any]
    arguments: list[dict[str, Any]]
    start: Path | None

    @property
    def folders(self) -> list[Path]:
        return [self.output / f"{number}-{stage.name}" for number, stage in enumerate(self.stages, 1)]

    def parts(self) -> Iterator[tuple[Stage, dict[str, Any], Path]]:
        """Each stage, its arguments and its folder."""
        return zip(self.stages, self.arguments, self.folders, strict=True)

    @cached_property
    def lm_head(self) -> nn.Linear:
        """The base's LM head, frozen: it is not saved with the model, so that a resumed run must find it as it was."""
        kwargs = self.settings["model"].get("model_kwargs") or {}
        base = self.settings["model"]["base"]
        llm = AutoModelForCausalLM.from_pretrained(base, **{"trust_remote_code": False, **kwargs})
        return llm.get_output_embeddings().requires_grad_(False)


def prepare_run(config: str | Path | Mapping[str, Any]) -> Run:
    """Read and check a configuration, its output and its data; no model is loaded, and nothing stays written.

    Raises:
        ValueError, OSError, RuntimeError: see ``train_stages``.
    """
    configuration = read_yaml(Path(config)) if isinstance(config, str | Path) else config
    settings, stages = read_settings(configuration)
    start = _read_start(settings.get("start"))
    text = yaml.safe_dump(without_tokens(configuration), sort_keys=True)
    output = Path(settings["output"]).expanduser()
    if _is_first_process():
        check_ours(output, text)
        if (output / LOCK).is_file():  # refused at once, if it is held
            lock_of(output).release()
    data = {
        name: read_data(name, data_settings)
        for name, data_settings in settings["data"].items()
        if any(name in (*stage.data, *stage.eval_data) for stage in stages)
    }
    return Run(settings, output, text, stages, data, stage_arguments(stages, data, settings), start)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _read_start(folder: str | None) -> Path | None:
    """The model to go on from."""
    if folder is None:
        return None
    folder = str(Path(folder).expanduser())
    if not (Path(folder) / "modules.json").is_file():
        raise ValueError(f"start={folder!r} is no model. It takes one that a run left, such as OUTPUT/1-NAME/model.")
    check_data(Path(folder))
    check_whole(Path(folder))
    return Path(folder)


def _trainer(stage: Stage, model: SentenceTransformer, run: Run, args: LLMEmbedTrainingArguments) -> LLMEmbedTrainer:
    callbacks: list[TrainerCallback] = []
    if stage.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping_patience))
    parts = [run.data[name] for name in stage.data]
    if all(isinstance(part, tuple) for part in parts):
        rows, eval_rows = ({name: run.data[name][0] for name in names} for names in (stage.data, stage.eval_data))
        tasks = {run.data[name][1].name: run.data[name][1] for name in (*stage.data, *stage.eval_data)}
        prompts = dict(model.prompts)
        trainer = LLMEmbedTrainer(
            model, args, rows, eval_rows or None, tasks=list(tasks.values()), callbacks=callbacks
        )
        # What is only evaluated leaves no prompt in the model.
        trained = [run.data[name][1] for name in stage.data]
        model.prompts = {**prompts, **encoding_prompts(trained, prompts, model.default_prompt_name)}
        if stage.loss:
            trainer.loss = trainer.prepare_loss(MatryoshkaLoss(model, trainer.loss, **stage.loss), model)
        return trainer
    (pretext_rows,) = parts
    eval_pretext = run.data[stage.eval_data[0]] if stage.eval_data else None
    loss_settings = dict(stage.loss)
    if loss_settings.get("lm_head") == "base":
        loss_settings["lm_head"] = run.lm_head
    loss = PretextLoss(model, **loss_settings)
    return LLMEmbedTrainer(model, args, pretext_rows, eval_pretext, loss=loss, callbacks=callbacks)


@contextmanager
def rehearsed(
    stage: Stage, model: SentenceTransformer, run: Run, arguments: Mapping[str, Any]
) -> Iterator[LLMEmbedTrainer]:
    """What the stage will be trained with, which trains nothing: whatever refuses its settings does so now.

    Raises:
        ValueError: naming the stage.
    """
    stand_in = copy.copy(model)  # of the same modules; a trainer changes the prompts and the card
    stand_in.prompts = dict(model.prompts)
    stand_in.model_card_data = SentenceTransformerModelCardData()
    stand_in.model_card_data.register_model(stand_in)
    with naming(f"Stage {stage.name!r}"), tempfile.TemporaryDirectory() as scratch:
        args = LLMEmbedTrainingArguments(scratch, **arguments)
        if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
            raise ValueError(f"max_steps={args.max_steps}, num_train_epochs={args.num_train_epochs} train nothing.")
        args.push_to_hub = False  # it would make the repository
        trainer = _trainer(stage, stand_in, run, args)
        trainer.get_train_dataloader()
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
        yield trainer


def _card_row(stage: Stage, data: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """A stage in the table of the model card."""
    kind = stage.arguments.get("stage", 1) if isinstance(data[stage.data[0]], tuple) else "pretext (EBAE + EBAR)"
    # By name, as an argument may be a token or a path of this machine.
    settings = {key: value for key, value in {**arguments, **stage.arguments}.items() if key in SHOWN}
    return {
        "": stage.name,
        "stage": str(kind),
        "data": describe_data(stage, data),
        "arguments": ", ".join(f"`{key}={value!r}`" for key, value in settings.items()),
    }


def describe_data(stage: Stage, data: Mapping[str, Any]) -> str:
    """The data sets of a stage and their sizes, in words."""
    sizes = {}
    for name in stage.data:
        rows = data[name][0] if isinstance(data[name], tuple) else data[name]
        sizes[name] = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream"
    return ", ".join(f"{name} ({size})" for name, size in sizes.items())


def begin(settings: Mapping[str, Any], previous: Path | None) -> SentenceTransformer:
    """The model that is to be trained, with the weights and prompts of the last stage.

    Args:
        settings: the configuration.
        previous: the folder of the last stage's model.
    """
    set_seed(settings["seed"])
    model = build_model(**settings["model"])
    if previous is not None:
        load_saved(model, previous)
    return model
