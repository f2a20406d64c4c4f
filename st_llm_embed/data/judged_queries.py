"""Queries with lists of texts to rows: the JSON lines that FlagEmbedding and Tevatron train on.

FlagEmbedding: ``query``, ``pos`` and ``neg``, lists of texts. Tevatron: ``query``, ``positive_passages`` and
``negative_passages``, lists of passages with ``title`` and ``text``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from .rows import Judged, contrastive_dataset
from .sources import Source, check_source, is_streamed, joined, source_rows, text_or_empty

FORMS = (("pos", "neg"), ("positive_passages", "negative_passages"))


def from_judged_queries(
    source: Source,
    *,
    negatives: int = 0,
    seed: int = 0,
    drop_short: bool = False,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each query with each of its positives, and with ``negatives`` of its hard negatives.

    Args:
        source: a JSON lines file, plain or ``.gz``, or a table with the same columns. Streams if it is a stream.
        negatives, seed, drop_short, streaming, counts: see ``contrastive_dataset``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: naming the row that has neither form; see also ``contrastive_dataset``.
    """
    check_source(source, {})

    def judged(_: Counter[str]) -> Iterator[Judged]:
        for where, row in source_rows(source, {}):
            form = next((form for form in FORMS if form[0] in row), None)
            if "query" not in row or form is None or (negatives and form[1] not in row):
                raise ValueError(
                    f"{where} has the columns {list(row)}. Needed: 'query', 'pos' and 'neg' (FlagEmbedding), or "
                    "'query', 'positive_passages' and 'negative_passages' (Tevatron). Fix: rename yours."
                )
            positive_texts, negative_texts = (_texts(row.get(column), where, column) for column in form)
            yield Judged(where, row["query"], positive_texts, negative_texts)

    next(judged(Counter()))  # refuse other forms now, not when a stream is read
    return contrastive_dataset(
        judged,
        negatives=negatives,
        seed=seed,
        drop_short=drop_short,
        streaming=is_streamed(source, streaming),
        counts=counts,
    )


def _texts(listed: Any, where: str, column: str) -> list[Any]:
    if not isinstance(listed or [], list):
        raise ValueError(f"{where} has {listed!r} in {column!r}, which must be a list.")
    return [_passage(item, where) if isinstance(item, dict) else item for item in listed or []]


def _passage(item: dict[str, Any], where: str) -> str:
    return joined(text_or_empty(item.get("title"), where), text_or_empty(item.get("text"), where))
