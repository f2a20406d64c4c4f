"""Decide which tokens of a decoder-only LLM may attend to which, and prove, layer by layer, that it took effect.

A causal LLM lets token i see tokens 0..i. NV-Embed (arXiv 2405.17428) drops that mask: every token sees every real
token. A structured mask is a boolean ``(batch, seq, seq)`` tensor, True where the query (second axis) may attend to
the key (third axis); LLaRA's joint prompts (arXiv 2312.15503) need one.

Where ``config.is_causal = False`` makes an architecture bidirectional, that is used: it is saved in ``config.json``
and needs no code of ours. Elsewhere (sliding windows, stablelm and nemotron under sdpa) the mask itself is replaced,
at the one place where transformers builds all masks, for the duration of a forward pass. Neither is assumed: a forward
pass over two rows of 8 tokens shows for every layer whether its first output moves with its last input. A layer that
stays causal, as in recurrent and hybrid models, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

ATTENTION_MODES = ("bidirectional", "causal")
PROBE_LENGTH = 8
PROBE_THRESHOLD = 1e-5  # of the layer's mean output; a token that is not attended to changes nothing at all
WINDOWS = ("sliding_window", "attention_chunk_size")

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) indices -> may attend
_MASK_FUNCTION: ContextVar[MaskFunction | None] = ContextVar("mask_function", default=None)


def set_attention_mode(model: PreTrainedModel, attention: str) -> None:
    """Make ``model`` attend in the given mode and prove it. Forward passes then go inside ``attending``.

    Afterwards ``config.is_causal`` says how: False where the config alone makes the model bidirectional.

    Args:
        model: a decoder-only LLM without its LM head.
        attention: ``"bidirectional"`` or ``"causal"``.

    Raises:
        ValueError: for an unknown mode, an encoder, an encoder-decoder, or an architecture that does not obey the
            mode.
    """
    config = model.config
    if attention not in ATTENTION_MODES:
        raise ValueError(f"attention={attention!r} is unknown. Valid modes: {', '.join(ATTENTION_MODES)}.")
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; LLMBackbone takes decoder-only LLMs. Load it with "
            "sentence_transformers' own Transformer module, which uses its encoder."
        )
    # A saved bidirectional LLM comes back with the flag off, so only a fresh one can be told from an encoder.
    if getattr(config, "is_causal", True) and all(_moved(model, changed=PROBE_LENGTH - 1, watched=0)):
        raise ValueError(
            f"{config.model_type!r} is an encoder: its tokens already attend to both sides. LLMBackbone takes "
            "decoder-only LLMs; load an encoder with sentence_transformers' own Transformer module."
        )
    config.is_causal = True
    if attention == "causal":
        _prove(model, attention)
        return
    flash = "flash" in config._attn_implementation
    if not flash and _mixes_tokens_without_attention(model):
        raise ValueError(
            f"{config.model_type!r} passes information between tokens outside its attention, by recurrence or "
            "convolution, which stays causal: it cannot be bidirectional. Choose another base, or attention='causal'."
        )
    if not _bidirectional_by_config(model):
        if flash:
            raise ValueError(
                f"{config.model_type!r} is not made bidirectional by its config, and {config._attn_implementation} "
                "takes no mask. Use model_kwargs={'attn_implementation': 'sdpa'}."
            )
        _prove(model, attention)


def _bidirectional_by_config(model: PreTrainedModel) -> bool:
    """Try ``is_causal=False``, with Mistral's one window for all layers off; undo it if that is not enough."""
    text_config = model.config.get_text_config()
    # NOTE: where each layer has its type, the window belongs to some of them, and None is no way to turn it off.
    window = None if getattr(text_config, "layer_types", None) else getattr(text_config, "sliding_window", None)
    model.config.is_causal = False
    if window:
        text_config.sliding_window = None
    if _obeys(model, "bidirectional"):
        return True
    model.config.is_causal = True
    if window:
        text_config.sliding_window = window
    return False


def _obeys(model: PreTrainedModel, attention: str) -> bool:
    """Does every layer's first output depend on its last input exactly when it should, with padding and without?"""
    expected = attention == "bidirectional"
    with _narrow_windows(model.config.get_text_config()):
        ends = (PROBE_LENGTH - 1, PROBE_LENGTH - 3)  # no padding, and two tokens of it
        return all(moved == expected for last in ends for moved in _moved(model, changed=last, watched=0, last=last))


def _mixes_tokens_without_attention(model: PreTrainedModel) -> bool:
    """With every token attending to itself alone, does the last one still hear of the one before?"""
    alone = torch.eye(PROBE_LENGTH, dtype=torch.bool, device=model.device).repeat(2, 1, 1)
    with attending(model, "bidirectional", alone):
        return any(_moved(model, changed=PROBE_LENGTH - 2, watched=PROBE_LENGTH - 1))


def _prove(model: PreTrainedModel, attention: str) -> None:
    with attending(model, attention):
        if not _obeys(model, attention):
            raise ValueError(
                f"{model.config.model_type!r} under {model.config._attn_implementation} attention does not obey "
                f"attention={attention!r} in every layer. Try model_kwargs={{'attn_implementation': 'eager'}}, or "
                "choose another base."
            )


@contextmanager
def _narrow_windows(config: PretrainedConfig) -> Iterator[None]:
    """Windows of 2 tokens for the duration of a probe, so that 8 tokens show whether they are open."""
    kept = {name: getattr(config, name) for name in WINDOWS if getattr(config, name, None)}
    for name in kept:
        setattr(config, name, 2)
    try:
        yield
    finally:
        for name, size in kept.items():
            setattr(config, name, size)


@torch.no_grad()
def _moved(model: PreTrainedModel, changed: int, watched: int, last: int = PROBE_LENGTH - 1) -> list[bool]:
    """For every layer: does its output at ``watched`` move when its input at ``changed``, and nowhere else, does?

    Both rows enter each layer with the first row's hidden states, but for the changed token, which the second row
    negates. Tokens after ``last`` are padding.
    """
    moved: list[bool] = []

    def negate(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden[:1].repeat(2, 1, 1)  # (2, seq, dim)
        hidden[1, changed] *= -1
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def compare(layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        state = (output[0] if isinstance(output, tuple) else output)[:, watched].float()  # (2, dim)
        moved.append(bool((state[0] - state[1]).abs().mean() > PROBE_THRESHOLD * state.abs().mean()))

    ids = torch.arange(PROBE_LENGTH, device=model.device) * 7919 + 101  # spread over the vocabulary
    ids = (ids % model.config.get_text_config().vocab_size).repeat(2, 1)
    attention_mask = (torch.arange(PROBE_LENGTH, device=model.device) <= last).long().repeat(2, 1)
    training = model.training
    model.eval()
    handles = []
    for layer in decoder_layers(model):
        handles.append(layer.register_forward_pre_hook(negate, with_kwargs=True))
        handles.append(layer.register_forward_hook(compare))
    try:
        model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not moved:  # nothing seen is nothing proven
        raise ValueError(f"{model.config.model_type!r} never calls its layers, so its attention cannot be proven.")
    return moved


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The LLM's list of layers.

    Raises:
        ValueError: if the model has no list of as many modules as its config says it has layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{model.config.model_type!r} has no list of {depth} layers, so its attention cannot be proven.")


@contextmanager
def attending(model: PreTrainedModel, attention: str, structured_mask: Tensor | None = None) -> Iterator[None]:
    """Run ``model``'s forward passes inside: they attend in the mode it was set to, or by the structured mask.

    Args:
        model: what ``set_attention_mode`` was called on.
        attention: the mode it was set to.
        structured_mask: ``(batch, seq, seq)`` boolean, complete: padding included.

    Raises:
        ValueError: for a structured mask of another shape or type, one with a query that may attend to nothing, or one
            under flash attention.
    """
    if structured_mask is None and (attention == "causal" or model.config.is_causal is False):
        yield
        return
    _check_structured_mask(structured_mask, model.config._attn_implementation)
    _replaceable_masks(model.config._attn_implementation)

    def everything(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= 0) & (key >= 0)

    def structured(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return structured_mask[batch, query, key]

    token = _MASK_FUNCTION.set(everything if structured_mask is None else structured)
    try:
        yield
    finally:
        _MASK_FUNCTION.reset(token)


def _check_structured_mask(mask: Tensor | None, implementation: str) -> None:
    if mask is None:
        return
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


def _replaceable_masks(implementation: str) -> None:
    """Wrap transformers' mask builder of this implementation, once. Without a mask function in force it does
    nothing."""
    builder = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    if getattr(builder, "replaceable_by", None) is _MASK_FUNCTION:
        return

    @wraps(builder)
    def build(*args: Any, **kwargs: Any) -> Tensor | None:
        if (mask_function := _MASK_FUNCTION.get()) is not None:
            # The builders skip a mask that they take for plain causal or plain bidirectional: this one is neither.
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            kwargs = {**kwargs, **skips, "mask_function": mask_function, "use_vmap": False}
        return builder(*args, **kwargs)

    build.replaceable_by = _MASK_FUNCTION
    AttentionMaskInterface.register(implementation, build)
