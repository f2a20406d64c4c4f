"""A judge: whoever gives pairs of a query and a document scores, as a second opinion on what a teacher ranks high.

Scores of different judges mean different things. So each says its scale, by which candidates that it holds for
relevant are told: those that score no further below the positive than a margin, a share of the positive's score or a
difference. RLHN (arXiv 2505.16967) has an LLM relabel mined negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

ROUNDING = 1e-3  # by which a score may be out of its range
SHOWN = 60  # characters of a text in an error
TRIAL = (  # what a judge is asked before any work
    ("how do I sort a list?", "list.sort() sorts the list in place."),
    ("how do I sort a list?", "The ferry leaves at noon."),
)


def nobody(count: int) -> None:
    """Hears how many pairs are done."""


class Scale(NamedTuple):
    """What the scores of a judge are.

    Args:
        name: what they are called.
        lowest: the lowest that there can be.
        highest: the highest that there can be.
        relative_margin: the share of the positive's score by which one must be lower, unless another is asked for; or
            None.
        absolute_margin: the difference by which one must be lower, unless another is asked for; or None.
    """

    name: str
    lowest: float
    highest: float
    relative_margin: float | None
    absolute_margin: float | None

    def __str__(self) -> str:
        return f"{self.name}, from {self.lowest:g} to {self.highest:g}"


PROBABILITIES = Scale("probabilities", 0.0, 1.0, 0.5, None)
COSINES = Scale("cosines", -1.0, 1.0, 0.2, None)
BM25_SCORES = Scale("BM25 scores", 0.0, float("inf"), 0.5, None)
LOGITS = Scale("logits", float("-inf"), float("inf"), None, 3.0)


@runtime_checkable
class Judge(Protocol):
    """Whoever scores pairs of texts.

    Args:
        name: what errors and reports call it.
        identity: hexadecimal digits that name everything that its scores depend on.
        scale: what its scores are.
    """

    name: str
    identity: str
    scale: Scale

    def score(
        self, queries: Sequence[str], documents: Sequence[str], done: Callable[[int], None] = nobody
    ) -> np.ndarray:
        """``(pairs,)``, of each query with the document in its place. ``done`` hears of every batch how many pairs it
        had."""


def try_judge(judge: Judge) -> None:
    """Ask a judge about two pairs.

    Raises:
        ValueError: if its scores are none; see ``checked_scores``.
    """
    queries, documents = zip(*TRIAL, strict=True)
    checked_scores(judge, queries, documents)


def checked_scores(
    judge: Judge, queries: Sequence[str], documents: Sequence[str], done: Callable[[int], None] = nobody
) -> np.ndarray:
    """``(pairs,)``: the scores.

    Raises:
        ValueError: for scores that are not finite, not one for each pair, or not of the judge's scale.
    """
    scores = np.asarray(judge.score(queries, documents, done), np.float32)
    if scores.shape != (len(queries),):
        raise ValueError(
            f"The judge {judge.name} gives scores of the shape {scores.shape} for {len(queries)} pairs. Expected: one "
            "number for each pair. A cross-encoder has num_labels=1."
        )
    scale = judge.scale
    with np.errstate(invalid="ignore"):
        fine = np.isfinite(scores) & (scale.lowest - ROUNDING <= scores) & (scores <= scale.highest + ROUNDING)
    if not fine.all():
        first = int(fine.argmin())
        raise ValueError(
            f"The judge {judge.name} gives {scores[first]} for the query {queries[first][:SHOWN]!r} and the document "
            f"{documents[first][:SHOWN]!r}. Expected: {scale}. Fix: another precision, if it is NaN "
            "(model_kwargs={'dtype': 'float32'}); else a sigmoid (CrossEncoder(..., "
            "activation_fn=torch.nn.Sigmoid())), which makes probabilities of logits, or a judge of the scale LOGITS."
        )
    return scores
