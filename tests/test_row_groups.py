"""On a CPU the LLM runs a batch in groups of rows of like length: the same vectors, and less padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CORPUS, TEXTS, save_llm
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import BloomConfig, Gemma2Config, GPT2Config, MambaConfig, MixtralConfig

from st_llm_embed import LLMBackbone, build_model
from st_llm_embed.modules import llm_backbone
from st_llm_embed.modules.row_groups import cut_to_length, rows_by_length

MIXED = [*TEXTS, *CORPUS, "sum", "a cat", "the quick brown fox"]
BUDGET = 24  # tokens of a group: of MIXED some rows are longer, others go together
WHOLE = 10**9
ARCHITECTURES = {  # learned positions, biases by distance, recurrence, experts, windows
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512), "bidirectional"),
    "bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=4), "causal"),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4), "causal"),
    "mixtral": (
        MixtralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
        "bidirectional",
    ),
    "gemma2": (
        Gemma2Config(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
        ),
        "causal",
    ),
}


@pytest.fixture
def group_tokens(monkeypatch):
    """Sets how many tokens a group has."""
    return lambda tokens: monkeypatch.setattr(llm_backbone, "GROUP_TOKENS", tokens)


@pytest.fixture
def passes(group_tokens):
    """Watches an LLM; gives the shapes of its passes."""
    group_tokens(BUDGET)

    def watch(llm: nn.Module) -> list[torch.Size]:
        seen: list[torch.Size] = []
        # sentence-transformers calls the LLM's forward, whose hooks do not run.
        llm.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        return seen

    return watch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [None, "Instruct: find it\nQuery: ", "Text: {text} The next sentence:"])
@pytest.mark.parametrize("recipe", ["mean", "mean of the text", "weightedmean", "last-token", "nv-embed", "llara"])
def test_vectors_are_those_of_the_whole_batch(llm, group_tokens, passes, recipe, prompt, side):
    chosen = {"nv-embed": {"num_latents": 4}, "mean of the text": {"include_prompt": False}}
    model = build_model(llm, recipe.removesuffix(" of the text"), **chosen.get(recipe, {}))
    model.tokenizer.padding_side = side
    seen = passes(model[0].model)
    vectors = []
    for tokens in (WHOLE, BUDGET):
        group_tokens(tokens)
        vectors.append(model.encode(MIXED, prompt=prompt))
    assert len(seen) > 2  # the whole batch once, then the groups
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_llm_gives_the_states_of_the_whole_batch(tmp_path, group_tokens, passes, name, side):
    config, attention = ARCHITECTURES[name]
    config.vocab_size = 700
    backbone = LLMBackbone(save_llm(tmp_path, config), attention=attention).eval()
    backbone.tokenizer.padding_side = side
    given = backbone.preprocess(MIXED)
    real = given["attention_mask"].bool()
    seen = passes(backbone.model)
    states = []
    for tokens in (WHOLE, BUDGET):
        group_tokens(tokens)
        with torch.no_grad():
            states.append(backbone(dict(given))["token_embeddings"])
    assert len(seen) > 2 and states[1].shape == states[0].shape
    torch.testing.assert_close(states[1][real], states[0][real], rtol=0, atol=1e-5)
    # What is compared depends on the order of the tokens, so that a row out of place would show.
    assert (states[0][real] - states[0].flip(0)[real]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_llm_sees_less_padding(llm, passes, side):
    backbone = LLMBackbone(llm).eval()
    backbone.tokenizer.padding_side = side
    seen = passes(backbone.model)
    features = backbone.preprocess(MIXED)
    mask = features["attention_mask"]
    with torch.no_grad():
        backbone(features)
    computed = sum(shape.numel() for shape in seen)
    assert int(mask.sum()) <= computed < 0.5 * mask.numel()
    assert all(rows == 1 or rows * width <= BUDGET for rows, width in seen)
    assert sum(rows for rows, _ in seen) == len(MIXED) and len(seen) < len(MIXED)
    assert features["attention_mask"] is mask


def test_what_asks_for_the_whole_batch_gets_it(llm, passes, monkeypatch):
    """Gradients, training (whose dropout a gradient cache draws again), other outputs, structured masks, and one of
    several processes (each of which runs a sharded LLM as often as the others)."""
    backbone = LLMBackbone(llm).eval()
    seen = passes(backbone.model)
    given = backbone.preprocess(MIXED)
    whole = given["input_ids"].shape
    backbone(dict(given))["token_embeddings"].sum().backward()
    assert seen == [whole] and all(weight.grad is not None for weight in backbone.model.layers.parameters())
    with torch.no_grad():
        backbone.train()(dict(given))
        backbone.eval()(dict(given), output_attentions=False)
        square = given["attention_mask"].bool().unsqueeze(1).expand(-1, whole[1], -1)
        backbone({**given, "structured_mask": square})
        backbone.model.config.output_hidden_states = True
        layers = backbone(dict(given))["all_layer_embeddings"]
    assert seen == [whole] * 5 and len(layers) == 3 and layers[0].shape[:2] == whole
    seen.clear()
    backbone.model.config.output_hidden_states = False
    with torch.inference_mode():
        with monkeypatch.context() as among_others:
            among_others.setattr(torch.distributed, "is_initialized", lambda: True)
            backbone(dict(given))
        assert seen == [whole]
        backbone(dict(given))
    assert len(seen) > 2


def test_a_compiled_model_has_one_pass_for_a_batch(llm, group_tokens, passes):
    model = build_model(llm, "mean")
    wanted = model.encode(MIXED)
    seen = passes(model[0].model)
    model.compile(backend="eager")
    np.testing.assert_allclose(model.encode(MIXED), wanted, rtol=0, atol=1e-5)
    assert len(seen) == 1 and isinstance(model[1], Pooling)


def test_positions_that_are_given_go_with_their_rows(llm, group_tokens):
    backbone = LLMBackbone(llm).eval()
    given = backbone.preprocess(MIXED)
    # Far apart in each row by another step: rotary embeddings see distances.
    steps = torch.arange(1, len(MIXED) + 1).unsqueeze(1)
    given["position_ids"] = torch.arange(given["input_ids"].shape[1]) * steps
    real, states = given["attention_mask"].bool(), []
    for tokens in (WHOLE, BUDGET):
        group_tokens(tokens)
        with torch.no_grad():
            states.append(backbone(dict(given))["token_embeddings"][real])
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)


def test_groups_by_hand():
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    groups = [rows.tolist() for rows in rows_by_length(mask, 4)]
    assert groups == [[1], [3, 0], [2]]
    features = {"attention_mask": mask, "ids": torch.arange(20).view(4, 5), "task": "sts", "of_row": torch.arange(4)}
    cut, columns = cut_to_length(features, torch.tensor([3, 0]))
    assert columns == slice(0, 2) and cut["ids"].tolist() == [[15, 16], [0, 1]]
    assert cut["task"] == "sts" and cut["of_row"].tolist() == [3, 0]
    left = {"attention_mask": mask.flip(1), "ids": features["ids"]}
    assert cut_to_length(left, torch.tensor([3, 0]))[0]["ids"].tolist() == [[18, 19], [3, 4]]
    assert cut_to_length(features, torch.tensor([2]))[0]["ids"].tolist() == [[10]]  # an LLM fails on no column
