"""LoRA folded into its LLM, and proven: the merged model gives the embeddings of model and adapter.

W + scale · BA is one weight, so a merged model needs no peft and costs no more than its base. Merging can change the
embeddings without a word (sentence-transformers 3246, llm2vec 128, unsloth 6881), so both are compared.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from sentence_transformers.base import BaseModel
from torch.nn import Parameter

from st_llm_embed.modules.reference import TEXTS, encode, whole_float32
from st_llm_embed.weights.saved import is_quantized

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def has_adapter(model: BaseModel) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@whole_float32()  # of the products of A and B too
def merge_adapter(model: AnyModel, tolerance: float | None = None) -> AnyModel:
    """A copy of ``model`` with its active adapters merged into the LLM. ``model`` stays as it is, so both must fit in
    memory.

    Args:
        model: the model, with peft adapters, LoRA and trained tokens among them.
        tolerance: the largest difference of a component of an embedding, as a share of the longest embedding's length
            where that is above 1. Default: 1e-5, or in half precision its last bit.

    Raises:
        ValueError: if there is no adapter, the LLM is quantized, two adapted layers share a weight, or merging gives
            weights that are not numbers.
        RuntimeError: if the merged model gives other embeddings.
    """
    if not has_adapter(model):
        raise ValueError("The model has no adapter to merge.")
    if is_quantized(model):
        raise ValueError(
            "The LLM is quantized, and merging would round the adapter as coarsely. Save the model; its folder loads "
            "with the plain LLM: merge_adapter(SentenceTransformer(folder, trust_remote_code=True))."
        )
    _check_weights_of_their_own(model)
    if tolerance is None:
        tolerance = max(1e-5, torch.finfo(model.dtype).eps)
    merged = copy.deepcopy(model)
    llm = merged.transformers_model
    # What peft's merge_and_unload does; an adapter that transformers injected has no PeftModel to call it on.
    done: list[str] = []
    for name, layer in list(llm.named_modules()):
        if name.startswith(tuple(done)):  # a part of one that is out of the model already
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(layer, BaseTunerLayer):
            plain = layer
            while isinstance(plain, BaseTunerLayer):  # each of an experts' weights has its own, around the others
                plain.merge(safe_merge=True)
                plain = plain.base_layer
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, plain)
        done.append(f"{name}.")
    del llm.peft_config
    llm._hf_peft_config_loaded = False
    # NOTE: loading an adapter leaves its names for the weights here, under which the plain LLM would be saved.
    vars(llm).pop("_weight_conversions", None)
    llm.requires_grad_(True)
    for name, prompt in model.prompts.items():
        before, after = (encode(one, TEXTS, name, prompt or "") for one in (model, merged))
        difference = (before - after).abs().max() / before.norm(dim=1).max().clamp(min=1)
        if not difference <= tolerance:
            raise RuntimeError(
                f"The merged model's embeddings differ by {difference:.1e} under the prompt {name!r}; at most "
                f"{tolerance:.0e} is rounding. Keep the adapter by itself, or merge in float32."
            )
    return merged


def _check_weights_of_their_own(model: BaseModel) -> None:
    adapted: dict[int, str] = {}
    for name, layer in model.transformers_model.named_modules():
        if isinstance(layer, BaseTunerLayer) and isinstance(weight := getattr(layer, "weight", None), Parameter):
            if adapted.setdefault(weight.data_ptr(), name) != name:
                raise ValueError(
                    f"{adapted[weight.data_ptr()]!r} and {name!r} share one weight, and each has an adapter of its "
                    "own, so no single weight is right for both. Keep the adapter by itself."
                )
