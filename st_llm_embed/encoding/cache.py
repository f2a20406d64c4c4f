"""Encode texts once, for mining, teaching and search: what a folder has is looked up by text, the rest is encoded.

The folder may be one that ``encode`` wrote, or hold vectors of many models and prompts, each space in a folder of its
own. Processes that need the same texts share the work, shard by shard.
"""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_llm_embed.encoding.encoder import ModelEncoder, Side, hash_of
from st_llm_embed.encoding.lease import Piece, complete
from st_llm_embed.encoding.manifest import is_same_space, space_of, write_manifest
from st_llm_embed.encoding.shards import (
    EmbeddingShards,
    TextIndex,
    column_hashes,
    is_whole,
    read_manifest,
    shard_files,
    write_shard,
)

SHARD_SIZE = 10_000  # vectors in a file: what an interruption loses at most
FLOATS = ("float32", "float16")  # what may be looked up


class EmbeddingCache:
    """The vectors of texts, in a folder.

    Args:
        model: any text model of sentence-transformers; its weights are hashed here.
        folder: the folder of the vectors, made if it is not there.
        tokens_per_batch: the number of tokens encoded at once. Default: 2,048 on a CPU, 32,768 elsewhere.
        shard_size: the number of vectors in a file.
        show_progress_bar: whether to show how many texts have their vectors, those that had them already among them.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        folder: str | Path,
        tokens_per_batch: int | None,
        shard_size: int,
        show_progress_bar: bool,
    ) -> None:
        self.model = model
        self.folder = Path(folder)
        self.tokens_per_batch = tokens_per_batch
        self.shard_size = shard_size
        self.show_progress_bar = show_progress_bar
        self._model_hash = hash_of(model)
        self._encoders: dict[tuple[Side, str | None], tuple[ModelEncoder, dict[str, Any]]] = {}

    def queries(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode_query`` gives the ``text`` of these rows.

        Raises:
            ValueError: if one is not finite.
        """
        return self._encode("query", texts, rows, prompt, "queries")

    def documents(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode_document`` gives the ``text`` of these rows.

        Raises:
            ValueError: if one is not finite.
        """
        return self._encode("document", texts, rows, prompt, "documents")

    def texts(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode`` gives the ``text`` of these rows, which are of one sort.

        Raises:
            ValueError: if one is not finite.
        """
        return self._encode("text", texts, rows, prompt, "texts")

    def _encode(self, side: Side, texts: Dataset, rows: np.ndarray, prompt: str | None, what: str) -> EmbeddingShards:
        if (side, prompt) not in self._encoders:
            made = ModelEncoder(self.model, side, prompt, self.tokens_per_batch, model_hash=self._model_hash)
            self._encoders[side, prompt] = made, space_of(made)
        encoder, space = self._encoders[side, prompt]
        folder, places = self._space(space)
        hashes = column_hashes(texts.select(rows))
        index = TextIndex([file for place in places for file in shard_files(place)])
        _, first = np.unique(hashes, return_index=True)
        missing = np.sort(first[index.find(hashes[first]) < 0])
        with tqdm(total=len(rows), desc=f"Encoding {what}", unit="text", disable=not self.show_progress_bar) as bar:
            bar.update(len(rows) - len(missing))

            def write(file: Path, part: np.ndarray) -> None:
                batch = list(texts[rows[part]]["text"])
                vectors = check_finite(encoder.encode(batch, bar.update), batch)
                write_shard(file, vectors, rows[part], hashes[part])

            pieces = []
            for start in range(0, len(missing), self.shard_size):
                part = missing[start : start + self.shard_size]
                name = hashlib.sha256(hashes[part].tobytes()).hexdigest()[:16]
                file = folder / f"{name}.npy"
                pieces.append(Piece(file, partial(is_whole, file), partial(write, file, part)))
            complete(lambda: pieces)
            bar.update(len(rows) - bar.n)  # what others did
        index = TextIndex(index.files + [piece.file for piece in pieces])
        at = index.find(hashes)
        dim = len(space["reference"][0])
        file, place = index.file[at], index.place[at]
        return EmbeddingShards(index.files, file, place, hashes, folder.name, dim, self.shard_size)

    def _space(self, space: dict[str, Any]) -> tuple[Path, list[Path]]:
        """The folder to write new vectors of a space to, and all that have some.

        Raises:
            ValueError: if they were kept in less than float16.
        """
        places = []
        of_corpus = read_manifest(self.folder)  # what encode wrote
        if of_corpus and is_same_space(space, of_corpus):
            if of_corpus["precision"] not in FLOATS:
                raise ValueError(
                    f"{self.folder} has the vectors in {of_corpus['precision']}, which is too little to compare with. "
                    "Encode into another folder with --precision float32 or float16, or name another one."
                )
            places.append(self.folder)
        # Two that tell apart what is not hashed (code, say) have the same identity, and folders of their own.
        for number in count():
            folder = self.folder / (space["identity"] + (f"-{number}" if number else ""))
            manifest = write_manifest(folder, {**space, "precision": "float32"})
            if is_same_space(space, manifest):
                return folder, [*places, folder]
        raise AssertionError


def check_finite(vectors: np.ndarray, texts: list[str]) -> np.ndarray:
    """The vectors.

    Raises:
        ValueError: naming the first text whose vector is not finite.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"The model gives NaN or infinity for {texts[int(finite.argmin())][:80]!r}. Load it in another precision: "
            "SentenceTransformer(..., model_kwargs={'dtype': 'float32'})."
        )
    return vectors
