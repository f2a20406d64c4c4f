"""Losses that plug into SentenceTransformerTrainer."""

from .instruction_contrastive import InstructionContrastiveLoss
from .pretext import PretextLoss

__all__ = ["InstructionContrastiveLoss", "PretextLoss"]
