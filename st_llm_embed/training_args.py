"""Training arguments: sentence-transformers' own, and which stage of NV-Embed's recipe this is."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.trainer_utils import HubStrategy


@dataclass
class LLMEmbedTrainingArguments(SentenceTransformerTrainingArguments):
    """Adds two fields, read where ``LLMEmbedTrainer`` gets ``tasks``.

    Args:
        stage: 1 for retrieval with in-batch and hard negatives; 2 for everything blended, own hard negatives only.
        temperature: of the contrastive loss.

    Raises:
        ValueError: for another stage, a temperature that is not positive, or ``push_to_hub`` during training.
    """

    stage: int = field(default=1, metadata={"help": "1: in-batch and hard negatives. 2: own hard negatives only."})
    temperature: float = field(default=0.02, metadata={"help": "Temperature of the contrastive loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(
                f"stage={self.stage!r} is unknown. Valid stages: 1 (retrieval, in-batch and hard negatives) and 2 "
                "(everything, own hard negatives only)."
            )
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} uploads checkpoints, whose modules load only where this "
                "package is installed; sealed they could not be resumed from. Use hub_strategy='end', which publishes "
                "the model once, when save_model or push_to_hub is called."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be positive.")
