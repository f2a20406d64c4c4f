"""The contrastive loss over late interaction (ColBERT, arXiv 2004.12832): a text is as many vectors as it has tokens.

    s(q, d) = 1/|q| Σ_i max_j q_i · d_j

over the tokens that the model's ``MultiVectorMask`` leaves. The mean stays below 1 for every length of a query, where
ColBERT's sum, which ranks alike, does not: so temperatures and margins mean what they mean for one vector.

In: features of ``anchor``, ``positive``, ``negative_1..n``; the first column is embedded as queries, the others as
documents. Embeddings are ``(batch, tokens, dim + 1)``: the last component is 1 on a token that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses.gradcache import RandContext, _create_minibatch
from sentence_transformers.base.losses.merged_forward import chunked_padded_forward, embed_columns_padded
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_kd_scores, mean_colbert_scores
from sentence_transformers.util import all_gather_padded
from torch import Tensor
from torch.nn.functional import pad

from st_llm_embed.losses.instruction_contrastive import InstructionContrastiveLoss
from st_llm_embed.losses.length_groups import ON_CPU


class LateInteractionLoss(InstructionContrastiveLoss):
    """``InstructionContrastiveLoss`` of a model of several vectors. With in-batch negatives and no guard this is
    sentence-transformers' ``MultiVectorMultipleNegativesRankingLoss`` with ``mean_colbert_scores``.

    Args:
        model: the model to train.
        scale, in_batch_negatives, false_negative_margin, mini_batch_size, gather_across_devices: see
            ``InstructionContrastiveLoss``.

    Raises:
        ValueError: see there; also for a model of one vector.
    """

    takes_several = True

    def __init__(
        self,
        model: MultiVectorEncoder,
        scale: float = 50.0,
        in_batch_negatives: bool = True,
        false_negative_margin: float | None = None,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        if not isinstance(model, MultiVectorEncoder):
            raise ValueError(
                f"LateInteractionLoss takes a MultiVectorEncoder, and the model is a {type(model).__name__}. Use "
                "InstructionContrastiveLoss(model), or build_model(base, 'multi-vector')."
            )
        super().__init__(
            model, scale, in_batch_negatives, false_negative_margin, mini_batch_size, gather_across_devices
        )

    def with_sides(self, columns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**column, "task": "document" if place else "query"} for place, column in enumerate(columns)]

    def embed(self, columns: Iterable[dict[str, Any]]) -> list[Tensor]:
        queries, *documents = self.with_sides(columns)
        # On a CPU in parts, each as wide as its own longest text.
        size = ON_CPU if queries["input_ids"].device.type == "cpu" else None
        embedded = [_pack(*chunked_padded_forward(self.model, queries, "query", size))]
        if documents:
            columns_and_masks = embed_columns_padded(self.model, documents, size, "document")
            embedded += [_pack(column, mask) for column, mask in zip(*columns_and_masks, strict=True)]
        return embedded

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """The host's gradient cache embeds a mini-batch twice, the second time with gradients."""
        part = _create_minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), torch.set_grad_enabled(with_grad):
            tensors = [value for value in part.values() if isinstance(value, Tensor)]
            state = RandContext(*tensors) if copy_random_state else None
            out = self.model(part, task=part["task"])
            return _pack(out["token_embeddings"], out["attention_mask"]), state

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(_as_wide(parts))

    def prepare(self, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The queries ``(batch, tokens, dim + 1)``, and each row's ``(batch, documents, tokens, dim + 1)``."""
        return embeddings[0], torch.stack(_as_wide(embeddings[1:] or embeddings), dim=1)

    def score(self, anchor: Tensor, documents: Tensor) -> Tensor:
        return mean_colbert_scores(**_unpack(anchor, documents)).unflatten(1, documents.shape[:2])

    def score_own(self, anchor: Tensor, documents: Tensor) -> Tensor:
        return mean_colbert_kd_scores(**_unpack(anchor, documents))

    def gather(self, documents: Tensor) -> Tensor:
        vectors, mask = documents.flatten(0, 1)[..., :-1], documents.flatten(0, 1)[..., -1].bool()
        # The host pads all processes' texts to one length.
        return _pack(*all_gather_padded(vectors, mask, with_grad=True)).unflatten(0, (-1, documents.shape[1]))

    def get_config_dict(self) -> dict[str, Any]:
        config = super().get_config_dict()
        return {key: config[key] for key in config if key not in ("spread_weight", "similarity")}

    @property
    def citation(self) -> str:
        return """
@misc{khattab2020colbert,
    title={ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over BERT},
    author={Omar Khattab and Matei Zaharia},
    year={2020},
    eprint={2004.12832},
    archivePrefix={arXiv},
    primaryClass={cs.IR},
    url={https://arxiv.org/abs/2004.12832},
}
"""


def _pack(vectors: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([vectors, mask.unsqueeze(-1).to(vectors.dtype)], dim=-1)


def _unpack(queries: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """Arguments of the host's scores."""
    return {
        "queries_embeddings": queries[..., :-1],
        "documents_embeddings": documents[..., :-1],
        "queries_mask": queries[..., -1].bool(),
        "documents_mask": documents[..., -1].bool(),
    }


def _as_wide(columns: list[Tensor]) -> list[Tensor]:
    """Padded to as many tokens as the one with the most has; the padding does not count."""
    tokens = max(column.shape[1] for column in columns)
    return [pad(column, (0, 0, 0, tokens - column.shape[1])) for column in columns]
