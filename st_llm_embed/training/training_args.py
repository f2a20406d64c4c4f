"""Training arguments: sentence-transformers' own, and the decisions of NV-Embed's recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer_utils import HubStrategy

from st_llm_embed.tasks import Task

OF_THE_LOSS = ("temperature", "false_negative_margin", "mini_batch_size", "gather_across_devices", "spread_weight")
OF_IN_BATCH_NEGATIVES = ("false_negative_margin", "gather_across_devices")
OF_THE_HOSTS_BATCHES = ("batch_sampler", "multi_dataset_batch_sampler")
NOT_OF_THE_HOST = ("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy")


@dataclass
class LLMEmbedTrainingArguments(SentenceTransformerTrainingArguments):
    """Adds what ``LLMEmbedTrainer`` reads where it gets ``tasks``.

    Args:
        stage: NV-Embed's stage: 1 for retrieval with in-batch and hard negatives; 2 for everything blended, own hard
            negatives only.
        temperature: the temperature of the contrastive loss.
        in_batch_negatives: whether every task has in-batch negatives. Default: in stage 1 where the task allows
            them, in stage 2 nowhere.
        blended: whether a batch draws from all tasks, as NV-Embed's do, or a step from one, the same on all processes.
            Default: in stage 2.
        sampling_temperature: the temperature of the tasks' shares, which go by their sizes to the power 1 / this;
            above 1 they are more even.
        false_negative_margin: the share of the positive's score, such as 0.95, above which in-batch negatives are left
            out.
        mini_batch_size: how many texts to embed at a time, twice, to fit a large batch into memory (GradCache).
        gather_across_devices: whether other processes' rows count for in-batch negatives.
        spread_weight: the weight of the spread-out regulariser, such as 0.1, which keeps vectors apart and so lets
            them be compressed. Default: without it.

    Raises:
        ValueError: for another stage, a number that is not positive, or ``push_to_hub`` during training.
    """

    stage: int = field(default=1, metadata={"help": "1: in-batch and hard negatives. 2: own hard negatives only."})
    temperature: float = field(default=0.02, metadata={"help": "Temperature of the contrastive loss."})
    in_batch_negatives: bool | None = field(default=None, metadata={"help": "For every task. Default: by stage."})
    blended: bool | None = field(default=None, metadata={"help": "All tasks in a batch. Default: in stage 2."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Tasks' shares by size ** (1 / this)."})
    false_negative_margin: float | None = field(default=None, metadata={"help": "Share of the positive's score."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Texts embedded at a time (GradCache)."})
    gather_across_devices: bool = field(default=False, metadata={"help": "In-batch negatives of all processes."})
    spread_weight: float | None = field(default=None, metadata={"help": "Weight of the spread-out regulariser."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage={self.stage!r} is unknown. Valid stages: 1 (retrieval, in-batch and hard negatives) and 2 "
                "(everything, own hard negatives only)."
            )
        for name in (
            "temperature",
            "sampling_temperature",
            "false_negative_margin",
            "mini_batch_size",
            "spread_weight",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        if self.blended is None:
            self.blended = self.stage == 2
        if self.accelerator_config.dispatch_batches is None:
            # Of a stream, the first process would else cut all processes' rows out of batches padded to other lengths.
            self.accelerator_config.dispatch_batches = False
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} uploads checkpoints, whose modules load only where this "
                "package is installed; sealed they could not be resumed from. Use hub_strategy='end', which publishes "
                "the model once, when save_model or push_to_hub is called."
            )

    def in_batch(self, task: Task) -> bool:
        """Whether a task's rows are each other's negatives."""
        if self.in_batch_negatives is not None:
            return self.in_batch_negatives
        return self.stage == 1 and bool(task.in_batch_negatives)

    def idle(self, tasks: Collection[Task] | None, own_loss: bool) -> dict[str, str]:
        """The arguments that have no effect on a trainer, each with the reason and what to do instead.

        Args:
            tasks: the trainer's tasks; None if it has none.
            own_loss: whether the trainer is given a loss.
        """
        reasons = dict.fromkeys(NOT_OF_THE_HOST, "sentence-transformers' trainer does not take it. Leave it out")
        reasons["data_seed"] = "the order of the rows is that of seed. Set that"
        if tasks is None:
            why = "it is read with tasks=[Task(...), ...] only. Give a loss of your own its settings itself"
            return reasons | dict.fromkeys(OF_TASKS, why)
        why = "tasks= make the batches. Set blended, sampling_temperature or the tasks' weights instead"
        reasons |= dict.fromkeys(OF_THE_HOSTS_BATCHES, why)
        if not any(map(self.in_batch, tasks)):
            why = "no task has in-batch negatives in this stage. Leave it out"
            reasons |= dict.fromkeys(OF_IN_BATCH_NEGATIVES, why)
        if own_loss:
            why = "the loss is one of your own. Give it the setting: InstructionContrastiveLoss(model, scale=1 / 0.02)"
            reasons |= dict.fromkeys(OF_THE_LOSS, why)
        return reasons

    def check_effect(self, tasks: Collection[Task] | None, own_loss: bool) -> None:
        """Check that each argument that is set has an effect.

        Raises:
            ValueError: for an argument that is ``idle`` and not at its default.
        """
        defaults = {argument.name: argument.default for argument in fields(self)} | {"blended": self.stage == 2}
        for name, why in self.idle(tasks, own_loss).items():
            value = getattr(self, name, None)
            if name in defaults and value != defaults[name]:  # transformers 5.2 does not know all
                raise ValueError(f"The training argument {name}={value!r} has no effect: {why}.")


OF_TASKS = tuple(
    {argument.name for argument in fields(LLMEmbedTrainingArguments)}
    - {argument.name for argument in fields(SentenceTransformerTrainingArguments)}
)
