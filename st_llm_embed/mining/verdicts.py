"""What a judge says of an anchor's candidates, asked about no more of them than its negatives need.

Held for relevant is a candidate that scores no further below the positive than the margins of the judge. Of several
positives the mean stands for all: the lowest of many is low by chance, and would leave fewer anchors with negatives
for as many unmarked positives among them (``examples/benchmarks/judged_negatives.py``). It is asked about the
candidates that the teacher's margins leave, best first, until an anchor has its negatives; if what it holds for
relevant becomes a positive, also about those above the margins. Of an anchor to which the margins leave too few, about
none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from st_llm_embed.mining.judged_pairs import Pairs
from st_llm_embed.mining.margins import highest_allowed, keep_below, mean_of

Judged = Literal["drop", "promote"]


class Verdicts(NamedTuple):
    """What a judge said.

    Args:
        scores: ``(queries, k)``, of the candidates; NaN of those that it was not asked about.
        positive_scores: ``(rows,)``, of each row's positive.
        limits: ``(queries,)`` by rule, the highest score of a candidate that is not relevant.
    """

    scores: np.ndarray
    positive_scores: np.ndarray
    limits: dict[str, np.ndarray]

    @property
    def relevant(self) -> np.ndarray:
        """``(queries, k)``, which candidates it holds for relevant."""
        return ~keep_below(np.ones(self.scores.shape, np.bool_), self.scores, self.limits)[0]


def ask(
    pairs: Pairs,
    query: np.ndarray,
    positive: np.ndarray,
    nearest: np.ndarray,
    allowed: np.ndarray,
    above: np.ndarray,
    needed: int,
    margins: Mapping[str, float | None],
) -> Verdicts:
    """Ask a judge.

    Args:
        pairs: the judge's scores.
        query: ``(rows,)``, each row's query.
        positive: ``(rows,)``, each row's positive among the documents.
        nearest: ``(queries, k)``, the candidates among the documents, best first.
        allowed: ``(queries, k)``, which of them the teacher's margins leave.
        above: ``(queries, k)``, which others it is asked about.
        needed: how many that are not relevant each query needs.
        margins: of the judge, by rule.
    """
    positive_scores = pairs.scores(query, positive)
    verdicts = Verdicts(
        np.full(nearest.shape, np.nan, np.float32),
        positive_scores,
        highest_allowed(mean_of(query, positive_scores), margins),
    )
    scores = verdicts.scores
    hopeful = allowed.sum(axis=1, keepdims=True) >= needed
    asked = above & hopeful
    while True:
        left, _ = keep_below(allowed & hopeful, scores, verdicts.limits)
        asked |= left & (left.cumsum(axis=1, dtype=np.int32) <= needed)
        of_query, place = np.nonzero(asked & np.isnan(scores))
        if not len(of_query):
            return verdicts
        scores[of_query, place] = pairs.scores(of_query, nearest[of_query, place])


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, minimum, quartiles and maximum; of no values none."""
    if not len(values):
        return {}
    quantiles = zip(("min", "25%", "median", "75%", "max"), np.quantile(values, (0, 0.25, 0.5, 0.75, 1)), strict=True)
    return {"mean": float(values.mean()), **{name: float(value) for name, value in quantiles}}


def report_of(verdicts: Verdicts, promoted: int) -> dict[str, Any]:
    """How many pairs a judge was asked about, what it said of them, and of what size its scores are."""
    asked = ~np.isnan(verdicts.scores)
    return {
        "pairs": len(verdicts.positive_scores) + int(asked.sum()),
        "relevant": int((verdicts.relevant & asked).sum()),
        "promoted": promoted,
        "scores": {
            "positive": summary(verdicts.positive_scores),
            "candidate": summary(verdicts.scores[asked]),
        },
    }
