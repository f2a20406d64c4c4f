"""A published model notices at loading that something between its files and its vectors has changed, and says what."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed
from st_llm_embed.modules.reference import take_reference

MESSAGE = "does not give the embeddings that it gave when it was published"


@pytest.fixture(scope="module")
def sealed(llm, tmp_path_factory) -> tuple[SentenceTransformer, Path]:
    model = build_model(llm)
    model.prompts["query"] = "Instruct: find it\nQuery: "
    return model, save_sealed(model, tmp_path_factory.mktemp("sealed") / "model")


def edit(file: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return act


def lose_eos(folder: Path) -> None:
    def drop(tokenizer: dict) -> None:
        template = tokenizer["post_processor"]
        template["single"] = [part for part in template["single"] if part.get("SpecialToken", {}).get("id") != "</s>"]

    edit("sentence_bert_config.json", lambda settings: settings.update(add_eos=False))(folder)
    edit("tokenizer.json", drop)(folder)


def alter_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"] = -weights["norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def causal(folder: Path) -> None:
    edit("sentence_bert_config.json", lambda settings: settings.update(attention="causal", window="keep"))(folder)


CHANGES = {
    "EOS: the token 2 no longer ends a text": lose_eos,
    "tokenizer: 'Café  №1' was": edit(
        "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"})
    ),
    "prompt: 'query' gives other tokens": edit("reference.json", lambda kept: kept["token_ids"]["query"].pop()),
    "mask: bidirectional then, causal now": causal,
    "dtype: float32 then, bfloat16 now": edit(
        "config.json", lambda config: config["backbone_config"].update(dtype="bfloat16")
    ),
    "embedding: differs by": alter_weights,
}


def load(folder: Path, **options) -> tuple[SentenceTransformer, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)
    return model, [str(warning.message) for warning in caught if MESSAGE in str(warning.message)]


def test_an_unchanged_model_says_nothing(sealed):
    model, folder = sealed
    precisions = [{key: value} for key in ("dtype", "torch_dtype") for value in ("bfloat16", torch.float16, None)]
    chosen = [{"model_kwargs": precision} for precision in precisions]
    for options in ({}, *chosen, {"truncate_dim": 8}, {"prompts": {"query": "Q: "}}):
        loaded, said = load(folder, **options)
        assert said == [], options
    assert np.isfinite(loaded.encode(TEXTS)).all()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_says_what_differs(sealed, tmp_path, change):
    folder = shutil.copytree(sealed[1], tmp_path / "model")
    CHANGES[change](folder)
    edit("reference.json", lambda kept: kept["versions"].update(transformers="5.2.0"))(folder)
    model, said = load(folder)
    assert len(said) == 1 and f"published. {change}" in said[0]
    assert "versions: transformers 5.2.0 then" in said[0]
    assert np.isfinite(model.encode(TEXTS)).all()


def test_other_versions_alone_and_a_broken_file_cost_nothing(sealed, tmp_path, caplog):
    folder = shutil.copytree(sealed[1], tmp_path / "model")
    edit("reference.json", lambda kept: kept["versions"].update(transformers="5.2.0"))(folder)
    assert load(folder)[1] == []
    (folder / "reference.json").write_text('{"texts": [')
    with caplog.at_level(logging.WARNING):
        model, said = load(folder)
    assert said == [] and "could not be compared with its reference.json" in caplog.text
    np.testing.assert_allclose(model.encode(TEXTS), sealed[0].encode(TEXTS), atol=1e-5)


def test_a_model_that_was_saved_again_carries_no_stale_reference(sealed, tmp_path):
    loaded, _ = load(sealed[1])
    with torch.no_grad():
        loaded[0].model.norm.weight.neg_()
    loaded.save_pretrained(str(tmp_path / "tuned"))
    assert not (tmp_path / "tuned" / "reference.json").exists()
    assert load(tmp_path / "tuned")[1] == []


def test_loading_in_inference_mode(sealed):
    with torch.inference_mode():
        loaded, said = load(sealed[1])
        inside = loaded.encode(TEXTS)
    assert said == []
    for found in (inside, loaded.encode(TEXTS)):
        np.testing.assert_allclose(found, sealed[0].encode(TEXTS), atol=1e-5)


def test_the_reference_is_what_encode_gives(sealed):
    model, folder = sealed
    kept = json.loads((folder / "reference.json").read_text())
    for name, vectors in kept["embeddings"].items():
        np.testing.assert_allclose(vectors, model.encode(kept["texts"], prompt=model.prompts[name]), atol=1e-6)
    assert (
        kept["token_ids"]["query"]
        == model.preprocess(kept["texts"][:1], prompt=model.prompts["query"])["input_ids"][0].tolist()
    )
    assert kept["bidirectional"] and kept["dtype"] == "float32"
    assert not take_reference(build_model(model[0].model.config._name_or_path, "llara"))["bidirectional"]
