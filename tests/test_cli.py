"""The command line: the demo in its short form, and errors that teach."""

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

from st_llm_embed import __version__, build_model
from st_llm_embed.cli import main
from st_llm_embed.demo import BUNDLED_ID, bundled_llm


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path):
    output = tmp_path / "demo"
    assert main(["demo", "--smoke", "--output", str(output)]) == 0
    assert sorted(file.name for file in output.iterdir()) == ["model", "report.json", "report.png"]
    report = json.loads((output / "report.json").read_text())
    assert report["base"] == BUNDLED_ID
    phases = ["BM25", "before training", "after pretext", "after stage 1", "after stage 2"]
    assert list(report["results"]) == phases
    assert all(0 <= score <= 1 for scores in report["results"].values() for score in scores.values())
    assert report["results"]["BM25"]["ndcg@10"] > 0.3  # the data is read as it should be
    assert all({"ebae", "ebar"} <= set(row) for row in report["losses"]["pretext"])
    assert report["search"].count("\n") == 5 * 4 - 1  # three modules for each question
    card = (output / "model" / "README.md").read_text()
    assert f"| after stage 2 | {report['results']['after stage 2']['ndcg@10']:.3f}" in card
    assert f"base_model: {BUNDLED_ID}" in card and "license: apache-2.0" in card
    assert 'SentenceTransformer("sentence_transformers_model_id", trust_remote_code=True)' in card
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["demo"]


@pytest.mark.slow
def test_the_bundled_llm_survives_its_journey_from_gguf(tmp_path):
    """Its layers cut or not, the rebuilt model is the one that transformers reads."""
    import torch
    from transformers import AutoModelForCausalLM

    from st_llm_embed import build_model
    from st_llm_embed.gguf import _parsed_once

    file = bundled_llm()
    with _parsed_once():
        ours = build_model(file, "last-token", num_layers=2)
        original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert ours[0].config.num_hidden_layers == 2
    ids = torch.tensor([[19556, 905, 2]])
    with torch.no_grad():
        expected = original.model.norm(original(ids, output_hidden_states=True).hidden_states[2])
        torch.testing.assert_close(ours[0].model(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(str(tmp_path / "saved"))  # which transformers refuses for the model it read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "no/such-model"], "base='no/such-model' could not be loaded. Give the Hub id"),
        (["--num-layers", "99"], r"num_layers=99 is outside 1..30"),
    ],
)
def test_bad_arguments_are_one_message(tmp_path, capsys, arguments, message):
    output = tmp_path / "demo"
    assert main(["demo", "--smoke", "--output", str(output), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_used_output_folder_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_faults_of_files_are_one_message(tmp_path, capsys):
    """Not YAML, weights of nothing, weights that would run code."""
    (tmp_path / "config.yaml").write_text("output:\t[a\n\t- b: {")
    pickled, empty = tmp_path / "pickled", tmp_path / "empty"
    for folder in (pickled, empty):
        save_llm(folder)
        (folder / "model.safetensors").unlink()
    torch.save({"x": Path}, pickled / "pytorch_model.bin")
    (empty / "model.safetensors").write_bytes(b"")
    for command, message in (
        (["train", str(tmp_path / "config.yaml")], "config.yaml is not a YAML file"),
        (["demo", "--smoke", "--base", str(empty), "--output", str(tmp_path / "out")], "header"),
        (["demo", "--smoke", "--base", str(pickled), "--output", str(tmp_path / "out")], ""),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and "st-llm-embed: error: " in error and "Traceback" not in error


def test_help_and_version_are_quick_and_true(capsys):
    for arguments, expected in ((["--help"], "demo"), (["demo", "--help"], "--smoke"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0 and expected in capsys.readouterr().out


def test_what_nobody_expected_says_that_it_is_a_bug(tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("st_llm_embed.averaging.average_checkpoints", fail)
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
