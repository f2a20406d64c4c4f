"""A padded batch as one row of its real tokens, and back: what flash attention's variable-length kernels take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def without_padding(features: dict[str, Any]) -> dict[str, Any]:
    """A batch as one row of its real tokens, as flash attention's variable-length kernels take it."""
    real = features["attention_mask"].bool()
    lengths = real.sum(dim=1)
    boundaries = nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()  # (batch + 1,)
    longest = int(lengths.max())
    return {
        "input_ids": features["input_ids"][real].unsqueeze(0),  # (1, tokens)
        "position_ids": features["position_ids"][real].unsqueeze(0),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def with_padding(states: Tensor, attention_mask: Tensor) -> Tensor:
    """``(1, tokens, dim)`` states of real tokens as ``(batch, seq, dim)``, zero at the padding."""
    padded = states.new_zeros(*attention_mask.shape, states.shape[-1])
    return padded.masked_scatter(attention_mask.bool().unsqueeze(-1), states)
