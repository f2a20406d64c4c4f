"""What a run would do, before it does it: its stages, their data as the model will see them, steps and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from st_llm_embed.data.columns import text_columns
from st_llm_embed.training.stages import Run, describe_data, prepare_run, rehearsed
from st_llm_embed.training.start import begin, unprojected
from st_llm_embed.training.trainer import LLMEmbedTrainer

LONGEST = 300  # characters of a text that are shown


def describe_run(config: str | Path | Mapping[str, Any], assignments: Mapping[str, Any] | None = None) -> str:
    """Check a configuration as ``train_stages`` does, and tell what it would do. Nothing is written or trained.

    Args:
        config, assignments: see ``train_stages``.

    Returns:
        For each stage: its data sets and their sizes, the steps, the rows of a step, the first row of its first batch
        as the model gets it; and the memory of weights, gradients and optimizer.

    Raises:
        ValueError: see ``train_stages``.
    """
    run = prepare_run(config, assignments)
    done = [folder for folder in run.folders if (folder / "model").is_dir()]
    model = None
    lines = [f"Output: {run.output}"]
    for number, (stage, folder) in enumerate(zip(run.config.stages, run.folders, strict=True)):
        lines += ["", f"Stage {number + 1}, {stage.name}: {describe_data(stage, run.data)}"]
        if folder in done:
            lines.append(f"  is finished: {folder / 'model'}")
            continue
        if run.config.shared_stages is not None and (found := run.shared.find(number)) is not None:
            lines.append(f"  is taken from another run: {found}")
            model = None
            continue
        lines += [f"  {line}" for line in _mining(run, [*stage.data, *stage.eval_data])]
        if model is None or run.config.differs(number):
            model = None
            before = run.before(number)
            model = begin(run.config, number, before if before and before.is_dir() else None, run.widths)
            lines.append(f"  {_memory(model)}")
        lines += [f"  {line}" for line in _teaching(run, number)]
        if run.config.projects(number):
            model = unprojected(model, run.widths[number])
        with rehearsed(number, model, run) as trainer:
            lines += [f"  {line}" for line in _steps(trainer)]
            lines += [f"  {line}" for line in _first_row(trainer)]
    if run.config.seal is not False:
        lines += ["", f"Sealed: {run.output / 'sealed'}"]
    if run.config.evaluate is not None:
        lines += ["", f"Evaluated on {', '.join(run.config.evaluate.tasks)}: {run.output / 'results'}"]
    return "\n".join(lines)


def _mining(run: Run, names: list[str]) -> list[str]:
    """What is mined before a stage, for which the positives stand in its first row."""
    return [
        f"negatives of {name} are mined first, by {_miners(run.config.data[name]['mine'])}, unless they are in "
        f"{run.output / 'mined' / name}; the row below shows each positive in their place"
        for name in names
        if name in run.mines
    ]


def _miners(mine: Mapping[str, Any]) -> str:
    """The teacher, and the judge if there is one."""
    return mine["teacher"] if mine.get("judge") is None else f"{mine['teacher']}, judged by {mine['judge']}"


def _teaching(run: Run, number: int) -> list[str]:
    """Who teaches a stage, and where the vectors lie."""
    teacher = run.teacher(number)
    if teacher is None:
        return []
    teach = teacher.teach
    texts = sum(len(rows) * len(text_columns(rows.column_names)) for rows, _ in teacher.data.values())
    who = f"{teach.teacher}, whose vectors lie in {run.vectors}" if teach.teacher else "vectors that the data bring"
    lines = [f"taught by {who}: {teacher.width} dimensions of {texts:,} texts"]
    if teacher.projects:
        lines.append(f"begins with a projection into that space, fitted to {min(teach.sample, texts):,} of them")
    return lines


def _memory(model: SentenceTransformer) -> str:
    """Without activations, which go by batch and length, and without what the optimizer keeps."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    count = sum(p.numel() for p in model.parameters())
    return (
        f"model: {count:,} parameters; {weights / 1e6:,.0f} MB of weights, {trained / 1e6:,.0f} MB of gradients, "
        "twice that for AdamW; activations come on top."
    )


def _steps(trainer: LLMEmbedTrainer) -> list[str]:
    args = trainer.args
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.max_steps > 0:
        steps = f"{args.max_steps:,} steps"
    else:
        updates = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        steps = f"{math.ceil(updates * args.num_train_epochs):,} steps ({args.num_train_epochs:g} epochs)"
    lines = [f"{steps} of {batch} rows, {args.optim.value} at learning rate {args.learning_rate:g}"]
    every = {
        "steps": f"every {args.save_steps:g} steps",
        "epoch": "every epoch",
        "no": "never",
        "best": "when it is best",
    }
    lines.append(f"loss {type(trainer.loss).__name__}, checkpoints {every[args.save_strategy.value]}")
    if trainer.eval_dataset is not None:
        lines.append(f"evaluated by {args.eval_strategy.value}, best by {args.metric_for_best_model}")
    return lines


def _first_row(trainer: LLMEmbedTrainer) -> list[str]:
    """Each column's tokens as text, special ones too."""
    batch = next(iter(trainer.get_train_dataloader()))
    lines = []
    for key, ids in batch.items():
        column, found, _ = key.partition("_input_ids")
        if found:
            real = ids[0][batch[f"{column}_attention_mask"][0].bool()]
            text = trainer.processing_class.decode(real)
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
            lines.append(f"{column}, {len(real)} tokens: {shown!r}")
    return lines
