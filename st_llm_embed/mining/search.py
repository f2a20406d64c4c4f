"""The documents of the highest cosine for each query, over shards on disk: exact, with torch or with FAISS.

In memory at once are one shard, its scores for 1,024 queries, and the best of every query.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from st_llm_embed.mining.embedding_cache import EmbeddingShards

BLOCK = 1024  # queries scored at once
# From queries (n, dim), pairs of a query's row and a document's row in the shard to leave out (two arrays), and k, to
# the shard's k best documents for each query: scores and rows, both (n, k). Documents left out score -inf.
Search = Callable[[np.ndarray, tuple[np.ndarray, np.ndarray], int], tuple[np.ndarray, np.ndarray]]


def find_nearest(
    queries: EmbeddingShards,
    documents: EmbeddingShards,
    excluded: tuple[np.ndarray, np.ndarray],
    k: int,
    search: Callable[[np.ndarray], Search],
    show_progress_bar: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` documents of the highest cosine for each query, best first: scores and rows, both ``(queries, k)``.

    Left out are the pairs ``excluded`` of queries and documents, sorted by query. Where fewer than ``k`` documents are
    left, scores end in -inf. ``show_progress_bar``: whether to show how many shards are searched.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    nearest = np.zeros((len(queries), k), np.int64)
    shards = tqdm(documents.shards(), "Searching", len(documents.files), unit="shard", disable=not show_progress_bar)
    for first, shard in shards:
        search_shard = search(shard)
        for start in range(0, len(queries), BLOCK):
            block = slice(start, min(start + BLOCK, len(queries)))
            pairs = slice(*np.searchsorted(excluded[0], (block.start, block.stop)))
            query, document = excluded[0][pairs], excluded[1][pairs]
            in_shard = (first <= document) & (document < first + len(shard))
            left_out = query[in_shard] - block.start, document[in_shard] - first
            best, rows = search_shard(queries.take(np.arange(block.start, block.stop)), left_out, min(k, len(shard)))
            best = np.append(scores[block], best, axis=1)
            rows = np.append(nearest[block], first + rows, axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            scores[block], nearest[block] = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return scores, nearest


def exact_search(shard: np.ndarray, device: torch.device) -> Search:
    """Search a shard ``(documents, dim)`` with torch."""
    documents = torch.from_numpy(shard).to(device)

    def nearest(queries: np.ndarray, left_out: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
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

    def nearest(queries: np.ndarray, left_out: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        # The index leaves nothing out: of each query as many more are asked for as are dropped here.
        query, document = left_out
        more = np.bincount(query, minlength=len(queries))
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for count in np.unique(more):
            group = np.flatnonzero(more == count)
            cosines, places = index.search(queries[group], min(k + int(count), len(shard)))
            cosines[np.isin(group[:, None] * len(shard) + places, query * len(shard) + document)] = -np.inf
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
