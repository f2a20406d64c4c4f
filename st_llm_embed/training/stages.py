"""A whole training run as one configuration: pretext, stage 1, stage 2, in any order, each begun where the last ended.

    output: runs/nv-embed
    model: {base: HuggingFaceTB/SmolLM2-135M, recipe: nv-embed, lora: true, max_seq_length: 256}
    arguments: {per_device_train_batch_size: 64, learning_rate: 2e-5}
    data:
      wikipedia: {read: consecutive_texts, documents: wikipedia.jsonl.gz, split: sentences}
      scifact: {read: from_beir, folder: scifact}
      moods: {read: from_class_examples, source: moods.jsonl, instruction: Tell the mood, kind: classification}
    stages:
      - {name: pretext, data: [wikipedia], arguments: {max_steps: 1000}}
      - {name: retrieval, data: [scifact], arguments: {stage: 1, num_train_epochs: 1}}
      - {name: blended, data: [scifact, moods], arguments: {stage: 2, num_train_epochs: 1}}

Every key is in ``run_config.RunConfig``. Each stage leaves ``output/NUMBER-NAME/model``; what is mined for it lies in
``output/mined``, what teachers give in ``output/vectors``, and at the end, where asked for, the sealed model in
``output/sealed`` and its figures in ``output/results``. A run that was killed is started again with the same
configuration: finished stages are kept, and the one in between goes on from its last checkpoint. Stages that another
run trained as this one would are taken from ``shared_stages``.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base import BaseModel
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, set_seed

from st_llm_embed.files import check_room, check_writable, read_json, size_of, write_json, written_beside
from st_llm_embed.hub import save_sealed
from st_llm_embed.hub.card import record_training, state_card
from st_llm_embed.hub.teacher import FILE as TEACHER_FILE
from st_llm_embed.hub.teacher import teacher_of
from st_llm_embed.losses import MNTPLoss, PretextLoss
from st_llm_embed.model import Outline
from st_llm_embed.tasks import encoding_prompts
from st_llm_embed.teaching.teacher import Teaching
from st_llm_embed.training.changes import find_changes
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.mined_data import check_mining, mined_rows, stand_in, without_scores
from st_llm_embed.training.run_config import OF_PRETEXT, RunConfig, Stage, read_run, stage_arguments
from st_llm_embed.training.run_folder import (
    LOCK,
    check_ours,
    check_whole,
    claimed,
    clear_unfinished,
    last_checkpoint,
    lock_of,
    without_tokens,
)
from st_llm_embed.training.shared_stages import SharedStages, beginnings
from st_llm_embed.training.stage_data import read_data
from st_llm_embed.training.start import begin, check_stage, outline_stage, unprojected
from st_llm_embed.training.taught_data import StageTeacher, StandIn, check_teachers, projection_of, without_vectors
from st_llm_embed.training.trainer import LLMEmbedTrainer
from st_llm_embed.training.training_args import OF_TASKS, LLMEmbedTrainingArguments
from st_llm_embed.trust import fetch, load_any
from st_llm_embed.weights.merging import has_adapter, merge_adapter

if TYPE_CHECKING:
    from st_llm_embed.evaluation import TaskEvaluator  # which needs mteb

logger = logging.getLogger(__name__)
SHOWN = (  # in cards
    *(name for name in OF_TASKS if name != "stage"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "lr_scheduler_type", "optim", "seed"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_checkpointing"),
)


def train_stages(config: str | Path | Mapping[str, Any], assignments: Mapping[str, Any] | None = None) -> Path:
    """Run all stages, or what is left of them.

    Args:
        config: the configuration, or the path of a YAML file with it, which its paths are relative to.
        assignments: values in place of the configuration's, by their path, such as
            ``{"stages.blended.arguments.max_steps": 9}``.

    Returns:
        The folder of the last stage's model, for ``SentenceTransformer(folder, trust_remote_code=True)``; or, where
        the configuration says ``seal``, of the sealed one.

    Raises:
        ValueError: for a configuration that says something unknown or impossible, before the first step of any stage
            and before the output is this configuration's: all data sets are read and checked, and every stage's
            trainer is made once. Also if the output belongs to another configuration, or files in it are damaged.
        OSError: if the output cannot be written, or its disk has no room for the model.
        RuntimeError: if another process runs in the output.
    """
    run = prepare_run(config, assignments)
    model, rehearsing, previous = None, None, None
    ready = 0  # the stage that the model is to begin
    for number, folder in enumerate(run.folders):
        if (folder / "model").is_dir():
            check_whole(folder / "model")
            previous = folder / "model"
            continue
        if rehearsing is None or run.config.differs(number):
            model = rehearsing = None  # two at once may not fit into memory
            goes_on = previous == run.before(number)
            rehearsing = begin(run.config, number, previous if goes_on else None, run.widths)
            check_room(run.output, size_of(rehearsing))
            model, ready = rehearsing if goes_on else None, number
        if run.config.projects(number):
            rehearsing = unprojected(rehearsing, run.widths[number])
        with rehearsed(number, rehearsing, run):
            pass
    del rehearsing
    with (
        claimed(run.output, run.text, partial(find_changes, run.given, run.config))
        if _is_first_process()
        else nullcontext()
    ):
        previous = None
        for number, (stage, folder) in enumerate(zip(run.config.stages, run.folders, strict=True)):
            if _is_first_process():
                clear_unfinished(folder)
            if run.config.shared_stages is not None:
                if _is_first_process():
                    run.shared.take(number)
                if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                    PartialState(cpu=bool(run.arguments[number].get("use_cpu"))).wait_for_everyone()
            if not (folder / "model").is_dir():
                for name in (*stage.data, *stage.eval_data):
                    run.mine(name)
                if model is None or run.config.differs(number):
                    model = None
                    model = begin(run.config, number, previous, run.widths)
                checkpoint = last_checkpoint(folder)
                teacher = run.teacher(number)
                if teacher and _is_first_process():
                    with run.given.naming("stages", number, "teach"):
                        teacher.pin(folder, goes_on=checkpoint is not None)
                taught = teacher.encode() if teacher else None
                if teacher and taught:
                    model = teacher.begin(model, taught, fits=checkpoint is None)
                elif (projection := projection_of(model)) is not None:
                    projection.requires_grad_(True)  # of the stage before
                if run.config.shared_stages is not None and checkpoint is None and _is_first_process():
                    run.shared.note(number)
                set_seed(run.config.seed + number + 1)  # adapters' dropout and masks, and nothing else, depend on it
                args = LLMEmbedTrainingArguments(str(folder), **run.arguments[number])
                trainer = _trainer(stage, model, run, args, taught)
                if checkpoint is not None:
                    logger.warning("Stage %s goes on from %s.", stage.name, checkpoint)
                trainer.train(resume_from_checkpoint=checkpoint)
                if teacher and taught:
                    teacher.end(model, taught)
                with trainer.whole_model() as whole:
                    if trainer.is_world_process_zero():
                        with written_beside(folder / "model") as staged:
                            whole.save_pretrained(str(staged))
                            if teacher and (space := teacher.space()):
                                write_json(staged / TEACHER_FILE, space._asdict())
                            before = run.earlier_card if previous is None else previous / "README.md"
                            record_training(staged / "README.md", [_card_row(stage, run)], before)
                trainer.accelerator.wait_for_everyone()
                ready = number + 1
                if trainer.is_fsdp_enabled:
                    model = None  # it stays in shards, and the next stage shards anew
            elif number >= ready:
                model = None  # the stage was taken from another run, and the next goes on from it
            if run.config.shared_stages is not None and _is_first_process():
                run.shared.keep(number)
            previous = folder / "model"
        del model
        return _finish(run) if _is_first_process() else run.last


def _finish(run: Run) -> Path:
    """Seal and evaluate the last stage's model, as far as the configuration says so."""
    model, trusts = run.folders[-1] / "model", run.config.model.get("trust_remote_code", False)
    if run.config.seal is not False:
        model = _sealed(run, model, trusts)
    if run.config.evaluate is not None:
        from st_llm_embed.evaluation import evaluate, evaluate_compressed
        from st_llm_embed.evaluation.compression import keep_with_model

        of = run.config.evaluate
        how: dict[str, Any] = {"split": of.split, "batch_size": of.batch_size, "trust_remote_code": trusts}
        # mteb puts the results into the folder results of the run.
        logger.warning("%s", evaluate(model, of.tasks, run.output, **how).table)
        if of.dims or of.precision:
            forms: dict[str, Any] = {"dims": of.dims, "precision": of.precision or ["float32"]}
            compressed = evaluate_compressed(model, of.tasks, run.output, **forms, **how)
            logger.warning("%s", compressed.table)
            if run.config.seal is not False:
                keep_with_model(compressed, model)
    return model


def _sealed(run: Run, model: Path, trusts: bool) -> Path:
    """The sealed model: the one that is there, if it is of this model and these settings."""
    sealed, mark = run.output / "sealed", run.output / "sealed.json"
    settings = dict(run.config.seal) if isinstance(run.config.seal, Mapping) else {}
    made_of = {"model": str(model.relative_to(run.output)), "time": model.stat().st_mtime_ns}
    made_of |= {"name": run.config.name, "seal": settings}
    if sealed.is_dir() and mark.is_file():
        if read_json(mark) == made_of:
            return sealed
        shutil.rmtree(sealed)
    clear_unfinished(run.output)
    trained = load_any(model, trusts)
    if settings.get("merge") and has_adapter(trained):
        trained = merge_adapter(trained)
    state_card(trained, run.config.name, settings.get("license"))
    if dims := [stage.loss["matryoshka_dims"] for stage in run.config.stages if "matryoshka_dims" in stage.loss][-1:]:
        # vLLM takes a request for fewer dimensions only if it is for one of these.
        trained.transformers_model.config.matryoshka_dimensions = sorted(*dims, reverse=True)
    write_json(mark, made_of)  # first: a sealed folder is whole or not there
    save_sealed(trained, sealed, samples=settings.get("samples", False), teacher=teacher_of(model))
    return sealed


@dataclass(frozen=True)
class Run:
    """A configuration, read and checked, with its data.

    Args:
        config: the configuration.
        given: the configuration as it was given.
        text: what is written beside the models: the configuration without tokens.
        data: each data set that a stage names, as ``read_data`` gives it; of what is to be mined, with rows that stand
            for its negatives until it is.
        mines: the rows that are to be mined, by the name of the data set.
        evaluators: what evaluates a stage's ``eval_tasks``, by the stage's name.
        arguments: the training arguments of each stage.
        widths: the width of each stage's teacher's vectors; 0 of a stage without one.
    """

    config: RunConfig
    given: Given
    text: str
    data: dict[str, Any]
    mines: dict[str, Dataset]
    evaluators: dict[str, TaskEvaluator]
    arguments: list[dict[str, Any]]
    widths: list[int]

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def folders(self) -> list[Path]:
        return [self.output / f"{number}-{stage.name}" for number, stage in enumerate(self.config.stages, 1)]

    @property
    def last(self) -> Path:
        """The model that the run ends with."""
        return self.output / "sealed" if self.config.seal is not False else self.folders[-1] / "model"

    def before(self, number: int) -> Path | None:
        """The model that a stage goes on from."""
        return self.folders[number - 1] / "model" if number else None

    def teacher(self, number: int) -> StageTeacher | None:
        """The teacher of a stage."""
        stage = self.config.stages[number]
        if stage.teach is None:
            return None
        arguments = self.arguments[number]
        return StageTeacher(
            stage.teach,
            {name: self.data[name] for name in stage.data},
            {name: self.data[name] for name in stage.eval_data},
            width=self.widths[number],
            vectors=self.vectors,
            projects=self.config.projects(number),
            seed=self.config.seed,
            batch_size=arguments.get("per_device_eval_batch_size", 32),
            precision=next((name for name in ("bf16", "fp16") if arguments.get(name)), None),
            matches=bool(arguments.get("distill_weight", 1.0)),
        )

    @property
    def vectors(self) -> Path:
        """The folder of teachers' vectors."""
        return Path(self.config.vectors) if self.config.vectors is not None else self.output / "vectors"

    def teachers(self, stage: Stage) -> dict[str, str]:
        """The teachers that mine the negatives of a stage's data sets."""
        mined = {name: self.config.data[name]["mine"] for name in stage.data if "mine" in self.config.data[name]}
        return {name: settings["teacher"] for name, settings in mined.items()}

    def mine(self, name: str) -> None:
        """Give a data set the negatives that are to be mined for it."""
        if (rows := self.mines.pop(name, None)) is not None:
            finished = {
                stage.name: folder / "model"
                for stage, folder in zip(self.config.stages, self.folders, strict=True)
                if (folder / "model").is_dir()
            }
            task = self.data[name][1]
            with self.given.naming("data", name, "mine"):
                folder = self.output / "mined" / name
                mined = mined_rows(rows, task, self.config.data[name], folder, self.vectors, finished)
            self.data[name] = (mined, task)

    @cached_property
    def shared(self) -> SharedStages:
        """The finished stages of this run and others."""
        assert self.config.shared_stages is not None  # as its callers have seen
        begun = beginnings(self.config, self.arguments, self.given.folder)
        return SharedStages(Path(self.config.shared_stages), begun, self.folders)

    @cached_property
    def earlier_card(self) -> Path | None:
        """The card of the model that the run was begun from."""
        load = self.config.model.get("load")
        return fetch(load, self.config.model.get("revision")) / "README.md" if load else None

    @cached_property
    def lm_head(self) -> nn.Linear:
        """The base's LM head, frozen: it is not saved with the model, so that a resumed run must find it as it was."""
        kwargs = self.config.model.get("model_kwargs") or {}
        base = self.config.model["base"]
        llm = AutoModelForCausalLM.from_pretrained(base, **{"trust_remote_code": False, **kwargs})
        return llm.get_output_embeddings().requires_grad_(False)


def prepare_run(config: str | Path | Mapping[str, Any], assignments: Mapping[str, Any] | None = None) -> Run:
    """Read and check a configuration, its output, its base and its data; no weights are loaded, nothing is
    written.

    Raises:
        ValueError, OSError, RuntimeError: see ``train_stages``.
    """
    given = Given.read(config, assignments or {})
    settings = read_run(given)
    output = Path(settings.output)
    if given.file is not None and output.resolve() == given.file.resolve().parent and given.file.name == "config.yaml":
        raise ValueError(f"{output} holds {given.file.name}, which the run would replace. Choose another output.")
    if _is_first_process():
        for change in check_ours(output, partial(find_changes, given, settings)):
            logger.warning("The run in %s goes on: %s.", output, change)
        if (output / LOCK).is_file():  # refused at once, if it is held
            lock_of(output).release()
    outlines: list[Outline | None] = []
    for number, stage in enumerate(settings.stages):
        if number and not settings.differs(number):
            outlines.append(outlines[-1])
            continue
        with given.naming(*(("stages", number, "model") if stage.model else ("model",))):
            outlines.append(outline_stage(settings, stage))
    data: dict[str, Any] = {}
    mines: dict[str, Dataset] = {}
    by_stage = {
        stage.name: settings.model_class if outline is None else outline.model
        for stage, outline in zip(settings.stages, outlines, strict=True)
    }
    for name, data_settings in settings.data.items():
        users = [stage for stage in settings.stages if name in (*stage.data, *stage.eval_data)]
        if not users:
            logger.warning("The data set %r is in no stage, and is not read.", name)
            continue
        with given.naming("data", name):
            data[name] = read_data(name, data_settings, given.folder)
            if mining := data_settings.get("mine"):
                rows, task = data[name]
                for who in (mining["teacher"], mining.get("judge")):
                    if (kind := by_stage.get(who or "", SentenceTransformer)) is not SentenceTransformer:
                        raise ValueError(
                            f"has the stage {who!r} in its mine, whose model is a {kind.__name__}. Negatives are "
                            "mined and judged by models of one dense vector for a text."
                        )
                check_mining(rows, mining, [stage.name for stage in settings.stages])
                mines[name] = rows
                data[name] = stand_in(rows, mining), task
    evaluators: dict[str, TaskEvaluator] = {}
    for number, stage in enumerate(settings.stages):
        if stage.eval_tasks:
            with given.naming("stages", number):
                from st_llm_embed.evaluation import TaskEvaluator
                from st_llm_embed.evaluation.encoder import check_tasks

                evaluators[stage.name] = TaskEvaluator(stage.eval_tasks, split=stage.eval_split)
                check_tasks(by_stage[stage.name], evaluators[stage.name].tasks)
    classes = list(by_stage.values())
    arguments = stage_arguments(settings, data, given, evaluators, classes)
    widths = check_teachers(settings, data, outlines, given)
    text = yaml.safe_dump(without_tokens(given.values), sort_keys=True)
    run = Run(settings, given, text, data, mines, evaluators, arguments, widths)
    for number, (stage, outline) in enumerate(zip(settings.stages, outlines, strict=True)):
        if outline is None:
            continue
        with given.naming("stages", number):
            tasks = [part[1] for part in map(data.get, (*stage.data, *stage.eval_data)) if isinstance(part, tuple)]
            check_stage(stage, outline, tasks)
        # What shards a model knows no other than an LLM, and what stands for one takes fast tokenizers alone.
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 and outline.tokenizer.is_fast:
            small = outline.model(modules=[StaticEmbedding(outline.tokenizer, embedding_dim=8)])
            with rehearsed(number, small, run, nn.Identity()):
                pass
    if settings.vectors is not None:
        with given.naming("vectors"):
            check_writable(Path(settings.vectors))
    if settings.shared_stages is not None:
        with given.naming("shared_stages"):
            shared = Path(settings.shared_stages)
            if shared.resolve().is_relative_to(output.resolve()):
                raise ValueError(f"{shared} lies in {output}, which is this run's alone. Name a folder beside it.")
            check_writable(shared)
    if settings.evaluate is not None:
        with given.naming("evaluate"):
            from st_llm_embed.evaluation.compression import check_forms
            from st_llm_embed.evaluation.encoder import check_tasks
            from st_llm_embed.evaluation.evaluate import choose_tasks, read_through

            check_forms(settings.evaluate.dims, settings.evaluate.precision or ["float32"])
            if (settings.evaluate.dims or settings.evaluate.precision) and classes[-1] is not SentenceTransformer:
                raise ValueError(
                    f"has dims or precision, of dense vectors, and the model is a {classes[-1].__name__}. Leave them "
                    "out."
                )
            chosen = choose_tasks(settings.evaluate.tasks, settings.evaluate.split)
            check_tasks(classes[-1], chosen)
            read_through(chosen)
    return run


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _trainer(
    stage: Stage,
    model: BaseModel,
    run: Run,
    args: LLMEmbedTrainingArguments,
    teacher: Teaching | None,
    loss: nn.Module | None = None,
) -> LLMEmbedTrainer:
    callbacks: list[TrainerCallback] = []
    if stage.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping_patience))
    parts = [run.data[name] for name in stage.data]
    if not all(isinstance(part, tuple) for part in parts):
        (pretext_rows,) = parts
        eval_pretext = run.data[stage.eval_data[0]] if stage.eval_data else None
        if loss is None:
            settings = {key: value for key, value in stage.loss.items() if key not in OF_PRETEXT}
            lm_head = run.lm_head if "lm_head" in stage.loss else None
            loss = (MNTPLoss if stage.masks else PretextLoss)(model, lm_head=lm_head, **settings)
        return LLMEmbedTrainer(model, args, pretext_rows, eval_pretext, loss=loss, callbacks=callbacks)
    rows, eval_rows = ({name: run.data[name][0] for name in names} for names in (stage.data, stage.eval_data))
    if not args.soft_label_weight:
        rows, eval_rows = (
            {name: without_scores(part) if "mine" in run.config.data[name] else part for name, part in of.items()}
            for of in (rows, eval_rows)
        )
    if teacher is not None:  # who has the vectors that the data bring
        rows, eval_rows = ({name: without_vectors(part) for name, part in of.items()} for of in (rows, eval_rows))
    tasks = {run.data[name][1].name: run.data[name][1] for name in (*stage.data, *stage.eval_data)}
    prompts = dict(model.prompts)
    trainer = LLMEmbedTrainer(
        model,
        args,
        rows,
        eval_rows or None,
        tasks=list(tasks.values()),
        teacher=teacher,
        evaluator=run.evaluators.get(stage.name),
        callbacks=callbacks,
    )
    # What is only evaluated leaves no prompt in the model.
    trained = [run.data[name][1] for name in stage.data]
    model.prompts = {**prompts, **encoding_prompts(trained, prompts, model.default_prompt_name)}
    if stage.loss and loss is None:
        trainer.loss = trainer.prepare_loss(MatryoshkaLoss(model, trainer.loss, **stage.loss), model)
    return trainer


@contextmanager
def rehearsed(number: int, model: BaseModel, run: Run, loss: nn.Module | None = None) -> Iterator[LLMEmbedTrainer]:
    """What a stage will be trained with, which trains nothing: whatever refuses its settings does so now.

    Args:
        number: the stage, from 0.
        model: its model; or, before that is loaded, a small one of the same tokenizer.
        run: the run.
        loss: the loss in place of the stage's own, which a small model cannot have. Default: its own.

    Raises:
        ValueError: naming the stage.
    """
    stand_in = copy.copy(model)  # of the same modules; a trainer changes the prompts and the card
    stand_in.prompts = dict(model.prompts)
    stand_in.model_card_data = model.model_card_data_class()
    stand_in.model_card_data.register_model(stand_in)
    with run.given.naming("stages", number), tempfile.TemporaryDirectory() as scratch:
        arguments = dict(run.arguments[number])
        if loss is not None:
            arguments.pop("learning_rate_mapping", None)  # which names parameters of the model's own
        args = LLMEmbedTrainingArguments(scratch, **arguments)
        args.push_to_hub = False  # it would make the repository
        stage = run.config.stages[number]
        teacher = StandIn(stand_in.get_embedding_dimension()) if stage.teach else None
        trainer = _trainer(stage, stand_in, run, args, teacher, loss)
        if trainer.is_fsdp_enabled and stage.teach and stage.teach.refit:
            raise ValueError("has refit: true, and under FSDP no process has the whole model to fit. Leave it out.")
        trainer.get_train_dataloader()
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
        yield trainer


def _card_row(stage: Stage, run: Run) -> dict[str, str]:
    """A stage in the table of the model card."""
    of_task = isinstance(run.data[stage.data[0]], tuple)
    # By name, as an argument may be a token or a path of this machine.
    settings = {key: value for key, value in {**run.config.arguments, **stage.arguments}.items() if key in SHOWN}
    if lora := run.config.model_of(stage).get("lora"):
        settings["lora"] = lora
    settings |= {key: value for key, value in stage.loss.items() if key not in OF_PRETEXT}
    pretext = "pretext (MNTP)" if stage.masks else "pretext (EBAE + EBAR)"
    if stage.teach is not None and (teacher := stage.teach.teacher) is not None:
        settings["teacher"] = Path(teacher).name if Path(teacher).exists() else teacher
    mined = [f"{name} by {Path(teacher).name}" for name, teacher in run.teachers(stage).items()]
    return {
        "": stage.name,
        "stage": str(stage.arguments.get("stage", 1)) if of_task else pretext,
        "data": describe_data(stage, run.data) + (f"; negatives mined: {', '.join(mined)}" if mined else ""),
        "arguments": ", ".join(f"`{key}={value!r}`" for key, value in settings.items()),
    }


def describe_data(stage: Stage, data: Mapping[str, Any]) -> str:
    """The data sets of a stage and their sizes, in words."""
    sizes = {}
    for name in stage.data:
        rows = data[name][0] if isinstance(data[name], tuple) else data[name]
        sizes[name] = f"{len(rows):,} rows" if isinstance(rows, Dataset) else "a stream"
    return ", ".join(f"{name} ({size})" for name, size in sizes.items())
