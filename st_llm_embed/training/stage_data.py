"""The data sets of a configuration, read by the builder that each names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

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
    load_rows,
    paragraphs,
    sentences,
    windows,
)
from st_llm_embed.tasks import Task, known_task
from st_llm_embed.training.configuration import checked, declared, required

TASK_KINDS = {name: kind for name, kind in declared(Task).items() if name not in ("name", "negatives")}
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
        load_dataset,
        load_from_disk,
    )
}
PRETEXT = consecutive_texts.__name__


def read_data(name: str, settings: Mapping[str, Any]) -> Dataset | IterableDataset | tuple[Dataset, Task]:
    """Pretext rows, or a task's rows and the task.

    Args:
        name: the name of the data set, which is the task's.
        settings: ``read``, the name of its builder; that builder's arguments; and settings of its ``Task``.

    Raises:
        ValueError: naming the data set and what is wrong with it.
    """
    place = f"Data set {name!r}"
    reader_name = settings.get("read")
    arguments = {key: value for key, value in settings.items() if key != "read"}
    if reader_name == PRETEXT:
        kinds = {**declared(consecutive_texts), "documents": str, "split": str | int}
        arguments = checked(place, arguments, kinds, ["documents"])
        with naming(place):
            documents = load_rows(arguments.pop("documents"), streaming=True)
            rows = consecutive_texts(documents, splitter(arguments.pop("split", None)), **arguments)
            check_pretext_columns(rows, name)
            return rows
    if str(reader_name) not in READERS:
        raise ValueError(
            f"{place} has read={reader_name!r}. Valid: {', '.join([PRETEXT, *READERS])}, of st_llm_embed.data and of "
            "datasets."
        )
    reader = READERS[str(reader_name)]
    kinds = {**declared(reader), **TASK_KINDS}
    arguments = checked(place, arguments, kinds, required(reader), open_ended=reader is load_dataset)
    with naming(place):
        task_settings = {key: arguments.pop(key) for key in TASK_KINDS if key in arguments}
        if "instruction" in task_settings:
            task = Task(name, **task_settings)
        else:
            task = replace(known_task(name), **task_settings)
        rows = reader(**arguments)
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(f"{place} is read as {list(rows)}. Name one of them: split: {next(iter(rows))}.")
    return rows, task


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Errors that say which part of the configuration they are about."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{place}: {error}") from error


def splitter(name: str | int | None) -> Callable[[str], list[str]]:
    """``paragraphs``, ``sentences``, or windows of so many characters."""
    if isinstance(name, int):
        return windows(name)
    splitters = {None: paragraphs, "paragraphs": paragraphs, "sentences": sentences}
    if name not in splitters:
        raise ValueError(f"split={name!r} is unknown. Valid: paragraphs, sentences, or a number of characters.")
    return splitters[name]
