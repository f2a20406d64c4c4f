"""Scores of pairs by another embedding model: cosines of its vectors, which are kept as the teacher's are."""

from __future__ import annotations

import numpy as np

from st_llm_embed.encoding.cache import EmbeddingCache
from st_llm_embed.mining.judged_pairs import NumberedTexts
from st_llm_embed.mining.search import cosines_of


class ComparedPairs:
    """The cosines of an embedding model, under its own prompts. Of the documents those that are asked for are encoded,
    not the corpus.

    Args:
        cache: the model, and the folder of its vectors.
        queries: the queries.
        documents: the documents.
    """

    def __init__(self, cache: EmbeddingCache, queries: NumberedTexts, documents: NumberedTexts) -> None:
        self.cache, self.queries, self.documents = cache, queries, documents

    def scores(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """``(pairs,)``: the cosine of each query with the document in its place.

        Raises:
            ValueError: for a vector that is not finite.
        """
        asked, of_query = np.unique(query, return_inverse=True)
        looked_at, of_document = np.unique(document, return_inverse=True)
        queries = self.cache.queries(self.queries.column, self.queries.rows[asked], None)
        documents = self.cache.documents(self.documents.column, self.documents.rows[looked_at], None)
        return cosines_of(queries, documents, of_query, of_document)
