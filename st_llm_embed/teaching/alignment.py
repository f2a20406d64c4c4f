"""A student's projection into its teacher's space in closed form: no step of training, one pass over some texts.

The vector of the student's pooling is mapped by a ``Dense`` layer, fitted by ridge regression to the teacher's vectors
of the same texts, each model under its own prompts for queries and for documents. What comes out is a model whose
vectors compare with the teacher's: its queries search the teacher's index. It is also where distillation should start:
from a random projection, an hour of steps did not get as far as this does in minutes (arXiv 2602.15547 projects the
student too; a trained projection of the teacher collapses).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn
from tqdm.auto import tqdm

from st_llm_embed.data.columns import check_text
from st_llm_embed.encoding.cache import SHARD_SIZE, EmbeddingCache
from st_llm_embed.encoding.encoder import Side, encode_texts
from st_llm_embed.encoding.shards import column_hashes
from st_llm_embed.teaching.ridge import RidgeRegression

PENALTIES = tuple(10.0**power for power in range(-6, 3))
MOST_HELD_OUT = 10_000  # texts, whose vectors are in memory
MOST_COMPARED = 2_000  # of them with each other
TEMPERATURE = 0.02  # of these scores


@dataclass(frozen=True)
class Alignment:
    """How well a student's vectors match its teacher's.

    Args:
        texts: the number of texts that the map was fitted on.
        held_out: the number of texts that it was chosen on.
        penalty: the penalty of the ridge regression that was chosen.
        cosine: the mean cosine of the student's and the teacher's vectors of the texts held out.
        cosines: the same for every penalty that was tried.
        confusions: for every penalty, the cross-entropy of finding the teacher's vector of a text by the student's,
            among the teacher's vectors of these texts, at a temperature of 0.02; the smallest was chosen.
    """

    texts: int
    held_out: int
    penalty: float
    cosine: float
    cosines: dict[float, float]
    confusions: dict[float, float]


def align(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    queries: Dataset | Sequence[str] = (),
    documents: Dataset | Sequence[str] = (),
    *,
    held_out: float = 0.1,
    penalties: Sequence[float] = PENALTIES,
    tokens_per_batch: int | None = None,
    seed: int = 0,
    cache_folder: str | Path | None = None,
    show_progress_bar: bool = False,
) -> tuple[SentenceTransformer, Alignment]:
    """Give a student a projection into its teacher's space.

    Args:
        student: the student, a model of any kind; a ``Normalize`` at its end comes after the projection.
        teacher: the teacher, any model that gives each text one vector.
        queries: the texts that are encoded as queries, by both: strings, or a data set with a column ``text``.
        documents: the texts that are encoded as documents.
        held_out: the share of the texts, at most 10,000, on which the penalty is chosen.
        penalties: the penalties to choose from, in units of the mean variance of a dimension of the student's vector.
        tokens_per_batch: the number of tokens encoded at once, padding included. Default: 2,048 on a CPU, 32,768
            elsewhere.
        seed: the seed by which texts are held out.
        cache_folder: the folder in which the teacher's vectors stay for later runs, as those of mining. Default: they
            are deleted.
        show_progress_bar: whether to show how far the encoding is.

    Returns:
        A new model of the student's modules and the projection, ``Dense`` and ``Normalize``; and how well it matches.

    Raises:
        ValueError: for fewer than ten texts, empty ones, a teacher that is the student, numbers out of range, and
            vectors that are not finite.
    """
    if teacher is student:
        raise ValueError("The teacher is the student. Its vectors are in its space already.")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be a share of the texts between 0 and 1, such as 0.1.")
    sides = {"queries": _texts(queries, "queries"), "documents": _texts(documents, "documents")}
    count = sum(map(len, sides.values()))
    if count < 10:
        raise ValueError(f"There are {count} texts. A map between two spaces needs ten or more, better ten thousand.")
    pooled = without_length(student)
    in_features, out_features = pooled.get_embedding_dimension(), teacher.get_embedding_dimension()
    texts = np.concatenate([column_hashes(rows) for rows in sides.values() if len(rows)])
    fit = ProjectionFit(in_features, out_features, texts, held_out, seed)
    with nullcontext(cache_folder) if cache_folder else tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(teacher, folder, tokens_per_batch, SHARD_SIZE, show_progress_bar)
        for x, y in _vectors(pooled, cache, sides, tokens_per_batch, show_progress_bar):
            fit.add(x, y)
    projection, alignment = fit.solve(penalties)
    return with_projection(copy.deepcopy(pooled), projection), alignment


class ProjectionFit:
    """The closed form of a projection, of vectors that come in parts.

    Args:
        in_features: the width of the student's vectors.
        out_features: the width of the teacher's.
        texts: ``(texts,)``, a number for each text that will come, equal where texts are: none is held out in part.
        held_out: the share of the texts on which the penalty is chosen; at most 10,000.
        seed: the seed by which texts are held out.
    """

    def __init__(
        self, in_features: int, out_features: int, texts: np.ndarray, held_out: float = 0.1, seed: int = 0
    ) -> None:
        self.regression = RidgeRegression(in_features, out_features)
        _, number = np.unique(texts, return_inverse=True)
        self.kept = _held_out(int(number.max()) + 1, held_out, seed)[number]
        self.random = np.random.default_rng(seed)
        self.done = 0
        self.held: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take the vectors of the next texts, the student's ``(n, in_features)`` and the teacher's ``(n,
        out_features)``."""
        kept = self.kept[self.done : self.done + len(x)]
        self.done += len(x)
        self.regression.add(x[~kept], y[~kept])
        self.held.append((x[kept], y[kept]))

    def solve(self, penalties: Sequence[float] = PENALTIES) -> tuple[Dense, Alignment]:
        """The projection of the penalty by which the student's vectors of the texts held out best tell the teacher's
        vectors of the same texts from those of the others, and how well each does. A larger penalty gives a better
        cosine, and a worse search.

        Raises:
            ValueError: for no penalty, or one that is not positive.
        """
        if not len(penalties):
            raise ValueError("penalties must hold one penalty or more.")
        x, y = (np.concatenate(vectors) for vectors in zip(*self.held, strict=True))
        x = x.astype(np.float64)
        y = y / np.linalg.norm(y, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
        compared = self.random.permutation(len(x))[:MOST_COMPARED]
        cosines: dict[float, float] = {}
        confusions: dict[float, float] = {}
        maps: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        for penalty, (weight, bias) in zip(penalties, self.regression.solve(penalties), strict=True):
            mapped = x @ weight.T + bias
            mapped /= np.linalg.norm(mapped, axis=1, keepdims=True).clip(min=np.finfo(float).tiny)
            cosines[penalty] = float((mapped * y).sum(axis=1).mean())
            confusions[penalty] = _confusion(mapped[compared], y[compared])
            maps[penalty] = weight, bias
        chosen = min(confusions, key=lambda penalty: confusions[penalty])
        # Contiguous: the fused AdamW of torch 2.13 takes memory as it lies, and a resumed run's lies in rows.
        found = [torch.from_numpy(part).float().contiguous() for part in maps[chosen]]
        projection = unfitted(*reversed(found[0].shape), init_weight=found[0], init_bias=found[1])
        kept = int(self.kept.sum())
        return projection, Alignment(self.done - kept, kept, chosen, cosines[chosen], cosines, confusions)


def _confusion(student: np.ndarray, teacher: np.ndarray) -> float:
    """The mean of -log softmax(s·t / τ) of each text's own t, over the teacher's vectors of all texts; of vectors
    ``(texts, dim)`` of length 1."""
    scores = torch.from_numpy(student @ teacher.T) / TEMPERATURE
    return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))))


def unfitted(in_features: int, out_features: int, **weights: Tensor) -> Dense:
    """A linear projection, of random weights unless they are given."""
    return Dense(in_features, out_features, activation_function=nn.Identity(), **weights)


def without_length(student: SentenceTransformer) -> SentenceTransformer:
    """A model of the same modules, but for a ``Normalize`` at the end: what a projection is put on."""
    modules = list(student)
    return of_modules(modules[:-1] if isinstance(modules[-1], Normalize) else modules, student)


def with_projection(pooled: SentenceTransformer, projection: Dense) -> SentenceTransformer:
    """A model of the same modules, the projection and ``Normalize``."""
    dtype = pooled.dtype if pooled.dtype.is_floating_point else torch.float32
    return of_modules([*pooled, projection.to(dtype), Normalize()], pooled, similarity_fn_name="cosine")


def of_modules(modules: list[nn.Module], like: SentenceTransformer, **settings: Any) -> SentenceTransformer:
    """A model of these modules, with the prompts and the device of another."""
    model = SentenceTransformer(
        modules=modules,
        device=str(like.device),
        prompts=like.prompts,
        default_prompt_name=like.default_prompt_name,
        **settings,
    )
    model.model_card_data.model_name = like.model_card_data.model_name
    return model


def _texts(texts: Dataset | Sequence[str], name: str) -> Dataset:
    dataset = texts if isinstance(texts, Dataset) else Dataset.from_dict({"text": list(texts)})
    if "text" not in dataset.column_names:
        raise ValueError(f"The {name} have the columns {dataset.column_names}, and no 'text'. Rename one of them.")
    if len(dataset):
        check_text(dataset, name, ["text"])
    return dataset.with_format(None).select_columns(["text"])


def _held_out(count: int, share: float, seed: int) -> np.ndarray:
    """``(count,)``: whether a text is held out; at least two are, and at least two are not."""
    size = min(max(2, round(share * count)), count - 2, MOST_HELD_OUT)
    kept = np.zeros(count, bool)
    kept[np.random.default_rng(seed).permutation(count)[:size]] = True
    return kept


def _vectors(
    student: SentenceTransformer,
    cache: EmbeddingCache,
    sides: dict[str, Dataset],
    tokens_per_batch: int | None,
    show_progress_bar: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The vectors of some texts by the student and the teacher, shard by shard."""
    of_side: dict[str, Side] = {"queries": "query", "documents": "document"}
    for side, texts in sides.items():
        if not len(texts):
            continue
        taught = getattr(cache, side)(texts, np.arange(len(texts)), None)
        with tqdm(
            total=len(texts), desc="Encoding with the student", unit="text", disable=not show_progress_bar
        ) as bar:
            for start, y in taught.shards():
                batch = list(texts[start : start + len(y)]["text"])
                yield encode_texts(student, batch, of_side[side], None, tokens_per_batch, bar.update), y
