"""The data sets of a configuration, read by the builder that each names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from st_llm_embed.data import (
    check_pretext_columns,
    consecutive_texts,
    from_beir,
    from_class_examples,
    from_class_labels,
    from_columns,
    from_judged_queries,
    from_ms_marco,
    from_ms_marco_triples,
    from_nli,
    from_parallel_text,
    from_sts,
    from_texts,
    load_rows,
    paragraphs,
    rename_columns,
    sentences,
    windows,
)
from st_llm_embed.tasks import Task, known_task
from st_llm_embed.teaching import with_arrays

OF_TASKS = [field.name for field in fields(Task) if field.name not in ("name", "negatives")]
OF_FILES = ("arrow", "csv", "json", "parquet", "text")  # what load_dataset reads files of this machine by
READERS: dict[str, Callable[..., Any]] = {
    reader.__name__: reader
    for reader in (
        from_beir,
        from_class_examples,
        from_class_labels,
        from_columns,
        from_judged_queries,
        from_ms_marco,
        from_ms_marco_triples,
        from_nli,
        from_parallel_text,
        from_sts,
        from_texts,
        load_dataset,
        load_from_disk,
    )
}
PRETEXT = consecutive_texts.__name__


def read_data(
    name: str, settings: Mapping[str, Any], folder: Path = Path()
) -> Dataset | IterableDataset | tuple[Dataset | IterableDataset, Task]:
    """Pretext rows, or a task's rows and the task.

    Args:
        name: the name of the data set, which is the task's.
        settings: ``read``, the name of its builder; that builder's arguments; ``columns``, which are renamed first;
            and settings of its ``Task``.
        folder: what the files that ``load_dataset`` reads are relative to.

    Raises:
        ValueError, OSError: for what cannot be read, or is no task's data.
    """
    arguments = {key: value for key, value in settings.items() if key not in ("read", "mine", "teacher_embeddings")}
    if settings["read"] == PRETEXT:
        rows = read_pretext(**arguments)
        check_pretext_columns(rows, name)
        return rows
    task = task_of(name, settings)
    arguments = {key: value for key, value in arguments.items() if key not in OF_TASKS}
    columns = arguments.pop("columns", None) or {}
    if columns and "source" in arguments:
        arguments["source"] = load_rows(arguments["source"], columns=columns)
    arguments |= files_beside(folder, settings)
    rows = READERS[settings["read"]](**arguments)
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(f"It is read as {', '.join(rows)}. Name one of them: split: {next(iter(rows))}.")
    if columns and "source" not in arguments:
        rows = rename_columns(rows, columns, name)
    return with_arrays(rows, settings.get("teacher_embeddings") or {}), task


def task_of(name: str, settings: Mapping[str, Any]) -> Task:
    """The task of a data set.

    Raises:
        ValueError: for a name that is not known, and without an instruction.
    """
    own = {key: settings[key] for key in OF_TASKS if key in settings}
    if settings["read"] == from_texts.__name__ and "instruction" not in own:
        return Task(name, **{"kind": "documents", **own})
    return Task(name, **own) if "instruction" in own else replace(known_task(name), name=name, **own)


def read_pretext(
    documents: str | Path,
    split: str | int | None = None,
    columns: Mapping[str, str] | None = None,
    document_column: str | None = None,
    max_characters: int | None = None,
    stop_words: list[str] | None = None,
    keep_last: bool = False,
) -> Dataset | IterableDataset:
    """``consecutive_texts`` of a file, a folder or a data set of the Hub, as they are read.

    Args:
        documents: what ``load_rows`` reads: ``.txt`` files, or rows with a column ``text``.
        split: ``paragraphs`` (the default), ``sentences``, or a number of characters.
        columns: what the columns are called: ``{text: body}``.
        document_column: see ``consecutive_texts``.
        max_characters: see ``consecutive_texts``.
        stop_words: see ``consecutive_texts``.
        keep_last: see ``consecutive_texts``.

    Raises:
        ValueError: for documents that cannot be read, or of which no text has a next one.
    """
    rows = load_rows(documents, streaming=True, columns=columns)
    return consecutive_texts(
        rows,
        splitter(split),
        document_column=document_column,
        max_characters=max_characters,
        stop_words=stop_words,
        keep_last=keep_last,
    )


def files_beside(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The files that ``load_dataset`` reads for a data set, as seen from ``folder``; of other builders none."""
    if settings["read"] != load_dataset.__name__ or settings["path"] not in OF_FILES:
        return {}
    return {key: _beside(folder, settings[key]) for key in ("data_files", "data_dir") if settings.get(key)}


def _beside(folder: Path, files: Any) -> Any:
    """Paths as seen from ``folder``; what is on a network stays."""
    if isinstance(files, Mapping):
        return {split: _beside(folder, file) for split, file in files.items()}
    if isinstance(files, list):
        return [_beside(folder, file) for file in files]
    return files if "://" in files else str(folder / Path(files).expanduser())


def splitter(name: str | int | None) -> Callable[[str], list[str]]:
    """``paragraphs``, ``sentences``, or windows of so many characters."""
    if isinstance(name, int):
        return windows(name)
    splitters = {None: paragraphs, "paragraphs": paragraphs, "sentences": sentences}
    if name not in splitters:
        raise ValueError(f"split={name!r} is unknown. Valid: paragraphs, sentences, or a number of characters.")
    return splitters[name]
