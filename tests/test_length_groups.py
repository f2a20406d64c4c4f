"""Texts of all columns in groups of like length: the embeddings and gradients of columns one by one, less padding."""

from __future__ import annotations

import pytest
import torch
from conftest import CORPUS
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llm_embed import build_model
from st_llm_embed.losses.length_groups import embed_by_length

PROMPT = "Instruct: Given a question\nQuery: "
COLUMNS = [
    ["the cat", CORPUS[2], "a fox jumped over them", "sum"],
    ["a dog", "a list", CORPUS[3], "at the moon"],
    ["", "empty", CORPUS[2], "the fox"],
]


def columns_of(model, prompt=PROMPT):
    return [model.preprocess(texts, prompt=prompt if place == 0 else None) for place, texts in enumerate(COLUMNS)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("recipe", ["nv-embed", "llara", "mean", "mean of the text"])
def test_embeddings_and_gradients_are_those_of_the_columns(llm, recipe, side):
    chosen = {"nv-embed": {"num_latents": 4, "head_dim": 8}, "mean of the text": {"include_prompt": False}}
    model = build_model(llm, recipe.removesuffix(" of the text"), **chosen.get(recipe, {})).double()
    model.tokenizer.padding_side = side
    seen = []
    model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["input_ids"].numel()))
    found, wanted = (
        embed(columns_of(model, "{text} The next sentence:" if recipe == "llara" else PROMPT))
        for embed in (
            lambda columns: embed_by_length(model, columns),
            lambda columns: [model(features)["sentence_embedding"] for features in columns],
        )
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert len(seen) == 6 and sum(seen[:3]) < 0.8 * sum(seen[3:])
    weights = [torch.randn_like(column) for column in wanted]
    gradients = []
    for columns in (found, wanted):
        model.zero_grad()
        sum((column * weight).sum() for column, weight in zip(columns, weights, strict=True)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-9)


def test_what_cannot_be_put_together_goes_column_by_column(llm):
    model = SentenceTransformer(modules=[Transformer(llm), Pooling(32)])
    model.tokenizer.pad_token = model.tokenizer.eos_token
    model.set_pooling_include_prompt(False)
    found = embed_by_length(model, columns_of(model))
    wanted = [model(features)["sentence_embedding"] for features in columns_of(model)]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    model.set_pooling_include_prompt(True)
    assert not torch.allclose(embed_by_length(model, columns_of(model))[0], wanted[0])
