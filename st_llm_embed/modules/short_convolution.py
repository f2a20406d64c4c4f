"""The short convolutions of LFM2 and its kind, centred: a token hears as many tokens after it as before it.

    causal      y[t] = out(C[t] · Σₖ w[k] h[t - (K - 1) + k])         B, C, x = in(states), h = B · x
    centred     y[t] = out(C[t] · Σₖ w[k] h[t - (K - 1) / 2 + k])

States in and out: ``(batch, seq, dim)``. h is 0 at the padding, as it is before and after the text: a text has the
same states in any batch, padded on either side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def centre_convolutions(model: nn.Module) -> list[nn.Module]:
    """Centre a model's short convolutions that have a middle, an odd number of weights. Gives them."""
    found = [part for part in model.modules() if (weights := _weights(part)) and weights % 2]
    for part in found:
        vars(part)["forward"] = partial(_centred, part)  # for good, as gradient checkpointing runs it once more
    return found


def causal_convolutions(model: nn.Module) -> None:
    """Undo ``centre_convolutions``."""
    for part in model.modules():
        if _weights(part):
            vars(part).pop("forward", None)


def _weights(part: nn.Module) -> int:
    """How many tokens a short convolution spans; 0 of any other part."""
    convolution = getattr(part, "conv", None)
    if isinstance(convolution, nn.Conv1d) and type(part).__name__.endswith("ShortConv"):
        return convolution.kernel_size[0]
    return 0


def _centred(part: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """What the module's own forward does without a cache, but for the place of the middle.

    Args:
        part: the module.
        hidden_states: the states, ``(batch, seq, dim)``.
        attention_mask: 1 at real tokens, ``(batch, seq)``. None: all are.
        **kwargs: what its forward takes besides, without a meaning here.
    """
    gate, output_gate, value = part.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)  # (batch, dim, seq) each
    heard = gate * value
    if attention_mask is not None:
        heard = heard * attention_mask.unsqueeze(1).to(heard.dtype)
    seq, before = heard.shape[2], part.conv.kernel_size[0] // 2
    # The convolution pads by all but one of its weights, on both sides.
    mixed = part.conv(heard)[..., before : before + seq]
    return part.out_proj((output_gate * mixed).transpose(1, 2))
