"""Refuse a data set with missing or misnamed columns, or with empty rows, before a training run spends hours on it."""

from __future__ import annotations

import re

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value


def check_contrastive_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Demand ``anchor, positive`` and then ``negative`` or ``negative_1, negative_2, ...``, all non-empty text.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix.
    """
    columns = list(dataset.column_names or [])
    negatives = columns[2:]
    named = negatives == ["negative"] or all(re.fullmatch(r"negative_\d+", column) for column in negatives)
    if columns[:2] != ["anchor", "positive"] or not named:
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. Expected, in this order: 'anchor', 'positive', then none, "
            "'negative', or 'negative_1', 'negative_2', ... Fix: dataset.rename_columns({'query': 'anchor', ...})"
            ".select_columns(['anchor', 'positive', ...])."
        )
    check_text(dataset, name, columns)


def check_pretext_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Demand ``text, next``: text, of which ``next`` may be empty.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix.
    """
    columns = list(dataset.column_names or [])
    if columns != ["text", "next"]:
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. PretextLoss reads 'text' and 'next', in this order. Fix: "
            "st_llm_embed.data.consecutive_paragraphs(documents) makes them from raw documents."
        )
    check_text(dataset, name, columns, may_be_empty=("next",))


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
