"""A ``config.json`` of the type ``llm_backbone``, read as that of the LLM inside.

An engine that is given it so knows the sizes, positions and mask of what it is to run, and by the name in
``architectures`` that it is not the LLM alone.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from st_llm_embed.serving.vllm_plugin import ARCHITECTURE, NAME


class LLMBackboneConfig(PretrainedConfig):
    """What ``AutoConfig`` reads a ``config.json`` of the type ``llm_backbone`` by."""

    model_type = NAME

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PretrainedConfig:
        """The configuration of the LLM inside.

        Raises:
            ValueError: if this transformers does not know the LLM.
        """
        inner = config_dict["backbone_config"]
        if inner["model_type"] not in CONFIG_MAPPING:
            raise ValueError(f"This version of transformers does not know the LLM of type {inner['model_type']!r}.")
        names = {"architectures": [ARCHITECTURE], "backbone_architectures": inner["architectures"]}
        return CONFIG_MAPPING[inner["model_type"]].from_dict({**inner, **names}, **kwargs)
