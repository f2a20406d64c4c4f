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

from st_llm_embed import build_model
from st_llm_embed.cli import main
from st_llm_embed.data import from_beir
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
    assert main(["seal", "run/1-retrieval/model", "sealed", "--license", "mit", "--name", "Our answers"]) == 0
    card = Path("sealed/README.md").read_text()
    assert "license: mit" in card and "\n# Our answers\n" in card
    model = SentenceTransformer("sealed")
    assert model.prompts["query"].startswith("Instruct: Find the answer")

    command = ["encode", "sealed", "faq.csv", "--columns", "text=question", "--side", "query", "--output"]
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


def guide_section() -> str:
    guide = (Path(__file__).parents[1] / "st_llm_embed" / "training" / "README.md").read_text()
    return guide.partition("## From a CSV file to a searched model")[2].partition("\n## ")[0]


def test_the_guides_way_from_a_csv_file_to_a_searched_model(here, capsys):
    """As it is written there, but for a small LLM and teacher, and the upload."""
    save_llm(here / "HuggingFaceTB" / "SmolLM2-135M")
    build_model("llm", "mean").save_pretrained("your-org/teacher")
    section = guide_section()
    configuration = section.partition("```yaml\n")[2].partition("```")[0]
    for given, small in (
        ("[576, 256, 64]", "[32, 16, 8]"),
        ("eval_steps: 50", "eval_steps: 1"),
        ("size: 32", "size: 2"),
    ):
        assert given in configuration
        configuration = configuration.replace(given, small)
    (here / "faq.yaml").write_text(configuration)
    questions = [f"how do I do {i} in {j}?" for i in range(8) for j in range(5)]
    rows = [f"{question},Title {i},do{i} does it" for i, question in enumerate(questions)]
    (here / "faq.csv").write_text("\n".join(["question,title,answer", *rows]))
    commands = section.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 8 and commands[-1].startswith("st-llm-embed publish")
    for command in commands[:-1]:
        words = shlex.split(command, comments=True)
        assert main(words[1:]) == 0, (command, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "Wrote faq: 32 queries to train, 4 queries to dev, 4 queries to test." in said
    assert "negatives of faq are mined first" in said and "Evaluated on " in said
    assert "| faq |" in said and "95 %" in said and "how do I get a refund?" in said
    assert said.count("Queries' prompts: `Instruct: Find the answer\\nQuery: `.") == 2  # as fair as can be
    sealed = SentenceTransformer("faq-run/sealed")  # stock, its LoRA folded in
    assert sealed.prompts["query"] == "Instruct: Find the answer\nQuery: "
    assert json.loads(Path("faq-run/sealed/config.json").read_text())["matryoshka_dimensions"] == [32, 16, 8]
    card = Path("faq-run/sealed/README.md").read_text()
    assert "# Answers to our customers" in card and "negatives mined: faq by teacher" in card
    assert "`lora={'r': 16, 'lora_alpha': 32}`" in card and "`matryoshka_dims=[32, 16, 8]`" in card
    assert np.load("answers.npy").shape == (40, 32)
    assert list(Path("faq-run/results").rglob("results.md")) and Path("faq-run/comparison.md").is_file()


def test_the_guides_llara_adapts_and_is_fine_tuned(here):
    save_llm(here / "HuggingFaceTB" / "SmolLM2-135M")
    assert main(["split", "faq.csv", "faq", "--columns", "anchor=question", "positive=answer"]) == 0
    Path("articles").mkdir()
    Path("articles/one.txt").write_text("A cat sat. A dog ran. A fox slept.")
    Path("llara.yaml").write_text(
        guide_section().partition("```yaml\n")[2].partition("```yaml\n")[2].partition("```")[0]
    )
    steps = ["stages.adapt.arguments.max_steps=1", "data.faq.document_prompt=passage: "]
    assert (
        main(["train", "llara.yaml", "--set", *steps, "stages.retrieval.arguments.per_device_train_batch_size=4"]) == 0
    )
    model = SentenceTransformer("llara-run/2-retrieval/model", trust_remote_code=True)
    assert model.prompts["document"] == "passage: {text} The original sentence:"
    assert model.prompts["query"] == "Instruct: Find the answer\nQuery: {text} The next sentence:"
    assert model.transformers_model.peft_config["default"].r == 64 and model[0].query_length == 64


def test_queries_are_held_back(here, capsys):
    rows = [{"anchor": f"How {i}?", "positive": f"so {i % 4}", "title": "T"} for i in range(20)]
    rows.append({"anchor": "How  3?", "positive": "or so", "title": None})  # a spelling of one that is there
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["split", "rows.jsonl", "set", "--dev", "0.2", "--test", "0.25", "--seed", "3"]) == 0
    assert "Wrote set: 11 queries to train, 4 queries to dev, 5 queries to test." in capsys.readouterr().out
    splits = {name: from_beir("set", split=name) for name in ("train", "dev", "test")}
    together = sorted((row["anchor"], row["positive"]) for split in splits.values() for row in split)
    expected = {(row["anchor"], "or so" if i == 20 else f"T {row['positive']}") for i, row in enumerate(rows[:20])}
    assert together == sorted(expected | {("How 3?", "or so")})
    anchors = [set(split["anchor"]) for split in splits.values()]
    assert sum(map(len, anchors)) == len(set.union(*anchors)) == 20
    assert len(Path("set/corpus.jsonl").read_text().splitlines()) == 5
    assert main(["split", "rows.jsonl", "again", "--dev", "0.2", "--test", "0.25", "--seed", "3"]) == 0
    assert Path("again/qrels/test.tsv").read_text() == Path("set/qrels/test.tsv").read_text()
    for arguments, message in (
        (["set"], "exists and is not an empty folder"),
        (["x", "--dev", "0.7", "--test", "0.4"], "must be shares of the queries"),
        (["x", "--dev", "0.01"], "leave none for dev"),
        (["x", "--columns", "anchor=question"], "and not ['question']"),
    ):
        assert main(["split", "rows.jsonl", *arguments]) == 2
        assert message in capsys.readouterr().err and not Path("x").exists()


def test_what_a_run_begins_with_is_built_of_its_file(here, capsys):
    assert main(["build", "run.yaml", "untrained", "--set", "model.num_layers=1"]) == 0
    model = SentenceTransformer("untrained")
    assert model.prompts["query"] == "Instruct: Find the answer\nQuery: " and model.max_seq_length == 32
    assert model.transformers_model.config.num_hidden_layers == 1
    assert main(["build", "run.yaml", "other", "--lora"]) == 2 and "says what --lora would" in capsys.readouterr().err


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
    config = json.loads(Path("other/1-only/model/config.json").read_text())
    assert config["backbone_config"]["num_hidden_layers"] == 1
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
    assert read_assignments(["a=passage: ", "b={c: 1}"]) == {"a": "passage: ", "b": {"c": 1}}
    with pytest.raises(ValueError, match="Put text that begins with a brace into quotes"):
        read_assignments(["a={text} The sentence:"])
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
