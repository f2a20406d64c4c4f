"""From an LLM and a CSV file to a model that is searched, by commands alone; and what a run says of itself before."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import save_llm
from sentence_transformers import SentenceTransformer

from st_llm_embed.cli import main
from st_llm_embed.training.configuration import override, read_assignments

QUESTIONS = [f"how do I do {i}?" for i in range(8)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llm(tmp_path / "llm")
    rows = "".join(f"{question},do{i} does it\n" for i, question in enumerate(QUESTIONS))
    (tmp_path / "faq.csv").write_text("question,answer\n" + rows)
    data = {"read": "from_columns", "source": "faq.csv", "anchor": "question", "positive": "answer"}
    run = {
        "output": "run",
        "model": {"base": "llm", "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "data": {"faq": {**data, "instruction": "Find the answer"}},
        "stages": [{"name": "retrieval", "data": ["faq"], "arguments": {"stage": 1, "max_steps": 2}}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def test_from_a_csv_file_to_a_searched_model(here, capsys):
    assert main(["build", "llm", "untrained", "--recipe", "mean", "--set", "max_seq_length=32", "num_layers=1"]) == 0
    untrained = SentenceTransformer("untrained")  # stock: sealed
    assert untrained.max_seq_length == 32 and untrained.transformers_model.config.num_hidden_layers == 1
    assert main(["train", "run.yaml"]) == 0
    assert main(["seal", "run/1-retrieval/model", "sealed", "--license", "mit"]) == 0
    assert "license: mit" in Path("sealed/README.md").read_text()
    model = SentenceTransformer("sealed")
    assert model.prompts["query"].startswith("Instruct: Find the answer")

    command = ["encode", "sealed", "faq.csv", "--column", "question", "--prompt-name", "query", "--output"]
    assert main([*command, "vectors.npy"]) == 0
    np.testing.assert_allclose(np.load("vectors.npy"), model.encode_query(QUESTIONS), atol=1e-6)
    assert main([*command, "vectors.txt"]) == 2 and "is no .npy file" in capsys.readouterr().err
    assert main([*command[:5], "--prompt-name", "nope", "--output", "x.npy"]) == 2
    assert "The model has: " in capsys.readouterr().err

    search = ["search", "sealed", "faq.csv", QUESTIONS[3], "how?", "--corpus-columns", "text=answer", "--top-k", "2"]
    for _ in range(2):  # the second from the cache
        assert main([*search, "--cache-folder", "cache"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == QUESTIONS[3] and lines[3] == "how?" and len(lines) == 6
    answers = [f"do{i} does it" for i in range(8)]
    scores = model.similarity(model.encode_query([QUESTIONS[3]]), model.encode_document(answers))[0]
    assert lines[1] == f"  {scores.max():.3f}  {answers[scores.argmax()]}"


def test_the_guides_way_from_a_csv_file_to_a_searched_model(here, capsys):
    """As it is written there, but for the upload."""
    guide = (Path(__file__).parents[1] / "st_llm_embed" / "training" / "README.md").read_text()
    section = guide.partition("## From a CSV file to a searched model")[2]
    save_llm(here / "HuggingFaceTB" / "SmolLM2-135M")
    (here / "faq.yaml").write_text(section.partition("```yaml\n")[2].partition("```")[0])
    (here / "faq-test" / "qrels").mkdir(parents=True)
    texts = [{"_id": str(i), "text": question} for i, question in enumerate(QUESTIONS)]
    (here / "faq-test" / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    answers = [{"_id": str(i), "title": "", "text": f"do{i} does it"} for i in range(8)]
    (here / "faq-test" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    judged = "".join(f"{i}\t{i}\t1\n" for i in range(8))
    (here / "faq-test" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    commands = section.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 9 and commands[-1].startswith("st-llm-embed publish")
    for command in commands[:-1]:
        words = shlex.split(command, comments=True)
        assert main(words[1:]) == 0, (command, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert said.count("faq-test") >= 2 and "how do I get a refund?" in said
    assert np.load("answers.npy").shape == (8, 32)


def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(here, capsys):
    before = sorted(path.name for path in here.iterdir())
    assert main(["train", "run.yaml", "--dry-run", "--set", "stages.retrieval.arguments.max_steps=7"]) == 0
    said = capsys.readouterr().out
    assert "Stage 1, retrieval: faq (8 rows)" in said
    assert "7 steps of 4 rows, adamw" in said and "at learning rate 0.001" in said
    assert "anchor, " in said and "Instruct: Find the answer\\nQuery: how do I do" in said and "</s>" in said
    assert "MB of weights" in said
    assert sorted(path.name for path in here.iterdir()) == before
    assert main(["train", "run.yaml"]) == 0
    capsys.readouterr()
    assert main(["train", "run.yaml", "--dry-run"]) == 0 and "is finished" in capsys.readouterr().out


def test_values_of_the_command_line_take_the_place_of_the_files(here, capsys):
    assert main(["train", "run.yaml", "--set", "output=other", "model.num_layers=1", "stages.1.name=only"]) == 0
    assert json.loads(Path("other/1-only/model/config.json").read_text())["num_hidden_layers"] == 1
    for setting, message in (
        ("model.num_layerz=1", "Did you mean 'num_layers'?"),
        ("stages.blended.name=x", "there is no 'blended'. There are: retrieval."),
        ("output.x=1", "'output.x' cannot be set: output is 'run'."),
        ("output", "sets nothing. Write NAME=VALUE"),
        ("output=[", "has a value that is not YAML"),
    ):
        assert main(["train", "run.yaml", "--set", setting]) == 2
        assert message in capsys.readouterr().err, setting
    assert main(["build", "llm", "out", "--set", "num_latentz=2"]) == 2
    assert "Did you mean 'num_latents'?" in capsys.readouterr().err and not Path("out").exists()


def test_assignments_are_yaml_and_leave_the_configuration_as_it_was():
    values = read_assignments(["a.b=2e-5", "a.c=[1, x]", "stages.two.steps=null", "d=a=b"])
    assert values == {"a.b": 2e-5, "a.c": [1, "x"], "stages.two.steps": None, "d": "a=b"}
    configuration = {"a": {"b": 1}, "stages": [{"name": "one"}, {"name": "two", "steps": 1}]}
    changed = override(configuration, values)
    assert (
        changed["a"] == {"b": 2e-5, "c": [1, "x"]} and changed["stages"][1]["steps"] is None and changed["d"] == "a=b"
    )
    assert configuration == {"a": {"b": 1}, "stages": [{"name": "one"}, {"name": "two", "steps": 1}]}


def test_an_element_of_a_list_goes_by_its_place_or_its_name():
    assert override({"l": [1, 1, 1]}, {"l.3": 0.5}) == {"l": [1, 1, 0.5]}
    assert override({"stages": [{"a": 1}, {"a": 1}]}, {"stages.2.a": 3}) == {"stages": [{"a": 1}, {"a": 3}]}
    for parts in ([{"name": "x"}, {"name": "x"}], [{"name": "y"}], [1]):
        with pytest.raises(ValueError, match="there is no 'x'"):
            override({"stages": parts}, {"stages.x.a": 1})
