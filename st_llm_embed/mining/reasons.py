"""Why a row was dropped, in words: how many candidates its anchor had, and how many of them each rule dropped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

WORDS = {
    "relative_margin": "too close to the positive or above it",
    "absolute_margin": "too close to the positive or above it",
    "judge_relative_margin": "held for relevant by the judge",
    "judge_absolute_margin": "held for relevant by the judge",
    "range_min": "skipped",
}
SHOWN = 3  # reasons in an error


def reasons_of(
    candidates: np.ndarray,
    dropped: Mapping[str, np.ndarray],
    settings: Mapping[str, float | None],
    num_negatives: int,
) -> tuple[list[str], np.ndarray]:
    """The distinct reasons of rows without enough negatives, and ``(rows,)``, which of them each row has.

    Args:
        candidates: ``(rows,)``, how many candidates there were.
        dropped: ``(rows,)`` by rule, how many of them the rule dropped; each candidate counts for one rule.
        settings: the number given for each rule.
        num_negatives: the number of negatives that a row needs.
    """
    counts = np.stack([candidates, *dropped.values()], axis=1)
    distinct, reason = np.unique(counts, axis=0, return_inverse=True)
    reasons = []
    for of, *taken in distinct.tolist():
        by_rule = [
            f"{count} {WORDS[rule]} ({rule}={settings[rule]})"
            for rule, count in zip(dropped, taken, strict=True)
            if count
        ]
        reasons.append(
            f"{of - sum(taken)} of {num_negatives} negatives: of {of} candidate{'s' * (of != 1)}, "
            f"{', '.join(by_rule) or 'none dropped'}"
        )
    return reasons, reason


def most_frequent(reasons: list[str], reason: np.ndarray) -> str:
    """The reasons of most rows, each with how many rows have it; arguments as ``reasons_of`` returns them."""
    rows = np.bincount(reason, minlength=len(reasons))
    order = np.argsort(-rows, kind="stable")
    words = [f"{rows[i]} row{'s' * int(rows[i] != 1)}: {reasons[i]}" for i in order[:SHOWN]]
    if len(reasons) > SHOWN:
        words.append(f"{rows[order[SHOWN:]].sum()} more for {len(reasons) - SHOWN} other reasons")
    return "; ".join(words)
