"""build_model: plain SentenceTransformers that encode anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DENSE
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from st_llm_embed import LatentAttentionPooling, LLMBackbone, build_model
from st_llm_embed.recipes import RECIPES
from st_llm_embed.training import train_stages

TEXTS = ["", "a cat", "日本語 🐈 ñandú", "word " * 2000, "a cat"]


@pytest.mark.parametrize("recipe", DENSE)
def test_every_recipe_encodes_anything(llm, recipe):
    model = build_model(llm, recipe)
    assert type(model) is SentenceTransformer and model.get_embedding_dimension() == 32
    vectors = model.encode(TEXTS)
    assert vectors.shape == (5, 32) and np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[1], vectors[4], atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    np.testing.assert_allclose(model.encode(""), vectors[0], atol=1e-5)
    np.testing.assert_allclose(model.encode(["a cat"])[0], vectors[1], atol=1e-5)
    assert np.isfinite(model.encode_query(TEXTS)).all() and np.isfinite(model.encode_document(TEXTS)).all()


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - set(DENSE)))
def test_recipes_of_other_vectors_encode_anything(llm, recipe):
    """Alone, in a batch, padded on either side: the same rows of a token's or a vocabulary's numbers."""
    model = build_model(llm, recipe)
    found = [torch.atleast_2d(one.to_dense()) for one in model.encode(TEXTS)]
    assert {one.shape[-1] for one in found} == {model.get_embedding_dimension()}
    assert all(one.isfinite().all() and len(one) for one in found)
    torch.testing.assert_close(found[1], found[4], atol=1e-5, rtol=0)
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        for text, one in zip(TEXTS, found, strict=True):
            torch.testing.assert_close(torch.atleast_2d(model.encode(text).to_dense()), one, atol=1e-4, rtol=0)
    assert len(model.encode_query(TEXTS)) == len(model.encode_document(TEXTS)) == len(TEXTS)


def test_modules_composed_by_hand_are_the_recipe(llm):
    torch.manual_seed(3)
    built = build_model(llm, "nv-embed", num_latents=7)
    torch.manual_seed(3)
    backbone = LLMBackbone(llm, attention="bidirectional")
    by_hand = SentenceTransformer(modules=[backbone, LatentAttentionPooling(32, num_latents=7), Normalize()])
    np.testing.assert_allclose(built.encode(TEXTS), by_hand.encode(TEXTS), atol=1e-6)


def test_overrides_reach_the_part_they_name(llm):
    model = build_model(llm, num_latents=5, head_dim=3, attention="causal", num_layers=1, max_seq_length=9)
    assert (model[1].num_latents, model[1].head_dim, model[0].attention) == (5, 3, "causal")
    assert model[0].config.num_hidden_layers == 1 and model.max_seq_length == 9
    half = build_model(llm, model_kwargs={"dtype": torch.bfloat16})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and np.isfinite(half.encode(TEXTS)).all()


def test_llara_reads_queries_and_documents_under_different_prompts(llm):
    model = build_model(llm, "llara")
    query, document, similarity = model.encode_query("a cat"), model.encode_document("a cat"), model.encode("a cat")
    np.testing.assert_allclose(document, similarity, atol=1e-6)
    assert np.abs(query - document).max() > 1e-3
    suffix = " The next sentence:"
    ids = model.preprocess(["a cat"], prompt=model.prompts["query"])["input_ids"][0]
    assert model.tokenizer.decode(ids) == f"<s>a cat{suffix}</s>"


def test_bad_arguments_are_named_with_the_valid_ones(llm, tmp_path):
    with pytest.raises(
        ValueError,
        match="recipe='nvembed' is unknown. Valid recipes: nv-embed, llara, llara-release, mean, last-token",
    ):
        build_model(llm, "nvembed")
    with pytest.raises(
        ValueError, match=r"unknown arguments \['latents'\].*LatentAttentionPooling takes.*num_latents"
    ):
        build_model(llm, latents=3)
    with pytest.raises(ValueError, match=r"unknown arguments \['kwargs', 'model_name_or_path'\]"):
        build_model(llm, kwargs={}, model_name_or_path="other")
    with pytest.raises(ValueError, match="base='no/such-model' could not be loaded. Give the Hub id"):
        build_model("no/such-model")
    with pytest.raises(ValueError, match=r"could not be loaded.*has no config.json"):
        build_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        build_model(tmp_path / "missing.gguf")


def test_a_trained_model_is_no_base_but_its_llm_is(llm, tmp_path):
    """Only its LLM would be taken, and the pooling and prompts that were trained with it replaced without a word."""
    trained = build_model(llm, "nv-embed", num_latents=4)
    trained.save_pretrained(str(tmp_path / "trained"))
    stock = SentenceTransformer(modules=[Transformer(llm), Pooling(32, "lasttoken")])  # as Qwen3-Embedding is
    stock.save_pretrained(str(tmp_path / "stock"))
    adapted = build_model(llm, "llara", lora=True)
    adapted.save_pretrained(str(tmp_path / "adapted"))
    for name in ("trained", "stock", "adapted"):
        with pytest.raises(ValueError, match=rf"{name}' is a model of sentence-transformers: .*its prompts"):
            build_model(tmp_path / name, "mean")
        # As the message says.
        model = SentenceTransformer(str(tmp_path / name), trust_remote_code=True)
        model[0].model.save_pretrained(tmp_path / f"{name}-llm")
        model.tokenizer.save_pretrained(tmp_path / f"{name}-llm")
        again = build_model(tmp_path / f"{name}-llm", "mean")
        np.testing.assert_allclose(again.encode(TEXTS), build_model(llm, "mean").encode(TEXTS), atol=1e-6)
    Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]}).to_json(tmp_path / "rows.jsonl")
    config = {
        "output": str(tmp_path / "run"),
        "model": {"base": str(tmp_path / "trained"), "recipe": "mean"},
        "data": {"rows": {"read": "from_columns", "source": str(tmp_path / "rows.jsonl"), "instruction": "Find it"}},
        "stages": [{"name": "first", "data": ["rows"], "arguments": {"max_steps": 1, "use_cpu": True}}],
    }
    with pytest.raises(ValueError, match="is a model of sentence-transformers: .*in a configuration, model: {load: "):
        train_stages(config)
    assert not (tmp_path / "run").exists()


def test_a_trained_model_on_the_hub_is_no_base(llm, tmp_path):
    folder = tmp_path / "models--org--model"  # as it lies in the Hub's cache
    build_model(llm, "last-token").save_pretrained(str(folder / "snapshots" / "0123"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123")
    with pytest.raises(ValueError, match="base='org/model' is a model of sentence-transformers"):
        build_model("org/model", "mean", model_kwargs={"cache_dir": str(tmp_path)})


@pytest.mark.parametrize(("recipe", "rank", "scale"), [("nv-embed", 16, 32), ("llara", 64, 16)])
def test_a_recipes_lora_trains_seven_linears_and_what_the_recipe_adds(llm, recipe, rank, scale):
    model = build_model(llm, recipe, lora=True)
    config = model[0].model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, scale, 0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    linears = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name for name, _ in model[1].named_parameters(prefix="1")} <= trained
    assert all(".lora_" in name or name.startswith("1.") for name in trained)


def test_a_recipe_without_lora_says_so(llm):
    with pytest.raises(ValueError, match="recipe='mean' names no LoRA; nv-embed, llara, llara-release do"):
        build_model(llm, "mean", lora=True)
