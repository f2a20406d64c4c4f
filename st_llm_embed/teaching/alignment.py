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

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn

from st_llm_embed.data.columns import check_text
from st_llm_embed.mining.embedding_cache import SHARD_SIZE, EmbeddingCache
from st_llm_embed.teaching.ridge import RidgeRegression

PENALTIES = tuple(10.0**power for power in range(-6, 3))
MOST_HELD_OUT = 10_000  # texts, whose vectors are in memory


@dataclass(frozen=True)
class Alignment:
    """How well a student's vectors match its teacher's.

    Args:
        texts: the number of texts that the map was fitted on.
        held_out: the number of texts that it was chosen on.
        penalty: the penalty of the ridge regression that was chosen.
        cosine: the mean cosine of the student's and the teacher's vectors of the texts held out.
        cosines: the same for every penalty that was tried.
    """

    texts: int
    held_out: int
    penalty: float
    cosine: float
    cosines: dict[float, float]


def align(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    queries: Dataset | Sequence[str] = (),
    documents: Dataset | Sequence[str] = (),
    *,
    held_out: float = 0.1,
    penalties: Sequence[float] = PENALTIES,
    batch_size: int = 32,
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
        batch_size: the number of texts encoded at once.
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
    modules = list(student)
    if isinstance(modules[-1], Normalize):
        modules.pop()
    settings = {"prompts": student.prompts, "default_prompt_name": student.default_prompt_name}
    pooled = SentenceTransformer(modules=modules, device=str(student.device), **settings)
    in_features, out_features = pooled.get_embedding_dimension(), teacher.get_embedding_dimension()
    kept = _held_out(count, held_out, seed)
    regression, held_x, held_y = RidgeRegression(in_features, out_features), [], []
    with nullcontext(cache_folder) if cache_folder else tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(teacher, folder, batch_size, SHARD_SIZE, show_progress_bar)
        for rows, x, y in _vectors(pooled, cache, sides, batch_size, show_progress_bar):
            regression.add(x[~kept[rows]], y[~kept[rows]])
            held_x.append(x[kept[rows]])
            held_y.append(y[kept[rows]])
    x, y = np.concatenate(held_x).astype(np.float64), np.concatenate(held_y)
    cosines: dict[float, float] = {}
    best: tuple[np.ndarray, np.ndarray] | None = None
    for penalty, (weight, bias) in zip(penalties, regression.solve(penalties), strict=True):
        mapped = x @ weight.T + bias
        norms = np.linalg.norm(mapped, axis=1).clip(min=np.finfo(float).tiny) * np.linalg.norm(y, axis=1)
        cosines[penalty] = float(((mapped * y).sum(axis=1) / norms).mean())
        if cosines[penalty] == max(cosines.values()):
            best = weight, bias
    if best is None:
        raise ValueError("penalties must hold one penalty or more.")
    projection = Dense(
        in_features,
        out_features,
        activation_function=nn.Identity(),
        init_weight=torch.from_numpy(best[0]).float(),
        init_bias=torch.from_numpy(best[1]).float(),
    )
    dtype = student.dtype if student.dtype.is_floating_point else torch.float32
    aligned = SentenceTransformer(
        modules=[*copy.deepcopy(modules), projection.to(dtype), Normalize()],
        device=str(student.device),
        similarity_fn_name="cosine",
        **settings,
    )
    chosen = max(cosines, key=lambda penalty: cosines[penalty])
    return aligned, Alignment(count - int(kept.sum()), int(kept.sum()), chosen, cosines[chosen], cosines)


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
    batch_size: int,
    show_progress_bar: bool,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The numbers of some texts, and their vectors by the student and the teacher, shard by shard."""
    done = 0
    for side, texts in sides.items():
        if not len(texts):
            continue
        encode = student.encode_query if side == "queries" else student.encode_document
        taught = getattr(cache, side)(texts, np.arange(len(texts)), None)
        for start, y in taught.shards():
            batch = list(texts[start : start + len(y)]["text"])
            x = encode(batch, batch_size=batch_size, show_progress_bar=show_progress_bar, normalize_embeddings=False)
            yield slice(done + start, done + start + len(y)), np.asarray(x, np.float32), y
        done += len(texts)
