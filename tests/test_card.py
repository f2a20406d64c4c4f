"""The card says what the model is: read off the model, not off the recipe's name."""

from __future__ import annotations

import shutil

import pytest
from conftest import save_llm, train_tokenizer
from hub_server import card_errors
from huggingface_hub import metadata_load
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model_card import generate_model_card
from tokenizers.processors import TemplateProcessing

from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed, seal
from st_llm_embed.hub.card import describe, finish_card, inherit_license

WORDS = {
    "nv-embed": ["2405.17428", "| attention | bidirectional", "latent attention (512 latents, 8 heads)"],
    "llara": ["2312.15503", "| attention | causal", "'{text} The next sentence:'` | `model.encode_query(texts)`"],
    "llara-release": ["2312.15503", "its released code", "last 8 tokens", "nothing is added"],
    "mean": ["with bidirectional attention", "the mean over all tokens", "AutoModel", "Texts get no prompt"],
    "last-token": ["with causal attention", "| pooling | the last token |", "AutoModel", "the token `</s>`"],
}


@pytest.mark.parametrize("recipe", WORDS)
def test_the_card_says_what_the_model_is(llm, recipe, tmp_path):
    has_code = recipe not in ("mean", "last-token")
    model = build_model(llm, recipe)
    model.save_pretrained(str(tmp_path))
    seal(tmp_path)
    text = describe(model, has_code, tmp_path)
    assert all(words in text for words in WORDS[recipe]), text
    assert ("trust_remote_code=True" in text) == has_code and ("AutoModel" in text) != has_code
    assert "An LLM turned into a text-embedding model" in text and "32 dimensions, length 1" in text
    assert ("pip install --no-deps st-llm-embed" in text) == has_code, "vLLM's plugin"
    assert ("| TEI | refuses it |" in text) == has_code == ("| llama.cpp | refuses it |" in text)


def test_the_licence_is_the_bases_unless_it_is_given(llm, tmp_path):
    base = shutil.copytree(llm, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    model = build_model(base, "mean")
    inherit_license(model)
    assert model.model_card_data.license == "apache-2.0"
    model.model_card_data.set_license("mit")
    inherit_license(model)
    assert model.model_card_data.license == "mit"
    plain = build_model(llm, "mean")
    inherit_license(plain)
    assert plain.model_card_data.license is None


@pytest.mark.parametrize("metadata", ["license:\tmit", "license: [mit", "license: mit: x", "- a\n- b"])
def test_a_card_that_cannot_be_read(llm, tmp_path, caplog, metadata):
    broken = f"---\n{metadata}\n---\n# A model\n"
    base = shutil.copytree(llm, tmp_path / "base")
    (base / "README.md").write_text(broken)
    model = build_model(base, "mean")
    inherit_license(model)
    assert model.model_card_data.license is None
    file = tmp_path / "README.md"
    file.write_text(broken)
    finish_card(file, model, "", has_code=False)
    assert "has metadata that cannot be read" in caplog.text
    assert metadata_load(file)["pipeline_tag"] == "sentence-similarity" and "## What this is" in file.read_text()


def test_prompts_of_any_characters_fit_into_the_cards_table(llm, tmp_path):
    model = build_model(llm, "last-token")
    model.prompts = {"query": "a|b `c` ``d`` ", "q/é \n|": "{not} x {", "document": ""}
    lines = describe(model, False, tmp_path).splitlines()
    rows = [line for line in lines if "encode" in line and line.startswith("| `")]
    assert rows == [
        "| `query` | ``` 'a\\|b `c` ``d`` ' ``` | `model.encode_query(texts)` |",
        "| `q/é \\n\\|` | `'{not} x {'` | `model.encode(texts, prompt_name=\"q/é \\n\\|\")` |",
    ]


def test_a_card_names_the_token_that_its_tokenizer_ends_texts_with(llm, tmp_path):
    tokenizer = train_tokenizer()
    ends = TemplateProcessing(single="$A <unk>", special_tokens=[("<unk>", 0)])
    tokenizer.backend_tokenizer.post_processor = ends
    model = build_model(save_llm(tmp_path, tokenizer=tokenizer), "mean")
    assert "the token `<unk>`" in describe(model, False, tmp_path)


def test_a_card_is_finished_once_and_keeps_its_other_parts(llm, tmp_path):
    model = build_model(llm, "nv-embed")
    model.model_card_data.set_license("mit")
    file = tmp_path / "README.md"
    file.write_text(generate_model_card(model))
    finish_card(file, model, "## Results\n\nGood.", has_code=True)
    once = file.read_text()
    finish_card(file, model, "## Results\n\nGood.", has_code=True)
    assert file.read_text() == once and once.count("## Results") == once.count("## What this is") == 1
    assert once.count(", trust_remote_code=True)") == 2 and card_errors(once) == []
    model.model_card_data.set_license("apache-2.0")
    model.model_card_data.language = ["en"]
    finish_card(file, model, "", has_code=True)
    stated = metadata_load(file)
    assert stated["license"] == "apache-2.0" and stated["language"] == ["en"] and "Good." in file.read_text()


def test_a_model_of_a_class_of_ones_own_has_the_hosts_line(llm, tmp_path):
    class Own(SentenceTransformer):
        pass

    folder = save_sealed(Own(modules=list(build_model(llm, "mean"))), tmp_path / "sealed")
    assert 'model = SentenceTransformer("' in (folder / "README.md").read_text()
