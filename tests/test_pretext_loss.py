"""PretextLoss: one pass equals two, and its parts equal the formula."""

from __future__ import annotations

import pytest
import torch
from conftest import save_llm
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import AutoModelForCausalLM

from st_llm_embed import LLMBackbone, PretextLoss, build_model
from st_llm_embed.losses.pretext import bag_of_words_loss
from st_llm_embed.tasks import EBAE_PROMPT, EBAR_PROMPT

TEXT = ["the cat sat on the mat", "dogs", "seven dogs were barking at the moon"]
NEXT = ["the quick brown fox", "", "sum of all numbers"]


def columns(model: SentenceTransformer) -> list[dict[str, torch.Tensor]]:
    return [model.preprocess(TEXT), model.preprocess(NEXT)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_one_pass_equals_two_prompted_passes(llm, side, num_tokens):
    model = build_model(llm, "llara", num_tokens=num_tokens).eval()
    model.tokenizer.padding_side = side
    loss = PretextLoss(model, num_tokens=num_tokens)
    features = model.preprocess(TEXT)
    ids = [
        row[mask.bool()].tolist() for row, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]
    joint = loss.join_prompts(ids, torch.device("cpu"))
    rows = torch.arange(len(TEXT)).unsqueeze(1)
    with torch.no_grad():
        hidden = model[0](joint.features)["token_embeddings"]
        for prompt, positions in ((EBAE_PROMPT, joint.self_positions), (EBAR_PROMPT, joint.next_positions)):
            alone = model.encode(TEXT, prompt=prompt, convert_to_tensor=True)
            pooled = nn.functional.normalize(hidden[rows, positions].mean(dim=1), dim=-1)
            torch.testing.assert_close(pooled, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_joint_mask_and_positions_by_the_rules(llm, attention):
    loss = PretextLoss(build_model(llm, "llara", attention=attention))
    text = [[1, 5, 6, 7, 2], [1, 8, 2]]
    joint = loss.join_prompts(text, torch.device("cpu"))
    for row, ids in enumerate(text):
        length, self_length = len(ids) - 1, len(loss.self_ids)
        blocks = ["text"] * length + ["self"] * self_length + ["next"] * len(loss.next_ids)
        expected = ids[:-1] + loss.self_ids + loss.next_ids
        assert joint.features["input_ids"][row, : len(expected)].tolist() == expected
        assert joint.features["attention_mask"][row].sum() == len(expected)
        positions = [i - (self_length if block == "next" else 0) for i, block in enumerate(blocks)]
        assert joint.features["position_ids"][row, : len(expected)].tolist() == positions
        mask = joint.features["structured_mask"][row]
        for q, query in enumerate(blocks):
            for k, key in enumerate(blocks):
                allowed = (key == "text" or key == query) and (attention == "bidirectional" or k <= q)
                assert mask[q, k] == allowed, (q, k)
        assert not mask[: len(expected), len(expected) :].any()
        assert joint.self_positions[row].tolist() == [length + self_length - 1]
        assert joint.next_positions[row].tolist() == [len(expected) - 1]
    assert joint.features["structured_mask"].any(dim=-1).all()  # no row without a key, padding's neither


def test_the_parts_equal_the_formula(llm):
    model = build_model(llm, "llara").eval()
    loss = PretextLoss(model)
    with torch.no_grad():
        parts = loss(columns(model))
        weight = model[0].model.get_input_embeddings().weight
        for name, prompt, targets in (("ebae", EBAE_PROMPT, TEXT), ("ebar", EBAR_PROMPT, NEXT)):
            terms = []
            for text, target in zip(TEXT, targets, strict=True):
                state = model[0](model.preprocess([text], prompt=prompt))["token_embeddings"][0, -1]
                log_probabilities = torch.log_softmax(weight @ state, dim=0)
                words = set(model.tokenizer(target, add_special_tokens=False)["input_ids"])
                if words:
                    terms.append(-sum(log_probabilities[word] for word in words) / len(words))
            assert len(terms) == (3 if name == "ebae" else 2)
            torch.testing.assert_close(parts[name], torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_bags_without_words_do_not_count():
    logits = torch.randn(3, 7, requires_grad=True)
    torch.testing.assert_close(bag_of_words_loss(logits, [[], [2], []]), -logits.log_softmax(-1)[1, 2])
    nothing = bag_of_words_loss(logits, [[], [], []])
    nothing.backward()
    assert nothing == 0 and logits.grad is not None


def test_long_texts_are_cut_and_suffixes_are_not(llm):
    model = build_model(llm, "llara", max_seq_length=24)
    loss = PretextLoss(model)
    long = model.preprocess(["a " * 200])["input_ids"].tolist()
    ids = loss.join_prompts(long, torch.device("cpu")).features["input_ids"][0].tolist()
    assert ids[-len(loss.next_ids) :] == loss.next_ids
    longest = max(len(loss.self_ids), len(loss.next_ids))
    assert len(ids) == 24 - longest + len(loss.self_ids) + len(loss.next_ids)


@pytest.mark.parametrize("recipe", ["nv-embed", "llara"])
def test_it_trains_the_llm(llm, recipe):
    model = build_model(llm, recipe).train()
    loss = PretextLoss(model)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    history = []
    for _ in range(20):
        parts = loss(columns(model))
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        history.append({name: part.item() for name, part in parts.items()})
    assert all(history[-1][name] < 0.7 * history[0][name] for name in ("ebae", "ebar"))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model[0].model.parameters())


def test_an_untied_lm_head_is_used_when_given_and_demanded_when_not(tmp_path):
    path = save_llm(tmp_path, tie_word_embeddings=False)
    model = build_model(path, "llara").eval()
    with pytest.raises(ValueError, match="Pass lm_head=AutoModelForCausalLM"):
        PretextLoss(model)
    head = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings()
    loss = PretextLoss(model, lm_head=head)
    state = torch.randn(2, 1, 32)
    expected = bag_of_words_loss(head(state[:, 0]), [[5], [6]])
    parts = loss.compute_loss_from_embeddings([state, state], [[[5], [6]], [[5], [6]]])
    torch.testing.assert_close(parts["ebae"], expected)


def test_refuses_models_prompts_and_columns_that_do_not_fit(llm):
    stock = Transformer(llm)
    with pytest.raises(ValueError, match="needs an LLMBackbone.*not Transformer"):
        PretextLoss(SentenceTransformer(modules=[stock, Pooling(32)]))
    model = SentenceTransformer(modules=[LLMBackbone(llm, attention="causal"), Pooling(32, "lasttoken")])
    with pytest.raises(ValueError, match="must begin with '{text}'"):
        PretextLoss(model, self_prompt="The original sentence: {text}")
    with pytest.raises(ValueError, match=r"num_tokens=99 is outside 1\.\."):
        PretextLoss(model, num_tokens=99)
    with pytest.raises(ValueError, match="takes the columns 'text' and 'next', got 1"):
        PretextLoss(model)(columns(model)[:1])
