"""Losses that plug into SentenceTransformerTrainer."""

from .distillation import DistillationLoss
from .instruction_contrastive import InstructionContrastiveLoss
from .pretext import PretextLoss

__all__ = ["DistillationLoss", "InstructionContrastiveLoss", "PretextLoss"]
