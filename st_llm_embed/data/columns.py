"""Refuse a data set with missing or misnamed columns, or with empty rows, before a training run spends hours on it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset, Value
from datasets.table import InMemoryTable

SCORES = "scores"  # of each row's documents, by a cross-encoder or whatever knows
# Beside the texts: the class, the scores, and what the host's trainer and this package's add.
TEACHER_EMBEDDING = "_teacher_embedding"  # ends the name of the column of vectors of a column of texts
NOT_TEXT = ("label", SCORES, "dataset_name", "teacher_source", "teacher_row")
DOCUMENTS, QUERIES = ["text"], ["anchor"]  # the columns of single texts, which a teacher says something of


def text_columns(columns: Iterable[str]) -> list[str]:
    """Those of ``anchor, positive, negative_1..n``, in their order; or of the one that there is."""
    return [column for column in columns if column not in NOT_TEXT and not column.endswith(TEACHER_EMBEDDING)]


def check_contrastive_columns(dataset: Dataset | IterableDataset, name: str, negatives: int | None = None) -> None:
    """Demand ``anchor, positive``, then ``negative`` or ``negative_1, negative_2, ...``, all non-empty text, and
    perhaps ``label``, the class as a whole number.

    Args:
        dataset: the data set to check.
        name: the name of the data set in errors.
        negatives: how many columns of negatives there must be. Default: any number.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix.
    """
    columns = list(dataset.column_names or [])
    negative_columns = text_columns(columns[2:])
    named = negative_columns == ["negative"] or all(
        re.fullmatch(r"negative_\d+", column) for column in negative_columns
    )
    if columns[:2] != ["anchor", "positive"] or not named:
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. Expected, in this order: 'anchor', 'positive', then none, "
            "'negative', or 'negative_1', 'negative_2', ... Fix: dataset.rename_columns({'query': 'anchor', ...})"
            ".select_columns(['anchor', 'positive', ...])."
        )
    if negatives is not None and len(negative_columns) != negatives:
        raise ValueError(
            f"Data set {name!r} has {len(negative_columns)} columns of negatives, and its task asks for negatives="
            f"{negatives}. Fix: build it with negatives={negatives}, mine them, or make the task with negatives="
            f"{len(negative_columns)}."
        )
    check_text(dataset, name, text_columns(columns))
    if "label" in columns:
        check_classes(dataset, name)
    if SCORES in columns:
        check_scores(dataset, name, len(text_columns(columns)) - 1)


def check_scores(dataset: Dataset | IterableDataset, name: str, documents: int) -> None:
    """Demand a list of numbers in each row, one for each document. Of a stream, nothing is known.

    Raises:
        ValueError: naming the data set, the row, its scores and the number of documents.
    """
    if documents < 2:
        raise ValueError(
            f"Data set {name!r} has {SCORES}, and one document in each row, whose score alone says nothing. Give "
            "it negatives, or leave the column out."
        )
    if isinstance(dataset, IterableDataset):
        return
    first_row = 0
    for batch in dataset.with_format("arrow").iter(batch_size=10_000):
        for row, scores in enumerate(batch[SCORES].to_pylist(), first_row):
            numbers = isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
            if not numbers or len(scores) != documents or not np.isfinite(scores).all():
                raise ValueError(
                    f"Row {row} of data set {name!r} has the {SCORES} {scores!r}. Expected a list of {documents} "
                    "numbers, one for each of its documents: the positive, then the negatives."
                )
        first_row += batch.num_rows


def score_column(scores: np.ndarray) -> Dataset:
    """The column of scores ``(rows, documents)``, a list in each row."""
    offsets = pa.array(np.arange(len(scores) + 1, dtype=np.int32) * np.int32(scores.shape[1]))
    lists = pa.ListArray.from_arrays(offsets, pa.array(scores.ravel()))
    return Dataset(InMemoryTable(pa.table({SCORES: lists})))


def check_classes(dataset: Dataset | IterableDataset, name: str, column: str = "label", several: bool = False) -> None:
    """Demand that a column has each row's class as a whole number: rows of one class take no positives of each other.

    Args:
        dataset: the data set to check. Of a stream, only the column's type is known.
        name: the name of the data set in errors.
        column: the name of the column of classes.
        several: whether to demand more than one class.

    Raises:
        ValueError: naming the data set, the column, its values and the fix.
    """
    feature = dataset.features[column]
    whole = isinstance(feature, Value) and re.fullmatch(r"u?int(8|16|32)|int64", feature.dtype)
    classes: set[int | None] = set()
    if not whole and not isinstance(feature, ClassLabel):
        shown = feature if isinstance(dataset, IterableDataset) else dataset.with_format(None)[:3][column]
        fault, fix = f"holds {shown}", f"dataset.class_encode_column({column!r})"
    else:
        if isinstance(dataset, Dataset):
            for batch in dataset.with_format("arrow").iter(batch_size=10_000):
                classes.update(batch[column].unique().to_pylist())
        if None in classes:
            fault, fix = "is None in some rows", f"dataset.filter(lambda row: row[{column!r}] is not None)"
        elif several and len(classes) == 1 and len(dataset) > 1:
            fault, fix = f"is {classes.pop()} in every row", "add rows of other classes"
        else:
            return
    raise ValueError(
        f"Column {column!r} of data set {name!r} {fault}. It is read as each row's class, a whole number, and rows of "
        f"one class take no positives of each other. Fix: {fix} if these are classes; dataset.remove_columns"
        f"({column!r}) if they are anything else, such as scores, or marks that the two texts match."
    )


def check_pretext_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Demand ``text, next`` and perhaps ``target``: text, of which ``next`` and ``target`` may be empty.

    Of a stream, the first row is read.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix; for no rows.
    """
    columns = list(dataset.column_names or [])
    if columns not in (["text", "next"], ["text", "next", "target"]):
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. PretextLoss reads 'text', 'next' and perhaps 'target', in "
            "this order. Fix: st_llm_embed.data.consecutive_texts(documents) makes them from raw documents."
        )
    check_text(dataset, name, columns, may_be_empty=("next", "target"))
    _check_first_row(dataset, name)


def check_mntp_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    """Demand ``text``, whatever there is besides. Of a stream, the first row is read.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix; for no rows.
    """
    columns = list(dataset.column_names or [])
    if "text" not in columns:
        raise ValueError(
            f"Data set {name!r} has the columns {columns}. MNTPLoss reads 'text'. Rename yours: "
            "rows.rename_column('...', 'text')."
        )
    check_text(dataset, name, ["text"])
    _check_first_row(dataset, name)


def _check_first_row(dataset: Dataset | IterableDataset, name: str) -> None:
    if isinstance(dataset, IterableDataset):
        try:
            first = next(iter(dataset), None)
        except ValueError as error:
            raise ValueError(f"Data set {name!r} cannot be read: {error}") from error
        if first is None:
            raise ValueError(f"Data set {name!r} has no rows.")


def check_text(
    dataset: Dataset | IterableDataset, name: str, columns: list[str], may_be_empty: tuple[str, ...] = ()
) -> None:
    """Demand columns of text without empty ones, but in ``may_be_empty``. Of a stream, only the types are known.

    Raises:
        ValueError: naming the data set, the column and the row, and the fix; for no rows.
    """
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
            refused = pc.is_null(text)
            if column not in may_be_empty:
                refused = pc.or_kleene(refused, pc.equal(pc.utf8_trim_whitespace(text), ""))
            row = pc.index(refused, True).as_py()
            if row >= 0:
                raise ValueError(
                    f"Row {first_row + row} of data set {name!r} has an empty {column!r}. Fix: dataset.filter(lambda "
                    f"row: row[{column!r}] and row[{column!r}].strip())."
                )
        first_row += batch.num_rows
