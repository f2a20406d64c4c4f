"""SentenceTransformerTrainer that takes tasks: they set the prompts, the loss of each data set, and the saved prompts.

With ``tasks``, NV-Embed's two stages (arXiv 2405.17428, section 4) differ in one switch: stage 1 uses in-batch
negatives where the task allows them, stage 2 never does. Without ``tasks`` this is the host's trainer, with its data
checked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import nn

from st_llm_embed.data.columns import check_contrastive_columns, check_pretext_columns
from st_llm_embed.hub import publish
from st_llm_embed.losses import InstructionContrastiveLoss, PretextLoss
from st_llm_embed.tasks import Task, encoding_prompts
from st_llm_embed.training_args import LLMEmbedTrainingArguments

AnyDataset = Dataset | IterableDataset | DatasetDict | dict[str, Dataset]


class LLMEmbedTrainer(SentenceTransformerTrainer):
    """The host's trainer with NV-Embed's stages and data checks.

    Args:
        model: the model to train.
        args: ``LLMEmbedTrainingArguments``; ``args.stage`` and ``args.temperature`` are read with ``tasks`` only.
        train_dataset: with ``tasks``, a dict from task name to a data set of ``anchor``, ``positive``,
            ``negative_1..n``.
        eval_dataset: likewise.
        loss: as in the host; not with ``tasks``, which make their own.
        tasks: one ``Task`` for each data set.
        **kwargs: the host's other arguments.

    Raises:
        ValueError: for data sets and tasks that do not match, misnamed columns, empty rows, or ``tasks`` together with
            ``loss`` or ``args.prompts``.
    """

    training_args_class = LLMEmbedTrainingArguments

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: LLMEmbedTrainingArguments | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | None = None,
        loss: nn.Module | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        **kwargs: Any,
    ) -> None:
        if tasks is not None:
            if loss is not None or (args is not None and args.prompts):
                raise ValueError("tasks= sets the losses and the prompts itself: leave out loss= and args.prompts.")
            args = _own_copy(args)
            named = {task.name: task for task in tasks}
            model_prompts = model.prompts if model is not None else {}
            for dataset in (train_dataset, eval_dataset):
                if dataset is not None:
                    _check_tasks(dataset, named)
            args.prompts = {
                name: named[name].column_prompts(rows.column_names, model_prompts)
                for dataset in (train_dataset, eval_dataset)
                for name, rows in (dataset or {}).items()
            }
            loss = {
                name: partial(
                    InstructionContrastiveLoss,
                    scale=1 / args.temperature,
                    in_batch_negatives=args.stage == 1 and task.in_batch_negatives,
                )
                for name, task in named.items()
            }
        elif isinstance(loss, PretextLoss):
            for name, rows in _as_dict(train_dataset).items():
                check_pretext_columns(rows, name)
            if loss.prefix and (args is None or not args.prompts):
                args = _own_copy(args)
                args.prompts = {"text": loss.prefix + "{text}"}
        super().__init__(model, args, train_dataset, eval_dataset, loss, **kwargs)
        if tasks is not None:
            self.model.prompts.update(encoding_prompts(tasks, self.model.prompts))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """``publish`` the model to ``args.hub_model_id``, sealed and checked: what the host would upload loads only
        where this package is. ``kwargs`` are those of ``publish``, such as ``adapter="merge"``; so is what it returns,
        on the first process.
        """
        if not self.is_world_process_zero():
            return None
        return publish(
            self.model,
            self.args.hub_model_id or Path(self.args.output_dir).name,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=private if private is not None else self.args.hub_private_repo,
            exist_ok=True,
            commit_message=commit_message,
            **kwargs,
        )


def _own_copy(args: LLMEmbedTrainingArguments | None) -> LLMEmbedTrainingArguments:
    """Arguments to set the prompts of: the caller's stay as they are."""
    return copy.copy(args) if args else LLMEmbedTrainingArguments(output_dir="tmp_trainer")


def _as_dict(dataset: AnyDataset | None) -> dict[str, Dataset | IterableDataset]:
    return dataset if isinstance(dataset, dict) else {} if dataset is None else {"train": dataset}


def _check_tasks(dataset: AnyDataset, tasks: dict[str, Task]) -> None:
    if not isinstance(dataset, dict):
        raise ValueError(
            f"tasks= needs a dict of data sets by task name, such as {{{next(iter(tasks))!r}: dataset}}; got "
            f"{type(dataset).__name__}."
        )
    if unknown := sorted(set(dataset) - set(tasks)):
        raise ValueError(f"The data sets {unknown} have no task. Tasks: {sorted(tasks)}.")
    for name, rows in dataset.items():
        check_contrastive_columns(rows, name)
