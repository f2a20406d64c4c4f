"""Rows of a padded batch in groups of like length, each without the columns that are padding in all of its rows.

Little of what is computed is then padding, and what a small group computes stays in a processor's cache. Each row's
states are the same; only the company it is padded to is another.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rows_by_length(attention_mask: Tensor, tokens: int) -> list[Tensor]:
    """The rows of each group, the longest first.

    Args:
        attention_mask: ``(batch, seq)``.
        tokens: how many a group has at most, padding included. A row that is longer is a group by itself.
    """
    lengths, order = attention_mask.sum(dim=1).sort(descending=True, stable=True)
    groups: list[Tensor] = []
    start = 0
    while start < len(order):
        stop = start + max(1, tokens // max(1, int(lengths[start])))
        groups.append(order[start:stop])
        start = stop
    return groups


def cut_to_length(features: dict[str, Any], rows: Tensor) -> tuple[dict[str, Any], slice]:
    """Some rows of a batch without the padding around all of them, and the columns that they keep."""
    mask = features["attention_mask"]  # (batch, seq)
    real = mask[rows].any(dim=0).nonzero()
    columns = slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 1)  # of rows without a token: one
    cut = {}
    for key, value in features.items():
        of_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(mask)
        chosen = value[rows] if of_rows else value
        cut[key] = chosen[:, columns] if of_rows and value.shape[1:2] == mask.shape[1:] else chosen
    return cut, columns
