"""The scripts to copy run as they are, on tiny models under the names that they use."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_llm
from hub_server import hub_server, online
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from test_convert_llara import checkpoint
from transformers import AutoModelForCausalLM

from st_llm_embed import build_model
from st_llm_embed.hub import save_sealed

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {"encode", "fine_tune", "mine_and_train", "teach", "adapt_on_raw_text", "publish", "convert"}
SCRIPTS |= {"late_interaction"}
OF_ENGINES = {"ray_encode", "to_lancedb", "to_qdrant"}  # run by test_encoding_engines.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An LLM, a teacher, pairs, a corpus and documents, under the scripts' names."""
    folder = tmp_path_factory.mktemp("files")
    save_llm(folder / "HuggingFaceTB" / "SmolLM2-135M")
    save_sealed(
        build_model(folder / "HuggingFaceTB" / "SmolLM2-135M", "mean"),
        folder / "sentence-transformers" / "all-MiniLM-L6-v2",
    )
    pairs = [f"how do I do {i}?,do{i} does it" for i in range(20)]
    (folder / "pairs.csv").write_text("\n".join(["anchor,positive", *pairs]) + "\n")
    texts = [{"text": f"The text {i} sat. It barked at {i} moons. A fox jumped."} for i in range(20)]
    for name in ("corpus.jsonl", "documents.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_script_is_run():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == SCRIPTS | OF_ENGINES
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name}.py)" in table for name in SCRIPTS | OF_ENGINES)


def test_fine_tune_then_encode(here, capsys):
    model = runpy.run_path(str(EXAMPLES / "fine_tune.py"))["model"]
    untrained = build_model("HuggingFaceTB/SmolLM2-135M")
    assert model.prompts["docs"].startswith("Instruct: Given a question") and "docs" not in untrained.prompts
    runpy.run_path(str(EXAMPLES / "encode.py"))
    said = capsys.readouterr().out
    assert "how do I send a mail?" in said and "argparse" in said


def test_late_interaction(here, capsys):
    pytest.importorskip("qdrant_client")
    runpy.run_path(str(EXAMPLES / "late_interaction.py"))
    said = capsys.readouterr().out
    found = re.findall(r"^  (\d\.\d{3})  (.*)$", said, flags=re.MULTILINE)
    model = MultiVectorEncoder("late-model")
    texts = [json.loads(line)["text"] for line in (here / "corpus.jsonl").read_text().splitlines()]
    scores = model.similarity([model.encode_query("how do I send a mail?")], model.encode_document(texts))[0]
    assert len(found) == 3 and "20 documents, " in said
    for (score, text), best in zip(found, scores.sort(descending=True).values, strict=False):
        assert float(score) == pytest.approx(best.item(), abs=2e-3)
        assert scores[texts.index(text)].item() == pytest.approx(best.item(), abs=1e-5)


def test_mine_and_train(here, capsys):
    pairs = here / "pairs.csv"
    pairs.write_text(pairs.read_text().replace("anchor,positive", "question,answer"))
    ran = runpy.run_path(str(EXAMPLES / "mine_and_train.py"))
    assert "rows; candidates dropped by rule: {'relative_margin'" in capsys.readouterr().out
    assert ran["mined"].rows.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert SentenceTransformer("my-model", trust_remote_code=True).encode_query("x").shape == (32,)


def test_teach(here, capsys):
    ran = runpy.run_path(str(EXAMPLES / "teach.py"))
    said = capsys.readouterr().out
    assert "Before the first step: mean cosine" in said and "tensor([[" in said
    card = (here / "student" / "README.md").read_text()
    assert "in the space of `all-MiniLM-L6-v2` (revision " in card and "they compare with that model's" in card
    named = json.loads((here / "student" / "reference.json").read_text())["teacher"]
    assert named["name"] == "all-MiniLM-L6-v2" and len(named["revision"]) == 16
    assert not ran["model"][-2].linear.weight.requires_grad


def test_adapt_on_raw_text(here):
    ran = runpy.run_path(str(EXAMPLES / "adapt_on_raw_text.py"))
    before = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M").model.norm.weight.detach()
    after = AutoModelForCausalLM.from_pretrained("adapted-lm").model.norm.weight.detach()
    np.testing.assert_array_equal(after, ran["model"][0].model.norm.weight.detach())
    assert not np.array_equal(before, after)


def test_convert(here, capsys):
    checkpoint(here / "BAAI" / "LLARA-passage")
    runpy.run_path(str(EXAMPLES / "convert.py"))
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.slow
def test_publish(here):
    build_model("HuggingFaceTB/SmolLM2-135M").save_pretrained("my-model")
    with hub_server() as hub:
        environment = {**os.environ, **online(hub, here / "hf")}
        command = [sys.executable, str(EXAMPLES / "publish.py")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "gives the same vectors within" in done.stdout
        published = hub.repositories["your-org/your-new-model"]
        assert published.private and b"license: apache-2.0" in published.files["README.md"]
