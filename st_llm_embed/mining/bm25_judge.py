"""BM25 as the judge: how many of the query's rare words a document has, a second opinion that costs next to nothing.

The form is Lucene's (Kamphuis et al., ECIR 2020), which bm25s has as its default:

    sum over the query's words w of  log(1 + (N - n(w) + 1/2) / (n(w) + 1/2)) · f(w) / (f(w) + k (1 - b + b |d| / avg))

with N documents, n(w) of which have the word, f(w) times in the document of |d| words. Words are runs of letters and
digits, capitals or not: text without spaces between words needs another judge.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import log

import numpy as np

from st_llm_embed.mining.judge import BM25_SCORES, nobody

K, B = 1.5, 0.75
WORD = re.compile(r"\w+")


class BM25Judge:
    """Scores by what a corpus says of the words of the queries. In memory is a number for each of these words.

    Args:
        queries: all queries that it will be asked about.
        documents: all documents of the corpus, each once.
    """

    name = "bm25"
    scale = BM25_SCORES

    def __init__(self, queries: Iterable[str], documents: Iterable[str]) -> None:
        asked = {word for query in queries for word in words(query)}
        having: Counter[str] = Counter()
        count = length = 0
        for document in documents:
            found = words(document)
            having.update(asked.intersection(found))
            count, length = count + 1, length + len(found)
        self.mean_length = length / max(count, 1)
        self.weights = {word: log(1 + (count - n + 0.5) / (n + 0.5)) for word, n in having.items()}
        hashed = json.dumps([K, B, WORD.pattern, self.mean_length, sorted(self.weights.items())])
        self.identity = hashlib.sha256(hashed.encode()).hexdigest()[:16]

    def score(
        self, queries: Sequence[str], documents: Sequence[str], done: Callable[[int], None] = nobody
    ) -> np.ndarray:
        """``(pairs,)``: see ``Judge``."""
        scores = [self._score(query, document) for query, document in zip(queries, documents, strict=True)]
        done(len(scores))
        return np.array(scores, np.float32)

    def _score(self, query: str, document: str) -> float:
        found = words(document)
        counts = Counter(found)
        saturation = K * (1 - B + B * len(found) / self.mean_length) if self.mean_length else 0.0
        return sum(
            self.weights[word] * counts[word] / (counts[word] + saturation)
            for word in words(query)
            if counts[word] and word in self.weights
        )


def words(text: str) -> list[str]:
    """The words of a text, in its order."""
    return WORD.findall(text.casefold())
