"""The weights and prompts of a saved model, taken into the model that was saved: no code of the folder runs.

An LLM in 4 bits under LoRA (QLoRA, arXiv 2305.14314; ``model_kwargs={"quantization_config": ...}``) saves the adapter
and the modules after the LLM only. Such a folder loads on the plain LLM, unless whoever loads it says otherwise; the
plain LLM's weights do not fit a quantized model, which has its own already.
"""

from __future__ import annotations

from pathlib import Path

from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Module
from sentence_transformers.util import fullname

from st_llm_embed.trust import MODULES, check_data, loading


def is_quantized(model: BaseModel) -> bool:
    return getattr(model.transformers_model, "is_quantized", False)


def load_saved(model: BaseModel, folder: str | Path) -> None:
    """Load the weights and prompts of a folder that ``model`` was saved to, and run no code of that folder.

    Raises:
        ValueError: if the folder does not hold data alone, or cannot be loaded.
        RuntimeError: if its weights are not the model's, but for what is frozen in a quantized one.
    """
    check_data(Path(folder))
    classes = {fullname(module): type(module) for module in model.modules() if isinstance(module, Module)}
    with loading(folder):
        saved = type(model)._load_with_module_classes(str(folder), {**MODULES, **classes}, device="cpu")
    weights = saved.state_dict()
    if is_quantized(model):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = {name for name, _ in model.named_parameters()} - trained
        loaded = {name: tensor for name, tensor in weights.items() if name not in frozen}
        missing, unexpected = model.load_state_dict(loaded, strict=False)
        if differing := sorted(trained.intersection(missing)) + unexpected:
            raise RuntimeError(
                f"{folder} does not hold the weights of this model: {differing[:5]} are missing or too many."
            )
    else:
        model.load_state_dict(weights)
    model.prompts = saved.prompts
