"""The loss that tasks are trained with, unless one is given: by what the model makes of a text.

    one vector           InstructionContrastiveLoss over cosine
    a vector per token   LateInteractionLoss
    sparse weights       InstructionContrastiveLoss over dot products, in the host's SpladeLoss, for sparsity

each within ``DistillationLoss`` where there is a teacher or the data have scores.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.base import BaseModel
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from torch import nn

from st_llm_embed.losses import DistillationLoss, InstructionContrastiveLoss, LateInteractionLoss
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

COSINES, DOT_PRODUCTS = 0.02, 1.0  # temperatures


def task_loss(
    model: BaseModel, args: LLMEmbedTrainingArguments, *, in_batch_negatives: bool, taught: bool
) -> nn.Module:
    """The loss of a model for tasks.

    Args:
        model: the model to train.
        args: the training arguments.
        in_batch_negatives: whether any task has in-batch negatives.
        taught: whether there is a teacher.

    Raises:
        ValueError: for what a model of several vectors, or of sparse ones, cannot learn.
    """
    sparse = isinstance(model, SparseEncoder)
    several = isinstance(model, MultiVectorEncoder)
    learns = taught or bool(args.soft_label_weight)
    if learns and sparse:
        raise ValueError(
            "A model of sparse vectors learns from pairs and negatives, and here there is a teacher, or a "
            "soft_label_weight. Leave them out, or take a recipe of dense vectors."
        )
    if taught and several and args.distill_weight:
        raise ValueError(
            f"distill_weight={args.distill_weight} matches a teacher's vector of a text with one of the model's, "
            "which has one for each token. Match the scores: distill_weight=0, score_weight=1.0."
        )
    settings: dict[str, Any] = {
        "scale": 1 / (args.temperature or (DOT_PRODUCTS if sparse else COSINES)),
        "in_batch_negatives": in_batch_negatives,
        "false_negative_margin": args.false_negative_margin,
        "gather_across_devices": args.gather_across_devices,
    }
    if sparse:
        contrastive = InstructionContrastiveLoss(model, similarity="dot", **settings)
        weights: dict[str, float] = {
            "document_regularizer_weight": args.document_regularizer_weight,
            "query_regularizer_weight": args.query_regularizer_weight,
        }
        if args.mini_batch_size is None:
            return SpladeLoss(model, contrastive, **weights)
        return CachedSpladeLoss(model, contrastive, mini_batch_size=args.mini_batch_size, **weights)
    settings["mini_batch_size"] = args.mini_batch_size
    if several:
        contrastive = LateInteractionLoss(model, **settings)
    else:
        contrastive = InstructionContrastiveLoss(model, spread_weight=args.spread_weight, **settings)
    if not learns:
        return contrastive
    return DistillationLoss(
        model,
        contrastive,
        distill_weight=args.distill_weight if taught else 0,
        score_weight=args.score_weight if taught else 0,
        soft_label_weight=args.soft_label_weight,
        contrastive_weight=args.contrastive_weight,
        score_temperature=args.score_temperature,
        soft_label_temperature=args.soft_label_temperature,
    )
