"""The contrastive loss of both NV-Embed stages (arXiv 2405.17428, section 4): in-batch negatives on, off, or by row.

    loss = -log( exp(s(a, p) / τ) / Σ_d exp(s(a, d) / τ) ),  s = cosine; of sparse vectors the dot product

d always runs over the row's own positive and hard negatives. Where in-batch negatives are on (stage 1, retrieval), it
also runs over the other rows' positives and hard negatives, but for those that are probably no negatives. Where they
are off (stage 2, everything blended) another row's text may well be a positive too.

In: the embeddings of ``anchor``, ``positive``, ``negative_1..n``, each ``(batch, dim)``, and in ``labels`` what the
collator knows of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn

from st_llm_embed.losses.length_groups import embed_by_length
from st_llm_embed.losses.row_labels import NONE, RowLabels


class InstructionContrastiveLoss(CachedLossMixin, nn.Module):
    """InfoNCE, each row with its own hard negatives and, where asked, those of its group in the batch.

    With in-batch negatives and no guard this is sentence-transformers' ``MultipleNegativesRankingLoss``.
    ``LateInteractionLoss`` compares texts of several vectors.

    Args:
        model: the model to train.
        scale: the factor on the scores, 1 / temperature. NV-Embed does not publish its temperature; 0.02 is what its
            sibling recipes use.
        in_batch_negatives: whether other rows' positives and hard negatives count as negatives. Labels of
            ``TaskCollator`` decide it row by row instead.
        false_negative_margin: the share of the positive's score, such as 0.95, above which other rows' texts are left
            out; None for no such limit.
        mini_batch_size: how many texts to embed at a time, twice, in the memory of one such batch (GradCache, arXiv
            2101.06983), with the gradients of the plain form. None: all at once.
        gather_across_devices: whether other processes' rows count as the batch's.
        spread_weight: the weight of the spread-out regulariser (arXiv 1708.06320, as EmbeddingGemma has it, arXiv
            2509.20354): for each column, by how much the mean square of the cosines of this process's rows exceeds
            that of vectors spread evenly, 1 / dim. None: without it.
        similarity: ``"cosine"``, or ``"dot"`` for the dot products of sparse vectors, whose usual scale is 1.

    Inputs:
        +-------------------------------------------------+-----------------------------+
        | Columns                                         | Labels                      |
        +=================================================+=============================+
        | anchor, positive, negative_1, ..., negative_n   | none, or each row's class   |
        +-------------------------------------------------+-----------------------------+

        Of rows with a class, those of one class take no positives of each other, and rows of different classes no
        hard negatives. ``TaskCollator`` gives ``(batch, 2 + columns)``: group, class, and a number for each text, by
        which texts equal to the row's anchor or positive are left out as well.

    Raises:
        ValueError: for a model of several vectors, fewer than two columns, labels that are no whole numbers, a scale,
            margin or weight that is not positive, or when a row has no negatives: in-batch negatives are off and there
            is no column of them.
    """

    takes_several = False  # vectors of a text

    def __init__(
        self,
        model: BaseModel,
        scale: float = 50.0,
        in_batch_negatives: bool = True,
        false_negative_margin: float | None = None,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
        spread_weight: float | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
    ) -> None:
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity={similarity!r} is unknown. Valid values: cosine, dot.")
        if isinstance(model, MultiVectorEncoder) and not self.takes_several:
            raise ValueError(
                f"{type(self).__name__} compares texts of one vector, and a MultiVectorEncoder has several. Use "
                "LateInteractionLoss(model)."
            )
        positive = {"scale": scale, "false_negative_margin": false_negative_margin, "spread_weight": spread_weight}
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be positive.")
        self.model = model
        self.scale = scale
        self.in_batch_negatives = in_batch_negatives
        self.false_negative_margin = false_negative_margin
        self.mini_batch_size = mini_batch_size
        self.gather_across_devices = gather_across_devices
        self.spread_weight = spread_weight
        self.similarity = similarity
        self.uses_gradient_cache = mini_batch_size is not None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if self.uses_gradient_cache:
            features = self.with_sides(sentence_features)
            return self.forward_cached(features, labels)  # type: ignore[operator]  # of the host's mixin
        return self.compute_loss_from_embeddings(self.embed(sentence_features), labels)

    def with_sides(self, columns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The columns of a batch, each with what the model must know of its side."""
        return list(columns)

    def embed(self, columns: Iterable[dict[str, Any]]) -> list[Tensor]:
        """The embeddings of each column, ``(batch, ...)``."""
        return embed_by_length(self.model, columns)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The embeddings of a column's mini-batches as one."""
        return torch.cat(parts)

    def prepare(self, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What is compared: the anchors ``(batch, dim)``, and each row's documents ``(batch, documents, dim)``. Of one
        column, each text is its own document."""
        if self.similarity == "cosine":
            embeddings = [F.normalize(column, dim=-1) for column in embeddings]
        return embeddings[0], torch.stack(embeddings[1:] or embeddings, dim=1)

    def score(self, anchor: Tensor, documents: Tensor) -> Tensor:
        """``(batch, rows, documents)``: the score of each anchor with each document of all rows."""
        return torch.einsum("bd,rnd->brn", anchor, documents)

    def score_own(self, anchor: Tensor, documents: Tensor) -> Tensor:
        """``(batch, documents)``: the score of each anchor with the documents of its own row."""
        return torch.einsum("bd,bnd->bn", anchor, documents)

    def gather(self, documents: Tensor) -> Tensor:
        """The documents of all processes, ``(rows of all, documents, ...)``."""
        documents = all_gather_with_grad(documents)
        if documents.requires_grad:
            # NOTE: the gather's backward pass takes memory as it lies, and einsum's gradients lie otherwise.
            documents.register_hook(torch.Tensor.contiguous)
        return documents

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The host's gradient cache asks for the loss of mini-batches of embeddings, column by column."""
        loss = self.compute_loss_from_embeddings([self.join(column) for column in reps], labels)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The mean over this process's rows.

        Args:
            embeddings: the embeddings of each column, ``(batch, dim)``.
            labels: None, the rows' classes ``(batch,)``, or ``(batch, 2 + columns)`` as ``RowLabels`` packs them.
        """
        rows = RowLabels.unpack(labels, self.in_batch_negatives, embeddings[0])
        loss = self.contrast(embeddings, rows)
        return loss if self.spread_weight is None else loss + self.spread_weight * self.crowding(embeddings, rows)

    def contrast(self, embeddings: list[Tensor], rows: RowLabels) -> Tensor:
        """The contrastive loss alone; rows without a positive, which are there to be taught, do not count."""
        if len(embeddings) < 2:
            raise ValueError(f"The loss takes the columns anchor, positive, ...; got {len(embeddings)}.")
        anchor, documents = self.prepare(embeddings)
        scores = self.score_own(anchor, documents)  # (batch, 1 + negatives), the positive first
        if rows.texts is not None:
            scores = scores.masked_fill(rows.texts[:, 1:] == NONE, -torch.inf)
        # Asked of all processes alike: where one gathers, all must.
        if self.in_batch_negatives:
            scores = torch.cat([scores, self._other_rows(anchor, documents, scores[:, :1], rows)], dim=1)
        elif documents.shape[1] < 2:
            raise ValueError(
                "Without in-batch negatives each row needs hard negatives of its own: the columns anchor, positive, "
                "negative_1, ... Mine some (st-llm-embed mine), or turn in-batch negatives on."
            )
        if rows.texts is not None:
            scores = scores[(rows.texts[:, :2] != NONE).all(dim=1)]
        labels = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return F.cross_entropy(scores * self.scale, labels, reduction="sum") / max(len(scores), 1)

    def crowding(self, embeddings: list[Tensor], rows: RowLabels) -> Tensor:
        """The sum over the columns of the spread-out regulariser, of the rows that have a text in it."""
        if rows.texts is not None:
            present = (rows.texts != NONE).unbind(dim=1)
            embeddings = [column[those] for column, those in zip(embeddings, present, strict=True)]
        regulariser = GlobalOrthogonalRegularizationLoss(self.model, mean_weight=None, aggregation="sum")
        return regulariser.compute_loss_from_embeddings(embeddings)["gor_second_moment"]

    def _other_rows(self, anchor: Tensor, documents: Tensor, positive_score: Tensor, rows: RowLabels) -> Tensor:
        """``(batch, rows of all processes · documents)``: scores, minus infinity where a document is no negative."""
        local = torch.arange(len(anchor), device=anchor.device)
        places = local  # of this process's rows among all
        group, label, texts = rows.group, rows.label, rows.texts
        if self.gather_across_devices:
            places = local + get_rank() * len(anchor)
            documents = self.gather(documents)
            group, label = all_gather(group), all_gather(label)
            texts = None if texts is None else all_gather(texts)
        scores = self.score(anchor, documents)  # (batch, rows, 1 + negatives)
        allowed = (rows.group.unsqueeze(1) == group) & (rows.group.unsqueeze(1) != NONE)  # (batch, rows)
        allowed[local, places] = False
        # A positive of the same class is no negative here, and a hard negative of another class may be a positive.
        both, same = (rows.label.unsqueeze(1) != NONE) & (label != NONE), rows.label.unsqueeze(1) == label
        positives, negatives = allowed & ~(both & same), allowed & (same | ~both)
        allowed = torch.stack([positives, *[negatives] * (scores.shape[2] - 1)], dim=2)  # (batch, rows, 1 + negatives)
        if texts is not None and rows.texts is not None:
            others, anchor_and_positive = texts[:, 1:], rows.texts[:, None, None, :2]
            allowed &= (others != NONE) & (others.unsqueeze(-1) != anchor_and_positive).all(dim=-1)
        if self.false_negative_margin is not None:
            limit = positive_score - (1 - self.false_negative_margin) * positive_score.abs()  # (batch, 1)
            allowed &= scores <= limit.unsqueeze(2)
        return scores.masked_fill(~allowed, -torch.inf).flatten(1)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "in_batch_negatives": self.in_batch_negatives,
            "false_negative_margin": self.false_negative_margin,
            "mini_batch_size": self.mini_batch_size,
            "gather_across_devices": self.gather_across_devices,
            "spread_weight": self.spread_weight,
            "similarity": self.similarity,
        }

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    @property
    def citation(self) -> str:
        return """
@misc{lee2024nvembed,
    title={NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models},
    author={Chankyu Lee and Rajarshi Roy and Mengyao Xu and Jonathan Raiman and Mohammad Shoeybi and Bryan Catanzaro
        and Wei Ping},
    year={2024},
    eprint={2405.17428},
    archivePrefix={arXiv},
    primaryClass={cs.CL},
    url={https://arxiv.org/abs/2405.17428},
}
"""
