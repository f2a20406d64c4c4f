"""Tables of text pairs to rows: any two columns, scored sentence pairs (STS), and parallel text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from datasets import Dataset, IterableDataset

from .rows import Judged, contrastive_dataset
from .sources import (
    Source,
    check_source,
    is_streamed,
    joined,
    number_of,
    source_rows,
    stripped,
    text_or_empty,
)


def from_columns(
    source: Source,
    *,
    anchor: str = "anchor",
    positive: str = "positive",
    negatives: Sequence[str] = (),
    title: str | None = None,
    drop_short: bool = False,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each row of a table, its columns renamed.

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
            Streams if it is a stream. Each row stands alone: what is its negative may be the positive of the same
            anchor in another row.
        anchor, positive: the names of the columns of anchors and of positives.
        negatives: the names of the columns of hard negatives.
        title: the name of the column of the positives' titles, each of which is joined with its positive, as in BEIR's
            corpora. Default: there is none.
        drop_short, streaming, counts: see ``contrastive_dataset``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for columns that are not there, or a row without one of its negatives; see also
            ``contrastive_dataset``.
    """
    columns = {anchor: "anchor", positive: "positive"} | ({title: "title"} if title else {})
    check_source(source, columns | dict.fromkeys(negatives, "negatives"))

    def judged(_: Counter[str]) -> Iterator[Judged]:
        for where, row in source_rows(source, columns):
            document = row[positive]
            if title and stripped(document, where):
                document = joined(text_or_empty(row[title], where), document)
            yield Judged(where, row[anchor], [document], [row.get(column) for column in negatives])

    return contrastive_dataset(
        judged,
        negatives=len(negatives),
        drop_short=drop_short,
        streaming=is_streamed(source, streaming),
        counts=counts,
    )


def from_sts(
    source: Source,
    *,
    sentence1: str = "sentence1",
    sentence2: str = "sentence2",
    score: str = "score",
    threshold: float = 4.0,
    scale: tuple[float, float] = (0.0, 5.0),
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """The sentence pairs that people scored high, in both directions (NV-Embed, arXiv 2405.17428: 4 or more of 5).

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
            Streams if it is a stream.
        sentence1, sentence2, score: the names of the columns of the two sentences and of their score.
        threshold: the lowest score that makes a positive pair.
        scale: the lowest and the highest score there can be.
        streaming, counts: see ``contrastive_dataset``. Counted besides: rows ``below threshold``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for a threshold or a score outside ``scale``, or columns that are not there; see also
            ``contrastive_dataset``.
    """
    low, high = scale
    if not low <= threshold <= high:
        raise ValueError(f"threshold={threshold} is outside scale={scale}.")
    columns = {sentence1: "sentence1", sentence2: "sentence2", score: "score"}
    check_source(source, columns)

    def judged(counted: Counter[str]) -> Iterator[Judged]:
        for where, row in source_rows(source, columns):
            value = number_of(row[score])
            if value is None or not low <= value <= high:
                raise ValueError(
                    f"{where} has the score {row[score]!r}, outside scale={scale}. Fix: give the scale of this set "
                    "and a threshold on it, such as scale=(0, 1), threshold=0.8."
                )
            if value >= threshold:
                yield Judged(where, row[sentence1], [row[sentence2]])
                yield Judged(where, row[sentence2], [row[sentence1]])
            else:
                counted["below threshold"] += 1

    return contrastive_dataset(judged, negatives=0, streaming=is_streamed(source, streaming), counts=counts)


def from_parallel_text(
    source: Source,
    *,
    sentence1: str = "sentence1",
    sentence2: str = "sentence2",
    both_directions: bool = True,
    streaming: bool = False,
    counts: Counter[str] | None = None,
) -> Dataset | IterableDataset:
    """Each sentence with its translation.

    Args:
        source: a ``Dataset``, or what ``load_rows`` reads: a CSV, TSV, Parquet or JSON lines file, ...
            Streams if it is a stream.
        sentence1, sentence2: the names of the columns of the two languages.
        both_directions: whether the second language's sentences are anchors too.
        streaming, counts: see ``contrastive_dataset``.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for columns that are not there; see also ``contrastive_dataset``.
    """
    columns = {sentence1: "sentence1", sentence2: "sentence2"}
    check_source(source, columns)

    def judged(_: Counter[str]) -> Iterator[Judged]:
        for where, row in source_rows(source, columns):
            yield Judged(where, row[sentence1], [row[sentence2]])
            if both_directions:
                yield Judged(where, row[sentence2], [row[sentence1]])

    return contrastive_dataset(judged, negatives=0, streaming=is_streamed(source, streaming), counts=counts)
