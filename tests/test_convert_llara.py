"""LLaRA checkpoints: the original's embeddings, whatever files the weights come in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_llm, train_tokenizer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_llm_embed.cli import main
from st_llm_embed.convert import convert_llara
from st_llm_embed.hub import check
from st_llm_embed.recipes import RELEASE_TOKENS


def checkpoint(folder: Path, files: str = "one") -> Path:
    """A random model in the layout of BAAI/LLARA-pretrain: an untied causal LM with sixteen added tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(byte_level=False)
    tokenizer.add_tokens(RELEASE_TOKENS, special_tokens=True)
    save_llm(folder, tokenizer=tokenizer, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    if files == "one":
        return folder
    (folder / "model.safetensors").unlink()
    kind = "bin" if files == "pickles" else "safetensors"
    stem = "pytorch_model" if files == "pickles" else "model"
    parts: dict[str, dict] = {}
    for i, (name, tensor) in enumerate(sorted(weights.items())):
        parts.setdefault(f"{stem}-{i % 2 + 1:05d}-of-00002.{kind}", {})[name] = tensor
    for file, part in parts.items():
        if files == "pickles":
            part["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old versions saved it
        (torch.save if files == "pickles" else save_file)(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    single = "pytorch_model.bin" if files == "pickles" else "model.safetensors"
    (folder / f"{single}.index.json").write_text(json.dumps(index))
    return folder


def test_equals_the_original(shared, tmp_path):
    """Embeddings and scores that the released code gave for queries and passages."""
    source = shared / "fixtures" / "llara_tiny"
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    model = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True)
    expected = json.loads((source / "finetune_expected.json").read_text())
    stored = load_file(source / "finetune_expected.safetensors")
    model[0].query_length, model[0].document_length = expected["query_max_len"], expected["passage_max_len"]
    queries = model.encode_query([row["query"] for row in expected["rows"]], convert_to_tensor=True)
    texts = [text for row in expected["rows"] for text in (*row["pos"], *row["neg"])]
    passages = model.encode_document(texts, convert_to_tensor=True)
    torch.testing.assert_close(queries, stored["query.reps"], atol=2e-6, rtol=0)
    torch.testing.assert_close(passages, stored["passage.reps"], atol=2e-6, rtol=0)
    scores = queries @ passages.T / expected["temperature"]
    torch.testing.assert_close(scores, stored["scores"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("files", ["one", "two", "pickles"])
def test_weights_in_any_files(tmp_path, files):
    """The folder is a model that loads without this package, with the same weights but for the LM head."""
    source = checkpoint(tmp_path / "source", files)
    whole = checkpoint(tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    folder = convert_llara(source, tmp_path / "out")
    assert not list(folder.glob("*.bin")) and len(list(folder.glob("model*.safetensors"))) == 1 + (files != "one")
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    assert check(folder, model).difference <= 1e-5
    assert model.tokenizer.padding_side == "left" and model.default_prompt_name == "similarity"
    written = {}
    for file in folder.glob("model*.safetensors"):
        written |= load_file(file)
    assert set(weights) - set(written) == {"lm_head.weight"}
    for name, tensor in written.items():
        assert torch.equal(tensor, weights[name])
    assert model.tokenizer("a cat")["input_ids"][-1] != model.tokenizer.eos_token_id


def test_what_is_not_llara_is_refused_before_anything_is_written(tmp_path, capsys):
    good = checkpoint(tmp_path / "good")
    plain = save_llm(tmp_path / "plain")
    other = Path(shutil.copytree(good, tmp_path / "other"))
    save_file(load_file(good / "model.safetensors") | {"score.weight": torch.ones(2)}, other / "model.safetensors")
    bare = Path(shutil.copytree(good, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    for source, message in (
        (plain, r"lacks <s10>, .* so it is no LLaRA checkpoint. Make one of an ordinary LLM with build_model\("),
        (other, "unknown tensors: score.weight"),
        (bare, "has neither model.safetensors nor pytorch_model.bin"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_llara(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_the_card_keeps_the_licence(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama2\n---\n# LLaRA")
    card = (convert_llara(source, tmp_path / "out") / "README.md").read_text()
    assert "license: llama2" in card and "The weights of source, unchanged" in card
    assert str(tmp_path) not in card
