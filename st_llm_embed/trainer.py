"""SentenceTransformerTrainer that takes tasks: they set the prompts, the batches, the negatives, the saved prompts.

With ``tasks``, NV-Embed's two stages (arXiv 2405.17428, section 4) differ in one switch: stage 1 uses in-batch
negatives where the task allows them, stage 2 never does. Without ``tasks`` this is the host's trainer, with its data
checked. Either way a loss that is not a number ends the run, and says where.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import Trainer

from st_llm_embed.collator import TaskCollator
from st_llm_embed.data.columns import check_contrastive_columns, check_pretext_columns, text_columns
from st_llm_embed.hub import publish
from st_llm_embed.losses import InstructionContrastiveLoss, PretextLoss
from st_llm_embed.losses.instruction_contrastive import NONE
from st_llm_embed.losses.length_groups import leaves_out_one_prompt
from st_llm_embed.quantized import is_quantized, load_saved
from st_llm_embed.sampler import Source, TaskBatchSampler
from st_llm_embed.sharding import prepare_for_sharding, whole_weights
from st_llm_embed.tasks import Task, encoding_prompts
from st_llm_embed.training_args import LLMEmbedTrainingArguments

AnyDataset = Dataset | IterableDataset | DatasetDict | dict[str, Dataset]


class LLMEmbedTrainer(SentenceTransformerTrainer):
    """The host's trainer with NV-Embed's stages and data checks.

    Args:
        model: the model to train.
        args: ``LLMEmbedTrainingArguments``; what they add to the host's is read with ``tasks`` only.
        train_dataset: with ``tasks``, a dict from task name to a data set of ``anchor``, ``positive``,
            ``negative_1..n``, and perhaps ``label``, the class.
        eval_dataset: likewise.
        loss: as in the host. With ``tasks``, ``InstructionContrastiveLoss`` as ``args`` say, or one of your own, such
            as ``MatryoshkaLoss`` around it.
        tasks: one ``Task`` for each data set.
        **kwargs: the host's other arguments.

    Raises:
        ValueError: for data sets and tasks that do not match, misnamed columns, empty rows, a task that has neither
            negatives of its own nor in-batch ones, ``tasks`` together with ``args.prompts`` or
            ``args.router_mapping``, or blended prompts that the model's pooling cannot leave out.
        FloatingPointError: in training, when the loss is not finite.
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
        self.tasks = None if tasks is None else {task.name: task for task in tasks}
        if self.tasks is not None:
            if args is not None and (args.prompts or args.router_mapping):
                raise ValueError(
                    "tasks= sets the prompts and the router mapping itself: leave out args.prompts and "
                    "args.router_mapping."
                )
            args = _own_copy(args)
            self.groups = {
                name: place if _in_batch(task, args) else NONE for place, (name, task) in enumerate(self.tasks.items())
            }
            model_prompts = model.prompts if model is not None else {}
            columns: dict[str, list[str]] = {}
            for dataset in (train_dataset, eval_dataset):
                if dataset is not None:
                    columns |= self._check_tasks(dataset)
            args.prompts = {name: self.tasks[name].column_prompts(own, model_prompts) for name, own in columns.items()}
            # With it, the backbone's query_length and document_length hold in training as in encode_query.
            args.router_mapping = {name: self.tasks[name].column_sides(own) for name, own in columns.items()}
            # In blended batches each has as many columns as the task with the most, on every process.
            self.num_negatives = max(map(len, columns.values())) - 2 if args.blended else None
            if loss is None:
                loss = InstructionContrastiveLoss(
                    model,
                    scale=1 / args.temperature,
                    in_batch_negatives=any(group != NONE for group in self.groups.values()),
                    false_negative_margin=args.false_negative_margin,
                    mini_batch_size=args.mini_batch_size,
                    gather_across_devices=args.gather_across_devices,
                )
        elif isinstance(loss, PretextLoss):
            for name, rows in _as_dict(train_dataset).items():
                check_pretext_columns(rows, name)
            if loss.prefix and (args is None or not args.prompts):
                args = _own_copy(args)
                args.prompts = {"text": loss.prefix + "{text}"}
        super().__init__(model, args, train_dataset, eval_dataset, loss, **kwargs)
        if self.is_fsdp_enabled:
            prepare_for_sharding(self.model)
        if tasks is not None:
            _check_pooling(self.model, self.args)
            self.model.prompts.update(encoding_prompts(tasks, self.model.prompts))

    def _check_tasks(self, dataset: AnyDataset) -> dict[str, list[str]]:
        """Each data set's columns of text, after checking them."""
        if not isinstance(dataset, dict):
            raise ValueError(
                f"tasks= needs a dict of data sets by task name, such as {{{next(iter(self.tasks))!r}: dataset}}; got "
                f"{type(dataset).__name__}."
            )
        if unknown := sorted(set(dataset) - set(self.tasks)):
            raise ValueError(f"The data sets {unknown} have no task. Tasks: {sorted(self.tasks)}.")
        for name, rows in dataset.items():
            check_contrastive_columns(rows, name, self.tasks[name].negatives)
            if self.groups[name] == NONE and len(text_columns(rows.column_names)) == 2:
                raise ValueError(
                    f"Task {name!r} is trained without in-batch negatives, and its data set has no negatives. Mine "
                    "some (st-llm-embed mine), or allow in-batch ones in stage 1: "
                    f"Task({name!r}, ..., in_batch_negatives=True)."
                )
        return {name: text_columns(rows.column_names) for name, rows in dataset.items()}

    def get_data_collator(
        self, model: SentenceTransformer, args: LLMEmbedTrainingArguments, processing_class: Any = None
    ) -> BaseDataCollator:
        if self.tasks is None:
            return super().get_data_collator(model, args, processing_class)
        return TaskCollator(
            preprocess_fn=model.preprocess,
            prompts=args.prompts,
            router_mapping=args.router_mapping,
            groups=self.groups,
            num_negatives=self.num_negatives,
            tokenizer=model.tokenizer,
        )

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[BatchSampler], generator: Any = None, seed: int | None = 0
    ) -> BatchSampler | TaskBatchSampler:
        if self.tasks is None:
            return super().get_multi_dataset_batch_sampler(dataset, batch_samplers, generator, seed)
        names = list(self.train_dataset)
        return TaskBatchSampler(
            [
                Source(name, rows, distinct=self.groups[name] != NONE, weight=self.tasks[name].weight)
                for name, rows in zip(names, dataset.datasets, strict=True)
            ],
            batch_samplers[0].batch_size,
            self.args.world_size,
            self.args.blended,
            self.args.sampling_temperature,
            seed,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        where = dict(inputs)  # the host takes the data set's name out
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not loss.isfinite():
            raise FloatingPointError(self._describe(loss, where))
        return result

    def _describe(self, loss: Tensor, inputs: dict[str, Any]) -> str:
        """Where a loss became infinite or no number: the step, the task and the first texts."""
        first = next(key for key in inputs if key.endswith("_input_ids"))
        texts = self.processing_class.batch_decode(inputs[first][:3], skip_special_tokens=True)
        task = f" of task {inputs['dataset_name']!r}" if "dataset_name" in inputs else ""
        return (
            f"The loss{task} is {loss.item()} at step {self.state.global_step + 1}. Its batch begins with the texts "
            f"{[text[:200] for text in texts]}. Lower the learning rate, raise the temperature, train in bf16 instead "
            "of fp16, or look at these rows."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # NOTE: transformers 5 calls this on all processes; sentence-transformers 6.2 believes that it is on the first
        # alone, and they would write the same files at once.
        if self.args.should_save:
            with whole_weights(self.model, state_dict if self.is_fsdp_enabled else {}):
                super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        # NOTE: sentence-transformers 6.2 takes no model, which transformers gives under FSDP, and loads no shards.
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, checkpoint_path, self.model)
        elif is_quantized(self.model):  # whose state the host would compare with a plain one
            load_saved(self.model, checkpoint_path)
        else:
            super()._load_from_checkpoint(checkpoint_path)

    @contextmanager
    def whole_model(self) -> Iterator[SentenceTransformer]:
        """The model, for the first process to save. All processes must enter: FSDP's shards are gathered."""
        weights = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else {}
        with whole_weights(self.model, weights):
            yield self.model

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

        Raises:
            ValueError: under FSDP.
        """
        if self.is_fsdp_enabled:
            raise ValueError(
                "Under FSDP no process has the whole model, and it cannot be published from the trainer. Save it "
                "(trainer.save_model(folder)), and publish the folder: st-llm-embed publish FOLDER ORG/NAME."
            )
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


def _in_batch(task: Task, args: LLMEmbedTrainingArguments) -> bool:
    if args.in_batch_negatives is not None:
        return args.in_batch_negatives
    return args.stage == 1 and bool(task.in_batch_negatives)


def _check_pooling(model: SentenceTransformer, args: LLMEmbedTrainingArguments) -> None:
    """Without an LLMBackbone, the host's pooling leaves one prompt out of a whole batch: with several it would pool
    them without a word."""
    several = len({frozenset(prompts.items()) for prompts in args.prompts.values()}) > 1
    if args.blended and several and leaves_out_one_prompt(model):
        raise ValueError(
            "blended=True puts rows of different prompts into a batch, and Pooling(include_prompt=False) can leave "
            "out only one prompt for all of them. Set blended=False, pool the prompts too "
            "(model.set_pooling_include_prompt(True)), or make the model with build_model."
        )


def _own_copy(args: LLMEmbedTrainingArguments | None) -> LLMEmbedTrainingArguments:
    """Arguments to set the prompts of: the caller's stay as they are."""
    return copy.copy(args) if args else LLMEmbedTrainingArguments(output_dir="tmp_trainer")


def _as_dict(dataset: AnyDataset | None) -> dict[str, Dataset | IterableDataset]:
    return dataset if isinstance(dataset, dict) else {} if dataset is None else {"train": dataset}
