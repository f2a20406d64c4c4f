"""InstructionContrastiveLoss against a naive loop, sums of separate computations, and the host where they agree."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from st_llm_embed import InstructionContrastiveLoss, build_model
from st_llm_embed.losses.row_labels import NONE

WORDS = "the cat sat on a mat while seven dogs were barking at moon and quick brown fox jumped over them".split()


def draw(columns: int, rows: int = 5) -> list[torch.Tensor]:
    return [torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for _ in range(columns)]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=0))


def naive(embeddings, scale, group, label=None, texts=None, margin=None, score_of=cosine) -> float:
    """One number at a time, from the rules in words."""
    anchors, *documents = [column.detach() for column in embeddings]
    count = len(anchors)
    label = label or [NONE] * count
    texts = texts or [[row * 100 + column for column in range(len(embeddings))] for row in range(count)]
    total = 0.0
    for i, anchor in enumerate(anchors):
        positive = score_of(anchor, documents[0][i])
        denominator = 0.0
        for k, column in enumerate(documents):
            for j in range(count):
                score, text = score_of(anchor, column[j]), texts[j][k + 1]
                if text == NONE:
                    continue
                if i != j:
                    if group[i] == NONE or group[i] != group[j] or text in texts[i][:2]:
                        continue
                    if margin is not None and score > positive - (1 - margin) * abs(positive):
                        continue
                    if NONE not in (label[i], label[j]) and (label[i] == label[j]) == (k == 0):
                        continue
                denominator += math.exp(scale * score)
        total -= math.log(math.exp(scale * positive) / denominator)
    return total / count


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("negatives", [1, 4])
def test_equals_the_naive_loop(llm, in_batch, negatives):
    loss = InstructionContrastiveLoss(build_model(llm, "mean"), scale=20.0, in_batch_negatives=in_batch)
    embeddings = draw(2 + negatives)
    value = loss.compute_loss_from_embeddings(embeddings)
    group = [0 if in_batch else NONE] * 5
    assert value.item() == pytest.approx(naive(embeddings, 20.0, group), rel=1e-9)
    value.backward()
    assert all(column.grad.abs().sum() > 0 for column in embeddings)


@pytest.mark.parametrize("margin", [None, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_groups_classes_texts_and_margin_equal_the_naive_loop(llm, seed, margin):
    """Drawn at random, with texts that repeat, negatives that are missing, and rows without a class."""
    model = build_model(llm, "mean")
    choose = random.Random(seed)
    embeddings = draw(4, rows=9)
    group = [choose.choice([NONE, 0, 1]) for _ in range(9)]
    label = [choose.choice([NONE, 7, 8]) for _ in range(9)]
    texts = [[choose.randrange(12) for _ in range(4)] for _ in range(9)]
    for row in choose.sample(texts, 3):
        row[3] = NONE
    loss = InstructionContrastiveLoss(model, scale=20.0, false_negative_margin=margin)
    labels = torch.tensor([[g, c, *t] for g, c, t in zip(group, label, texts, strict=True)])
    value = loss.compute_loss_from_embeddings(embeddings, labels)
    assert value.item() == pytest.approx(naive(embeddings, 20.0, group, label, texts, margin), rel=1e-9)
    value.backward()
    assert all(torch.isfinite(column.grad).all() and column.grad.abs().sum() > 0 for column in embeddings)
    classes = loss.compute_loss_from_embeddings(embeddings, torch.tensor(label))  # a label column of the host
    assert classes.item() == pytest.approx(naive(embeddings, 20.0, [0] * 9, label, None, margin), rel=1e-9)


def test_the_spread_equals_the_naive_loop(llm):
    """By column: the mean square of the cosines of two rows that have a text, beyond 1 / dim, if it is more."""
    model = build_model(llm, "mean")
    embeddings = [column.detach() + torch.tensor([3.0] + [0.0] * 7) for column in draw(4, rows=6)]
    texts = torch.arange(24).reshape(6, 4)
    texts[2:5, 3] = NONE
    labels = torch.cat([torch.zeros(6, 1), torch.full((6, 1), NONE), texts], dim=1).long()
    plain = InstructionContrastiveLoss(model).compute_loss_from_embeddings(embeddings, labels)
    spread = InstructionContrastiveLoss(model, spread_weight=0.3).compute_loss_from_embeddings(embeddings, labels)
    expected = 0.0
    for number, column in enumerate(embeddings):
        rows = [F.normalize(row, dim=0) for row, text in zip(column, texts[:, number], strict=True) if text != NONE]
        squares = [float(a @ b) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        expected += max(0.0, sum(squares) / len(squares) - 1 / 8)
    assert expected > 0.5 and (spread - plain).item() == pytest.approx(0.3 * expected, rel=1e-6)
    alone = [column[:1] for column in draw(3, rows=1)]
    assert InstructionContrastiveLoss(model, spread_weight=1.0).compute_loss_from_embeddings(alone).isfinite()
    with pytest.raises(ValueError, match="spread_weight=0 must be positive"):
        InstructionContrastiveLoss(model, spread_weight=0)


def test_switches_in_one_batch_are_the_sum_of_separate_computations(llm):
    """Two tasks with in-batch negatives, one without, blended: each as if it were alone."""
    model = build_model(llm, "mean")
    embeddings = draw(3, rows=9)
    tasks = {0: [0, 3, 7], 1: [1, 2], NONE: [4, 5, 6, 8]}
    group = torch.tensor([next(task for task, rows in tasks.items() if row in rows) for row in range(9)])
    texts = torch.arange(27).reshape(9, 3)
    labels = torch.cat([group.unsqueeze(1), torch.full((9, 1), NONE), texts], dim=1)
    blended = InstructionContrastiveLoss(model).compute_loss_from_embeddings(embeddings, labels)
    separate = sum(
        InstructionContrastiveLoss(model, in_batch_negatives=task != NONE).compute_loss_from_embeddings(
            [column[rows] for column in embeddings]
        )
        * len(rows)
        for task, rows in tasks.items()
    )
    torch.testing.assert_close(blended, separate / 9)


def test_on_is_the_hosts_loss_and_off_is_not(llm):
    model = build_model(llm, "mean")
    embeddings = draw(3)
    on = InstructionContrastiveLoss(model, scale=50.0).compute_loss_from_embeddings(embeddings, None)
    off = InstructionContrastiveLoss(model, scale=50.0, in_batch_negatives=False)
    host = MultipleNegativesRankingLoss(model, scale=50.0).compute_loss_from_embeddings(embeddings, None)
    torch.testing.assert_close(on, host, atol=1e-6, rtol=0)
    assert off.compute_loss_from_embeddings(embeddings) < host
    assert off.get_config_dict()["in_batch_negatives"] is False and off.temperature == 0.02


def test_other_rows_do_not_matter_when_off(llm):
    loss = InstructionContrastiveLoss(build_model(llm, "mean"), in_batch_negatives=False)
    embeddings = draw(3)
    rows = [loss.compute_loss_from_embeddings([column[i : i + 1] for column in embeddings]) for i in range(5)]
    torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings), torch.stack(rows).mean())


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("training", ["full", "LoRA and checkpointing"])
def test_the_gradient_cache_gives_the_plain_gradients(llm, training, matryoshka):
    """Texts of many lengths, in mini-batches that divide nothing; float64, where rounding hides no difference."""
    model = build_model(llm, "nv-embed", num_latents=4, model_kwargs={"dtype": "float64"}).double()
    if training != "full":
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.train()
        model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    prompt = "Instruct: find it\nQuery: "
    texts = [[" ".join(random.choices(WORDS, k=random.randint(1, 9))) for _ in range(7)] for _ in range(3)]
    labels = torch.tensor([[row % 2 - 1, NONE, *range(3 * row, 3 * row + 3)] for row in range(7)])
    gradients, values = [], []
    for mini_batch_size in (None, 3):
        loss = InstructionContrastiveLoss(model, mini_batch_size=mini_batch_size)
        whole = MatryoshkaLoss(model, loss, [32, 16]) if matryoshka else loss
        features = [model.preprocess(texts[0], prompt=prompt), *map(model.preprocess, texts[1:])]
        model.zero_grad()
        value = whole(features, labels)
        value.backward()
        values.append(value.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(values[1], values[0], atol=1e-8, rtol=1e-8)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-8, rtol=1e-8)


def test_what_makes_no_sense_is_refused(llm):
    model = build_model(llm, "mean")
    loss = InstructionContrastiveLoss(model, in_batch_negatives=False)
    with pytest.raises(ValueError, match="Without in-batch negatives each row needs hard negatives of its own"):
        loss.compute_loss_from_embeddings(draw(2))
    with pytest.raises(ValueError, match="takes the columns anchor, positive, ...; got 1"):
        loss.compute_loss_from_embeddings(draw(1))
    for name in ("scale", "false_negative_margin"):
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            InstructionContrastiveLoss(model, **{name: 0})
