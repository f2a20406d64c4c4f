"""The contrastive loss of both NV-Embed stages (arXiv 2405.17428, section 4): in-batch negatives on, or off.

    loss = -log( exp(s(a, p) / τ) / Σ_d exp(s(a, d) / τ) ),  s = cosine

On (stage 1, retrieval): d runs over all positives and hard negatives of the batch, which is sentence-transformers' own
ranking loss. Off (stage 2, everything blended): d runs over the row's own positive and hard negatives, because another
row's text may well share the class. In: the embeddings of ``anchor``, ``positive``, ``negative_1..n``, each
``(batch, dim)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor


class InstructionContrastiveLoss(MultipleNegativesRankingLoss):
    """InfoNCE with a switch for in-batch negatives.

    Args:
        model: the model to train.
        scale: 1 / temperature. NV-Embed does not publish its temperature; 0.02 is what its sibling recipes use.
        in_batch_negatives: whether other rows' positives and hard negatives count as negatives.
        **kwargs: the arguments of ``MultipleNegativesRankingLoss``, where in-batch negatives are on.

    Raises:
        ValueError: when called without negatives while in-batch negatives are off.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 50.0,
        in_batch_negatives: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, scale=scale, **kwargs)
        self.in_batch_negatives = in_batch_negatives

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        if self.in_batch_negatives:
            return super().compute_loss_from_embeddings(embeddings, labels)
        if len(embeddings) < 3:
            raise ValueError(
                f"in_batch_negatives=False needs at least one hard negative: the columns are anchor, positive, "
                f"negative_1, ..., and this batch has {len(embeddings)}. Mine negatives (sentence_transformers.util."
                "mine_hard_negatives), or turn in-batch negatives on."
            )
        anchor, *documents = (F.normalize(column, dim=-1) for column in embeddings)
        scores = torch.einsum("bd,nbd->bn", anchor, torch.stack(documents)) * self.scale  # (batch, 1 + negatives)
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "in_batch_negatives": self.in_batch_negatives}

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
