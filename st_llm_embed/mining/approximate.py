"""An approximate index of some documents: FAISS's inverted lists (IVF), which looks at a few of many clusters.

Its cosines are exact; what it misses are documents of clusters that are not looked at. An index is as large as its
vectors, and is read from disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from st_llm_embed.encoding.shards import EmbeddingShards
from st_llm_embed.files import written_beside
from st_llm_embed.mining.search import Search, index_search

LISTS = 4  # clusters, by the square root of the documents
LOOKED_AT = 64  # clusters for each query
SAMPLE = 64  # documents of each cluster by which they are found; FAISS wants 39


def build_index(documents: EmbeddingShards, file: Path) -> None:
    """Write the index of ``documents``, all of whose vectors are in memory for it."""
    import faiss

    lists = max(1, int(min(LISTS * len(documents) ** 0.5, len(documents) / SAMPLE)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(documents.dim), documents.dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(LOOKED_AT, lists)
    draw = np.random.default_rng(0)
    sample = draw.choice(len(documents), min(len(documents), SAMPLE * lists), replace=False)
    index.train(documents.take(np.sort(sample)))
    for _, shard in documents.shards():
        index.add(shard)
    with written_beside(file) as staged:
        faiss.write_index(index, str(staged))


def read_index(file: Path) -> Search:
    """Search with an index, whose vectors stay on disk."""
    import faiss

    return index_search(faiss.read_index(str(file), faiss.IO_FLAG_MMAP))
