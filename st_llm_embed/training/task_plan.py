"""What a trainer must know of its tasks: whose negatives are whose, which columns there are, under which prompts.

The tasks and the training arguments say the groups of in-batch negatives; each data set, once it is seen, its columns;
the model, its prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from datasets import Dataset
from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Transformer
from torch import nn

from st_llm_embed.data.columns import (
    DOCUMENTS,
    QUERIES,
    SCORES,
    check_classes,
    check_contrastive_columns,
    check_text,
    text_columns,
)
from st_llm_embed.losses import DistillationLoss, InstructionContrastiveLoss
from st_llm_embed.losses.length_groups import leaves_out_one_prompt
from st_llm_embed.losses.row_labels import NONE
from st_llm_embed.tasks import NV_EMBED, TEXT, Task, encoding_prompts
from st_llm_embed.training.sampler import Source
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

logger = logging.getLogger(__name__)


class TaskPlan:
    """The tasks of a trainer.

    Args:
        tasks: the tasks, each with a name of its own.
        args: the training arguments.

    Raises:
        ValueError: for no task, or two of one name.
    """

    def __init__(self, tasks: Sequence[Task], args: LLMEmbedTrainingArguments) -> None:
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks) or not tasks:
            names = [task.name for task in tasks]
            raise ValueError(f"tasks= takes one task or more, each with a name of its own; got {names}.")
        self.columns: dict[str, list[str]] = {}  # of text, that have been seen in each data set
        self.num_negatives = 0  # columns of negatives that each training batch has at least
        self.pairs = False  # whether each training batch has pairs
        self.set_groups(args)

    def set_groups(self, args: LLMEmbedTrainingArguments) -> None:
        """Set the group in which a task's rows are each other's negatives; NONE for own negatives only."""
        self.groups = {
            name: place if args.in_batch(task) else NONE for place, (name, task) in enumerate(self.tasks.items())
        }

    @property
    def in_batch_negatives(self) -> bool:
        """Whether any task has in-batch negatives."""
        return any(group != NONE for group in self.groups.values())

    def add_data(
        self, name: str, rows: Dataset, *, training: bool, blended: bool, taught: bool, contrastive: bool
    ) -> None:
        """Take the columns of a task's data set.

        Args:
            name: the task's name.
            rows: the data set.
            training: whether it is trained on, and not evaluated.
            blended: whether a batch draws from all tasks.
            taught: whether a teacher says something of each text, so that rows of a single one will do.
            contrastive: whether the contrastive loss has a weight, so that pairs need negatives.

        Raises:
            ValueError: for misnamed columns, empty rows, labels that are no classes, and rows without any negatives.
        """
        if text_columns(rows.column_names) in (DOCUMENTS, QUERIES):
            self._add_single_texts(name, rows, taught)
            return
        if self.tasks[name].kind == "documents":
            raise ValueError(
                f"Task {name!r} is of the kind 'documents', which are {DOCUMENTS}, and its data set has the columns "
                f"{rows.column_names}."
            )
        check_contrastive_columns(rows, name, self.tasks[name].negatives if training else None)
        columns = text_columns(rows.column_names)
        if training and "label" in rows.column_names:
            check_classes(rows, name, several=True)
        if contrastive and self.groups[name] == NONE and len(columns) == 2:
            raise ValueError(
                f"Task {name!r} is trained without in-batch negatives, and its data set has no negatives. Mine "
                "some (st-llm-embed mine), or allow in-batch ones in stage 1: "
                f"Task({name!r}, ..., in_batch_negatives=True)."
            )
        self.columns[name] = list(dict.fromkeys([*self.columns.get(name, []), *columns]))
        if training and blended:
            # Each batch has as many columns as the task with the most, on every process.
            self.num_negatives, self.pairs = max(self.num_negatives, len(columns) - 2), True

    def _add_single_texts(self, name: str, rows: Dataset, taught: bool) -> None:
        columns = text_columns(rows.column_names)
        if (columns == DOCUMENTS) != (self.tasks[name].kind == "documents"):
            raise ValueError(
                f"Data set {name!r} has the column {columns[0]!r} alone, and its task is of the kind "
                f"{self.tasks[name].kind!r}. Documents, of the kind 'documents', are called {DOCUMENTS[0]!r}; the "
                f"texts of other kinds, under the task's instruction, {QUERIES[0]!r}."
            )
        if not taught:
            raise ValueError(
                f"Data set {name!r} has single texts, of which only a teacher's vectors say what there is to learn. "
                "Give the trainer a teacher, or pairs of 'anchor' and 'positive'."
            )
        if others := sorted({"label", SCORES} & set(rows.column_names)):
            raise ValueError(f"Data set {name!r} has single texts, and {others} beside them, which nothing reads.")
        check_text(rows, name, columns)
        self.columns[name] = list(dict.fromkeys([*self.columns.get(name, []), *columns]))

    def check_loss(self, name: str, loss: nn.Module) -> None:
        """Check that the loss of a task's data set keeps to the task.

        Raises:
            ValueError: if it does not.
        """
        inner = contrastive_loss(loss)
        if inner is None:
            raise ValueError(
                f"{type(loss).__name__} does not read which rows are each other's negatives, which texts are missing "
                "and which classes there are, as tasks= demand. Fix: InstructionContrastiveLoss(model), which is "
                "MultipleNegativesRankingLoss where in-batch negatives are on, or of several vectors "
                "LateInteractionLoss(model), alone or inside a loss such as MatryoshkaLoss; or train without tasks=, "
                "with prompts= in the arguments."
            )
        if self.groups[name] != NONE and not inner.in_batch_negatives:
            raise ValueError(
                f"Task {name!r} has in-batch negatives, and the loss in_batch_negatives=False. Fix: "
                "InstructionContrastiveLoss(model), or in_batch_negatives=False in the training arguments."
            )

    def encoding_prompts(self, model: BaseModel) -> dict[str, str]:
        """What ``model.prompts`` gains."""
        return encoding_prompts(self.tasks.values(), model.prompts, model.default_prompt_name)

    def column_prompts(self, model: BaseModel) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
        """By task and column: the prompt, and the side of texts (query or document) that the backbone cuts it as.

        Raises:
            ValueError: for a prompt with a part after the text, of a model that puts prompts before it alone.
        """
        prompts = model.prompts | self.encoding_prompts(model)
        by_column, sides = {}, {}
        for name, columns in self.columns.items():
            by_column[name] = self.tasks[name].column_prompts(columns, prompts, model.default_prompt_name)
            # With it, the backbone's query_length and document_length hold in training as in encode_query.
            sides[name] = self.tasks[name].column_sides(columns)
            around = [prompt for prompt in by_column[name].values() if TEXT in prompt]
            if around and type(model[0]) is Transformer:
                raise ValueError(
                    f"Task {name!r} has the prompt {around[0]!r}, and the model's first module, a Transformer, puts a "
                    f"prompt before the text, {TEXT!r} and all. Fix: leave {TEXT!r} out, at the end of the prompt."
                )
        return by_column, sides

    def warn_of_instructions(self, model: BaseModel) -> None:
        """Say, once, which tasks' instructions the model's prompts have no place for."""
        kept: dict[str, list[str]] = {}
        for name, task in self.tasks.items():
            prompt = task.encoding_prompt(model.prompts, model.default_prompt_name)
            if task.query_prompt is None and task.instruction.strip() not in prompt:
                kept.setdefault(prompt, []).append(name)
        for prompt, names in kept.items():
            _warn_once(
                f"The instructions of {', '.join(names)} are left out: their texts get the model's own prompt, "
                f"{prompt!r}, which has no place for one. Fix: query_prompt={prompt!r} of the task, if that is meant; "
                f"or one with a place, such as query_prompt={NV_EMBED!r}."
            )

    def sources(
        self, data: Iterable[tuple[str, Dataset]], batch_size: int, args: LLMEmbedTrainingArguments
    ) -> list[Source]:
        """The tasks' rows, for the sampler.

        Args:
            data: each task's name and rows, in the order in which they are concatenated.
            batch_size: rows of a batch of one process.
            args: the training arguments.

        Raises:
            ValueError: for rows that have no negatives, neither of their own nor in their batch.
        """
        sources = [
            Source(
                name,
                rows,
                distinct=self.groups[name] != NONE and len(text_columns(rows.column_names)) > 1,
                weight=self.tasks[name].weight,
                by_length=args.by_length,
            )
            for name, rows in data
        ]
        whole = sum(len(source.rows) for source in sources)
        for source in sources:
            together = min(batch_size, (whole if args.blended else len(source.rows)) // args.world_size)
            together *= args.world_size if args.gather_across_devices else 1
            alone = source.distinct and len(text_columns(source.rows.column_names)) == 2 and together == 1
            if alone and args.contrastive_weight:
                raise ValueError(
                    f"Task {source.name!r} has no negatives of its own, and a batch of one row has no others: its "
                    "loss is 0. Raise per_device_train_batch_size, or mine some (st-llm-embed mine)."
                )
        return sources


def check_blended_prompts(
    prompts: Mapping[str, Mapping[str, str]], data: Mapping[str, Dataset], model: BaseModel
) -> None:
    """Check that the model's pooling can leave out the prompts of blended rows.

    Args:
        prompts: by task and column.
        data: the data sets by task.
        model: the model to train.

    Raises:
        ValueError: if it leaves out one prompt for a whole batch, and there are several.
    """
    by_task = [
        {column: prompts[name].get(column) for column in text_columns(rows.column_names)}
        for name, rows in data.items()
    ]
    if any(own != by_task[0] for own in by_task) and leaves_out_one_prompt(model):
        raise ValueError(
            "blended=True puts rows of different prompts into a batch, and Pooling(include_prompt=False) can "
            "leave out only one prompt for all of them. Set blended=False, pool the prompts too "
            "(model.set_pooling_include_prompt(True)), or make the model with build_model."
        )


@cache  # a run makes each stage's trainer twice, to try it first
def _warn_once(message: str) -> None:
    logger.warning(message)


def distillation_loss(loss: nn.Module) -> DistillationLoss | None:
    """The loss itself, or the one that it is around."""
    return next((module for module in loss.modules() if isinstance(module, DistillationLoss)), None)


def contrastive_loss(loss: nn.Module) -> InstructionContrastiveLoss | None:
    """The loss itself, or the one that it is around."""
    return next((module for module in loss.modules() if isinstance(module, InstructionContrastiveLoss)), None)
