"""A teacher's vectors of a data set's texts, wherever they lie: looked up by row, and never all in memory.

From the shards of an ``EmbeddingCache``, or from a column of the data set itself, ``anchor_teacher_embedding`` beside
``anchor``, which Arrow keeps on disk; an array file becomes such a column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.table import InMemoryTable

from st_llm_embed.data.columns import TEACHER_EMBEDDING as COLUMN
from st_llm_embed.encoding.shards import EmbeddingShards

AT_ONCE = 10_000  # rows looked through
FLOATS = (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))


@dataclass(frozen=True)
class TeacherEmbeddings:
    """The vectors of one column of texts.

    Args:
        rows: the number of rows.
        dim: the width of a vector.
        take: gives the vectors ``(n, dim)``, in float32, of the rows ``(n,)``.
    """

    rows: int
    dim: int
    take: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of_shards(cls, shards: EmbeddingShards, number: np.ndarray) -> TeacherEmbeddings:
        """Those of an embedding cache.

        Args:
            shards: the vectors of the different texts.
            number: which of them each row has, ``(rows,)``.
        """
        return cls(len(number), shards.dim, partial(_of_shards, shards, number))

    @classmethod
    def of_column(cls, dataset: Dataset, column: str) -> TeacherEmbeddings:
        """Those of a data set's column of lists of floats.

        Raises:
            ValueError: for a column of something else, and for vectors of different widths or that are not finite.
        """
        kind = dataset.data.schema.field(column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_floating(kind.value_type)):
            raise ValueError(f"Column {column!r} holds {kind}. A teacher's vectors are lists of floats.")
        vectors = dataset.select_columns([column]).with_format("numpy")
        dim = len(vectors[0][column]) if len(vectors) else 0

        def part(start: int) -> np.ndarray:
            arrays = vectors[start : start + AT_ONCE][column]
            other = next((i for i, vector in enumerate(arrays) if np.shape(vector) != (dim,)), None)
            if other is not None:
                raise ValueError(
                    f"Row {start + other} of column {column!r} has {np.size(arrays[other])} dimensions, and row 0 has "
                    f"{dim}."
                )
            return np.stack(arrays)

        _check_finite(part, len(vectors), f"column {column!r}")
        return cls(len(vectors), dim, partial(_of_column, vectors, column))


def brings_embeddings(rows: Dataset | IterableDataset) -> bool:
    """Whether a data set has a column of a teacher's vectors."""
    return any(column.endswith(COLUMN) for column in rows.column_names or [])


def with_arrays(rows: Dataset, arrays: Mapping[str, str | Path]) -> Dataset:
    """A data set with columns of the vectors in ``.npy`` files ``(rows, dim)``, which stay on disk.

    Args:
        rows: the data set.
        arrays: the file of each column of texts.

    Raises:
        ValueError: for a column that is not there, a file that holds no such array, and another number of rows.
    """
    for column, file in arrays.items():
        if column not in rows.column_names:
            raise ValueError(f"There is no column {column!r} that {file} could be of. There are: {rows.column_names}.")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is no .npy file of an array: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype.newbyteorder("=") not in FLOATS:
            raise ValueError(f"{file} is no .npy file of one array of floats of 16, 32 or 64 bits.")
        if array.ndim != 2 or len(array) != len(rows):
            raise ValueError(
                f"{file} has the shape {array.shape}, and must be ({len(rows)}, dim): a vector for each row of "
                f"{column!r}."
            )
        if not (array.dtype.isnative and array.flags.c_contiguous):  # of another machine, or by columns: in memory
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        kind = pa.from_numpy_dtype(array.dtype)
        values = pa.Array.from_buffers(kind, array.size, [None, pa.py_buffer(array)])
        vectors = pa.FixedSizeListArray.from_arrays(values, array.shape[1])
        # Named by where it lies: to hash its content, the library would copy all of it.
        state = Path(file).stat()
        name = hashlib.sha256(f"{Path(file).resolve()} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:16]
        table = Dataset(InMemoryTable(pa.table({f"{column}{COLUMN}": vectors})), fingerprint=name)
        rows = concatenate_datasets([rows, table], axis=1)
    return rows


def _of_shards(shards: EmbeddingShards, number: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return shards.take(number[rows])


def _of_column(vectors: Dataset, column: str, rows: np.ndarray) -> np.ndarray:
    return np.stack(vectors[rows][column]).astype(np.float32)


def _check_finite(part: Callable[[int], np.ndarray], rows: int, name: str) -> None:
    for start in range(0, rows, AT_ONCE):
        vectors = part(start)
        fine = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
        if not fine.all():
            raise ValueError(
                f"The teacher's vector of row {start + int(fine.argmin())} of {name} is not finite, or all 0. Encode "
                "its text again, or leave the row out."
            )
