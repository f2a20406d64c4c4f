"""Masks that an LLM's own forward pass builds, changed on their way: made symmetric, or replaced by a structured mask.

A structured mask is a boolean ``(batch, seq, seq)`` tensor, True where the query (second axis) may attend to the key
(third axis); LLaRA's joint prompts (arXiv 2312.15503) need one. Both kinds of change happen at the one place where
transformers builds all masks, for the duration of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) indices -> may attend
MaskChange = Callable[[MaskFunction], MaskFunction]
_CHANGE_MASK: ContextVar[MaskChange | None] = ContextVar("change_mask", default=None)


@contextmanager
def attending(
    model: PreTrainedModel,
    attention: str,
    structured_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[None]:
    """Run ``model``'s forward passes inside: they attend in the mode it was set to, or by the structured mask.

    Args:
        model: the LLM that ``set_attention_mode`` was called on.
        attention: the mode it was set to.
        structured_mask: ``(batch, seq, seq)`` booleans, True where the query may attend to the key, complete: padding
            included. Where the model keeps its windows, they narrow it further.
        position_ids: ``(batch, seq)``, the positions by which those windows are measured; the columns if None.

    Raises:
        ValueError: for a structured mask of another shape or type, one with a query that may attend to nothing, one
            under flash attention, or positions that do not fit it.
    """
    if structured_mask is None and (attention == "causal" or model.config.is_causal is False):
        yield
        return
    implementation = model.config._attn_implementation
    change: MaskChange = _symmetric
    if structured_mask is not None:
        _check_structured_mask(structured_mask, position_ids, implementation)
        change = _structured(structured_mask, position_ids)
    _changeable_masks(implementation)
    token = _CHANGE_MASK.set(change)
    try:
        yield
    finally:
        _CHANGE_MASK.reset(token)


def _symmetric(native: MaskFunction) -> MaskFunction:
    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return native(batch, head, query, key) | native(batch, head, key, query)

    return may_attend


def _structured(mask: Tensor, position_ids: Tensor | None) -> MaskChange:
    def structured(native: MaskFunction) -> MaskFunction:
        within_window = _symmetric(native)

        def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            allowed = mask[batch, query, key]
            if position_ids is not None:
                query, key = position_ids[batch, query], position_ids[batch, key]
            return allowed & within_window(batch, head, query, key)

        return may_attend

    return structured


def _check_structured_mask(mask: Tensor, position_ids: Tensor | None, implementation: str) -> None:
    if "flash" in implementation:
        raise ValueError(
            f"A structured mask needs sdpa or eager attention, not {implementation}. Use "
            "model_kwargs={'attn_implementation': 'sdpa'}."
        )
    if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != mask.shape[2]:
        raise ValueError(
            f"structured_mask must be a boolean (batch, seq, seq) tensor, not {mask.dtype} {tuple(mask.shape)}."
        )
    if not mask.any(dim=-1).all():
        row, query = (~mask.any(dim=-1)).nonzero()[0].tolist()
        raise ValueError(
            f"structured_mask lets token {query} of row {row} attend to nothing. Let padding attend to itself."
        )
    if position_ids is not None and position_ids.shape != mask.shape[:2]:
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)} do not fit structured_mask {tuple(mask.shape)}: they must be "
            f"{tuple(mask.shape[:2])}."
        )


def _changeable_masks(implementation: str) -> None:
    """Wrap transformers' mask builder of this implementation, once. It does nothing outside ``attending``."""
    builder = wrapper = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    # Published models bring copies of this file, each with a wrapper of its own around the others'.
    while wrapper is not None:
        if vars(wrapper).get("changed_by") is _CHANGE_MASK:
            return
        wrapper = vars(wrapper).get("__wrapped__")

    @wraps(builder)
    def build(*args: Any, **kwargs: Any) -> Tensor | None:
        if (change := _CHANGE_MASK.get()) is not None:
            # The builders skip a mask that they take for plain causal or plain bidirectional: this one is neither.
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            kwargs = {**kwargs, **skips, "mask_function": change(kwargs["mask_function"]), "use_vmap": False}
        return builder(*args, **kwargs)

    vars(build)["changed_by"] = _CHANGE_MASK
    AttentionMaskInterface.register(implementation, build)
