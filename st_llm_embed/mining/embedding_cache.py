"""Embeddings of many texts on disk: in shards, each written whole and named by a hash of all that it depends on.

A shard's name hashes the model's weights, how it encodes a few texts (its tokenizer, attention, pooling and adapters
show there), the prompt, and the shard's own texts. So an interrupted run goes on at the next shard, a corpus that has
grown at its end keeps what it had, and nothing else is ever taken for it. In memory is one shard of texts and vectors.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from st_llm_embed.files import written_beside
from st_llm_embed.modules.reference import TEXTS

logger = logging.getLogger(__name__)
SHARD_SIZE = 10_000  # vectors in a file: what an interruption loses at most


@dataclass(frozen=True)
class EmbeddingShards:
    """Embeddings ``(rows, dim)`` in float32, as ``.npy`` files of ``shard_size`` rows (the last may have fewer)."""

    files: list[Path]
    shard_size: int
    rows: int
    dim: int

    def __len__(self) -> int:
        return self.rows

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """The first row's number and the vectors of one shard after another."""
        for i, file in enumerate(self.files):
            yield i * self.shard_size, np.load(file)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """``(len(rows), dim)``: the vectors of these rows, and no others read."""
        shard, row = np.divmod(rows, self.shard_size)
        vectors = np.empty((len(rows), self.dim), np.float32)
        for i in np.unique(shard):
            in_shard = shard == i
            vectors[in_shard] = np.load(self.files[i], mmap_mode="r")[row[in_shard]]
        return vectors


class EmbeddingCache:
    """Encode texts once, into a folder.

    Args:
        model: any text model of sentence-transformers; its weights are hashed here.
        folder: the folder of the shards, made if it is not there.
        batch_size: the number of texts encoded at once.
        shard_size: the number of vectors in a file.
        show_progress_bar: whether to show how many texts have their vectors, those that had them already among them.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        folder: str | Path,
        batch_size: int,
        shard_size: int,
        show_progress_bar: bool,
    ) -> None:
        self.model = model
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.shard_size = shard_size
        self.show_progress_bar = show_progress_bar
        self._model_hash = hashlib.sha256(f"{model.max_seq_length} {model.truncate_dim}".encode())
        for name, tensor in model.state_dict().items():
            self._model_hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            self._model_hash.update(tensor.flatten().contiguous().cpu().view(torch.uint8).numpy())

    def queries(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode_query`` gives the ``text`` of these rows."""
        return self._encode(self.model.encode_query, texts, rows, prompt, "queries")

    def documents(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode_document`` gives the ``text`` of these rows.

        Raises:
            ValueError: if one is not finite.
        """
        return self._encode(self.model.encode_document, texts, rows, prompt, "documents")

    def texts(self, texts: Dataset, rows: np.ndarray, prompt: str | None) -> EmbeddingShards:
        """The vectors, of length 1, that ``encode`` gives the ``text`` of these rows, which are of one sort.

        Raises:
            ValueError: if one is not finite.
        """
        return self._encode(self.model.encode, texts, rows, prompt, "texts")

    def _encode(
        self, encode: Callable[..., np.ndarray], texts: Dataset, rows: np.ndarray, prompt: str | None, what: str
    ) -> EmbeddingShards:
        def embed(batch: list[str]) -> np.ndarray:
            settings = {"batch_size": self.batch_size, "show_progress_bar": False, "normalize_embeddings": True}
            return encode(batch, prompt=prompt, **settings).astype(np.float32)

        key = self._model_hash.copy()
        key.update(repr((encode.__name__, prompt, self.model.prompts)).encode())
        # To two decimals: the last bits differ between machines.
        reference = embed(list(TEXTS))
        key.update(np.rint(100 * reference).astype(np.int8))
        files = []
        bar = tqdm(total=len(rows), desc=f"Encoding {what}", unit="text", disable=not self.show_progress_bar)

        def count(module: torch.nn.Module, inputs: tuple[Any, ...], features: dict[str, torch.Tensor]) -> None:
            bar.update(len(features["sentence_embedding"]))

        # By batches, as a shard may take an hour.
        with bar, self.model[-1].register_forward_hook(count):
            for start in range(0, len(rows), self.shard_size):
                batch = list(texts[rows[start : start + self.shard_size]]["text"])
                name = key.copy()
                for text in batch:
                    name.update(hashlib.sha256(text.encode()).digest())
                file = self.folder / f"{name.hexdigest()}.npy"
                if _is_whole(file, (len(batch), reference.shape[1])):
                    bar.update(len(batch))
                else:
                    _write(embed(batch), batch, file)
                files.append(file)
        return EmbeddingShards(files, self.shard_size, len(rows), reference.shape[1])


def _write(vectors: np.ndarray, texts: list[str], file: Path) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"The model gives NaN or infinity for {texts[int(finite.argmin())][:80]!r}. Load it in another precision: "
            "SentenceTransformer(..., model_kwargs={'dtype': 'float32'})."
        )
    with written_beside(file) as staged:
        np.save(staged, vectors)


def _is_whole(file: Path, shape: tuple[int, int]) -> bool:
    """Is the shard there, and not cut off by a crash or a copy that was broken off?"""
    if not file.exists():
        return False
    try:
        return np.load(file, mmap_mode="r").shape == shape
    except (ValueError, OSError, EOFError) as error:
        logger.warning("%s is computed again, as it is damaged: %s", file, error)
        return False
