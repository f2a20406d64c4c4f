"""Training arguments: sentence-transformers' own, and the decisions of NV-Embed's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer_utils import HubStrategy


@dataclass
class LLMEmbedTrainingArguments(SentenceTransformerTrainingArguments):
    """Adds what ``LLMEmbedTrainer`` reads where it gets ``tasks``.

    Args:
        stage: 1 for retrieval with in-batch and hard negatives; 2 for everything blended, own hard negatives only.
        temperature: of the contrastive loss.
        in_batch_negatives: True or False for every task. Default: in stage 1 where the task allows them, in stage 2
            nowhere.
        blended: whether a batch draws from all tasks, as NV-Embed's do, or a step from one, the same on all processes.
            Default: in stage 2.
        sampling_temperature: a task's share goes by its size to the power 1 / this; above 1, shares are more even.
        false_negative_margin: leave out in-batch negatives that score above this share of the positive, such as 0.95.
        mini_batch_size: embed so many texts at a time, twice, to fit a large batch into memory (GradCache).
        gather_across_devices: whether other processes' rows count for in-batch negatives.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage={self.stage!r} is unknown. Valid stages: 1 (retrieval, in-batch and hard negatives) and 2 "
                "(everything, own hard negatives only)."
            )
        for name in ("temperature", "sampling_temperature", "false_negative_margin", "mini_batch_size"):
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
