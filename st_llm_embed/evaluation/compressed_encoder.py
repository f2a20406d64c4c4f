"""A model as mteb calls it, whose vectors are cut to their first dimensions and kept in fewer bits.

Documents are kept as a store keeps them, by ``quantize_embeddings`` of sentence-transformers: in float32, float16, the
256 steps of each dimension's range (int8), or its sign (binary, ubinary). Queries stay as they are, and find documents

- of float32, float16 and int8 by the cosine with what was kept;
- of signs by how many are alike, and the best 40 of each 50,000 documents by the cosine with their signs: rescoring,
  as in sentence-transformers' searches and most stores.

All other tasks compare texts that are kept alike, by their cosine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor

from st_llm_embed.encoding.corpus import PRECISIONS as OF_CORPORA
from st_llm_embed.evaluation.encoder import PromptedEncoder
from st_llm_embed.files import write_array, written_beside

PRECISIONS: dict[str, float] = {**dict(OF_CORPORA.items()), "ubinary": OF_CORPORA["binary"]}  # bytes of a number
RESCORED = 40  # four times the ten documents by which figures are named


class KeptEncoder(PromptedEncoder):
    """A model whose vectors are kept on disk, so that texts are encoded once however often they are asked for.

    Args:
        encoder: the model.
        folder: the folder of the vectors, which is whoever's who made it.
        sample: how many documents of each task, from the first on, are noted by ``sampled``.
    """

    def __init__(self, encoder: PromptedEncoder, folder: Path, sample: int) -> None:
        self.model, self.mteb_model_meta, self.index = encoder.model, encoder.mteb_model_meta, encoder.index
        self.folder, self.sample = folder, sample
        self.sampled: dict[str, np.ndarray] = {}

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings ``(texts, dim)``. Called by mteb."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self.prompt(task_metadata, prompt_type)
        named = hashlib.sha256("\0".join([str(prompt_type), prompt, *texts]).encode("utf-8", "surrogatepass"))
        file = self.folder / f"{named.hexdigest()[:32]}.npy"
        if not file.is_file():
            given = [{"text": texts}]
            vectors = super().encode(given, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
            with written_beside(file) as staged:
                write_array(staged, vectors.astype(np.float32))
        vectors = np.load(file)
        if prompt_type == PromptType.document:
            self.sampled.setdefault(task_metadata.name, np.array(vectors[: self.sample]))
        return vectors


class CompressedEncoder(PromptedEncoder):
    """A model whose vectors are cut and kept in fewer bits.

    Args:
        encoder: the model as it is.
        width: how many of the first dimensions are kept.
        precision: how each of them is kept, a key of ``PRECISIONS``.
        ranges: ``(2, width)``, of int8: each dimension's least and largest number.
    """

    def __init__(self, encoder: PromptedEncoder, width: int, precision: str, ranges: np.ndarray | None = None) -> None:
        meta = encoder.mteb_model_meta
        settings = {**(meta.experiment_kwargs or {}), "dims": width, "precision": precision}
        if ranges is not None:
            settings["ranges"] = hashlib.sha256(ranges.tobytes()).hexdigest()[:8]
        super().__init__(encoder.model, str(meta.name), str(meta.revision), settings)
        self.encoder = encoder
        self.width, self.precision, self.ranges = width, precision, ranges

    def encode(
        self, inputs: Iterable[dict[str, Any]], *, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> np.ndarray:
        """``(texts, width)``, in float32: queries cut, all other texts as what was kept of them says. Called by
        mteb."""
        vectors = cut(self.encoder.encode(inputs, prompt_type=prompt_type, **kwargs), self.width)
        return vectors if prompt_type == PromptType.query else restored(vectors, self.precision, self.ranges)

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        """``(queries, documents)``: what ranks them."""
        queries, documents = (F.normalize(torch.as_tensor(part)) for part in (embeddings1, embeddings2))
        exact = queries @ documents.T
        if not self.precision.endswith("binary"):
            return exact
        alike = signs_of(queries) @ signs_of(documents).T
        count = alike.shape[1]
        places = alike.long() * count - torch.arange(count, device=alike.device)  # of documents alike, the first
        best = places.topk(min(RESCORED, count)).indices
        return (alike / self.width).scatter(1, best, exact.gather(1, best) + 4)  # above all others: from -1 to 1

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        return F.cosine_similarity(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2))


def cut(vectors: np.ndarray, width: int) -> np.ndarray:
    """``(texts, width)``: the first dimensions, brought to length 1 again."""
    first = np.asarray(vectors, np.float32)[:, :width]
    return first / np.linalg.norm(first, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)


def restored(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """``(texts, width)``, in float32: what a store that keeps vectors ``(texts, width)`` so knows of them."""
    if precision in ("float32", "float16"):
        return vectors.astype(precision).astype(np.float32)
    kept = quantize_embeddings(vectors, precision, ranges=ranges)
    if ranges is not None:
        low, high = ranges
        return low + (kept.astype(np.float32) + 128.5) * ((high - low) / 255)
    bits = np.unpackbits(kept.view(np.uint8) ^ (0x80 if precision == "binary" else 0), axis=1)
    return signs_of(torch.from_numpy(bits[:, : vectors.shape[1]])).numpy()


def signs_of(values: Tensor) -> Tensor:
    """1 where a value is above 0, else -1, in float32."""
    return (values > 0).float() * 2 - 1


def bytes_of(width: int, precision: str) -> int:
    """What a vector takes, in bytes."""
    return -(-int(width * PRECISIONS[precision] * 8) // 8)
