"""Single texts, which need no partner: a teacher's vectors say what there is to learn of each."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .columns import QUERIES, check_text
from .corpus import load_corpus, read_corpus


def from_texts(source: Dataset | str | Path) -> Dataset:
    """Documents, ``text``, from a corpus; or queries, ``anchor``, from rows that have that column.

    Args:
        source: a data set, or what ``load_corpus`` reads: a file, a folder in BEIR's layout, a Hub id. Documents have
            ``text`` and perhaps ``title``, which are joined; other columns are left out.

    Raises:
        ValueError: for rows with neither column, and for empty texts.
    """
    rows = source if isinstance(source, Dataset) else load_corpus(source)
    if QUERIES[0] not in rows.column_names:
        return read_corpus(rows)
    queries = rows.with_format(None).select_columns(QUERIES)
    check_text(queries, str(source), QUERIES)
    return queries
