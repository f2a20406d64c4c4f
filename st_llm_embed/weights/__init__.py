"""Weights from one form to another: adapters merged, checkpoints averaged, LLMs exported, GGUF files unpacked."""

from st_llm_embed.weights.averaging import average_checkpoints
from st_llm_embed.weights.export import export_causal_lm
from st_llm_embed.weights.merging import merge_adapter

__all__ = ["average_checkpoints", "export_causal_lm", "merge_adapter"]
