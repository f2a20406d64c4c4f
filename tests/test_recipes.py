"""Recipes that are an entry of the table alone, against the formulas of their papers."""

from __future__ import annotations

import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed
from st_llm_embed.recipes import RECIPES, Recipe

TEXTS = ["the cat sat on the mat", "dogs", "seven dogs were barking at the moon"]


@pytest.mark.parametrize("prompt", [None, "Instruct: find it\nQuery: "])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_weightedmean_is_sgpts_formula(llm, prompt, include_prompt):
    """v = Σ i h_i / Σ i, i from 1 (SGPT, equation 2), of a causal LLM; a prompt that is left out has no weight."""
    model = build_model(llm, "weightedmean", include_prompt=include_prompt)
    assert model.transformers_model.config.is_causal
    for text, embedding in zip(TEXTS, model.encode(TEXTS, prompt=prompt, convert_to_tensor=True), strict=True):
        features = model[0](model.preprocess([text], prompt=prompt))
        states = features["token_embeddings"][0]  # (seq, dim)
        position = torch.arange(1, len(states) + 1).unsqueeze(1).float()
        if prompt and not include_prompt:
            position = position * (1 - features["instruction_mask"][0].unsqueeze(1))
        expected = torch.nn.functional.normalize((position * states).sum(dim=0) / position.sum(), dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)


def test_weightedmean_is_published_as_a_stock_model(llm, tmp_path):
    model = build_model(llm, "weightedmean")
    save_sealed(model, tmp_path / "model")
    stock = SentenceTransformer(str(tmp_path / "model"))  # no code of its own
    torch.testing.assert_close(
        stock.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True), atol=1e-6, rtol=0
    )


MAX_POOLING = """
import torch
from sentence_transformers.base.modules import Module


class MaxPooling(Module):
    config_keys = ["embedding_dimension"]

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__()
        self.embedding_dimension = embedding_dimension

    def forward(self, features, **kwargs):
        kept = features["attention_mask"] - features.get("instruction_mask", 0)
        states = features["token_embeddings"].masked_fill(kept.unsqueeze(-1) == 0, -torch.inf)
        features["sentence_embedding"] = states.amax(dim=1)
        return features

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path, *args, **kwargs) -> None:
        self.save_config(output_path)
"""


def test_a_pooling_of_ones_own_is_a_recipe_and_is_published(llm, tmp_path, monkeypatch):
    """As CONTRIBUTING says it: from a file of its own, without a change of this package."""
    (tmp_path / "own_max_pooling.py").write_text(MAX_POOLING)
    monkeypatch.syspath_prepend(tmp_path)
    from own_max_pooling import MaxPooling

    monkeypatch.setitem(RECIPES, "mine", Recipe(pooling=MaxPooling))
    model = build_model(llm, "mine")
    prompt = "Instruct: find it\nQuery: "
    features = model[0](model.preprocess(TEXTS[:1], prompt=prompt))
    text = features["token_embeddings"][0, features["instruction_mask"][0].sum() :]
    expected = torch.nn.functional.normalize(text.amax(dim=0), dim=0)
    torch.testing.assert_close(model.encode(TEXTS[0], prompt=prompt, convert_to_tensor=True), expected)
    folder = save_sealed(model, tmp_path / "model")
    assert (folder / "own_max_pooling.py").is_file()
    monkeypatch.setitem(sys.modules, "own_max_pooling", None)
    again = SentenceTransformer(str(folder), trust_remote_code=True)
    torch.testing.assert_close(
        again.encode(TEXTS, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True), atol=1e-6, rtol=0
    )
