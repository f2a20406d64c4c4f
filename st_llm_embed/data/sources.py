"""What the builders read: tables of the ``datasets`` library and text files, row by row, each with its place.

A table on the Hub is read by the library's own call: ``datasets.load_dataset(id, split="train", streaming=True)``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

Source = Dataset | IterableDataset | str | Path
# What no honest file comes near.
LONGEST_LINE = 1 << 25  # bytes
DENSEST = 200  # bytes of text in a byte of an archive, which has
UNPACKED = 1 << 30  # at least so many before that is looked at


def load_rows(source: str, streaming: bool = False) -> Dataset | IterableDataset:
    """A JSON lines file, a folder of ``save_to_disk``, or what ``load_dataset`` makes of a folder or Hub id (its split
    ``train``).

    Raises:
        ValueError: naming what could not be read as a data set.
    """
    try:
        if Path(source).is_file():
            demand_lines(source)
            return load_dataset("json", data_files=source, split="train", streaming=streaming)
        if Path(source, "state.json").is_file():
            rows = Dataset.load_from_disk(source)
            return rows.to_iterable_dataset() if streaming else rows
        return load_dataset(source, split="train", streaming=streaming)
    except DatasetsError as error:
        raise ValueError(f"{source} could not be read as a data set: {error.__cause__ or error}") from error


def plain_or_gz(file: Path) -> Path:
    """``file``, or ``file.gz`` in its place.

    Raises:
        FileNotFoundError: if neither is there.
    """
    found = [path for path in (file, file.with_name(f"{file.name}.gz")) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"Neither {file} nor {file.name}.gz exists.")
    return found[0]


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file, plain or ``.gz``, that are not blank, with their numbers from 1.

    Raises:
        ValueError: naming the file and the line, for text that is not UTF-8, a damaged archive, or a line or an
            archive that was made to fill the memory.
    """
    # Bytes, as text mode would also break lines at a lone carriage return.
    with undamaged(file), _opened(file) as handle:
        read = 0
        for number in count(1):
            raw = handle.readline(LONGEST_LINE + 1)
            read += len(raw)
            _demand_honest(file, number, len(raw), read)
            if not raw:
                return
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} of {file} is not UTF-8 text: {error}.") from error
            if line.strip():
                yield number, line


def demand_lines(file: str | Path) -> None:
    """Check a text file that another library reads line by line, whatever their length.

    Raises:
        ValueError: see ``read_lines``; not for text that is not UTF-8.
    """
    with undamaged(file), _opened(file) as handle:
        number, length, read = 1, 0, 0
        while block := handle.read(1 << 20):
            read += len(block)
            first = block.find(b"\n")
            _demand_honest(file, number, length + (len(block) if first < 0 else first), read)
            number += block.count(b"\n")
            length = length + len(block) if first < 0 else len(block) - block.rfind(b"\n") - 1


def _opened(file: str | Path) -> BinaryIO:
    return (gzip.open if Path(file).suffix == ".gz" else open)(file, "rb")


def _demand_honest(file: str | Path, number: int, length: int, read: int) -> None:
    if length > LONGEST_LINE:
        raise ValueError(f"Line {number} of {file} is longer than {LONGEST_LINE:,} bytes, which no text is.")
    if read > UNPACKED and read > DENSEST * Path(file).stat().st_size:
        raise ValueError(
            f"{file} unpacks to more than {DENSEST} times its size, which no text does, and would fill the disk."
        )


@contextmanager
def undamaged(file: str | Path) -> Iterator[None]:
    """Name the file in the errors of a broken ``.gz``, which do not."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}.") from error


def read_json_lines(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, plain or ``.gz``, each with the words that name its line.

    Raises:
        ValueError: naming the file and the line that is no JSON object.
    """
    for number, line in read_lines(file):
        where = f"Line {number} of {file}"
        try:
            row = json.loads(line)
            if "\\ud" in line or "\\uD" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half of an escaped surrogate pair is no text
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without an end
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no JSON object such as {{"query": "..."}}: {line[:80]}')
        yield where, row


def source_rows(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table or a JSON lines file, each with the words that name it.

    Args:
        source: a ``Dataset``, an ``IterableDataset``, or the path of a JSON lines file, plain or ``.gz``.
        columns: the columns that each row must have, and the option that names each.

    Raises:
        ValueError: naming the row, the columns found, those needed, and the fix.
    """
    if isinstance(source, Dataset | IterableDataset):
        rows = ((f"Row {i}", row) for i, row in enumerate(source.with_format(None)))
    else:
        rows = read_json_lines(source)
    for where, row in rows:
        if missing := [column for column in columns if column not in row]:
            options = " ".join(f"{columns[column]}=..." for column in missing)
            raise ValueError(
                f"{where} has the columns {list(row)}, and not {missing}. Fix: say what yours are called ({options}), "
                f"or dataset.rename_columns({{'yours': {missing[0]!r}}})."
            )
        yield where, row


def check_source(source: Source, columns: Mapping[str, str]) -> None:
    """Read the first row of ``source``, so that a wrong one is refused by the builder and not later by its stream.

    Raises:
        FileNotFoundError: for a path that is no file.
        ValueError: for a source without rows, or without the columns.
    """
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(
            f"{source} is not a JSON lines file. For a data set of the Hub, pass "
            f"datasets.load_dataset({str(source)!r}, split='train')."
        )
    if next(source_rows(source, columns), None) is None:
        raise ValueError(f"The source is empty: {source}")


def is_streamed(source: Source, streaming: bool) -> bool:
    """Whether what is built from ``source`` is an ``IterableDataset``."""
    return streaming or isinstance(source, IterableDataset)


def label_names(source: Source, column: str) -> dict[int, str]:
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


def one_label(label: Any, where: str) -> str | int | float | None:
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
