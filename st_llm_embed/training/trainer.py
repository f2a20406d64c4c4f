"""SentenceTransformerTrainer that takes tasks: they set the prompts, the batches, the negatives, the saved prompts.

With ``tasks``, NV-Embed's two stages (arXiv 2405.17428, section 4) differ in one switch: stage 1 uses in-batch
negatives where the task allows them, stage 2 never does. Without ``tasks`` this is the host's trainer, with its data
checked and its streams shuffled. Either way what is given and would have no effect is refused, and a loss that is no
number ends the run, and says where.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base import BaseModel
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from st_llm_embed.data.columns import SCORES, check_classes, check_mntp_columns, check_pretext_columns
from st_llm_embed.data.columns import TEACHER_EMBEDDING as COLUMN
from st_llm_embed.hub import publish
from st_llm_embed.losses import DistillationLoss, MNTPLoss, PretextLoss
from st_llm_embed.tasks import Task
from st_llm_embed.teaching.embeddings import TeacherEmbeddings, brings_embeddings
from st_llm_embed.teaching.teacher import Teaching, embeddings_of
from st_llm_embed.training.collator import TaskCollator
from st_llm_embed.training.sampler import TaskBatchSampler
from st_llm_embed.training.sharding import prepare_for_sharding, whole_weights
from st_llm_embed.training.task_loss import task_loss
from st_llm_embed.training.task_plan import TaskPlan, check_blended_prompts, contrastive_loss, distillation_loss
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments
from st_llm_embed.weights.saved import is_quantized, load_saved

SHUFFLE_BUFFER = 10_000  # rows of a stream: those of some hundred documents
AnyDataset: TypeAlias = Dataset | IterableDataset | DatasetDict | dict[str, Dataset]


class LLMEmbedTrainer(SentenceTransformerTrainer):
    """The host's trainer with NV-Embed's stages and data checks.

    Args:
        model: the model to train: a SentenceTransformer, MultiVectorEncoder or SparseEncoder.
        args: ``LLMEmbedTrainingArguments``; what they add to the host's is read with ``tasks`` only.
        train_dataset: with ``tasks``, a dict from task name to a data set of ``anchor``, ``positive``,
            ``negative_1..n``, and perhaps ``label``, the class. A stream is shuffled in a buffer of 10,000 rows.
        eval_dataset: likewise, each with as many negatives as it has.
        loss: as in the host. With ``tasks``, what ``task_loss`` makes of ``args``, or one of your own: with settings
            of its own, or around it, such as ``MatryoshkaLoss``.
        tasks: one ``Task`` for each data set. Its instruction goes into the template that the model's prompts show;
            where they have no place for one, a warning says so.
        teacher: a ``Teacher``, whose vectors of all texts are taken before the training; without one, data sets may
            bring some in columns of lists, ``anchor_teacher_embedding`` beside ``anchor``. Either way rows of a
            single text will do: ``text``, a document, or ``anchor``, a query. Rows may have ``scores`` of their
            documents, which ``args.soft_label_weight`` reads.
        **kwargs: the host's other arguments.

    Raises:
        ValueError: for data sets and tasks that do not match, misnamed columns, empty rows, labels that are no
            classes, a task that has neither negatives of its own nor in-batch ones, ``tasks`` together with
            ``args.prompts``, ``args.router_mapping``, a collator or a loss that does not read whose negatives are
            whose, arguments without effect, blended prompts that the model's pooling cannot leave out, or neither
            ``tasks`` nor a loss; for a teacher of another width than the model's, or that is the model; vectors or
            scores that are not finite or too few, or that no loss reads; or that a model of several or of sparse
            vectors cannot learn.
        FloatingPointError: in training, when the loss is not finite.
    """

    training_args_class = LLMEmbedTrainingArguments

    def __init__(
        self,
        model: BaseModel | None = None,
        args: LLMEmbedTrainingArguments | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | None = None,
        loss: nn.Module | dict[str, nn.Module] | Callable[[Any], nn.Module] | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        teacher: Teaching | None = None,
        data_collator: BaseDataCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LLMEmbedTrainingArguments | None):
            raise ValueError(f"args is {type(args).__name__}. LLMEmbedTrainer takes LLMEmbedTrainingArguments.")
        self.plan: TaskPlan | None = None
        self.own_loss, self.own_collator = loss is not None, data_collator is not None
        self.teacher_embeddings: list[Mapping[str, TeacherEmbeddings]] = []
        self.teacher = teacher
        self.taught = teacher is not None or any(map(brings_embeddings, _named(train_dataset)))
        if isinstance(teacher, nn.Module):
            raise ValueError("teacher= takes a Teacher, which keeps the vectors: Teacher(model, 'vectors').")
        if self.taught and tasks is None:
            raise ValueError("A teacher's vectors are read with tasks=[Task(...), ...] only, and there are none.")
        if teacher is not None and getattr(teacher, "model", None) is model:
            raise ValueError("The teacher is the student. Give another model, which knows more.")
        if tasks is not None:
            if args is not None and (args.prompts or args.router_mapping):
                raise ValueError(
                    "tasks= sets the prompts and the router mapping itself: leave out args.prompts and "
                    "args.router_mapping."
                )
            if data_collator is not None:
                raise ValueError("tasks= brings its own collator: leave out data_collator.")
            args = _own_copy(args)
            if isinstance(loss, dict) and args.blended:
                raise ValueError(
                    "In blended batches all tasks have one loss. Give one, or set blended=False for a loss by task."
                )
            self.plan = TaskPlan(tasks, args)
        elif isinstance(loss, PretextLoss) and loss.prefix and (args is None or not args.prompts):
            args = _own_copy(args)
            args.prompts = {"text": loss.prefix + "{text}"}
        if args is not None:
            args.check_effect(tasks, self.own_loss, self.taught, None if model is None else type(model))
        super().__init__(model, args, train_dataset, eval_dataset, loss, data_collator=data_collator, **kwargs)
        if self.is_fsdp_enabled:
            prepare_for_sharding(self.model)
        self._save_prompts()

    def _save_prompts(self) -> None:
        if self.plan is not None:
            if self.is_world_process_zero():
                self.plan.warn_of_instructions(self.model)
            self.model.prompts.update(self.plan.encoding_prompts(self.model))

    def _hp_search_setup(self, trial: Any) -> None:
        # NOTE: with model_init each run makes a model, and a trial of a search sets its arguments only then.
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        tasks = self.plan and self.plan.tasks.values()
        self.args.check_effect(tasks, self.own_loss, self.taught, type(self.model))
        if self.plan is not None:
            self.plan.set_groups(self.args)
        if not self.own_collator:
            self.data_collator = self.get_data_collator(self.model, self.args)
        if not self.own_loss:
            callbacks = self.callback_handler.callbacks  # an earlier trial's would keep its model, and log its weights
            callbacks[:] = [one for one in callbacks if not isinstance(one, SpladeRegularizerWeightSchedulerCallback)]
            self.loss = self.prepare_loss(self.get_default_loss, self.model)
        self._save_prompts()

    def get_default_loss(self, model: BaseModel) -> nn.Module:
        if self.plan is None:
            return super().get_default_loss(model)
        return task_loss(model, self.args, in_batch_negatives=self.plan.in_batch_negatives, taught=self.taught)

    def prepare_loss(self, loss: Any, model: BaseModel) -> nn.Module:
        loss = super().prepare_loss(loss, model)
        if isinstance(loss, SpladeLoss):  # as the host's trainer of sparse models does: the weights grow from 0
            callbacks, growth = self.callback_handler.callbacks, SpladeRegularizerWeightSchedulerCallback
            if not any(isinstance(one, growth) and one.loss is loss for one in callbacks):
                callbacks.insert(1, growth(loss))
        return loss

    def override_model_in_loss(self, loss: nn.Module, model: nn.Module) -> nn.Module:
        # It reads the model when it is made. With model_init, each run has another model; other wrappers keep it.
        if isinstance(loss, PretextLoss | MNTPLoss) and isinstance(model, BaseModel):
            return type(loss)(model, lm_head=loss.lm_head, **loss.get_config_dict())
        return super().override_model_in_loss(loss, model)

    def preprocess_dataset(
        self, dataset: AnyDataset | None = None, dataset_name: str | None = None
    ) -> Dataset | IterableDataset | DatasetDict | None:
        if isinstance(dataset, dict):
            # The host sets its transform on the data sets it gets: the caller's stay as they are.
            dataset = DatasetDict({name: copy.copy(rows) for name, rows in dataset.items()})
        training = dataset_name == "train"
        if dataset is not None and self.plan is not None:
            self._read_tasks(dataset, training, self.plan)
        elif dataset is not None:
            self._check_columns(dataset, training)
            dataset = self._without_unread(dataset)
        if training and isinstance(dataset, IterableDataset):
            dataset = dataset.shuffle(seed=self.args.seed, buffer_size=SHUFFLE_BUFFER)
        return super().preprocess_dataset(dataset, dataset_name)

    def _read_tasks(self, dataset: AnyDataset, training: bool, plan: TaskPlan) -> None:
        """Check the tasks' data sets, and give their columns prompts."""
        if isinstance(dataset, Dataset) and len(dataset) and "dataset_name" in dataset[0]:
            return  # one of a dict that has been here
        if not isinstance(dataset, dict):
            raise ValueError(
                f"tasks= needs a dict of data sets by task name, such as {{{next(iter(plan.tasks))!r}: dataset}}; got "
                f"{type(dataset).__name__}."
            )
        if unknown := sorted(set(dataset) - set(plan.tasks)):
            raise ValueError(f"The data sets {unknown} have no task. Tasks: {sorted(plan.tasks)}.")
        for name, rows in dataset.items():
            loss = self.loss[name] if isinstance(self.loss, dict) else self.loss
            plan.check_loss(name, loss)
            distillation = distillation_loss(loss)
            needs_teacher = distillation is not None and distillation.needs_teacher
            contrastive = distillation is None or bool(distillation.weights["contrastive_weight"])
            plan.add_data(
                name,
                rows,
                training=training,
                blended=self.args.blended,
                taught=needs_teacher,
                contrastive=contrastive,
            )
            dataset[name] = self._with_teacher(name, rows, plan, distillation)
            weight = 0.0 if distillation is None else distillation.weights["soft_label_weight"]
            if SCORES in rows.column_names and not weight:
                raise ValueError(
                    f"Data set {name!r} has {SCORES}, which nothing reads. Say soft_label_weight=1.0 in the "
                    "training arguments, or leave the column out."
                )
            if training and weight and not any(SCORES in other.column_names for other in dataset.values()):
                raise ValueError(
                    f"soft_label_weight={weight} and no data set has a column {SCORES!r}, a list of numbers for "
                    "the documents of each row."
                )
        self.data_collator = self.get_data_collator(self.model, self.args)
        if training and self.args.blended:
            check_blended_prompts(self.args.prompts, dataset, self.model)

    def _with_teacher(self, name: str, rows: Dataset, plan: TaskPlan, loss: DistillationLoss | None) -> Dataset:
        """Rows that name their place among the teacher's vectors, instead of the vectors themselves.

        Raises:
            ValueError: for vectors that are missing, of another width than the model's where they are matched, or not
                read by the loss.
        """
        if "teacher_row" in rows.column_names:
            return rows  # which have been here
        brought = [column for column in rows.column_names if column.endswith(COLUMN)]
        needed = loss is not None and loss.needs_teacher
        if (brought or self.teacher is not None) and not needed:
            raise ValueError(
                f"A teacher says something of data set {name!r}, and the loss does not read it. Give distill_weight "
                "or score_weight a value, leave out a loss of your own, or give a DistillationLoss."
            )
        if loss is None or not needed:
            return rows
        width = self.model.get_embedding_dimension() if loss.weights["distill_weight"] else None
        embeddings = embeddings_of(rows, plan.tasks[name], self.teacher)
        for column, vectors in embeddings.items():
            if width is not None and vectors.dim != width:
                raise ValueError(
                    f"The teacher's vectors of {column!r} in data set {name!r} have {vectors.dim} dimensions, and the "
                    f"model's {width}. Give the model a projection into the teacher's space (st_llm_embed.teaching."
                    "align; in a configuration it has one unless projection: false), or take as many of the "
                    "teacher's first dimensions, if it is a Matryoshka one (truncate_dim)."
                )
        rows = rows.remove_columns(brought)
        rows = rows.add_column("teacher_source", np.full(len(rows), len(self.teacher_embeddings)))
        rows = rows.add_column("teacher_row", np.arange(len(rows)))
        self.teacher_embeddings.append(embeddings)
        return rows

    def _check_columns(self, dataset: AnyDataset, training: bool) -> None:
        """Has a data set without tasks what its loss reads?"""
        named = dataset if isinstance(dataset, dict) else {"train" if training else "eval": dataset}
        for name, rows in named.items():
            loss = self.loss.get(name) if isinstance(self.loss, dict) else self.loss
            columns = list(rows.column_names or [])
            labels = [column for column in self.data_collator.valid_label_columns if column in columns]
            if isinstance(loss, PretextLoss):
                check_pretext_columns(rows, name)
            elif isinstance(loss, MNTPLoss):
                check_mntp_columns(rows, name)
            elif not self.own_loss and (not labels or columns[:2] == ["anchor", "positive"]):
                raise ValueError(
                    f"Data set {name!r} has neither a task nor a loss. Pass tasks=[Task({name!r}, 'what to do, in one "
                    f"sentence')] and the data set as {{{name!r}: dataset}}, or a loss=."
                )
            elif labels and loss is not None and contrastive_loss(loss) is not None:
                check_classes(rows, name, labels[0], several=training)

    def _without_unread(self, dataset: AnyDataset) -> AnyDataset:
        """The texts alone of what is masked, as the host tokenizes every column."""
        if isinstance(dataset, dict):
            for name, rows in dataset.items():
                if isinstance(self.loss[name] if isinstance(self.loss, dict) else self.loss, MNTPLoss):
                    dataset[name] = rows.select_columns(["text"])
            return dataset
        return dataset.select_columns(["text"]) if isinstance(self.loss, MNTPLoss) else dataset

    def get_data_collator(
        self, model: BaseModel, args: LLMEmbedTrainingArguments, processing_class: Any = None
    ) -> BaseDataCollator:
        if self.plan is None:
            return super().get_data_collator(model, args, processing_class)
        args.prompts, args.router_mapping = self.plan.column_prompts(model)
        return TaskCollator(
            preprocess_fn=model.preprocess,
            prompts=args.prompts,
            router_mapping=args.router_mapping,
            groups=self.plan.groups,
            num_negatives=self.plan.num_negatives,
            pairs=self.plan.pairs,
            teacher=self.teacher_embeddings,
            tokenizer=model.tokenizer,
        )

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[BatchSampler], generator: Any = None, seed: int | None = 0
    ) -> BatchSampler | TaskBatchSampler:
        if self.plan is None:
            return super().get_multi_dataset_batch_sampler(dataset, batch_samplers, generator, seed)
        batch_size = batch_samplers[0].batch_size
        named = zip(self.train_dataset, dataset.datasets, strict=True)
        return TaskBatchSampler(
            self.plan.sources(named, batch_size, self.args),
            batch_size,
            self.args.world_size,
            self.args.blended,
            self.args.sampling_temperature,
            seed or 0,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super().train(*args, **kwargs)
        if self.state.global_step == 0 < self.state.max_steps:
            raise ValueError(
                "Nothing was trained: the data gave no batch. Look at the rows that the stream gives, "
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} and dataloader_drop_last="
                f"{self.args.dataloader_drop_last}."
            )
        return output

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
        of_data = self.loss[where["dataset_name"]] if isinstance(self.loss, dict) else self.loss
        if (distillation := distillation_loss(of_data)) is not None:
            self.track_loss_components(distillation.take_parts())
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
            token, self.args.hub_token = self.args.hub_token, None  # the arguments are saved too
            try:
                with whole_weights(self.model, (state_dict or {}) if self.is_fsdp_enabled else {}):
                    super()._save(output_dir, state_dict)
            finally:
                self.args.hub_token = token

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        # NOTE: sentence-transformers 6.2 takes no model, which transformers gives under FSDP, and loads no shards.
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, checkpoint_path, self.model)
        elif is_quantized(self.model):  # whose state the host would compare with a plain one
            load_saved(self.model, checkpoint_path)
        else:
            super()._load_from_checkpoint(checkpoint_path)

    @contextmanager
    def whole_model(self) -> Iterator[BaseModel]:
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
            commit_message=commit_message or "End of training",
            **kwargs,
        )


def _named(data: AnyDataset | None) -> list[Dataset | IterableDataset]:
    return list(data.values()) if isinstance(data, dict) else [] if data is None else [data]


def _own_copy(args: LLMEmbedTrainingArguments | None) -> LLMEmbedTrainingArguments:
    """Arguments to set the prompts of: the caller's stay as they are."""
    return copy.copy(args) if args else LLMEmbedTrainingArguments(output_dir="tmp_trainer")
