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
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.modules import Module
from sentence_transformers.util import fullname
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from st_llm_embed.collator import TaskCollator
from st_llm_embed.data.columns import check_classes, check_contrastive_columns, check_pretext_columns, text_columns
from st_llm_embed.hub import publish
from st_llm_embed.hub.trust import MODULES, demand_data, loading
from st_llm_embed.losses import InstructionContrastiveLoss, PretextLoss
from st_llm_embed.losses.instruction_contrastive import NONE
from st_llm_embed.losses.length_groups import leaves_out_one_prompt
from st_llm_embed.quantized import is_quantized
from st_llm_embed.sampler import Source, TaskBatchSampler
from st_llm_embed.sharding import prepare_for_sharding, whole_weights
from st_llm_embed.tasks import Task, encoding_prompts
from st_llm_embed.training_args import LLMEmbedTrainingArguments

SHUFFLE_BUFFER = 10_000  # rows of a stream: those of some hundred documents
AnyDataset = Dataset | IterableDataset | DatasetDict | dict[str, Dataset]


class LLMEmbedTrainer(SentenceTransformerTrainer):
    """The host's trainer with NV-Embed's stages and data checks.

    Args:
        model: the model to train.
        args: ``LLMEmbedTrainingArguments``; what they add to the host's is read with ``tasks`` only.
        train_dataset: with ``tasks``, a dict from task name to a data set of ``anchor``, ``positive``,
            ``negative_1..n``, and perhaps ``label``, the class. A stream is shuffled in a buffer of 10,000 rows.
        eval_dataset: likewise, each with as many negatives as it has.
        loss: as in the host. With ``tasks``, ``InstructionContrastiveLoss`` as ``args`` say, or one of your own: with
            settings of its own, or around it, such as ``MatryoshkaLoss``.
        tasks: one ``Task`` for each data set.
        **kwargs: the host's other arguments.

    Raises:
        ValueError: for data sets and tasks that do not match, misnamed columns, empty rows, labels that are no
            classes, a task that has neither negatives of its own nor in-batch ones, ``tasks`` together with
            ``args.prompts``, ``args.router_mapping``, a collator or a loss that does not read whose negatives are
            whose, arguments without effect, blended prompts that the model's pooling cannot leave out, or neither
            ``tasks`` nor a loss.
        FloatingPointError: in training, when the loss is not finite.
    """

    training_args_class = LLMEmbedTrainingArguments

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: LLMEmbedTrainingArguments | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | None = None,
        loss: nn.Module | dict[str, nn.Module] | Callable[[SentenceTransformer], nn.Module] | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        data_collator: BaseDataCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LLMEmbedTrainingArguments | None):
            raise ValueError(f"args is {type(args).__name__}. LLMEmbedTrainer takes LLMEmbedTrainingArguments.")
        self.tasks = None if tasks is None else _by_name(tasks)
        self.own_loss, self.own_collator = loss is not None, data_collator is not None
        if self.tasks is not None:
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
            self.columns: dict[str, list[str]] = {}  # of text, that have been seen in each data set
            self.num_negatives = 0
            self._read_arguments(args)
        elif isinstance(loss, PretextLoss) and loss.prefix and (args is None or not args.prompts):
            args = _own_copy(args)
            args.prompts = {"text": loss.prefix + "{text}"}
        if args is not None:
            args.demand_effect(tasks, self.own_loss)
        super().__init__(model, args, train_dataset, eval_dataset, loss, data_collator=data_collator, **kwargs)
        if self.is_fsdp_enabled:
            prepare_for_sharding(self.model)
        self._save_prompts()

    def _read_arguments(self, args: LLMEmbedTrainingArguments) -> None:
        """The group in which a task's rows are each other's negatives."""
        self.groups = {
            name: place if args.in_batch(task) else NONE for place, (name, task) in enumerate(self.tasks.items())
        }

    def _save_prompts(self) -> None:
        if self.tasks is not None:
            self.model.prompts.update(_encoding_prompts(self.tasks, self.model))

    def _hp_search_setup(self, trial: Any) -> None:
        # NOTE: with model_init each run makes a model, and a trial of a search sets its arguments only then.
        super()._hp_search_setup(trial)
        if self.model_init is None:
            return
        self.args.demand_effect(self.tasks and self.tasks.values(), self.own_loss)
        if self.tasks is not None:
            self._read_arguments(self.args)
        if not self.own_collator:
            self.data_collator = self.get_data_collator(self.model, self.args)
        if not self.own_loss:
            self.loss = self.prepare_loss(self.get_default_loss, self.model)
        self._save_prompts()

    def get_default_loss(self, model: SentenceTransformer) -> nn.Module:
        if self.tasks is None:
            return super().get_default_loss(model)
        return InstructionContrastiveLoss(
            model,
            scale=1 / self.args.temperature,
            in_batch_negatives=any(group != NONE for group in self.groups.values()),
            false_negative_margin=self.args.false_negative_margin,
            mini_batch_size=self.args.mini_batch_size,
            gather_across_devices=self.args.gather_across_devices,
        )

    def override_model_in_loss(self, loss: nn.Module, model: nn.Module) -> nn.Module:
        # It reads the model when it is made. With model_init, each run has another model; other wrappers keep it.
        if isinstance(loss, PretextLoss) and isinstance(model, SentenceTransformer):
            return type(loss)(model, lm_head=loss.lm_head, **loss.get_config_dict())
        return super().override_model_in_loss(loss, model)

    def preprocess_dataset(
        self, dataset: AnyDataset | None = None, dataset_name: str | None = None
    ) -> Dataset | IterableDataset | DatasetDict | None:
        if isinstance(dataset, dict):
            # The host sets its transform on the data sets it gets: the caller's stay as they are.
            dataset = DatasetDict({name: copy.copy(rows) for name, rows in dataset.items()})
        training = dataset_name == "train"
        if dataset is not None and self.tasks is not None:
            self._read_tasks(dataset, training)
        elif dataset is not None:
            self._check_columns(dataset, training)
        if training and isinstance(dataset, IterableDataset):
            dataset = dataset.shuffle(seed=self.args.seed, buffer_size=SHUFFLE_BUFFER)
        return super().preprocess_dataset(dataset, dataset_name)

    def _read_tasks(self, dataset: AnyDataset, training: bool) -> None:
        """Check the tasks' data sets, and give their columns prompts."""
        if isinstance(dataset, Dataset) and len(dataset) and "dataset_name" in dataset[0]:
            return  # one of a dict that has been here
        if not isinstance(dataset, dict):
            raise ValueError(
                f"tasks= needs a dict of data sets by task name, such as {{{next(iter(self.tasks))!r}: dataset}}; got "
                f"{type(dataset).__name__}."
            )
        if unknown := sorted(set(dataset) - set(self.tasks)):
            raise ValueError(f"The data sets {unknown} have no task. Tasks: {sorted(self.tasks)}.")
        for name, rows in dataset.items():
            check_contrastive_columns(rows, name, self.tasks[name].negatives if training else None)
            columns = text_columns(rows.column_names)
            if training and "label" in rows.column_names:
                check_classes(rows, name, several=True)
            if self.groups[name] == NONE and len(columns) == 2:
                raise ValueError(
                    f"Task {name!r} is trained without in-batch negatives, and its data set has no negatives. Mine "
                    "some (st-llm-embed mine), or allow in-batch ones in stage 1: "
                    f"Task({name!r}, ..., in_batch_negatives=True)."
                )
            self._check_loss(name)
            self.columns[name] = list(dict.fromkeys([*self.columns.get(name, []), *columns]))
            if training and self.args.blended:
                # Each batch has as many columns as the task with the most, on every process.
                self.num_negatives = max(self.num_negatives, len(columns) - 2)
        self.data_collator = self.get_data_collator(self.model, self.args)
        if training and self.args.blended:
            prompts = [
                {column: self.args.prompts[name].get(column) for column in text_columns(rows.column_names)}
                for name, rows in dataset.items()
            ]
            if any(own != prompts[0] for own in prompts) and leaves_out_one_prompt(self.model):
                raise ValueError(
                    "blended=True puts rows of different prompts into a batch, and Pooling(include_prompt=False) can "
                    "leave out only one prompt for all of them. Set blended=False, pool the prompts too "
                    "(model.set_pooling_include_prompt(True)), or make the model with build_model."
                )

    def _check_loss(self, name: str) -> None:
        """Does the loss of a task's data set keep to the task?"""
        loss = self.loss[name] if isinstance(self.loss, dict) else self.loss
        inner = _contrastive_loss(loss)
        if inner is None:
            raise ValueError(
                f"{type(loss).__name__} does not read which rows are each other's negatives, which texts are missing "
                "and which classes there are, as tasks= demand. Fix: InstructionContrastiveLoss(model), which is "
                "MultipleNegativesRankingLoss where in-batch negatives are on, alone or inside a loss such as "
                "MatryoshkaLoss; or train without tasks=, with prompts= in the arguments."
            )
        if self.groups[name] != NONE and not inner.in_batch_negatives:
            raise ValueError(
                f"Task {name!r} has in-batch negatives, and the loss in_batch_negatives=False. Fix: "
                "InstructionContrastiveLoss(model), or in_batch_negatives=False in the training arguments."
            )

    def _check_columns(self, dataset: AnyDataset, training: bool) -> None:
        """Has a data set without tasks what its loss reads?"""
        named = dataset if isinstance(dataset, dict) else {"train" if training else "eval": dataset}
        for name, rows in named.items():
            loss = self.loss.get(name) if isinstance(self.loss, dict) else self.loss
            columns = list(rows.column_names or [])
            labels = [column for column in self.data_collator.valid_label_columns if column in columns]
            if isinstance(loss, PretextLoss):
                check_pretext_columns(rows, name)
            elif not self.own_loss and (not labels or columns[:2] == ["anchor", "positive"]):
                raise ValueError(
                    f"Data set {name!r} has neither a task nor a loss. Pass tasks=[Task({name!r}, 'what to do, in one "
                    f"sentence')] and the data set as {{{name!r}: dataset}}, or a loss=."
                )
            elif labels and loss is not None and _contrastive_loss(loss) is not None:
                check_classes(rows, name, labels[0], several=training)

    def get_data_collator(
        self, model: SentenceTransformer, args: LLMEmbedTrainingArguments, processing_class: Any = None
    ) -> BaseDataCollator:
        if self.tasks is None:
            return super().get_data_collator(model, args, processing_class)
        prompts = model.prompts | _encoding_prompts(self.tasks, model)
        args.prompts, args.router_mapping = {}, {}
        for name, columns in self.columns.items():
            args.prompts[name] = self.tasks[name].column_prompts(columns, prompts, model.default_prompt_name)
            # With it, the backbone's query_length and document_length hold in training as in encode_query.
            args.router_mapping[name] = self.tasks[name].column_sides(columns)
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
        batch_size, processes = batch_samplers[0].batch_size, self.args.world_size
        sources = [
            Source(name, rows, distinct=self.groups[name] != NONE, weight=self.tasks[name].weight)
            for name, rows in zip(self.train_dataset, dataset.datasets, strict=True)
        ]
        for source in sources:
            together = min(batch_size, len(dataset if self.args.blended else source.rows) // processes)
            together *= processes if self.args.gather_across_devices else 1
            if source.distinct and len(text_columns(source.rows.column_names)) == 2 and together == 1:
                raise ValueError(
                    f"Task {source.name!r} has no negatives of its own, and a batch of one row has no others: its "
                    "loss is 0. Raise per_device_train_batch_size, or mine some (st-llm-embed mine)."
                )
        return TaskBatchSampler(
            sources, batch_size, processes, self.args.blended, self.args.sampling_temperature, seed
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
                with whole_weights(self.model, state_dict if self.is_fsdp_enabled else {}):
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


def _by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks) or not tasks:
        raise ValueError(f"tasks= takes one task or more, each with a name of its own; got {[t.name for t in tasks]}.")
    return by_name


def _encoding_prompts(tasks: Mapping[str, Task], model: SentenceTransformer) -> dict[str, str]:
    return encoding_prompts(tasks.values(), model.prompts, model.default_prompt_name)


def _contrastive_loss(loss: nn.Module) -> InstructionContrastiveLoss | None:
    """The loss itself, or the one that it is around."""
    return next((module for module in loss.modules() if isinstance(module, InstructionContrastiveLoss)), None)


def _own_copy(args: LLMEmbedTrainingArguments | None) -> LLMEmbedTrainingArguments:
    """Arguments to set the prompts of: the caller's stay as they are."""
    return copy.copy(args) if args else LLMEmbedTrainingArguments(output_dir="tmp_trainer")


def load_saved(model: SentenceTransformer, folder: str | Path) -> None:
    """Load the weights and prompts of a folder that ``model`` was saved to, and run no code of that folder.

    Raises:
        ValueError: if the folder does not hold data alone, or cannot be loaded.
        RuntimeError: if its weights are not the model's, but for what is frozen in a quantized one.
    """
    demand_data(Path(folder))
    own = {fullname(module): type(module) for module in model.modules() if isinstance(module, Module)}
    with loading(folder):
        saved = SentenceTransformer._load_with_module_classes(str(folder), {**MODULES, **own}, device="cpu")
    weights = saved.state_dict()
    if is_quantized(model):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = {name for name, _ in model.named_parameters()} - trained
        own = {name: tensor for name, tensor in weights.items() if name not in frozen}
        missing, unexpected = model.load_state_dict(own, strict=False)
        if wrong := sorted(trained.intersection(missing)) + unexpected:
            raise RuntimeError(
                f"{folder} does not hold the weights of this model: {wrong[:5]} are missing or too many."
            )
    else:
        model.load_state_dict(weights)
    model.prompts = saved.prompts
