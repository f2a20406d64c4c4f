"""Text files line by line, plain or ``.gz``: UTF-8 or an error with its line, whatever was made to fill the memory."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any

# What no honest file comes near.
LONGEST_LINE = 1 << 25  # bytes
DENSEST = 200  # bytes of text in a byte of an archive
UNPACKED = 1 << 30  # bytes of text up to which an archive may be denser
# Spreadsheets and archives, by the end of the name and by the first bytes.
NO_TEXT = (".xlsx", ".xls", ".ods", ".zip")
NO_TEXT_BYTES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def plain_or_gz(file: Path) -> Path:
    """``file``, or ``file.gz`` in its place.

    Raises:
        FileNotFoundError: if neither is there.
    """
    for path in (file, file.with_name(f"{file.name}.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"Neither {file} nor {file.name}.gz exists.")


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file, plain or ``.gz``, that are not blank, with their numbers from 1.

    Raises:
        ValueError: naming the file and the line, for text that is not UTF-8, a damaged archive, or a line or an
            archive that was made to fill the memory.
    """
    # Bytes, as text mode would also break lines at a lone carriage return.
    with undamaged(file), opened(file) as handle:
        read = 0
        for number in count(1):
            raw = handle.readline(LONGEST_LINE + 1)
            read += len(raw)
            _check_length(file, number, len(raw))
            check_expansion(file, read)
            if not raw:
                return
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"Line {number} of {file} is not UTF-8 text: {error}.") from error
            if line.strip():
                yield number, line


def check_lines(file: str | Path) -> None:
    """Check a text file that another library reads line by line, whatever their length.

    Raises:
        ValueError: see ``read_lines``.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with undamaged(file), opened(file) as handle:
        number, length, read = 1, 0, 0
        while block := handle.read(1 << 20):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line = number + block[: error.start].count(b"\n")
                raise ValueError(f"Line {line} of {file} is not UTF-8 text: {error}.") from error
            read += len(block)
            first = block.find(b"\n")
            _check_length(file, number, length + (len(block) if first < 0 else first))
            check_expansion(file, read)
            number += block.count(b"\n")
            length = length + len(block) if first < 0 else len(block) - block.rfind(b"\n") - 1


def is_gz(file: str | Path) -> bool:
    """Whether a file's name ends in ``.gz``, in small letters or capitals."""
    return Path(file).suffix.lower() == ".gz"


def ending(file: str | Path) -> str:
    """The end of a file's name, in lower case and without ``.gz``."""
    return Path(Path(file).name.lower().removesuffix(".gz")).suffix


def opened(file: str | Path) -> BufferedIOBase:
    """The bytes of a text file, plain or ``.gz``.

    Raises:
        ValueError: for a spreadsheet or an archive, whatever its name, with the fix.
    """
    handle = gzip.open(file, "rb") if is_gz(file) else open(file, "rb")
    try:
        if ending(file) in NO_TEXT or handle.peek(4).startswith(NO_TEXT_BYTES):
            raise ValueError(
                f"{file} is a spreadsheet or a ZIP archive. What is read is JSON, CSV and TSV, each plain or .gz, and "
                "Parquet. Fix: save the sheet as CSV (UTF-8), or unpack the archive."
            )
    except BaseException:
        handle.close()
        raise
    return handle


def _check_length(file: str | Path, number: int, length: int) -> None:
    if length > LONGEST_LINE:
        raise ValueError(f"Line {number} of {file} is longer than {LONGEST_LINE:,} bytes, which no text is.")


def check_expansion(file: str | Path, read: int) -> None:
    """Raise ValueError for an archive of which ``read`` bytes of text are more than any text is packed."""
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
