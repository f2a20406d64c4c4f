"""A plugin of vLLM (entry point ``vllm.general_plugins``): it serves the models whose ``config.json`` has the type
``llm_backbone``, which vLLM by itself refuses.

vLLM calls ``register`` in each of its processes. Before that, this file imports nothing.
"""

from __future__ import annotations

NAME = "llm_backbone"
ARCHITECTURE = "LLMBackbone"


def register() -> None:
    """Tell vLLM what a model of this type is configured by, how its texts become tokens, and what computes it."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from st_llm_embed.serving.inner_config import LLMBackboneConfig
    from st_llm_embed.serving.vllm_config import LLMBackboneSettings

    AutoConfig.register(NAME, LLMBackboneConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = LLMBackboneSettings
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:LLMBackbone")
    TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(NAME, f"{__package__}.vllm_renderer", "LLMBackboneRenderer")
