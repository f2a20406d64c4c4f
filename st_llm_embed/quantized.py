"""An LLM in 4 bits under LoRA (QLoRA, arXiv 2305.14314), by ``model_kwargs={"quantization_config": ...}``.

Only the adapter and the modules after the LLM are saved. Such a folder loads on the plain LLM, unless whoever loads it
says otherwise; the plain LLM's weights do not fit a quantized model, which has its own already.
"""

from __future__ import annotations

from sentence_transformers import SentenceTransformer


def is_quantized(model: SentenceTransformer) -> bool:
    return getattr(model.transformers_model, "is_quantized", False)
