"""A search cut into pieces that several processes share: a block of queries in a group of shards at a time.

Each piece leaves a file in the folder ``search`` beside the vectors, under a name that hashes all it depends on: the
best of its group for each query, 8 bytes a document. An approximate search leaves the index of each group, too. They
stay: processes that are not done need them, and a later run that asks the same, or one whose corpus has grown, begins
with them. The folder may be deleted when nobody searches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from st_llm_embed.encoding.lease import Piece, complete
from st_llm_embed.encoding.shards import EmbeddingShards
from st_llm_embed.files import write_array, written_beside
from st_llm_embed.mining import approximate
from st_llm_embed.mining.search import (
    BLOCK,
    Pairs,
    Part,
    UseFaiss,
    exact_search,
    faiss_search,
    find_nearest,
    keep_best,
    no_documents,
    pairs_within,
    shards_of,
)

QUERIES = 10 * BLOCK  # of a piece
DOCUMENTS = 1_000_000  # of a piece, in whole shards
ASKED = 100  # queries by which the recall is measured
FOUND = np.dtype([("score", np.float32), ("row", np.int32)])  # row: in its group


class _Cell(NamedTuple):
    """A piece of the search: ``queries`` in the group ``documents``, whose index is in ``index_file``."""

    queries: slice
    documents: slice
    excluded: Pairs
    index_file: Path
    file: Path


@dataclass(frozen=True)
class SharedSearch:
    """The search of documents, shared with all processes that ask the same in one folder.

    Args:
        documents: the documents.
        device: where torch searches.
        folder: the folder of the vectors.
        show_progress_bar: whether to show how many shards are searched, for each block of queries.
    """

    documents: EmbeddingShards
    device: torch.device
    folder: Path
    show_progress_bar: bool

    def nearest(
        self, queries: EmbeddingShards, excluded: Pairs, k: int, use_faiss: UseFaiss
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` documents of the highest cosine for each query, as ``find_nearest`` gives them.

        With ``use_faiss="approximate"`` some are missed, and others are in their place.
        """
        cells = self._cells(queries, excluded, k, use_faiss)
        sizes = [-(-_size(cell.documents) // self.documents.shard_size) for cell in cells]
        with tqdm(total=sum(sizes), desc="Searching", unit="shard", disable=not self.show_progress_bar) as bar:

            def parts(cell: _Cell) -> Iterator[Part]:
                documents = self.documents.select(cell.documents)
                if use_faiss == "approximate":
                    yield Part(0, len(documents), approximate.read_index(cell.index_file))
                else:
                    with_torch = partial(exact_search, device=self.device)
                    yield from shards_of(documents, faiss_search if use_faiss else with_torch, bar)

            def search(cell: _Cell) -> None:
                vectors = queries.take(np.arange(cell.queries.start, cell.queries.stop))
                scores, rows = find_nearest(vectors, parts(cell), cell.excluded, k)
                _write(cell.file, scores, rows)

            def pieces() -> Iterator[Piece]:
                if use_faiss == "approximate":
                    for index, group in {cell.index_file: cell.documents for cell in cells}.items():
                        build = partial(approximate.build_index, self.documents.select(group), index)
                        yield Piece(index, index.exists, build)
                for cell in cells:
                    if use_faiss != "approximate" or cell.index_file.exists():  # or others are at it
                        yield Piece(cell.file, partial(_is_whole, cell.file), partial(search, cell))

            complete(pieces)
            bar.update(bar.total - bar.n)  # what others did, or was there
        scores, rows = no_documents(len(queries), k)
        for cell in cells:
            found = np.load(cell.file, mmap_mode="r")
            row = found["row"].astype(np.int64) + cell.documents.start
            keep_best(scores[cell.queries], rows[cell.queries], found["score"], row)
        return scores, rows

    def recall(self, queries: EmbeddingShards, excluded: Pairs, scores: np.ndarray, rows: np.ndarray) -> float:
        """The share of the documents of an exact search that an approximate one found, for a sample of the queries.

        Args:
            queries: the queries.
            excluded: what was left out for them.
            scores: ``(queries, k)``, of what the approximate search found.
            rows: ``(queries, k)``, which documents those are.
        """
        draw = np.random.default_rng(0)
        sample = np.sort(draw.choice(len(queries), min(ASKED, len(queries)), replace=False))
        inside = np.isin(excluded[0], sample)
        pairs = np.searchsorted(sample, excluded[0][inside]), excluded[1][inside]
        exact_scores, exact_rows = self.nearest(queries.select(sample), pairs, scores.shape[1], None)
        exact, found = (
            np.arange(len(sample))[:, None] * len(self.documents) + numbers for numbers in (exact_rows, rows[sample])
        )
        exact, found = exact[np.isfinite(exact_scores)], found[np.isfinite(scores[sample])]
        return float(np.isin(exact, found).mean()) if len(exact) else 1.0

    def _cells(self, queries: EmbeddingShards, excluded: Pairs, k: int, use_faiss: UseFaiss) -> list[_Cell]:
        blocks = _cut(len(queries), QUERIES)
        groups = _cut(len(self.documents), max(1, DOCUMENTS // self.documents.shard_size) * self.documents.shard_size)
        asked = [_hash(queries.space, queries.hashes[block]) for block in blocks]
        searched = [_hash(self.documents.space, self.documents.hashes[group]) for group in groups]
        settings = f"{approximate.LISTS} {approximate.LOOKED_AT} {approximate.SAMPLE}"
        cells = []
        for (group, of_group), (block, of_block) in product(
            zip(groups, searched, strict=True), zip(blocks, asked, strict=True)
        ):
            pairs = pairs_within(excluded, block, group)
            index = _hash(of_group, settings)
            by = index if use_faiss == "approximate" else str(use_faiss)
            file = _hash(of_block, of_group, *pairs, str(k), by)
            folder = self.folder / "search"
            cells.append(_Cell(block, group, pairs, folder / f"{index}.index", folder / f"{file}.nearest"))
        return cells


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _size(part: slice) -> int:
    return part.stop - part.start


def _hash(*parts: str | np.ndarray) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(hashlib.sha256(part.encode() if isinstance(part, str) else part.tobytes()).digest())
    return hashed.hexdigest()[:32]


def _write(file: Path, scores: np.ndarray, rows: np.ndarray) -> None:
    found = np.empty(scores.shape, FOUND)
    found["score"], found["row"] = scores, rows
    with written_beside(file) as staged:
        write_array(staged, found)


def _is_whole(file: Path) -> bool:
    try:
        np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # not there; or cut off
        return False
    return True
