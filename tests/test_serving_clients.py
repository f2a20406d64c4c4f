"""What stands between a model and its users: the right line of each client gives the model's vectors."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import save_llm, train_tokenizer
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from examples.serving import clients, gguf_model
from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed

REPOSITORY = Path(__file__).parents[1]
CLIENTS = Path(os.environ.get("CLIENTS_VENV", REPOSITORY / ".venv-clients"))
HERE = ("lancedb", "mteb", "truncate_dim")  # which the environment of the tests has


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    llm = save_llm(root / "llm")
    for recipe in ("mean", "nv-embed"):
        model = build_model(llm, recipe, max_seq_length=64)
        model.prompts.update({"query": "Instruct: Find it\nQuery: ", "document": "passage: "})
        save_sealed(model, root / recipe)
    return {recipe: str(root / recipe) for recipe in ("mean", "nv-embed")}


@pytest.mark.parametrize("recipe", ["mean", "nv-embed"])
@pytest.mark.parametrize("name", HERE)
def test_the_right_line_is_right(folders, recipe, name):
    if name != "truncate_dim":
        pytest.importorskip(name)
    model = SentenceTransformer(folders[recipe], trust_remote_code=True)
    expected = model.encode_query(clients.QUERIES), model.encode_document(clients.DOCUMENTS)
    right, (default,) = clients.CLIENTS[name]
    assert max(clients.differences(right(folders[recipe]), expected)) < clients.ALIKE
    if name == "mteb":
        with pytest.raises(NotImplementedError):
            default(folders[recipe])
    else:
        assert min(clients.differences(default(folders[recipe]), expected)) > 1e-3  # as the guide says


@pytest.mark.slow
@pytest.mark.skipif(not CLIENTS.is_dir(), reason=f"no clients at {CLIENTS}: run examples/serving/clients.sh, 2.7 GB")
def test_every_client_is_right_in_its_own_environment(folders):
    for recipe, folder in folders.items():
        command = ["bash", str(REPOSITORY / "examples" / "serving" / "clients.sh"), folder]
        environment = {**os.environ, "VENV": str(CLIENTS)}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        rows = dict(re.findall(r"^\| \w+ \| (\w+) \| (.*) \|$", done.stdout, re.MULTILINE))
        assert rows.keys() == {way.__name__ for right, others in clients.CLIENTS.values() for way in (right, *others)}
        # By path txtai takes the LLM by itself, and pools its mean: the folder makes it refuse.
        assert ("refused" in rows["txtai_default"]) == (recipe == "nv-embed")


@pytest.mark.parametrize("byte_level", [True, False])
def test_a_folder_is_made_ready_for_llama_cpps_converter(tmp_path, byte_level):
    """The tokenizer without the EOS that was added is the base's, by which the converter knows it."""
    tokenizer = train_tokenizer(byte_level)
    model = build_model(save_llm(tmp_path / "llm", tokenizer=tokenizer), "mean", max_seq_length=64)
    save_sealed(model, tmp_path / "model")
    gguf_model.prepare(str(tmp_path / "model"), str(tmp_path / "ready"))
    ready = AutoTokenizer.from_pretrained(tmp_path / "ready")
    text = "seven dogs  were barking\n at 33 moons"
    assert ready(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert model.tokenizer(text)["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    config = json.loads((tmp_path / "ready" / "tokenizer_config.json").read_text())
    assert config["add_eos_token"] is True and not (tmp_path / "ready" / "chat_template.jinja").exists()
    assert gguf_model.pooling_of(tmp_path / "ready") == 1


def test_what_llama_cpp_cannot_pool_is_refused(folders, tmp_path):
    with pytest.raises(
        SystemExit, match="latent_attention_pooling.LatentAttentionPooling.*takes an LLM, a pooling of"
    ):
        gguf_model.prepare(folders["nv-embed"], str(tmp_path / "ready"))
    llm = save_llm(tmp_path / "llm")
    save_sealed(build_model(llm, "weightedmean"), tmp_path / "weighted")
    with pytest.raises(SystemExit, match="pooling_mode='weightedmean'.*mean, cls, lasttoken"):
        gguf_model.prepare(str(tmp_path / "weighted"), str(tmp_path / "ready"))
    assert not (tmp_path / "ready").exists()


def test_what_plain_sentence_transformers_saves_has_no_reference_and_stock_no_requirements(folders, tmp_path):
    """As the guide says of a model that somebody trained further."""
    for recipe, folder in folders.items():
        saved = tmp_path / recipe
        SentenceTransformer(folder, trust_remote_code=True).save_pretrained(str(saved))
        assert (Path(folder) / "reference.json").is_file() and not (saved / "reference.json").exists()
        kept = json.loads((saved / "config_sentence_transformers.json").read_text()).get("requirements")
        assert bool(kept) == (recipe == "nv-embed")
        again = SentenceTransformer(str(saved), trust_remote_code=True).encode_query(clients.QUERIES)
        whole = SentenceTransformer(folder, trust_remote_code=True).encode_query(clients.QUERIES)
        np.testing.assert_allclose(again, whole, atol=1e-6)
