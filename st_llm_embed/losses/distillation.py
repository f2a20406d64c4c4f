"""Learn from a teacher's vectors and scores, alone or beside the contrastive loss, in one pass over the batch.

    vectors       1 - s·t                                       mean over the batch's texts
    scores        KL( softmax(t_q·t_d / τ) || softmax(s_q·s_d / τ) )   mean over its queries, d over its documents
    soft labels   KL( softmax(scores / τ') || softmax(s_q·s_d / τ) )   the same, d over the row's own documents

with s the student's vector and t the teacher's, both of length 1; s_q·s_d is the contrastive loss's own score, so a
student of several vectors learns the scores of a teacher of one. The student matches the teacher's vectors, so its own
must have their width: by a projection in the model, never in the loss, where it would be lost (arXiv 2602.15547
projects the student too; a trained projection of the teacher collapses). The teacher knows which texts are near, so
that scores are over all documents of the batch, whosever negatives they are. Of rows with one text only, each text is
a query and the others are its documents.

In: the features of ``anchor``, ``positive``, ``negative_1..n``, or of the one column that there is, each with
``teacher_embedding`` ``(batch, teacher's dim)``; in the first, where there are any, ``soft_labels`` ``(batch,
documents)``. What the collator knows of the rows is in ``labels``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.base import BaseModel
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, get_rank
from torch import Tensor, nn

from st_llm_embed.losses.instruction_contrastive import InstructionContrastiveLoss
from st_llm_embed.losses.row_labels import NONE, RowLabels

TEACHER_EMBEDDING, SOFT_LABELS = "teacher_embedding", "soft_labels"  # in the features


class Supervision(NamedTuple):
    """What a batch is to be matched with, beside its embeddings.

    Args:
        labels: None, or ``(batch, 2 + columns)`` as ``RowLabels`` packs them.
        teacher: the teacher's vectors of each column, ``(batch, teacher's dim)``; none where they are not needed.
        soft_labels: the scores of each row's own documents, ``(batch, documents)``, NaN where there is none; or None.
    """

    labels: Tensor | None
    teacher: list[Tensor]
    soft_labels: Tensor | None


class DistillationLoss(CachedLossMixin, nn.Module):
    """The weighted sum of what a teacher says, the contrastive loss, and its regulariser.

    Args:
        model: the student.
        contrastive: the contrastive loss, whose mini-batches, gathering and ``spread_weight`` hold here too.
        distill_weight: the weight of the match with the teacher's vectors; 0 leaves a part out.
        score_weight: the weight of the match with the teacher's scores over the batch.
        soft_label_weight: the weight of the match with given scores of each row's own documents.
        contrastive_weight: the weight of the contrastive loss, of the rows that have a positive.
        score_temperature: τ of the teacher's and the student's scores, which are cosines.
        soft_label_temperature: τ' of the given scores: 1 for the logits of a cross-encoder.

    Raises:
        ValueError: for negative weights, all of them 0, temperatures that are not positive, features without
            ``teacher_embedding`` where it is needed, vectors of fewer dimensions than the model's to match, and scores
            of another number of documents.
    """

    def __init__(
        self,
        model: BaseModel,
        contrastive: InstructionContrastiveLoss,
        *,
        distill_weight: float = 1.0,
        score_weight: float = 0.0,
        soft_label_weight: float = 0.0,
        contrastive_weight: float = 1.0,
        score_temperature: float = 0.05,
        soft_label_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        weights = {
            "distill_weight": distill_weight,
            "score_weight": score_weight,
            "soft_label_weight": soft_label_weight,
            "contrastive_weight": contrastive_weight,
        }
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name}={weight!r} must be 0 or more.")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0, and the loss would be too. Give one of them a weight.")
        temperatures = {"score_temperature": score_temperature, "soft_label_temperature": soft_label_temperature}
        for name, temperature in temperatures.items():
            if not temperature > 0:
                raise ValueError(f"{name}={temperature!r} must be positive.")
        self.model = model
        self.contrastive = contrastive
        self.weights = weights
        self.score_temperature = score_temperature
        self.soft_label_temperature = soft_label_temperature
        self.mini_batch_size = contrastive.mini_batch_size
        self.uses_gradient_cache = contrastive.uses_gradient_cache
        self._parts: dict[str, Tensor] = {}

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's vectors of the texts are read."""
        return bool(self.weights["distill_weight"] or self.weights["score_weight"])

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = [dict(column) for column in sentence_features]
        teacher = [column.pop(TEACHER_EMBEDDING) for column in columns if TEACHER_EMBEDDING in column]
        soft_labels = [column.pop(SOFT_LABELS, None) for column in columns][0]
        if self.needs_teacher and len(teacher) < len(columns):
            raise ValueError(
                f"{len(columns)} columns of texts have {len(teacher)} of the teacher's vectors. Give the trainer "
                "a teacher, or distill_weight=0 and score_weight=0."
            )
        supervision = Supervision(labels, teacher, soft_labels)
        if self.uses_gradient_cache:
            columns = self.contrastive.with_sides(columns)
            return self.forward_cached(columns, supervision)  # type: ignore[operator, arg-type]  # handed on as it is
        return self.compute_loss_from_embeddings(self.contrastive.embed(columns), supervision)

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        return self.contrastive.embed_minibatch(*args, **kwargs)  # type: ignore[operator]  # of the host's mixin

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Supervision,  # type: ignore[override]  # what forward handed on
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The host's gradient cache asks for the loss of mini-batches of embeddings, column by column."""
        loss = self.compute_loss_from_embeddings([self.contrastive.join(column) for column in reps], labels)
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss

    def take_parts(self) -> dict[str, Tensor]:
        """The parts of the loss since they were last taken, weighted, by name: ``distill``, ``scores``,
        ``soft_labels``, ``contrastive``, ``spread``."""
        parts, self._parts = self._parts, {}
        return parts

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], supervision: Supervision) -> Tensor:
        """The weighted sum of the parts.

        Args:
            embeddings: the student's embeddings of each column, ``(batch, dim)``; of fewer dimensions than the
                teacher's inside ``MatryoshkaLoss``, which are compared with the teacher's first.
            supervision: what they are to be matched with.
        """
        wide = torch.promote_types(embeddings[0].dtype, torch.float32)
        embeddings = [column.to(wide) for column in embeddings]
        rows = RowLabels.unpack(supervision.labels, self.contrastive.in_batch_negatives, embeddings[0])
        parts: dict[str, Tensor] = {}
        if self.needs_teacher:
            teacher = torch.stack(supervision.teacher, dim=1).to(wide)  # (batch, columns, teacher's dim)
            everywhere = torch.ones_like(teacher[:, :, 0], dtype=torch.bool)
            present = everywhere if rows.texts is None else rows.texts != NONE
            if self.weights["distill_weight"]:
                parts["distill"] = self.weights["distill_weight"] * self._distance(embeddings, teacher, present)
            if self.weights["score_weight"]:
                divergence = self._score_divergence(embeddings, F.normalize(teacher, dim=-1), present)
                parts["scores"] = self.weights["score_weight"] * divergence
        if self.weights["soft_label_weight"] and supervision.soft_labels is not None:
            divergence = self._label_divergence(embeddings, supervision.soft_labels.to(wide))
            parts["soft_labels"] = self.weights["soft_label_weight"] * divergence
        if self.weights["contrastive_weight"] and len(embeddings) > 1:
            contrast = self.contrastive.contrast(embeddings, rows)
            parts["contrastive"] = self.weights["contrastive_weight"] * contrast
        if self.contrastive.spread_weight is not None:
            parts["spread"] = self.contrastive.spread_weight * self.contrastive.crowding(embeddings, rows)
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.detach()
        return torch.stack([embeddings[0].sum() * 0.0, *parts.values()]).sum()

    def _distance(self, embeddings: list[Tensor], teacher: Tensor, present: Tensor) -> Tensor:
        """The mean over the texts of 1 - cosine with the teacher's vectors."""
        student = torch.stack([F.normalize(column, dim=-1) for column in embeddings], dim=1)  # (batch, columns, dim)
        if teacher.shape[2] < student.shape[2]:
            raise ValueError(
                f"The teacher's vectors have {teacher.shape[2]} dimensions and the student's {student.shape[2]}. "
                "Give the student a projection into the teacher's space (st_llm_embed.teaching.align)."
            )
        target = F.normalize(teacher[:, :, : student.shape[2]], dim=-1)
        distance = (1 - (student * target).sum(dim=2)).masked_fill(~present, 0)  # (batch, columns)
        return distance.sum() / present.sum().clamp(min=1)

    def _score_divergence(self, embeddings: list[Tensor], teacher: Tensor, present: Tensor) -> Tensor:
        """The mean over the queries of this process.

        Args:
            embeddings: the student's embeddings of each column.
            teacher: ``(batch, columns, teacher's dim)``, of length 1.
            present: ``(batch, columns)``, which are texts.
        """
        anchor, documents = self.contrastive.prepare(embeddings)
        local = torch.arange(len(anchor), device=anchor.device)
        first = 1 if len(embeddings) > 1 else 0  # column of documents
        taught, there = (part[:, first:].flatten(0, 1) for part in (teacher, present))
        offset = 0  # of this process's rows among the documents
        if self.contrastive.gather_across_devices:
            offset = get_rank() * len(taught)
            documents, taught, there = self.contrastive.gather(documents), all_gather(taught), all_gather(there)
        allowed = there.expand(len(anchor), -1)  # (batch, documents of all rows)
        if not first:  # no text is its own document
            allowed = allowed.clone()
            allowed[local, offset + local] = False
        asked = present[:, 0] & (allowed.sum(dim=1) > 1)  # one document has probability 1 whatever its score
        scores = self.contrastive.score(anchor, documents).flatten(1)
        found = (scores / self.score_temperature).masked_fill(~allowed, -torch.inf)
        wanted = (teacher[:, 0] @ taught.T / self.score_temperature).masked_fill(~allowed, -torch.inf)
        return mean_divergence(wanted, found, asked)

    def _label_divergence(self, embeddings: list[Tensor], soft_labels: Tensor) -> Tensor:
        """The mean over the rows that have scores of two documents or more."""
        anchor, documents = self.contrastive.prepare(embeddings)
        if soft_labels.shape != documents.shape[:2]:
            raise ValueError(
                f"The scores are {tuple(soft_labels.shape)}, and the rows have {tuple(documents.shape[:2])} documents."
            )
        there = ~soft_labels.isnan()
        found = self.contrastive.score_own(anchor, documents) / self.score_temperature
        wanted = (soft_labels / self.soft_label_temperature).masked_fill(~there, -torch.inf)
        return mean_divergence(wanted, found.masked_fill(~there, -torch.inf), there.sum(dim=1) > 1)

    def get_config_dict(self) -> dict[str, Any]:
        temperatures = {
            "score_temperature": self.score_temperature,
            "soft_label_temperature": self.soft_label_temperature,
        }
        return {**self.weights, **temperatures, **self.contrastive.get_config_dict()}

    @property
    def citation(self) -> str:
        return """
@misc{kim2023embeddistill,
    title={EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval},
    author={Seungyeon Kim and Ankit Singh Rawat and Manzil Zaheer and Sadeep Jayasumana and Veeranjaneyulu Sadhanala
        and Wittawat Jitkrittum and Aditya Krishna Menon and Rob Fergus and Sanjiv Kumar},
    year={2023},
    eprint={2301.12005},
    archivePrefix={arXiv},
    primaryClass={cs.IR},
    url={https://arxiv.org/abs/2301.12005},
}
"""


def mean_divergence(wanted: Tensor, found: Tensor, rows: Tensor) -> Tensor:
    """The mean over some rows of KL(softmax(wanted) || softmax(found)); 0 if there are none.

    Args:
        wanted: ``(batch, documents)``, minus infinity for what is no document of the row.
        found: ``(batch, documents)``, likewise.
        rows: ``(batch,)``, which rows count.
    """
    wanted, found = wanted[rows], found[rows]
    there = wanted > -torch.inf
    log_ratio = (wanted.log_softmax(dim=1) - found.log_softmax(dim=1)).masked_fill(~there, 0)
    return (wanted.softmax(dim=1) * log_ratio).sum() / rows.sum().clamp(min=1)
