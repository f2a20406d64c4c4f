"""The ``config.json`` of a model that is more than its LLM.

Engines that know an LLM by this file (transformers' ``AutoModel`` and what builds on it, vLLM, Text Embeddings
Inference, llama.cpp's converter) would serve it under a mask and a pooling of their own choice, without a word. So an
``LLMBackbone`` is saved under a ``model_type`` of its own, which they refuse, with the LLM's configuration inside.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

CONFIG = "config.json"
MODEL_TYPE = "llm_backbone"
INNER = "backbone_config"  # llama.cpp's converter would take what is in a text_config or an llm_config for the whole


class LLMBackboneConfig(PretrainedConfig):
    """Known to ``AutoConfig`` where ``LLMBackbone`` is, for ``AutoTokenizer`` asks it. No ``AutoModel`` takes it."""

    model_type = MODEL_TYPE
    backbone_config: dict | None = None


AutoConfig.register(MODEL_TYPE, LLMBackboneConfig, exist_ok=True)


def wrap_config(folder: Path) -> None:
    """Put the LLM's configuration in ``folder`` inside one of a type that only ``LLMBackbone`` knows.

    An LLM with code of its own keeps its file: that code is looked for there, and runs only where it is trusted.
    """
    config = _read(folder)
    if config.get("model_type") not in (None, MODEL_TYPE) and "auto_map" not in config:
        versions = {"transformers_version": config.get("transformers_version")}
        _write(folder, {"architectures": ["LLMBackbone"], "model_type": MODEL_TYPE, **versions, INNER: config})


def unwrap_config(folder: Path) -> None:
    """Undo ``wrap_config``: stock modules do the same as the model."""
    _write(folder, inner_config(_read(folder)))


def inner_config(config: dict[str, Any]) -> dict[str, Any]:
    """The LLM's own configuration, of the content of a ``config.json``."""
    return config[INNER] if config.get("model_type") == MODEL_TYPE else config


def load_inner_config(config: PretrainedConfig, **kwargs: Any) -> PretrainedConfig:
    """The LLM's own configuration, by ``AutoConfig``, which reads files.

    Args:
        config: what ``AutoConfig`` made of a ``config.json``.
        **kwargs: its arguments, but for those that say where the file is.
    """
    if config.model_type != MODEL_TYPE:
        return config
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), config.backbone_config)
        inner = AutoConfig.from_pretrained(folder, **kwargs)
    inner.name_or_path = config.name_or_path
    return inner


def _read(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # of an adapter there is none


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
