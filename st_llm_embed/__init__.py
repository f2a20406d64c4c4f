"""Turn any decoder-only LLM into a text-embedding model inside sentence-transformers."""

from st_llm_embed.hub import publish
from st_llm_embed.losses import InstructionContrastiveLoss, PretextLoss
from st_llm_embed.model import build_model
from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling
from st_llm_embed.tasks import Task
from st_llm_embed.trainer import LLMEmbedTrainer
from st_llm_embed.training_args import LLMEmbedTrainingArguments
from st_llm_embed.version import __version__

__all__ = [
    "InstructionContrastiveLoss",
    "LLMBackbone",
    "LLMEmbedTrainer",
    "LLMEmbedTrainingArguments",
    "LatentAttentionPooling",
    "PretextLoss",
    "PromptTokenPooling",
    "Task",
    "__version__",
    "build_model",
    "publish",
]
