"""An LLM in 4 bits under LoRA (QLoRA, arXiv 2305.14314), by ``model_kwargs={"quantization_config": ...}``.

Only the adapter and the modules after the LLM are saved. Such a folder loads on the plain LLM, unless whoever loads it
says otherwise; the plain LLM's weights do not fit a quantized model, which has its own already.
"""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer


def is_quantized(model: SentenceTransformer) -> bool:
    return getattr(model.transformers_model, "is_quantized", False)


def load_saved(model: SentenceTransformer, folder: str | Path) -> None:
    """Load the weights and prompts of a folder that ``model`` was saved to.

    Raises:
        RuntimeError: if its weights are not the model's, but for what is frozen in a quantized one.
    """
    saved = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    weights = saved.state_dict()
    if is_quantized(model):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = {name for name, _ in model.named_parameters()} - trained
        own = {name: tensor for name, tensor in weights.items() if name not in frozen}
        missing, unexpected = model.load_state_dict(own, strict=False)
        if wrong := sorted(trained.intersection(missing)) + unexpected:
            raise RuntimeError(
                f"{folder} does not hold the weights of this model: {wrong[:5]} are missing or too many."
            )
    else:
        model.load_state_dict(weights)
    model.prompts = saved.prompts
