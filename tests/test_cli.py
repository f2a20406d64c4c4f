"""The command line: errors that teach, help that is quick, and nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import save_llm
from peft import LoraConfig

import st_llm_embed
from st_llm_embed import __version__, build_model
from st_llm_embed.cli import main


def test_faults_of_files_are_one_message(tmp_path, capsys):
    """Not YAML, weights of nothing, weights that would run code."""
    (tmp_path / "config.yaml").write_text("output:\t[a\n\t- b: {")
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    for folder in (pickled, empty):
        save_llm(folder)
        (folder / "model.safetensors").unlink()
    torch.save({"x": Path}, pickled / "pytorch_model.bin")
    (empty / "model.safetensors").write_bytes(b"")

    def run(base: Path) -> str:
        file = tmp_path / f"{base.name}.yaml"
        data = {"read": "load_dataset", "path": "json", "data_files": str(rows), "split": "train", "instruction": "x"}
        stages = [{"name": "one", "data": ["docs"], "arguments": {"max_steps": 1}}]
        whole = {
            "output": str(tmp_path / "out"),
            "model": {"base": str(base)},
            "data": {"docs": data},
            "stages": stages,
        }
        file.write_text(json.dumps(whole))
        return str(file)

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"anchor": "a", "positive": "b", "negative": "c"}) + "\n")
    for command, message in (
        (["train", str(tmp_path / "config.yaml")], "config.yaml is not a YAML file"),
        (["train", run(empty)], "header"),
        (["train", run(pickled)], ""),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and "st-llm-embed: error: " in error and "Traceback" not in error


def test_help_and_version_say_what_there_is(capsys):
    for arguments, expected in ((["--help"], "mine"), (["mine", "--help"], "--corpus"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0 and expected in capsys.readouterr().out


def test_neither_the_package_nor_its_help_imports_torch():
    script = """
import sys, st_llm_embed
from st_llm_embed.cli import main
for arguments in (["--version"], ["--help"], ["train", "--help"], ["mine"]):
    try:
        main(arguments)
    except SystemExit:
        pass
heavy = {"torch", "transformers", "sentence_transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert {*st_llm_embed.__all__} <= {*dir(st_llm_embed)}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_the_package_are_where_they_are_defined():
    for name in st_llm_embed.__all__:
        assert getattr(st_llm_embed, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'build_modell'"):
        getattr(st_llm_embed, "build_" + "modell")


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_where_an_error_arose(tmp_path, capsys, debug):
    assert main(["merge", str(tmp_path / "none"), str(tmp_path / "out"), *(["--debug"] if debug else [])]) == 2
    assert ("Traceback" in (said := capsys.readouterr().err)) == debug and "st-llm-embed: error: " in said


def test_what_nobody_expected_says_that_it_is_a_bug(tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("st_llm_embed.weights.average_checkpoints", fail)
    assert main(["average", "a", "b", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'surprise'" in said and "Traceback" in said and "this is a bug of this package" in said


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_an_interrupted_run_leaves_nothing(llm, tmp_path, number, status):
    """Interrupted while what it wrote is checked, beside its place."""
    model = build_model(llm, "last-token")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "st_llm_embed", "merge", str(tmp_path / "adapter"), "out"],
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background shell, as in some CI, starts its children deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(work.glob(".out-*/out/reference.json")):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert "interrupted; nothing was left half-written" in said and process.returncode == status
    assert list(work.iterdir()) == []
