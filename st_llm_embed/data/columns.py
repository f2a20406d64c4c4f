"""Refuse a data set with missing or misnamed columns, or with empty rows, before a training run spends hours on it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value

NOT_TEXT = ("label", "dataset_name")  # the class, and what the host's trainer adds


def text_columns(columns: Iterable[str]) -> list[str]:
    """Those of ``anchor, positive, negative_1..n``, in their order."""
    return [column for column in columns if column not in NOT_TEXT]


def check_contrastive_columns(dataset: Dataset | IterableDataset, name: str, negatives: int | None = None) -> None:
    """Demand ``anchor, positive``, then ``negative`` or ``negative_1, negative_2, ...``, all non-empty text, and
    perhaps ``label``, the class as a number.

    Args:
        dataset: the rows.
        name: what an error calls them.
        negatives: how many columns of negatives there must be. Default: any number.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix.
    """
    columns = list(dataset.column_names or [])
    found = text_columns(columns[2:])
    named = found == ["negative"] or all(re.fullmatch(r"negative_\d+", column) for column in found)
    if columns[:2] != ["anchor", "positive"] or not named:
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. Expected, in this order: 'anchor', 'positive', then none, "
            "'negative', or 'negative_1', 'negative_2', ... Fix: dataset.rename_columns({'query': 'anchor', ...})"
            ".select_columns(['anchor', 'positive', ...])."
        )
    if negatives is not None and len(found) != negatives:
        raise ValueError(
            f"Data set {name!r} has {len(found)} columns of negatives, and its task asks for negatives={negatives}. "
            f"Fix: build it with negatives={negatives}, mine them, or make the task with negatives={len(found)}."
        )
    check_text(dataset, name, text_columns(columns))


def check_pretext_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Demand ``text, next`` and perhaps ``target``: text, of which ``next`` and ``target`` may be empty.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix.
    """
    columns = list(dataset.column_names or [])
    if columns not in (["text", "next"], ["text", "next", "target"]):
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. PretextLoss reads 'text', 'next' and perhaps 'target', in "
            "this order. Fix: st_llm_embed.data.consecutive_texts(documents) makes them from raw documents."
        )
    check_text(dataset, name, columns, may_be_empty=("next", "target"))


def check_text(
    dataset: Dataset | IterableDataset, name: str, columns: list[str], may_be_empty: tuple[str, ...] = ()
) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"Data set {name!r} has no rows.")
    for column in columns:
        feature = dataset.features[column]
        if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
            raise ValueError(
                f"Column {column!r} of data set {name!r} holds {feature}, not text. Fix: "
                f"dataset.cast_column({column!r}, Value('string')), or drop the column."
            )
    if isinstance(dataset, IterableDataset):  # rows are seen only when they stream past
        return
    first_row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        for column in columns:
            text = batch[column]
            bad = pc.is_null(text)
            if column not in may_be_empty:
                bad = pc.or_kleene(bad, pc.equal(pc.utf8_trim_whitespace(text), ""))
            row = pc.index(bad, True).as_py()
            if row >= 0:
                raise ValueError(
                    f"Row {first_row + row} of data set {name!r} has an empty {column!r}. Fix: dataset.filter(lambda "
                    f"row: row[{column!r}] and row[{column!r}].strip())."
                )
        first_row += batch.num_rows
