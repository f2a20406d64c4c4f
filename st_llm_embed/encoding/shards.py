"""Vectors on disk: a folder of one space, in shards, each written whole; looked up by text or read in order.

A shard is two files. ``NAME.npy`` is its vectors ``(rows, dim)``, or ``NAME.parquet`` with them as the column
``embedding``; ``NAME.rows.parquet`` says what each row is: ``id``, ``hash`` (of the text, 16 bytes), and of a whole
corpus ``tokens`` and ``characters``. The vectors come last, so that a shard whose vectors are there is whole.
``manifest.json`` says what space it is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from numpy.typing import ArrayLike

from st_llm_embed.files import read_json, write_array, written_beside

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
ROWS = ".rows.parquet"
FORMATS = ("npy", "parquet")
AT_ONCE = 10_000  # texts hashed at once
DIGEST = 16  # bytes of a text's hash: that two of a billion texts share one has a chance of 1 in 10²⁰
HASH = np.dtype(f"S{DIGEST}")


@dataclass(frozen=True)
class EmbeddingShards:
    """Vectors ``(rows, dim)`` of length 1, each in a place of a file on disk.

    Args:
        files: the shards.
        file: ``(rows,)``, which file each vector is in.
        place: ``(rows,)``, which of the file's vectors it is.
        hashes: ``(rows,)``, of the texts that they are of.
        space: names the space that they are of.
        dim: the width of a vector.
        shard_size: how many are read at once.
    """

    files: list[Path]
    file: np.ndarray
    place: np.ndarray
    hashes: np.ndarray
    space: str
    dim: int
    shard_size: int

    def __len__(self) -> int:
        return len(self.file)

    def select(self, rows: slice | np.ndarray) -> EmbeddingShards:
        """Those of these rows."""
        return replace(self, file=self.file[rows], place=self.place[rows], hashes=self.hashes[rows])

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row's number and the vectors ``(n, dim)``, in float32, of one part after another."""
        for first in range(0, len(self), self.shard_size):
            yield first, self.take(np.arange(first, min(first + self.shard_size, len(self))))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """``(len(rows), dim)``, in float32: the vectors of these rows, and of ``.npy`` files no others read."""
        file, place = self.file[rows], self.place[rows]
        vectors = np.empty((len(rows), self.dim), np.float32)
        for i in np.unique(file):
            in_file = file == i
            vectors[in_file] = read_vectors(self.files[i])[place[in_file]]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """``(texts,)``, of 16 bytes: a hash of each text, exactly as it is."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=DIGEST).digest() for text in texts)
    return np.frombuffer(digests, HASH)


def column_hashes(texts: Dataset) -> np.ndarray:
    """``(rows,)``: those of a data set's ``text``."""
    batches = texts.with_format("arrow").iter(AT_ONCE)
    return np.concatenate([np.empty(0, HASH), *(text_hashes(batch["text"].to_pylist()) for batch in batches)])


def read_vectors(file: Path) -> np.ndarray:
    """``(rows, dim)`` as they were kept; of a ``.npy`` file memory-mapped."""
    return np.load(file, mmap_mode="r") if file.suffix == ".npy" else _of_parquet(file, file.stat().st_mtime_ns)


@lru_cache(1)
def _of_parquet(file: Path, changed: int) -> np.ndarray:
    column = pq.read_table(file, columns=["embedding"])["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def write_shard(
    file: Path,
    vectors: np.ndarray,
    ids: Sequence[Any],
    hashes: np.ndarray,
    **more: ArrayLike,
) -> None:
    """Write a shard, its vectors last. ``more``: whole numbers of each row, by their names."""
    if file.exists():
        logger.warning("%s was damaged, and is computed again.", file)
    rows = pa.table(
        {
            "id": pa.array(ids),
            "hash": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(DIGEST), len(hashes), [None, pa.py_buffer(np.ascontiguousarray(hashes))]
            ),
            **{name: pa.array(numbers, pa.int32()) for name, numbers in more.items()},
        }
    )
    with written_beside(rows_file(file)) as staged:
        pq.write_table(rows, staged)
    with written_beside(file) as staged:
        if file.suffix == ".npy":
            write_array(staged, vectors)
        else:
            values = pa.array(vectors.ravel())
            column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
            pq.write_table(pa.table({"id": rows["id"], "embedding": column}), staged)


def shard_file(folder: Path, number: int, file_format: str) -> Path:
    """The vectors of a corpus's shard of this number."""
    return folder / f"{number:06d}.{file_format}"


def rows_file(file: Path) -> Path:
    """What says of a shard's vectors which rows they are."""
    return file.with_name(f"{file.stem}{ROWS}")


def read_hashes(file: Path) -> np.ndarray:
    """``(rows,)``: the hashes of a shard's texts."""
    column = pq.read_table(rows_file(file), columns=["hash"])["hash"].combine_chunks()
    return np.frombuffer(column.buffers()[1], HASH)[column.offset :][: len(column)]


def is_whole(file: Path) -> bool:
    """Whether a shard is there, and was not cut off by a crash or a copy that was broken off."""
    if not file.exists():
        return False
    try:
        vectors = read_vectors(file)
        return vectors.ndim == 2 and len(vectors) == pq.read_metadata(rows_file(file)).num_rows
    except (ValueError, OSError, EOFError, pa.ArrowException):
        return False


def shard_files(folder: Path) -> list[Path]:
    """The whole shards of a folder, by name."""
    files = sorted(file for kind in FORMATS for file in folder.glob(f"*.{kind}") if not file.name.endswith(ROWS))
    return [file for file in files if not file.name.startswith(".") and is_whole(file)]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of vectors says of itself; None if it is none."""
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


class TextIndex:
    """Where the vector of a text is, in the shards of some folders.

    In memory are 24 bytes for each vector.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        hashes = [read_hashes(file) for file in files]
        lengths = [len(part) for part in hashes]
        of = np.concatenate(hashes) if hashes else np.empty(0, HASH)
        order = np.argsort(of, kind="stable")
        self.hashes = of[order]
        self.file = np.repeat(np.arange(len(files), dtype=np.int32), lengths)[order]
        places = [np.arange(length, dtype=np.int32) for length in lengths]
        self.place = (np.concatenate(places) if places else np.empty(0, np.int32))[order]

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """``(texts,)``: the number of each text's vector in ``file`` and ``place``, or -1."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        at = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, at, -1)
