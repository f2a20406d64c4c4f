"""An LLM's own LM head in a loss: where its weights are, and how its logits come of the last hidden states.

    logits = cap(scale · states Wᵀ + bias),  cap(x) = c tanh(x / c) where the LLM has a softcap c

In: the backbone, and the LM head where that is not tied to the input embeddings. Out: what ``ChunkedCrossEntropy`` and
``linear`` take. Neither the head nor the scale is part of the embedding model, which is saved without them.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.base import BaseModel
from sentence_transformers.base.modules import Dense
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from st_llm_embed.modules import LLMBackbone


def backbone_of(model: BaseModel, lm_head: nn.Linear | None, loss: str) -> LLMBackbone:
    """The backbone of a model whose LM head a loss can have.

    Args:
        model: the model.
        lm_head: the LM head that is given.
        loss: the name of the loss, for messages.

    Raises:
        ValueError: if the model has no LLMBackbone, or its LM head is not tied to the embeddings and none is given.
    """
    backbone = model[0]
    # By name: a published model brings its own copy of the class.
    if LLMBackbone.__name__ not in [kind.__name__ for kind in type(backbone).__mro__]:
        raise ValueError(
            f"{loss} needs an LLMBackbone as the model's first module, not {type(backbone).__name__}. Build "
            "the model with build_model, or with SentenceTransformer(modules=[LLMBackbone(...), ...])."
        )
    if lm_head is None and not backbone.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            f"{backbone.config.model_type!r} does not tie its LM head to its input embeddings. Pass "
            "lm_head=AutoModelForCausalLM.from_pretrained(base).get_output_embeddings(), or in a configuration "
            "loss: {lm_head: base}."
        )
    return backbone


class LastStates:
    """The LLM's last hidden states out of a pass through the whole model, whatever a head makes of them after it.

    Through the whole model, as a DDP wrapper synchronises gradients in its forward only.

    Args:
        model: the model, whose first module is the backbone.
    """

    def __init__(self, model: BaseModel) -> None:
        heads = [module for module in model if isinstance(module, Dense)]
        self.changed = any(head.module_output_name == "token_embeddings" for head in heads)
        self.backbone = model[0]

    def __call__(self, model: nn.Module, features: dict[str, Any]) -> Tensor:
        """``(batch, seq, dim)``.

        Args:
            model: the model, or what a trainer has wrapped around it.
            features: see the backbone's ``forward``.
        """
        if not self.changed:
            return model(features)["token_embeddings"]
        kept: list[Tensor] = []
        hook = self.backbone.register_forward_hook(lambda module, given, out: kept.append(out["token_embeddings"]))
        try:
            model(features)
        finally:
            hook.remove()
        return kept[0]


def vocabulary_projection(llm: PreTrainedModel, lm_head: nn.Linear | None) -> tuple[Tensor, Tensor | None]:
    """Weight ``(vocabulary, dim)`` and bias: those of the LM head, or the input embeddings that it is tied to."""
    if lm_head is not None:
        return lm_head.weight, lm_head.bias
    return llm.get_input_embeddings().weight, None  # asked anew: an adapter may have come in between


def logit_scale(config: PretrainedConfig) -> float:
    """What an LLM multiplies its logits by."""
    text = config.get_text_config()
    if (divisor := getattr(text, "logits_scaling", None)) is not None:  # Granite, MiniCPM 3
        # NOTE: HyperCLOVA X multiplies by what has Granite's name.
        return float(divisor) if text.model_type == "hyperclovax" else 1 / divisor
    return float(getattr(text, "logit_scale", None) or 1.0)  # Cohere


def logit_softcap(config: PretrainedConfig) -> float | None:
    """What an LLM keeps its logits below: Gemma 2 and others."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)
