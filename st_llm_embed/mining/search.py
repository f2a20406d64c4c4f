"""The documents of the highest cosine for each query, over shards on disk: exact, with torch or with FAISS.

In memory at once are the queries, one shard, its scores for 1,024 queries, and the best of every query.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from st_llm_embed.encoding.shards import EmbeddingShards

if TYPE_CHECKING:
    import faiss

BLOCK = 1024  # queries scored at once
UseFaiss = Literal["exact", "approximate"] | None
Pairs = tuple[np.ndarray, np.ndarray]  # of a query's row and a document's row, two arrays, sorted by query
# From queries (n, dim), pairs to leave out, and k, to the k best documents of a part for each query: scores and rows
# in the part, both (n, k). Documents left out score -inf.
Search = Callable[[np.ndarray, Pairs, int], tuple[np.ndarray, np.ndarray]]


class Part(NamedTuple):
    """Some of the documents, one after another.

    Args:
        first: the row of the first.
        size: their number.
        search: searches them.
    """

    first: int
    size: int
    search: Search


def check_faiss(use_faiss: UseFaiss) -> None:
    """Check that FAISS is there if it is asked for.

    Raises:
        ValueError: naming the ways to search.
        ImportError: if it is not installed.
    """
    if use_faiss not in (None, "exact", "approximate"):
        raise ValueError(
            f"use_faiss={use_faiss!r} must be 'exact' or 'approximate', or be left out to search with torch, exactly."
        )
    if use_faiss and importlib.util.find_spec("faiss") is None:
        raise ImportError(f"use_faiss={use_faiss!r} needs FAISS. Fix: pip install faiss-cpu, or leave it out.")


def find_nearest(queries: np.ndarray, parts: Iterable[Part], excluded: Pairs, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` documents of the highest cosine for each of ``queries`` ``(n, dim)``, best first.

    Scores and rows, both ``(n, k)``.

    Left out are the pairs ``excluded``. Where fewer than ``k`` documents are left, scores end in -inf.
    """
    scores, nearest = no_documents(len(queries), k)
    for part in parts:
        for start in range(0, len(queries), BLOCK):
            block = slice(start, min(start + BLOCK, len(queries)))
            left_out = pairs_within(excluded, block, slice(part.first, part.first + part.size))
            best, rows = part.search(queries[block], left_out, min(k, part.size))
            keep_best(scores[block], nearest[block], best, part.first + rows)
    return scores, nearest


def no_documents(queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores and rows, both ``(queries, k)``, before any document was looked at."""
    return np.full((queries, k), -np.inf, np.float32), np.zeros((queries, k), np.int64)


def keep_best(scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more_rows: np.ndarray) -> None:
    """Put what is better of ``more`` into ``scores`` and ``rows`` ``(n, k)``; of equals the earlier stay ahead."""
    both_scores, both_rows = np.append(scores, more_scores, axis=1), np.append(rows, more_rows, axis=1)
    order = np.argsort(-both_scores, axis=1, kind="stable")[:, : scores.shape[1]]
    scores[:], rows[:] = np.take_along_axis(both_scores, order, 1), np.take_along_axis(both_rows, order, 1)


def pairs_within(pairs: Pairs, queries: slice, documents: slice) -> Pairs:
    """Those of a range of queries and of documents, counted from where these begin."""
    of_queries = slice(*np.searchsorted(pairs[0], (queries.start, queries.stop)))
    query, document = pairs[0][of_queries], pairs[1][of_queries]
    inside = (documents.start <= document) & (document < documents.stop)
    return query[inside] - queries.start, document[inside] - documents.start


def shards_of(documents: EmbeddingShards, search: Callable[[np.ndarray], Search], bar: tqdm) -> Iterator[Part]:
    """Each shard as a part, for ``search`` to be made of its vectors; ``bar`` counts those that are searched."""
    for first, shard in documents.shards():
        yield Part(first, len(shard), search(shard))
        bar.update()


def exact_search(shard: np.ndarray, device: torch.device) -> Search:
    """Search a shard ``(documents, dim)`` with torch."""
    documents = torch.from_numpy(shard).to(device)

    def nearest(queries: np.ndarray, left_out: Pairs, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = torch.from_numpy(queries).to(device) @ documents.T
        scores[left_out] = -torch.inf
        scores, rows = scores.topk(k)
        return scores.cpu().numpy(), rows.cpu().numpy()

    return nearest


def faiss_search(shard: np.ndarray) -> Search:
    """Search a shard ``(documents, dim)`` with FAISS, on the CPU."""
    import faiss

    index = faiss.IndexFlatIP(shard.shape[1])
    index.add(shard)
    return index_search(index)


def index_search(index: faiss.Index) -> Search:
    """Search an index of FAISS by the scalar product."""

    def nearest(queries: np.ndarray, left_out: Pairs, k: int) -> tuple[np.ndarray, np.ndarray]:
        # The index leaves nothing out: of each query as many more are asked for as are dropped here.
        query, document = left_out
        more = np.bincount(query, minlength=len(queries))
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for count in np.unique(more):
            group = np.flatnonzero(more == count)
            cosines, places = index.search(queries[group], min(k + int(count), index.ntotal))
            is_left_out = np.isin(group[:, None] * index.ntotal + places, query * index.ntotal + document)
            cosines[is_left_out | (places < 0)] = -np.inf  # below 0 where an approximate index finds no more
            best = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
            scores[group], rows[group] = np.take_along_axis(cosines, best, 1), np.take_along_axis(places, best, 1)
        return scores, rows

    return nearest


def cosines_of(
    queries: EmbeddingShards, documents: EmbeddingShards, query: np.ndarray, document: np.ndarray
) -> np.ndarray:
    """``(pairs,)``: the cosine of each pair of rows."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(query), BLOCK)]
    return np.concatenate(
        [(queries.take(query[block]) * documents.take(document[block])).sum(axis=1) for block in blocks]
    )
