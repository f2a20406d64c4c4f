"""What is written loads where this package is not, gives the same vectors, and survives strangers."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TEXTS, save_llm
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.hub import check, save_sealed, seal
from st_llm_embed.trust import code_in, load_trusted
from st_llm_embed.weights.merging import merge_adapter

LOAD = """
import sys
sys.modules["st_llm_embed"] = None
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], trust_remote_code=True)
"""


def test_an_adapter_alone_keeps_its_attention_mode(llm, tmp_path):
    """Its config.json is the base model's, which is causal."""
    model = build_model(llm, "mean")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = save_sealed(model, tmp_path / "adapter")  # compares the vectors
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()


def test_unsealed_needs_the_package_and_sealed_needs_trust(llm, tmp_path):
    folder = str(tmp_path / "model")
    build_model(llm).save_pretrained(folder)
    loaded = subprocess.run([sys.executable, "-I", "-c", LOAD, folder], capture_output=True, text=True)
    assert loaded.returncode and "No module named 'st_llm_embed.modules'" in loaded.stderr
    seal(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(tmp_path / "model"))


@pytest.mark.parametrize("recipe", ["nv-embed", "mean"])
def test_sealing_twice_changes_nothing(llm, tmp_path, recipe):
    folder = tmp_path / recipe
    build_model(llm, recipe).save_pretrained(str(folder))
    seal(folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    seal(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not any(str(tmp_path).encode() in content for content in before.values())  # no absolute paths
    config = json.loads(before[folder / "config_sentence_transformers.json"])
    assert set(config["requirements"]) == {"sentence-transformers", "transformers"}


@pytest.mark.parametrize(("recipe", "kind"), [("mean", "MEAN"), ("last-token", "LAST")])
def test_servers_that_know_the_old_keys_pool_as_they_should(llm, tmp_path, recipe, kind):
    """What vLLM makes of the files, by its rule: the first key whose value is true, of a module by its old name."""
    folder = tmp_path / "model"
    model = build_model(llm, recipe)
    model.save_pretrained(str(folder))
    seal(folder)
    modules = {entry["type"]: entry["path"] for entry in json.loads((folder / "modules.json").read_text())}
    assert "sentence_transformers.models.Normalize" in modules
    config = json.loads((folder / modules["sentence_transformers.models.Pooling"] / "config.json").read_text())
    first = next(key for key, value in config.items() if value is True)
    name = first.replace("pooling_mode_", "").split("_")[0]
    assert ("LAST" if "lasttoken" in name else name.upper()) == kind
    again = SentenceTransformer(str(folder))
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_check_notices_other_vectors(llm, tmp_path):
    model = build_model(llm, "mean")
    folder = tmp_path / "model"
    model.save_pretrained(str(folder))
    seal(folder)
    with pytest.raises(FileNotFoundError, match="has no reference.json, so there is nothing to compare it with"):
        check(folder)
    checked = check(folder, model)
    assert checked.difference <= 1e-5
    assert checked.files == {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": True}))
    with pytest.raises(
        RuntimeError, match="gives other vectors in a fresh process.*mask: bidirectional then, causal now"
    ):
        check(folder, model)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RuntimeError, match="does not load in a process without 'st_llm_embed'"):
        check(folder, model)


@pytest.mark.slow
def test_merged_and_adapter_forms_are_compared(llm, tmp_path, capsys):
    model = build_model(llm, "last-token")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapter = save_sealed(model, tmp_path / "adapter")
    merged = save_sealed(merge_adapter(model), tmp_path / "merged")
    assert main(["check", str(merged), "--against", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "The embeddings are the expected ones" in shown
    base = save_sealed(build_model(llm, "last-token"), tmp_path / "base")
    assert main(["check", str(base), "--against", str(adapter)]) == 2
    assert "gives other vectors" in capsys.readouterr().err


def test_half_precision_is_published_as_it_is(tmp_path):
    model = build_model(save_llm(tmp_path / "llm", hidden_size=128), "nv-embed", num_latents=8).half()
    model.prompts = {}  # no prompt at all is one way to embed
    folder = save_sealed(model, tmp_path / "half")  # compares the vectors
    assert json.loads((folder / "reference.json").read_text())["dtype"] == "float16"
    assert check(folder, trust_remote_code=True).difference == 0


def test_an_llm_cast_by_itself_is_told_of(tmp_path):
    model = build_model(save_llm(tmp_path / "llm", hidden_size=128), "last-token")
    model[0].model.half()
    with pytest.raises(RuntimeError, match=r"Settings that differ: precision: casting the LLM .*model.half\(\)"):
        save_sealed(model, tmp_path / "half")


def test_merging_changes_no_embedding_and_leaves_the_model(llm):
    model = build_model(llm, "nv-embed", lora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    before = model.encode(TEXTS, prompt="Query: ")
    merged = merge_adapter(model)
    np.testing.assert_allclose(merged.encode(TEXTS, prompt="Query: "), before, atol=1e-5)
    np.testing.assert_array_equal(model.encode(TEXTS, prompt="Query: "), before)
    plain = build_model(llm, "nv-embed")
    assert set(merged.state_dict()) == set(plain.state_dict())
    weights = merged[0].model.state_dict().items()
    assert any((weight - plain[0].model.state_dict()[name]).abs().max() > 1e-3 for name, weight in weights)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_adapter(merged)
    with pytest.raises(RuntimeError, match="merged model's embeddings differ by .*; at most -1e"):
        merge_adapter(model, tolerance=-1.0)


def test_merging_trained_tokens(llm):
    model = build_model(llm, "last-token")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[5, 6, 7]))
    (delta,) = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    torch.nn.init.normal_(delta)
    rows = delta.detach().clone()
    merged = merge_adapter(model)
    torch.testing.assert_close(merged[0].model.get_input_embeddings().weight[5:8], rows)


def test_a_trainers_checkpoint_is_not_sealed(llm, tmp_path):
    build_model(llm, "mean").save_pretrained(str(tmp_path / "checkpoint-12"))
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{}")  # which tells it from a name
    before = (tmp_path / "checkpoint-12" / "modules.json").read_text()
    with pytest.raises(ValueError, match="checkpoint-12 is a trainer's checkpoint. Sealed, it could not be resumed"):
        seal(tmp_path / "checkpoint-12")
    assert (tmp_path / "checkpoint-12" / "modules.json").read_text() == before


def test_a_name_like_a_checkpoints_is_a_name_like_any_other(llm, tmp_path):
    saved = save_sealed(build_model(llm, "mean"), tmp_path / "out" / "checkpoint-100")
    assert (saved / "reference.json").is_file()


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("__main__.Scale", "it is not in a file of its module's name"),  # of a script or a notebook
        ("shipped.pooling.Outer.Scale", "shipped.pooling.Outer"),
        ("shipped.Scale", "it is not in a file of its module's name"),  # of the package's __init__.py
        ("shipped.parent.Scale", "No such file"),  # from ..other import, which no repository has
        ("shipped.llm_backbone.Scale", "the folder has another llm_backbone.py already"),
        ("nowhere.Scale", "no module 'nowhere' is installed here"),
        ("math.Scale", "it is not in a file of its module's name"),
    ],
)
def test_a_class_that_nobody_else_could_import_is_refused(llm, tmp_path, monkeypatch, reference, reason):
    for name, text in (("__init__", ""), ("pooling", ""), ("llm_backbone", ""), ("parent", "from ..other import x\n")):
        (tmp_path / "shipped").mkdir(exist_ok=True)
        (tmp_path / "shipped" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    build_model(llm, "nv-embed", num_latents=2).save_pretrained(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = reference
    (folder / "modules.json").write_text(json.dumps(modules))
    match = (
        rf"module class '{re.escape(reference)}' cannot be shipped \(.*{re.escape(reason)}.*Put the class into a file"
    )
    with pytest.raises(ValueError, match=match):
        seal(folder)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("../elsewhere", "sentence_transformers.models.Normalize", "names '../elsewhere', which is outside"),
        ("/etc", "sentence_transformers.models.Normalize", "names '/etc', which is outside"),
        ("C:\\windows", "sentence_transformers.models.Normalize", "which is outside"),
        ("", "org/other--file.Class", "names 'org/other--file.Class', which is not a class"),
    ],
)
def test_folders_that_name_what_is_outside_are_refused(tmp_path, path, kind, message):
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path, "type": kind}]))
    for act in (seal, check):
        with pytest.raises(ValueError, match=message):
            act(tmp_path)


def test_folders_with_links_pickles_and_indices_are_refused(tmp_path):
    stock = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Normalize"}
    (tmp_path / "secret").write_text("mine")
    hostile = {}
    for name in ("link", "pickle", "nested", "index", "pickled index", "odd index"):
        hostile[name] = tmp_path / name
        hostile[name].mkdir()
        (hostile[name] / "modules.json").write_text(json.dumps([stock]))
    (hostile["link"] / "model.safetensors").symlink_to(tmp_path / "secret")
    (hostile["pickle"] / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    (hostile["nested"] / "1_Dense").mkdir()
    (hostile["nested"] / "1_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    index = {"weight_map": {"weight": "../secret"}}
    (hostile["index"] / "model.safetensors.index.json").write_text(json.dumps(index))
    # A trainer's pickle is let be, and must not be named as weights.
    index = {"weight_map": {"weight": "optimizer.pt"}}
    (hostile["pickled index"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (hostile["odd index"] / "model.safetensors.index.json").write_text(json.dumps(index))
    pickled = "may run code when read"
    messages = {"link": "lead out of the folder", "pickle": pickled, "nested": pickled, "index": "outside"}
    messages |= {"pickled index": pickled, "odd index": "names 'optimizer.pt'. Weights belong into safetensors files"}
    for act in (seal, check):
        for name, message in messages.items():
            with pytest.raises(ValueError, match=message):
                act(hostile[name])


def test_what_a_trainer_leaves_beside_a_model_is_no_reason_to_refuse_it(llm, tmp_path):
    model = build_model(llm, "mean")
    save_sealed(model, tmp_path / "model")
    left = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth")
    (tmp_path / "model" / "checkpoint-1").mkdir()
    for folder in ("model", "model/checkpoint-1"):
        for name in left:
            (tmp_path / folder / name).write_bytes(b"no pickle: reading it would fail")
    # Sealed it is stock, which does not run a batch in groups.
    np.testing.assert_allclose(
        load_trusted(tmp_path / "model").encode(list(TEXTS)), model.encode(list(TEXTS)), atol=1e-6
    )
    assert check(tmp_path / "model").difference <= 1e-5


def test_code_that_is_not_this_packages_is_not_run(llm, tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "was-run"
    build_model(llm).save_pretrained(str(folder))
    seal(folder)
    assert code_in(folder) == {}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "other/repo--file.Class"}}))
    with pytest.raises(ValueError, match="does not ship. 'config.json': auto_map"):
        check(folder, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "llm_backbone.py", "a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w')\n")
    for refused in (lambda: check(folder, folder), lambda: load_trusted(folder)):
        with pytest.raises(ValueError, match="does not ship. 'llm_backbone.py': "):
            refused()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(folder))
    assert not marker.exists()


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
