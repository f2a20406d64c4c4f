"""A corpus to search: documents of ``text``, or of ``title`` and ``text``, which are read as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import get_temporary_cache_files_directory

from .columns import check_text
from .sources import joined, load_rows, text_or_empty
from .text_files import plain_or_gz


def load_corpus(
    source: str | Path, columns: Mapping[str, str] | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """What ``load_rows`` reads; of a folder in BEIR's layout, the corpus alone.

    Args:
        source: the path, or the Hub id.
        columns: the columns to rename, by their new names, such as ``{"text": "body", "title": "headline"}``.
        streaming: whether the rows are read as they are needed.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: naming what could not be read as a data set.
    """
    path = Path(source).expanduser()
    if any(path.glob("corpus.jsonl*")):
        source = plain_or_gz(path / "corpus.jsonl")
    return load_rows(source, streaming, columns)


def read_corpus(corpus: Dataset | Sequence[str]) -> Dataset:
    """One column ``text``, each document as the benchmarks embed it: its title, if it has one, a space, its text.

    What was not in memory is not brought there: the result is a file of the ``datasets`` library, in its cache or,
    for what lies outside of that, in a temporary folder.

    Raises:
        ValueError: for a corpus without ``text``, naming its columns, or with an empty document, naming its row.
    """
    if not isinstance(corpus, Dataset):
        corpus = Dataset.from_dict({"text": list(corpus)})
    if "text" not in corpus.column_names:
        raise ValueError(
            f"The corpus has the columns {corpus.column_names}, not 'text'. Fix: corpus.rename_column(..., 'text')."
        )
    columns = [name for name in ("title", "text") if name in corpus.column_names]
    documents = corpus.with_format(None).select_columns(columns)
    documents = documents.map(
        _documents,
        cache_file_name=scratch_file(documents),
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=Features({"text": Value("string")}),
    )
    check_text(documents, "corpus", ["text"])
    return documents


def scratch_file(rows: Dataset) -> str | None:
    """Where to write what is made of rows on disk, lest it is written beside them; None for the library's choice,
    which is right in its own cache and in memory."""
    cache = Path(datasets.config.HF_DATASETS_CACHE).resolve()
    files = [Path(file["filename"]).resolve() for file in rows.cache_files]
    if all(file.is_relative_to(cache) for file in files):
        return None
    return str(Path(get_temporary_cache_files_directory(), f"{uuid4().hex}.arrow"))


def _documents(batch: dict[str, list[str | None]], rows: list[int]) -> dict[str, list[str]]:
    titles = batch.get("title", [None] * len(rows))
    return {
        "text": [
            joined(*(text_or_empty(part, f"Row {row} of the corpus") for part in parts))
            for row, *parts in zip(rows, titles, batch["text"], strict=True)
        ]
    }
