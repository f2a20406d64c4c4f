"""Turn any decoder-only LLM into a text-embedding model inside sentence-transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from st_llm_embed.version import __version__

if TYPE_CHECKING:
    from st_llm_embed.hub import publish
    from st_llm_embed.losses import DistillationLoss, InstructionContrastiveLoss, MNTPLoss, PretextLoss
    from st_llm_embed.model import build_model
    from st_llm_embed.modules import LatentAttentionPooling, LLMBackbone, PromptTokenPooling
    from st_llm_embed.tasks import Task
    from st_llm_embed.training import LLMEmbedTrainer, LLMEmbedTrainingArguments

__all__ = [
    "DistillationLoss",
    "InstructionContrastiveLoss",
    "LLMBackbone",
    "LLMEmbedTrainer",
    "LLMEmbedTrainingArguments",
    "LatentAttentionPooling",
    "MNTPLoss",
    "PretextLoss",
    "PromptTokenPooling",
    "Task",
    "__version__",
    "build_model",
    "publish",
]
# Where each name is: importing the package imports no torch.
HOMES = {
    "hub": ("publish",),
    "losses": ("DistillationLoss", "InstructionContrastiveLoss", "MNTPLoss", "PretextLoss"),
    "model": ("build_model",),
    "modules": ("LLMBackbone", "LatentAttentionPooling", "PromptTokenPooling"),
    "tasks": ("Task",),
    "training": ("LLMEmbedTrainer", "LLMEmbedTrainingArguments"),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
