"""Losses that plug into SentenceTransformerTrainer."""

from .distillation import DistillationLoss
from .instruction_contrastive import InstructionContrastiveLoss
from .late_interaction import LateInteractionLoss
from .mntp import MNTPLoss
from .pretext import PretextLoss

__all__ = ["DistillationLoss", "InstructionContrastiveLoss", "LateInteractionLoss", "MNTPLoss", "PretextLoss"]
