"""The modules of a text-embedding LLM. These files ship with published models: each imports only the host libraries
and its siblings."""

from .latent_attention_pooling import LatentAttentionPooling
from .llm_backbone import LLMBackbone
from .prompt_token_pooling import PromptTokenPooling

__all__ = ["LLMBackbone", "LatentAttentionPooling", "PromptTokenPooling"]
