"""Recipes that are an entry of the table alone, against the formulas of their papers."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed

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
