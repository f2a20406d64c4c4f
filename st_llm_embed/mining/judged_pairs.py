"""Scores of pairs by a judge, each computed once: kept on disk by the two texts, and looked up there.

They lie in the folder ``judged`` beside the vectors, in one folder for each judge, in shards of 1,000 pairs as vectors
of one number. A run that was killed loses one shard at most, and processes with one folder share what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from st_llm_embed.encoding.lease import Piece, complete
from st_llm_embed.encoding.shards import (
    AT_ONCE,
    DIGEST,
    HASH,
    TextIndex,
    is_whole,
    read_vectors,
    shard_files,
    write_shard,
)
from st_llm_embed.files import write_json, written_beside
from st_llm_embed.mining.judge import Judge, checked_scores

PAIRS = 1_000  # in a shard
ABOUT = "judge.json"


class NumberedTexts(NamedTuple):
    """Texts, each of which has a number.

    Args:
        column: a data set whose ``text`` they are in.
        rows: ``(texts,)``, the row that each is in.
        hashes: ``(texts,)``, of 16 bytes.
    """

    column: Dataset
    rows: np.ndarray
    hashes: np.ndarray

    def take(self, numbers: np.ndarray) -> list[str]:
        """The texts of these numbers."""
        return list(self.column[self.rows[numbers]]["text"])

    def all(self) -> Iterator[str]:
        """One text after another."""
        for batch in self.column.select(self.rows).iter(AT_ONCE):
            yield from batch["text"]


class Pairs(Protocol):
    """Whoever knows the score of a query and a document by their numbers."""

    def scores(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """``(pairs,)``: the score of each."""


class JudgedPairs:
    """The scores of a judge, in a folder.

    Args:
        judge: the judge.
        queries: the queries.
        documents: the documents.
        folder: the folder of the vectors, in which ``judged`` is made.
        show_progress_bar: whether to show how many pairs have their scores.
    """

    def __init__(
        self, judge: Judge, queries: NumberedTexts, documents: NumberedTexts, folder: Path, show_progress_bar: bool
    ) -> None:
        self.judge, self.queries, self.documents = judge, queries, documents
        self.show_progress_bar = show_progress_bar
        self.folder = folder / "judged" / judge.identity
        if not (self.folder / ABOUT).is_file():
            with written_beside(self.folder / ABOUT) as staged:
                write_json(staged, {"judge": judge.name, "scores": str(judge.scale)})
        self.index = TextIndex(shard_files(self.folder))

    def scores(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """``(pairs,)``: the score of each query with the document in its place.

        Raises:
            ValueError: for scores that are not finite, or not of the judge's scale.
        """
        hashes = self._hashes(query, document)
        _, first, of = np.unique(hashes, return_index=True, return_inverse=True)
        hashes, query, document = hashes[first], query[first], document[first]  # of each pair once
        at = self.index.find(hashes)
        scores = np.empty(len(hashes), np.float32)
        known, missing = np.flatnonzero(at >= 0), np.flatnonzero(at < 0)
        file, place = self.index.file[at[known]], self.index.place[at[known]]
        for number in np.unique(file):
            in_file = file == number
            scores[known[in_file]] = read_vectors(self.index.files[number])[place[in_file], 0]
        parts = [missing[start : start + PAIRS] for start in range(0, len(missing), PAIRS)]
        with tqdm(total=len(hashes), desc="Judging", unit="pair", disable=not self.show_progress_bar) as bar:
            bar.update(len(known))

            def judge(file: Path, part: np.ndarray) -> None:
                texts = self.queries.take(query[part]), self.documents.take(document[part])
                found = checked_scores(self.judge, *texts, bar.update)
                write_shard(file, found[:, None], document[part], hashes[part])

            pieces = []
            for part in parts:
                name = hashlib.sha256(hashes[part].tobytes()).hexdigest()[:16]
                file_of_part = self.folder / f"{name}.npy"
                do = partial(judge, file_of_part, part)
                pieces.append(Piece(file_of_part, partial(is_whole, file_of_part), do))
            complete(lambda: pieces)
            bar.update(len(hashes) - bar.n)  # what others did
        for piece, part in zip(pieces, parts, strict=True):
            scores[part] = read_vectors(piece.file)[:, 0]
        return scores[of]

    def _hashes(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """``(pairs,)``, of 16 bytes: of the hashes of both texts."""
        both = np.stack([self.queries.hashes[query], self.documents.hashes[document]], axis=1).tobytes()
        size = 2 * DIGEST
        digests = (
            hashlib.blake2b(both[start : start + size], digest_size=DIGEST).digest()
            for start in range(0, len(both), size)
        )
        return np.frombuffer(b"".join(digests), HASH)
