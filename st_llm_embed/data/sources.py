"""What the builders read: tables of the ``datasets`` library and text files, row by row, each with its place.

A path that does not exist may be the id of a data set on the Hub, of which the split train is read; for another split,
give what ``datasets.load_dataset(id, split="...")`` returns.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from .json_arrays import as_json_lines, is_json_array
from .text_files import LONGEST_LINE, NO_TEXT, check_lines, ending, opened, read_json_lines, undamaged

Source: TypeAlias = Dataset | IterableDataset | str | Path
Label: TypeAlias = str | int | float
# By the end of a file's name; any other is JSON. A TSV file has no quotes.
TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
OF_LIBRARY = ("csv", "json", "parquet", "text", "arrow", "webdataset", "imagefolder")  # its builders: no data sets
BY_LIBRARY = (*TABLES, ".parquet", ".txt", ".json")  # which ``load_rows`` reads for the builders, too


def load_rows(
    source: str | Path, streaming: bool = False, columns: Mapping[str, str] | None = None
) -> Dataset | IterableDataset:
    """The rows of a file, a folder or a data set of the Hub.

    A file is read by its name's end: ``.csv`` and ``.tsv`` (every value is text; a TSV file has no quotes),
    ``.parquet``, ``.txt`` (one document, the column ``text``), and otherwise as JSON: lines, or one array of the same
    objects; all but Parquet may be ``.gz``. A folder is one that ``save_to_disk`` wrote, one of ``.txt`` files, each a
    document, or what ``load_dataset`` makes of it, and so is a Hub id (its split ``train``).

    Args:
        source: the path, or the Hub id.
        streaming: whether the rows are read as they are needed.
        columns: the columns to rename, by their new names, such as ``{"anchor": "question"}``.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: naming what could not be read as a data set, or the columns that are not there.
    """
    path = Path(source).expanduser()
    with _naming(source):
        rows = _load_local(path, streaming) if path.exists() else _load_from_hub(str(source), streaming)
    return rename_columns(rows, columns or {}, str(source))


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Name the source in the library's errors, which do not."""
    try:
        yield
    except DatasetsError as error:
        raise ValueError(f"{source} could not be read as a data set: {error.__cause__ or error}") from error


def _load_local(path: Path, streaming: bool) -> Dataset | IterableDataset:
    if path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty.")
        end = ending(path)
        if end not in (*TABLES, ".parquet", ".txt") and is_json_array(path):
            path = as_json_lines(path)
        elif end != ".parquet":
            check_lines(path)
        if end in TABLES:
            return _generated(_read_table, [path], _table_columns(path), streaming)
        if end == ".txt":
            return _generated(_read_document, [path], ["text"], streaming)
        kind = "parquet" if end == ".parquet" else "json"
        return load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=streaming)
    if (path / "state.json").is_file():
        rows = Dataset.load_from_disk(str(path))
        return rows.to_iterable_dataset() if streaming else rows
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    texts = [file for file in files if ending(file) == ".txt"]
    if texts and len(texts) < len(files):
        other = next(file for file in files if file not in texts)
        raise ValueError(
            f"{path} holds .txt files and others, such as {other.name}. Give the texts a folder of their own."
        )
    if texts:
        for text in texts:
            check_lines(text)
        return _generated(_read_document, texts, ["text"], streaming)
    return load_dataset(str(path.resolve()), split="train", streaming=streaming)


def _load_from_hub(source: str, streaming: bool) -> Dataset | IterableDataset:
    owner, slash, name = source.partition("/")
    looks_like_a_path = source.startswith((".", "~", "/")) or "/" in name or (slash and Path(owner).is_dir())
    if looks_like_a_path or source in OF_LIBRARY or ending(source) in (*BY_LIBRARY, ".jsonl", *NO_TEXT):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    try:
        return load_dataset(source, split="train", streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no file or folder {source}, nor could a data set of the Hub of that name be read: {error}"
        ) from error


def _generated(
    read: Callable[[Path], Iterator[dict[str, str]]], files: list[Path], columns: list[str], streaming: bool
) -> Dataset | IterableDataset:
    """Rows of texts, on disk or as they are read, of files that were looked through."""
    # Of this state of the files: the library keeps what it read once.
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings: dict[str, Any] = {
        "gen_kwargs": {"read": read, "files": [str(file) for file in files], "states": states},
        "features": Features({name: Value("string") for name in columns}),
    }
    if streaming:
        return IterableDataset.from_generator(_read_all, **settings)
    return Dataset.from_generator(_read_all, **settings)


def _read_all(
    read: Callable[[Path], Iterator[dict[str, str]]], files: list[str], states: list[tuple[int, int]]
) -> Iterator[dict[str, str]]:
    for file in files:
        yield from read(Path(file))


def _read_table(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV or TSV file, every value a text.

    Raises:
        ValueError: naming the file and the line: for a row of more or fewer fields than columns, or quotes that do
            not end.
    """
    records = _fields(file)
    _, columns = next(records)
    for line, row in records:
        if row and len(row) != len(columns):
            raise ValueError(
                f"Line {line} of {file} has {len(row)} fields, and the first line names {len(columns)} columns: "
                f"{row}. Put texts with a {TABLES[ending(file)]['delimiter']!r} in them into quotes."
            )
        if row:
            yield dict(zip(columns, row, strict=True))


def _table_columns(file: Path) -> list[str]:
    """The columns that the first line of a CSV or TSV file names.

    Raises:
        ValueError: if there are none, one has no name, or two have the same.
    """
    _, columns = next(_fields(file), (1, []))
    if not columns or not all(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"The first line of {file} must name the columns, each once, such as anchor,positive; it has {columns}."
        )
    return columns


def _fields(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV or TSV file, each with the line it begins with."""
    csv.field_size_limit(LONGEST_LINE)
    with undamaged(file), opened(file) as lines:
        text = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(lines))
        reader = csv.reader(text, strict=True, **TABLES[ending(file)])
        line = 1
        try:
            for row in reader:
                yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"Line {line} of {file} cannot be read: {error}.") from error


def _read_document(file: Path) -> Iterator[dict[str, str]]:
    with undamaged(file), opened(file) as handle:
        yield {"text": handle.read().decode("utf-8-sig")}


def rename_columns(
    rows: Dataset | IterableDataset, columns: Mapping[str, str], source: str
) -> Dataset | IterableDataset:
    """Rename columns, which may change their places.

    Args:
        rows: the data set.
        columns: the columns by their new names, such as ``{"anchor": "question"}``.
        source: what the message calls the data set.

    Raises:
        ValueError: naming the columns that are not there, and those that are.
    """
    names = rows.column_names or list(next(iter(rows), {}))
    if missing := [name for name in columns.values() if name not in names]:
        raise ValueError(f"{source} has the columns {names}, and not {missing}. Name those that it has.")
    changes = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    if not changes:
        return rows
    rows = rows.remove_columns([ours for ours in changes.values() if ours in names and ours not in changes])
    # In two steps, as two columns may change their places.
    rows = rows.rename_columns({theirs: f"\0{theirs}" for theirs in changes})
    return rows.rename_columns({f"\0{theirs}": ours for theirs, ours in changes.items()})


def source_rows(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table or a file, each with the words that name it.

    Args:
        source: a ``Dataset``, an ``IterableDataset``, or what ``load_rows`` reads: the path of a file or folder, or
            the Hub id of a data set.
        columns: the columns that each row must have, each with the option that names it.

    Raises:
        ValueError: naming the row, its columns, those it lacks, and the fix.
    """
    rows: Iterator[tuple[str, dict[str, Any]]]
    if isinstance(source, Dataset | IterableDataset):
        rows = ((f"Row {i}", row) for i, row in enumerate(source.with_format(None)))
    elif (path := Path(source).expanduser()).is_file() and ending(path) not in BY_LIBRARY and not is_json_array(path):
        rows = read_json_lines(path)
    else:
        rows = _file_rows(source)
    for where, row in rows:
        if missing := [column for column in columns if column not in row]:
            options = " ".join(f"{columns[column]}=..." for column in missing)
            raise ValueError(
                f"{where} has the columns {list(row)}, and not {missing}. Fix: say what yours are called ({options}), "
                f"or dataset.rename_columns({{'yours': {missing[0]!r}}})."
            )
        yield where, row


def _file_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _naming(source):
        for number, row in enumerate(load_rows(source, streaming=True), 1):
            yield f"Row {number} of {source}", row


def check_source(source: Source, columns: Mapping[str, str]) -> None:
    """Read the first row of ``source``, so that a wrong one is refused by the builder and not later by its stream.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for a source without rows, or without the columns.
    """
    if next(source_rows(source, columns), None) is None:
        raise ValueError(f"The source is empty: {source}")


def is_streamed(source: Source, streaming: bool) -> bool:
    """Whether what is built from ``source`` is an ``IterableDataset``."""
    return streaming or isinstance(source, IterableDataset)


def label_names(source: Source, column: str) -> dict[Label, str]:
    """The names of the labels of a ``ClassLabel`` column, by number; none of another column."""
    feature = (source.features or {}).get(column) if isinstance(source, Dataset | IterableDataset) else None
    return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}


def text_or_empty(text: Any, where: str) -> str:
    """``text``, and "" for None.

    Raises:
        ValueError: naming the row, for what is not text.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{where} has {text!r} where text is expected. Fix: choose another column, or cast it to str."
        )
    return text or ""


def stripped(text: Any, where: str) -> str:
    """``text_or_empty`` without the space around it."""
    return text_or_empty(text, where).strip()


def number_of(value: Any) -> float | None:
    """``value``, or the number that it says as text, as in a CSV file; None of what is no number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def one_label(label: Any, where: str) -> Label | None:
    """``label``, which is one value.

    Raises:
        ValueError: naming the row, for a list or an object.
    """
    if label is not None and not isinstance(label, str | int | float):
        raise ValueError(
            f"{where} has the label {label!r}. A label is text or a number, and a row has one. Fix: choose another "
            "column, or make a row of each label."
        )
    return label


def joined(title: str, text: str) -> str:
    """A document as the retrieval benchmarks embed it: the title, a space, the text."""
    return f"{title} {text}".strip()
