"""Training: SentenceTransformerTrainer with tasks and stages, and whole runs as one configuration."""

from st_llm_embed.training.stages import train_stages
from st_llm_embed.training.trainer import LLMEmbedTrainer
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

__all__ = ["LLMEmbedTrainer", "LLMEmbedTrainingArguments", "train_stages"]
