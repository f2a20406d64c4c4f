"""What is written loads where this package is not, gives the same vectors, and survives strangers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXTS
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model, publish
from st_llm_embed.hub import check, save_sealed, seal
from st_llm_embed.model import RECIPES

STOCK_RECIPES = {"mean", "last-token"}
STRANGER = """
import sys
sys.modules["st_llm_embed"] = None
import json, numpy
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
source, copy, trust, train = sys.argv[1:]
model = SentenceTransformer(source, trust_remote_code=trust == "True", device="cpu")
if train == "True":
    quiet = {"report_to": [], "use_cpu": True}
    args = SentenceTransformerTrainingArguments(copy + "-run", max_steps=2, learning_rate=1e-3, **quiet)
    data = Dataset.from_dict({"anchor": ["a cat", "a dog"] * 4, "positive": ["meow", "woof"] * 4})
    SentenceTransformerTrainer(model, args, data, loss=MultipleNegativesRankingLoss(model)).train()
model.save_pretrained(copy)
texts = json.loads(sys.stdin.read())
numpy.savez(copy + ".npz", **{name: model.encode(texts, prompt=prompt) for name, prompt in model.prompts.items()})
"""


def stranger(source: Path, copy: Path, trust: bool, train: bool = False) -> dict[str, np.ndarray]:
    """Plain sentence-transformers in a process without this package: load, perhaps fine-tune, save again, encode."""
    subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(source), str(copy), str(trust), str(train)],
        input=json.dumps(TEXTS),
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": f"{copy}-modules"},
    )
    with np.load(f"{copy}.npz") as vectors:
        return dict(vectors)


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_generations_without_this_package(llm, tmp_path, recipe):
    model = build_model(llm, recipe)
    model.prompts["docs"] = "Instruct: find it\nQuery: " if not recipe.startswith("llara") else "{text} In one word:"
    first = save_sealed(model, tmp_path / "first")
    stock = recipe in STOCK_RECIPES
    types = [entry["type"] for entry in json.loads((first / "modules.json").read_text())]
    assert all("st_llm_embed" not in name for name in types)
    assert all(name.startswith("sentence_transformers.") for name in types) == stock
    assert bool(list(first.glob("*.py"))) == (not stock)
    copied = stranger(first, tmp_path / "second", trust=not stock)
    assert set(copied) == set(model.prompts)
    for name, vectors in copied.items():
        np.testing.assert_allclose(vectors, model.encode(TEXTS, prompt=model.prompts[name]), atol=1e-5)
    tuned = stranger(tmp_path / "second", tmp_path / "third", trust=not stock, train=True)
    again = stranger(tmp_path / "third", tmp_path / "fourth", trust=not stock)
    for name in model.prompts:
        np.testing.assert_allclose(again[name], tuned[name], atol=1e-5)
        assert np.abs(tuned[name] - copied[name]).max() > 1e-4


@pytest.mark.parametrize("recipe", ["nv-embed", "mean"])
def test_an_adapter_alone_keeps_its_attention_mode(llm, tmp_path, recipe):
    """Its config.json is the base model's, which is causal."""
    model = build_model(llm, recipe)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = save_sealed(model, tmp_path / "adapter")  # compares the vectors
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()


def test_unsealed_needs_the_package_and_sealed_needs_trust(llm, tmp_path):
    model = build_model(llm)
    model.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(subprocess.CalledProcessError):
        stranger(tmp_path / "plain", tmp_path / "copy", trust=True)
    sealed = save_sealed(model, tmp_path / "sealed")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(sealed))


def test_sealing_twice_changes_nothing(llm, tmp_path):
    for recipe in ("nv-embed", "mean"):
        folder = save_sealed(build_model(llm, recipe), tmp_path / recipe)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        seal(folder)
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
        assert not any(str(tmp_path).encode() in content for content in before.values())  # no absolute paths
        config = json.loads(before[folder / "config_sentence_transformers.json"])
        assert set(config["requirements"]) == {"sentence-transformers", "transformers"}


def test_check_notices_other_vectors(llm, tmp_path):
    model = build_model(llm, "mean")
    folder = tmp_path / "model"
    model.save_pretrained(str(folder))
    seal(folder)
    assert check(folder, model) <= 1e-5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": True}))
    with pytest.raises(RuntimeError, match="gives other vectors in a fresh process"):
        check(folder, model)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RuntimeError, match="does not load in a process without 'st_llm_embed'"):
        check(folder, model)


def test_a_full_folder_is_refused_and_an_empty_one_used(llm, tmp_path):
    model = build_model(llm, "mean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder. Choose another"):
        save_sealed(model, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert (save_sealed(model, tmp_path / "empty") / "modules.json").is_file()


def test_a_write_that_fails_leaves_nothing(llm, tmp_path):
    """A real one: the process may not write files over 10 kB, as on a full disk."""
    script = f"""
import resource
from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed
model = build_model({llm!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_sealed(model, {str(tmp_path / "model")!r})
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode != 0 and "File too large" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_invalid_repository_names_are_refused_before_anything_is_written(llm):
    with pytest.raises(ValueError, match="repo_id='my model' is not a valid name such as 'organisation/name'"):
        publish(build_model(llm, "mean"), "my model")
