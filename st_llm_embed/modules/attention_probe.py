"""Prove which tokens each layer of an LLM attends to, by passes over a few rows of 5 tokens.

One token of a layer's input changes in each row: the positions of its output that move are those that heard it. This
shows for every kind of layer what its mask lets through, whatever its code, its configuration and its kernels say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_mask import attending
from .sliding_windows import narrow_windows

PROBE_LENGTH = 5  # unlike the number of rows, 4 at most, or the axes could be confused
PLAIN = {bool, int, float, str, type(None)}
PROBE_THRESHOLD = 1e-5  # of the layer's mean output; a token that is not attended to changes nothing at all


class AttentionProbe:
    """Watches an LLM's layers: which positions of a layer's output move when one token of its input changes?

    Of layers that are alike and are called alike only the first is computed, and with thin linear maps where it is
    nothing but attention and MLP: this costs less than one layer of the model.
    """

    def __init__(self, model: PreTrainedModel, centred: Collection[nn.Module] = ()) -> None:
        self.model = model
        self.stacks = _stacks(model)
        first: dict[tuple, nn.Module] = {}  # of each kind
        self.kinds = {layer: first.setdefault(_kind(layer), layer) for stack in self.stacks for layer in stack}
        self.plain = {layer for layer in first.values() if _is_attention_and_mlp(layer)}
        # Those of centred convolutions, which hear a few tokens on both sides.
        self.local = {layer for layer in first.values() if not set(centred).isdisjoint(layer.modules())}

    def obeys(self, attention: str, window: str) -> bool:
        """Does each kind of layer hear just the tokens that it should, in batches without padding and with it?"""
        first, second, last = 0, 1, PROBE_LENGTH - 1
        with narrow_windows(self.model):
            for layer, heard in self.hears([last, first, second]):
                later, earlier, near = heard.unbind()
                if attention == "causal":  # padding comes after all that a token hears, so this batch says it all
                    obeyed = earlier[second] and not later[:last].any()
                elif window == "keep" or layer in self.local:
                    obeyed = near[first] and earlier[second] and later[: last - 1].any() == earlier[second + 1 :].any()
                else:
                    obeyed = later[: last - 1].any()  # from two tokens away, which no narrow window spans
                if not obeyed:
                    return False
            if attention == "causal":
                return True
            real = last - 1
            for layer, heard in self.hears([real, second, last], length=last):
                later, near, padding = heard.unbind()
                is_local = window == "keep" or layer in self.local
                if padding[:last].any() or not (near[first] if is_local else later[: real - 1].any()):
                    return False
        return True

    def mixes_without_attention(self) -> bool:
        """With every token attending to itself alone, does the last one still hear of the one before? Centred
        convolutions do not count."""
        config = self.model.config
        # NOTE: deepseek_v4 also attends to summaries of 4 or 128 past tokens, which these few tokens do not show.
        if getattr(config.get_text_config(), "compress_rates", None):
            return True
        if (self.plain | self.local).issuperset(self.kinds.values()):
            return False
        alone = torch.eye(PROBE_LENGTH, dtype=torch.bool, device=self.model.device).repeat(2, 1, 1)
        implementation = config._attn_implementation
        if "flash" in implementation:  # takes no mask; recurrence is the same under any implementation
            config._attn_implementation = "eager"
        try:
            with attending(self.model, "bidirectional", alone):
                heard = self.hears([PROBE_LENGTH - 2])
                return any(of_layer[0, -1] for layer, of_layer in heard if layer not in self.local)
        finally:
            config._attn_implementation = implementation

    @torch.no_grad()
    def hears(self, speakers: Sequence[int], length: int = PROBE_LENGTH) -> list[tuple[nn.Module, Tensor]]:
        """Every kind of layer, by the first of it, and ``(speakers, seq)`` booleans: True where the output moves with
        the speaker's input.

        Every layer gets the first row's hidden states in each row, but for one speaker's token in each further row,
        whose channels move on by one: not negated, for gates multiply two signs away. Tokens from ``length`` on are
        padding.
        """
        model, rows = self.model, 1 + len(speakers)
        heard: list[tuple[nn.Module, Tensor]] = []
        computed: dict[tuple, tuple] = {}  # kind of layer -> its arguments, held so that none of their ids is reused
        called: set[nn.Module] = set()
        form: Tensor | Sequence = ()  # of what a layer gives

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
                heard.append((kind, (moved > PROBE_THRESHOLD * output[0].abs().mean(dim=-1)).cpu()))
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
        layers = max(self.stacks, key=len, default=[])
        if not self.kinds or not called.issuperset(layers):  # nothing seen is nothing proven
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
    parts = [part for part in module.children() if not part.__class__.__module__.startswith("torch.")]
    return (module.__class__, *values, *map(_kind, parts))


def _is_attention_and_mlp(layer: nn.Module) -> bool:
    """Are all weights those of linear maps and of norms? Recurrences and convolutions have weights of other kinds."""
    for part in layer.modules():
        if type(part) is nn.Linear:
            continue
        is_leaf = next(part.children(), None) is None
        if any(not is_leaf or weight.dim() != 1 for weight in part.parameters(recurse=False)):
            return False
    return True


def _batch_axis(hidden: Any, rows: int) -> int | None:
    """Where ``(rows, PROBE_LENGTH)`` is in the shape: some models stack or split their hidden states."""
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) and hidden.is_floating_point() else ()
    return next((i for i in range(len(shape) - 2) if shape[i : i + 2] == (rows, PROBE_LENGTH)), None)
