"""A real Hub on loopback: an upload arrives as a whole or not at all, and loads by its id with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import READER, TOKEN, Repository, card_errors, hub_server, online
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model, publish
from st_llm_embed.hub import save_sealed, seal
from st_llm_embed.hub.publishing import check_uploadable

UPLOADS = f"""
import json, sys
from huggingface_hub import ModelCard
from st_llm_embed.hub.publishing import upload
first, second = sys.argv[1:]
results = {{}}
def attempt(name, call):
    try:
        results[name] = call()
    except Exception as error:
        results[name] = f"{{type(error).__name__}}: {{error}}"
attempt("first", lambda: upload(first, "org/model", private=True))
attempt("again", lambda: upload(second, "org/model"))
attempt("branch", lambda: upload(second, "org/model", revision="v2"))
attempt("branch again", lambda: upload(second, "org/model", revision="v2"))
attempt("proposal", lambda: upload(second, "org/model", create_pr=True))
attempt("reader", lambda: upload(first, "org/other", token="{READER}"))
attempt("wrong", lambda: upload(first, "org/other", token="hf_wrong"))
attempt("nobody", lambda: upload(first, "org/other", token=False))
attempt("broken", lambda: upload(first, "org/broken"))
attempt("broken again", lambda: upload(first, "org/broken"))
attempt("replaced", lambda: upload(second, "org/replaced", exist_ok=True))
attempt("card", lambda: ModelCard.load(first + "/README.md").validate())
print(json.dumps(results))
"""
DOWNLOADS = """
import sys
sys.modules["st_llm_embed"] = None
import json
from sentence_transformers import SentenceTransformer
scratch, token = sys.argv[1:]
results = {}
for name, options in {
    "main": {"token": token}, "v2": {"token": token, "revision": "v2"}, "nobody": {"token": False},
    "stranger": {"token": "hf_wrong"}, "nothing": {"token": token, "revision": "v3"},
}.items():
    try:
        model = SentenceTransformer("org/model", cache_folder=f"{scratch}/{name}", device="cpu", **options)
        results[name] = model.encode(["a cat"]).tolist()
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""
TRAINS = """
import json, sys
from datasets import Dataset
from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, Task, build_model
base, folder = sys.argv[1:]
model = build_model(base, "last-token")
data = {"docs": Dataset.from_dict({"anchor": ["a cat", "a dog"], "positive": ["meow", "woof"]})}
options = {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "org/trained", "hub_private_repo": True}
args = LLMEmbedTrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, save_steps=1, **options)
trainer = LLMEmbedTrainer(model, args, data, tasks=[Task("docs", "Find it")])
trainer.train()
print(json.dumps(trainer.push_to_hub()))
"""


def run(script: str, *arguments: object, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory, llm) -> dict[str, tuple[SentenceTransformer, Path]]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, window in (("first", 32), ("second", 16)):
        model = build_model(llm, "mean", max_seq_length=window)
        model.model_card_data.set_license("apache-2.0")
        with torch.no_grad():
            model[0].model.norm.weight.normal_()
        made[name] = (model, folder / name)
    save_sealed(*made["first"])
    (folder / "first" / "training_args.bin").write_bytes(b"what a trainer leaves is not uploaded")
    made["second"][0].save_pretrained(str(folder / "second"))  # without the check, which takes seconds
    seal(folder / "second")
    return made


@pytest.fixture(scope="module")
def hub(models, tmp_path_factory):
    with hub_server() as server:
        old = Repository(private=False)
        old.commit("main", {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"old"})
        server.repositories["org/replaced"] = old
        server.drop = {("PUT", "/blobs/"): 1, ("POST", "org/broken/commit"): 1}
        folders = [folder for _, folder in models.values()]
        server.uploads = run(UPLOADS, *folders, **online(server, tmp_path_factory.mktemp("home")))
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def test_what_arrives_is_the_folder(hub, models):
    repository = hub.repositories["org/model"]
    first, second = (contents(folder) for _, folder in models.values())
    assert first.pop("training_args.bin")
    assert repository.private and without_attributes(repository.files) == first
    assert hub.uploads["first"] == f"{hub.url}/org/model/commit/{repository.branches['main']}"
    assert without_attributes(repository.commits[repository.branches["v2"]]) == second
    assert without_attributes(repository.commits[repository.branches["refs/pr/1"]]) == second
    assert hub.uploads["proposal"].endswith("/org/model/discussions/1")


def test_what_a_repository_held_does_not_stay(hub, models):
    """An adapter or a shard of an earlier version would be loaded along."""
    repository = hub.repositories["org/replaced"]
    assert without_attributes(repository.files) == contents(models["second"][1])
    assert any("adapter_config.json" in files for files in repository.commits.values())


def test_refusals_name_the_fix(hub):
    assert "FileExistsError: The repository 'org/model' exists and holds" in hub.uploads["again"]
    assert "exist_ok=True (--exist-ok)" in hub.uploads["again"]
    assert "exists and holds" in hub.uploads["branch again"] and "on the branch 'v2'" in hub.uploads["branch again"]
    for name in ("reader", "wrong", "nobody"):
        assert "PermissionError: The Hub does not let this token write to 'org/other'" in hub.uploads[name]
    assert "org/other" not in hub.repositories


def test_a_broken_connection_leaves_nothing_half_written(hub, models):
    assert hub.dropped >= 2  # a file, which the client sends again, and a commit
    assert hub.uploads["broken"].startswith("ConnectionError: The upload to 'org/broken' failed")
    repository = hub.repositories["org/broken"]
    assert list(next(iter(repository.commits.values()))) == [".gitattributes"]
    sent = contents(models["first"][1])
    del sent["training_args.bin"]
    assert without_attributes(repository.files) == sent
    assert len(repository.commits) == 2


@pytest.mark.slow
def test_loading_by_id_with_an_empty_cache(hub, models, tmp_path):
    before = hub.dropped
    hub.drop = {("GET", "/model.safetensors"): 1}
    loaded = run(DOWNLOADS, tmp_path, TOKEN, **online(hub, tmp_path / "home", token=None))
    assert hub.dropped == before + 1  # and the client went on where the connection broke
    for branch, name in (("main", "first"), ("v2", "second")):
        np.testing.assert_allclose(loaded[branch], models[name][0].encode(["a cat"]), atol=1e-5)
    assert np.abs(np.subtract(loaded["main"], loaded["v2"])).max() > 1e-3
    for refused in ("nobody", "stranger", "nothing"):
        assert "Error: " in loaded[refused]


def test_the_card_is_valid_and_its_plain_snippet_true(hub, models, tmp_path):
    model, folder = models["first"]
    card = (folder / "README.md").read_text()
    assert hub.uploads["card"] is None  # huggingface_hub's own validation, by the Hub's endpoint
    assert card_errors(card) == [] and card_errors(card.replace("apache-2.0", "anything")) != []
    assert "license: apache-2.0" in card and "| attention | bidirectional" in card
    snippet = card.partition("Without sentence-transformers:")[2].split("```")[1].removeprefix("python")
    snippet = snippet.replace("sentence_transformers_model_id", str(folder))
    names: dict[str, object] = {}
    exec(snippet, names)
    texts = ["how do I parse command line arguments?", "argparse: command-line parsing library"]
    np.testing.assert_allclose(names["embeddings"].numpy(), model.encode(texts), atol=1e-5)


def test_publishing_an_adapter_is_a_choice(llm, tmp_path):
    model = build_model(llm, "last-token")
    with pytest.raises(ValueError, match="adapter='merge', but the model has no adapter"):
        publish(model, "org/name", adapter="merge")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(ValueError, match="Choose adapter='merge' .* or adapter='only'"):
        publish(model, "org/name")
    with pytest.raises(ValueError, match="adapter='both' is unknown. Valid values: merge, only"):
        publish(model, "org/name", adapter="both")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="The adapter's base is .*tiny-llama', a folder of this machine"):
        check_uploadable(tmp_path / "adapter")


def test_what_cannot_be_published_is_refused_at_once(llm, tmp_path):
    model = build_model(llm, "mean")
    with pytest.raises(ValueError, match="repo_id='my model' is not a valid name such as 'organisation/name'"):
        publish(model, "my model")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(51_000_000_000)  # of no blocks
    with pytest.raises(ValueError, match="files of at most 50 GB, and {'model.safetensors': 51000000000} are larger"):
        check_uploadable(tmp_path)
    model[0].model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="The model is quantised"):
        save_sealed(model, tmp_path / "quantised")
    with pytest.raises(ValueError, match="are on the meta device: there is nothing to save"):
        save_sealed(build_model(llm, "mean").to("meta"), tmp_path / "meta")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.slow
def test_the_command_publishes_what_its_folder_holds(hub, models, tmp_path):
    environment = {**os.environ, **online(hub, tmp_path)}
    command = [sys.executable, "-m", "st_llm_embed", "publish", str(models["first"][1]), "org/by-command"]
    command += ["--private", "--license", "mit"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    published = hub.repositories["org/by-command"]
    assert done.stdout.strip() == f"Published: {hub.url}/org/by-command/commit/{published.branches['main']}"
    assert published.private and "names no licence" not in done.stderr
    assert published.files["model.safetensors"] == (models["first"][1] / "model.safetensors").read_bytes()
    card = published.files["README.md"].decode()
    assert 'SentenceTransformer("org/by-command")' in card and card.count("## What this is") == 1
    command = [sys.executable, "-m", "st_llm_embed", "check", "org/by-command"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "The embeddings are the expected ones" in done.stdout, done.stderr[-3000:]
    assert "license: mit" in card and "sentence_transformers_model_id" not in card and card_errors(card) == []


@pytest.mark.slow
def test_the_trainer_publishes_what_loads_anywhere(hub, llm, tmp_path):
    url = run(TRAINS, llm, tmp_path / "run", **online(hub, tmp_path / "home"))
    published = hub.repositories["org/trained"]
    assert published.private and url == f"{hub.url}/org/trained/commit/{published.branches['main']}"
    assert "st_llm_embed" not in published.files["modules.json"].decode() and "reference.json" in published.files
    assert len(published.commits) == 2  # nothing was uploaded on the way
    assert not any("training_args" in path or "checkpoint" in path for path in published.files)
