"""Decide which tokens of a decoder-only LLM may attend to which, and prove, layer by layer, that it took effect.

A causal LLM lets token i see tokens 0..i. NV-Embed (arXiv 2405.17428) drops that mask: every token sees every real
token. A structured mask is a boolean ``(batch, seq, seq)`` tensor, True where the query (second axis) may attend to
the key (third axis); LLaRA's joint prompts (arXiv 2312.15503) need one.

What the configuration can do, it does, for it is saved in ``config.json`` and needs no code of ours: sliding windows
are opened there, and ``is_causal = False`` makes most architectures bidirectional. Where that is not enough (stablelm
and nemotron under sdpa, chunked attention), each mask is made symmetric at the one place where transformers builds
all masks, for the duration of a forward pass; structured masks go the same way. Neither is assumed: passes over a few
rows of 5 tokens show for every kind of layer which positions of its output move with which tokens of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

ATTENTION_MODES = ("bidirectional", "causal")
WINDOW_MODES = ("full", "keep")
WINDOWS = ("sliding_window", "attention_chunk_size")
WIDE = 2**30  # tokens: an open window, where None is not an option. Small enough for the int32 of attention kernels
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
PROBE_LENGTH = 5  # unlike the number of rows, 4 at most, or the axes could be confused
PLAIN = {bool, int, float, str, type(None)}
PROBE_THRESHOLD = 1e-5  # of the layer's mean output; a token that is not attended to changes nothing at all

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query, key) indices -> may attend
_CHANGE_MASK: ContextVar[Callable[[MaskFunction], MaskFunction] | None] = ContextVar("change_mask", default=None)


def set_attention_mode(model: PreTrainedModel, attention: str, window: str = "full", probe: bool = True) -> None:
    """Make ``model`` attend in the given mode and prove it. Forward passes then go inside ``attending``.

    Afterwards ``config.is_causal`` says how: False where the config alone makes the model bidirectional.

    Args:
        model: a decoder-only LLM without its LM head.
        attention: ``"bidirectional"`` or ``"causal"``.
        window: what becomes of sliding windows and chunks: ``"full"`` opens them, ``"keep"`` leaves them, and makes
            them symmetric where the attention is bidirectional. (Where the config does it, transformers lets tokens
            at a distance of the window's size in; its causal windows end one before.)
        probe: prove it. Without the proof, a config that says ``is_causal: false`` is believed, and any other model
            has its masks replaced.

    Raises:
        ValueError: for an unknown mode, an encoder, an encoder-decoder, or an architecture that does not obey.
    """
    config = model.config
    if attention not in ATTENTION_MODES:
        raise ValueError(f"attention={attention!r} is unknown. Valid modes: {', '.join(ATTENTION_MODES)}.")
    if window not in WINDOW_MODES:
        raise ValueError(f"window={window!r} is unknown. Valid values: {', '.join(WINDOW_MODES)}.")
    if config.is_encoder_decoder or config.model_type in ENCODERS:
        kind = "encoder-decoder model" if config.is_encoder_decoder else "encoder"
        raise ValueError(
            f"{config.model_type!r} is an {kind}, whose tokens need no leave to attend to both sides; LLMBackbone "
            "takes decoder-only LLMs. Load it with sentence_transformers' own Transformer module."
        )
    implementation = config._attn_implementation
    flash = "flash" in implementation
    if window == "full":
        _open_windows(model)
    if not probe:
        believed = flash or getattr(config, "is_causal", True) is False
        config.is_causal = attention == "causal" or not believed
        return
    refusal = (
        f"{config.model_type!r} under {implementation} attention does not obey attention={attention!r} with "
        f"window={window!r} in every layer. Try model_kwargs={{'attn_implementation': 'eager'}}, or choose another "
        "base."
    )
    prober = _Prober(model)
    if attention == "causal":
        config.is_causal = True
        if not prober.obeys(attention, window):
            raise ValueError(refusal)
        return
    # NOTE: deepseek_v4 also attends to summaries of 4 or 128 past tokens; the probe's few tokens do not show those.
    if getattr(config.get_text_config(), "compress_rates", None) or prober.mixes_without_attention():
        raise ValueError(
            f"{config.model_type!r} passes information between tokens other than by attention under a mask, as "
            "recurrence, convolution and summaries do. That stays causal: it cannot be bidirectional. Choose another "
            "base, or attention='causal'."
        )
    config.is_causal = False
    try:
        if prober.obeys(attention, window):
            return
    except (AttributeError, TypeError):
        pass  # mpt, and modernbert-decoder under eager, fail for want of a mask; other errors come again below
    config.is_causal = True
    if flash:
        raise ValueError(
            f"{config.model_type!r} is not made bidirectional by its config, and {implementation} takes no mask. Use "
            "model_kwargs={'attn_implementation': 'sdpa'}."
        )
    with attending(model, attention):
        if not prober.obeys(attention, window):
            raise ValueError(refusal)


def _windows(model: PreTrainedModel) -> list[tuple[Any, str, int]]:
    """Every ``(owner, attribute, size)`` of a window: the config's, and those that layers copied from it."""
    config = model.config.get_text_config()
    names = [name for name in WINDOWS if getattr(config, name, None)]
    owners = [config, *(model.modules() if names else ())]
    found = [(owner, name, vars(owner).get(name)) for owner in owners for name in names]
    return [(owner, name, size) for owner, name, size in found if isinstance(size, int) and size > 0]


def _open_windows(model: PreTrainedModel) -> None:
    # NOTE: where each layer has its type, None does not turn the windows off, and models fail over it.
    typed = getattr(model.config.get_text_config(), "layer_types", None)
    for owner, name, _ in _windows(model):
        setattr(owner, name, WIDE if typed or name != "sliding_window" else None)


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Kept windows are 2 tokens wide for the duration of a probe, so that its few tokens show them."""
    kept = [found for found in _windows(model) if found[2] != WIDE]
    for owner, name, _ in kept:
        setattr(owner, name, 2)
    try:
        yield
    finally:
        for owner, name, size in kept:
            setattr(owner, name, size)


class _Prober:
    """Watches an LLM's layers: which positions of a layer's output move when one token of its input changes?

    Of layers that are alike and are called alike only the first is computed, and with thin linear maps where it is
    nothing but attention and MLP: this costs less than one layer of the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.stacks = _stacks(model)
        first: dict[tuple, nn.Module] = {}  # of each kind
        self.kinds = {layer: first.setdefault(_kind(layer), layer) for stack in self.stacks for layer in stack}
        self.plain = {layer for layer in first.values() if _is_attention_and_mlp(layer)}

    def obeys(self, attention: str, window: str) -> bool:
        """Does each kind of layer hear just the tokens that it should, in batches without padding and with it?"""
        first, second, last = 0, 1, PROBE_LENGTH - 1
        with _narrow_windows(self.model):
            for later, earlier, near in (hears.unbind() for hears in self.hears([last, first, second])):
                if attention == "causal":  # padding comes after all that a token hears, so this batch says it all
                    obeyed = earlier[second] and not later[:last].any()
                elif window == "keep":
                    obeyed = near[first] and earlier[second] and later[: last - 1].any() == earlier[second + 1 :].any()
                else:
                    obeyed = later[: last - 1].any()  # from two tokens away, which no narrow window spans
                if not obeyed:
                    return False
            if attention == "causal":
                return True
            real = last - 1
            for later, near, padding in (hears.unbind() for hears in self.hears([real, second, last], length=last)):
                heard = near[first] if window == "keep" else later[: real - 1].any()
                if padding[:last].any() or not heard:
                    return False
        return True

    def mixes_without_attention(self) -> bool:
        """With every token attending to itself alone, does the last one still hear of the one before?"""
        if self.plain.issuperset(self.kinds.values()):
            return False
        config = self.model.config
        alone = torch.eye(PROBE_LENGTH, dtype=torch.bool, device=self.model.device).repeat(2, 1, 1)
        implementation = config._attn_implementation
        if "flash" in implementation:  # takes no mask; recurrence is the same under any implementation
            config._attn_implementation = "eager"
        try:
            with attending(self.model, "bidirectional", alone):
                return any(hears[0, -1] for hears in self.hears([PROBE_LENGTH - 2]))
        finally:
            config._attn_implementation = implementation

    @torch.no_grad()
    def hears(self, speakers: Sequence[int], length: int = PROBE_LENGTH) -> list[Tensor]:
        """For every kind of layer, ``(speakers, seq)`` booleans: True where the output moves with the speaker's input.

        Every layer gets the first row's hidden states in each row, but for one speaker's token in each further row,
        whose channels move on by one: not negated, for gates multiply two signs away. Tokens from ``length`` on are
        padding.
        """
        model, rows = self.model, 1 + len(speakers)
        heard: list[Tensor] = []
        computed: dict[tuple, tuple] = {}  # kind of layer -> its arguments, held so that none of their ids is reused
        called: set[nn.Module] = set()
        form: Tensor | Sequence | None = None

        def listen(layer: nn.Module, kind: nn.Module, forward: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Tensor | Sequence:
                nonlocal form
                called.add(layer)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                others = (*args[1:], *kwargs.values())
                signature = (kind, *map(id, others))
                if signature in computed:
                    return hidden if isinstance(form, Tensor) else (hidden, *form[1:])
                axis = _batch_axis(hidden, rows)
                if axis is None:  # no layer of tokens
                    called.discard(layer)
                    return forward(hidden, *args[1:], **kwargs)
                computed[signature] = others
                hidden = hidden.narrow(axis, 0, 1).expand_as(hidden).clone()
                for row, speaker in enumerate(speakers, 1):
                    token = hidden.select(axis, row).select(axis, speaker)  # seq takes the place of the batch axis
                    token.copy_(token.roll(1, dims=-1))
                with _thin_linear_maps(layer) if kind in self.plain else nullcontext():
                    form = forward(hidden, *args[1:], **kwargs)
                output = (form if isinstance(form, Tensor) else form[0]).float()
                output = output.movedim((axis, axis + 1), (0, 1)).flatten(2)  # (rows, seq, ...)
                moved = (output[1:] - output[0]).abs().mean(dim=-1)  # (speakers, seq)
                heard.append((moved > PROBE_THRESHOLD * output[0].abs().mean(dim=-1)).cpu())
                return form

            return run

        vocabulary = model.config.get_text_config().vocab_size
        ids = [(101 + 7919 * position) % vocabulary for position in range(PROBE_LENGTH)]  # spread over it
        mask = [int(position < length) for position in range(PROBE_LENGTH)]
        ids, mask = torch.tensor([[ids] * rows, [mask] * rows], device=model.device)
        training = model.training
        if training:
            model.eval()
        # Through __dict__, for nn.Module's own setattr is slow; what accelerate may have put there comes back.
        replaced = {layer: vars(layer).get("forward") for layer in self.kinds}
        for layer, kind in self.kinds.items():
            vars(layer)["forward"] = listen(layer, kind, layer.forward)
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for layer, forward in replaced.items():
                del vars(layer)["forward"]
                if forward is not None:
                    vars(layer)["forward"] = forward
            if training:
                model.train()
        if not self.kinds or not called.issuperset(max(self.stacks, key=len)):  # nothing seen is nothing proven
            raise ValueError(f"{model.config.model_type!r} never calls its layers, so its attention cannot be proven.")
        return heard


@contextmanager
def _thin_linear_maps(layer: nn.Module) -> Iterator[None]:
    """A layer's linear maps read 16 channels only. They act on each token by itself, and all heads have one mask, so
    this changes nothing of which token hears which in a layer of attention and MLP, whose cost is mostly theirs."""
    maps = [part for part in layer.modules() if type(part) is nn.Linear and "forward" not in vars(part)]
    for part in maps:
        vars(part)["forward"] = partial(_thin_linear, part.weight)
    try:
        yield
    finally:
        for part in maps:
            del vars(part)["forward"]


def _thin_linear(weight: Tensor, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden[..., :16], weight[:, :16])


def _stacks(module: nn.Module) -> list[list[nn.Module]]:
    """The outermost module lists, without members that have no parts but an adapter's: the longest is the LLM's
    layers."""
    stacks: list[list[nn.Module]] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            whole = [member for member in child if next(member.children(), None) is not None]
            stacks.append([member for member in whole if not hasattr(member, "base_layer")])
        else:
            stacks += _stacks(child)
    return stacks


def _kind(module: nn.Module) -> tuple:
    """What tells a layer from others like it: the plain values that its parts hold, but for its number."""
    values = [(k, v) for k, v in vars(module).items() if v.__class__ in PLAIN and k != "layer_idx"]
    own = [part for part in module.children() if not _is_torch(part.__class__)]
    return (module.__class__, *values, *map(_kind, own))


def _is_attention_and_mlp(layer: nn.Module) -> bool:
    """Are all weights those of linear maps and of norms? Recurrences and convolutions have weights of other kinds."""
    for part in layer.modules():
        if type(part) is nn.Linear:
            continue
        is_leaf = next(part.children(), None) is None
        if any(not is_leaf or weight.dim() != 1 for weight in part.parameters(recurse=False)):
            return False
    return True


@cache
def _is_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def _batch_axis(hidden: Any, rows: int) -> int | None:
    """Where ``(rows, PROBE_LENGTH)`` is in the shape: some models stack or split their hidden states."""
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) and hidden.is_floating_point() else ()
    return next((i for i in range(len(shape) - 2) if shape[i : i + 2] == (rows, PROBE_LENGTH)), None)


@contextmanager
def attending(
    model: PreTrainedModel,
    attention: str,
    structured_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[None]:
    """Run ``model``'s forward passes inside: they attend in the mode it was set to, or by the structured mask.

    Args:
        model: what ``set_attention_mode`` was called on.
        attention: the mode it was set to.
        structured_mask: ``(batch, seq, seq)`` boolean, complete: padding included. Where the model keeps its windows,
            they narrow it further.
        position_ids: ``(batch, seq)``, the positions by which those windows are measured; the columns if None.

    Raises:
        ValueError: for a structured mask of another shape or type, one with a query that may attend to nothing, one
            under flash attention, or positions that do not fit it.
    """
    if structured_mask is None and (attention == "causal" or model.config.is_causal is False):
        yield
        return
    implementation = model.config._attn_implementation
    if structured_mask is not None:
        _check_structured_mask(structured_mask, position_ids, implementation)
    _changeable_masks(implementation)

    def symmetric(native: MaskFunction) -> MaskFunction:
        def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return native(batch, head, query, key) | native(batch, head, key, query)

        return may_attend

    def structured(native: MaskFunction) -> MaskFunction:
        within_window = symmetric(native)

        def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            allowed = structured_mask[batch, query, key]
            if position_ids is not None:
                query, key = position_ids[batch, query], position_ids[batch, key]
            return allowed & within_window(batch, head, query, key)

        return may_attend

    token = _CHANGE_MASK.set(symmetric if structured_mask is None else structured)
    try:
        yield
    finally:
        _CHANGE_MASK.reset(token)


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

    build.changed_by = _CHANGE_MASK
    AttentionMaskInterface.register(implementation, build)
