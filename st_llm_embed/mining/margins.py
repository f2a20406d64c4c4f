"""How far below its positive's score a document's must be: by a share of it, by a difference, or by both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def highest_allowed(positive: np.ndarray, margins: Mapping[str, float | None]) -> dict[str, np.ndarray]:
    """The highest score that each margin allows, ``(queries,)``.

    Args:
        positive: ``(queries,)``, the score of each query's positive, or what stands for those of several.
        margins: by the name of the rule, which ends in ``relative_margin`` or ``absolute_margin``; None is no rule.
    """
    return {
        rule: positive - (margin * np.abs(positive) if rule.endswith("relative_margin") else margin)
        for rule, margin in margins.items()
        if margin is not None
    }


def lowest_of(query: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``(queries,)``: the lowest of the scores ``(rows,)`` that the rows of each query have."""
    lowest = np.full(query.max() + 1, np.inf, np.float32)
    np.minimum.at(lowest, query, scores)
    return lowest


def mean_of(query: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """``(queries,)``: the mean of the scores ``(rows,)`` that the rows of each query have."""
    return (np.bincount(query, scores) / np.bincount(query)).astype(np.float32)


def keep_below(
    candidate: np.ndarray, scores: np.ndarray, limits: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which candidates all limits allow, ``(queries, k)``; and ``(queries,)`` by rule, how many each drops. One that
    several would drop counts for the first.

    Args:
        candidate: ``(queries, k)``, which documents are candidates.
        scores: ``(queries, k)``, of these documents; NaN where there is none, which is allowed.
        limits: ``(queries,)`` by rule, the highest score that it allows.
    """
    left, dropped = candidate, {}
    for rule, limit in limits.items():
        above = left & (scores > limit[:, None])
        dropped[rule] = above.sum(axis=1)
        left = left & ~above
    return left, dropped
