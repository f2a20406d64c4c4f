"""InstructionContrastiveLoss against a naive loop, and against sentence-transformers' own loss where they agree."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_llm_embed import InstructionContrastiveLoss, build_model


def naive(embeddings: list[torch.Tensor], scale: float, in_batch: bool) -> float:
    anchors, *documents = [F.normalize(column.detach(), dim=-1) for column in embeddings]
    total = 0.0
    for i, anchor in enumerate(anchors):
        rows = range(len(anchors)) if in_batch else [i]
        candidates = [math.exp(scale * float(anchor @ column[j])) for column in documents for j in rows]
        total -= math.log(math.exp(scale * float(anchor @ documents[0][i])) / sum(candidates))
    return total / len(anchors)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("negatives", [1, 4])
def test_equals_the_naive_loop(llm, in_batch, negatives):
    loss = InstructionContrastiveLoss(build_model(llm, "mean"), scale=20.0, in_batch_negatives=in_batch)
    embeddings = [torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2 + negatives)]
    value = loss.compute_loss_from_embeddings(embeddings, None)
    assert value.item() == pytest.approx(naive(embeddings, 20.0, in_batch), rel=1e-9)
    value.backward()
    assert all(column.grad.abs().sum() > 0 for column in embeddings)


def test_on_is_the_hosts_loss_and_off_is_not(llm):
    model = build_model(llm, "mean")
    embeddings = [torch.randn(5, 8) for _ in range(3)]
    on = InstructionContrastiveLoss(model, scale=50.0).compute_loss_from_embeddings(embeddings, None)
    off = InstructionContrastiveLoss(model, scale=50.0, in_batch_negatives=False)
    host = MultipleNegativesRankingLoss(model, scale=50.0).compute_loss_from_embeddings(embeddings, None)
    torch.testing.assert_close(on, host)
    assert off.compute_loss_from_embeddings(embeddings) < host
    assert off.get_config_dict()["in_batch_negatives"] is False and off.temperature == 0.02


def test_other_rows_do_not_matter_when_off(llm):
    loss = InstructionContrastiveLoss(build_model(llm, "mean"), in_batch_negatives=False)
    embeddings = [torch.randn(5, 8) for _ in range(3)]
    rows = [loss.compute_loss_from_embeddings([column[i : i + 1] for column in embeddings]) for i in range(5)]
    torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings), torch.stack(rows).mean())


def test_off_without_negatives_is_refused(llm):
    loss = InstructionContrastiveLoss(build_model(llm, "mean"), in_batch_negatives=False)
    with pytest.raises(ValueError, match="in_batch_negatives=False needs at least one hard negative"):
        loss.compute_loss_from_embeddings([torch.randn(5, 8)] * 2)
