"""A JSON array of objects as JSON lines, which give the same rows.

The ``datasets`` library reads an array in another way than lines, and whole: NaN, half of a surrogate pair and large
numbers become something else.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets

from st_llm_embed.files import written_beside

from .text_files import LONGEST_LINE, check_expansion, opened, undamaged

BLOCK = 1 << 20  # bytes read at once
NO_SPACE = re.compile(r"[^ \t\r\n]")


def is_json_array(file: str | Path) -> bool:
    """Whether an array begins a text file, plain or ``.gz``."""
    with undamaged(file), opened(file) as handle:
        return handle.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def as_json_lines(file: Path) -> Path:
    """The JSON lines of the rows of an array, as a file in the library's cache: made once for each state of the array.

    Raises:
        ValueError: see ``read_json_array``.
    """
    state = file.resolve(), file.stat().st_size, file.stat().st_mtime_ns
    name = hashlib.sha256(repr(state).encode()).hexdigest()
    lines = Path(datasets.config.HF_DATASETS_CACHE, "json_arrays", f"{name}.jsonl")
    if not lines.exists():
        with written_beside(lines) as staged, open(staged, "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in read_json_array(file))
    return lines


def read_json_array(file: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of an array, from a file, plain or ``.gz``; a text alone becomes ``{"text": ...}``. In memory are
    one row and a block of the file.

    Raises:
        ValueError: naming the file and the row, from 1, that is neither, or no JSON, or longer than any text; also for
            an array without rows or without an end, text that is not UTF-8, and an archive that is damaged or was made
            to fill the disk.
    """
    blocks, parse = _text_blocks(file), json.JSONDecoder().raw_decode
    text, place = "", 0

    def read_on() -> bool:
        nonlocal text, place
        block = next(blocks, "")
        text, place = text[place:] + block, 0
        return bool(block)

    def go_on() -> str:
        """The next character that is no space, to which ``place`` goes; "" at the end of the file."""
        nonlocal place
        while not (found := NO_SPACE.search(text, place)):
            place = len(text)
            if not read_on():
                return ""
        place = found.start()
        return text[place]

    go_on()
    place += 1  # behind the bracket
    for number in count(1):
        where = f"Row {number} of {file}"
        if number == 1 and go_on() == "]":
            raise ValueError(f"{file} holds an array without rows.")
        if go_on() not in ("{", '"'):
            raise ValueError(f'{where} is no JSON object such as {{"query": "..."}}: {text[place : place + 80]}')
        while True:
            try:
                row, end = parse(text, place)
                break
            except json.JSONDecodeError as error:  # or its end is not read yet
                if len(text) - place > LONGEST_LINE or not read_on():
                    raise ValueError(f"{where} is not JSON, or too long for a text: {error.msg}.") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without an end
                raise ValueError(f"{where} is not JSON: {error}.") from error
        place = end
        yield {"text": row} if isinstance(row, str) else row
        separator = go_on()
        place += 1
        if separator == "]" and not go_on():
            return
        if separator != ",":
            raise ValueError(f"{where} is not followed by a comma or by the array's end, which ends the file.")


def _text_blocks(file: str | Path) -> Iterator[str]:
    decode, read = codecs.getincrementaldecoder("utf-8-sig")().decode, 0
    with undamaged(file), opened(file) as handle:
        while block := handle.read(BLOCK):
            read += len(block)
            check_expansion(file, read)
            try:
                text = decode(block)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
            if text:
                yield text
