"""What a configuration says is read as it is meant, or refused with the word that was probably meant."""

from __future__ import annotations

import pytest

from st_llm_embed import build_model
from st_llm_embed.data import from_beir, from_columns
from st_llm_embed.mining import mine_negatives
from st_llm_embed.tasks import Task
from st_llm_embed.training.configuration import ConfigurationError, Given, override, read_assignments, read_yaml
from st_llm_embed.training.run_config import RunConfig, Stage, read_run
from st_llm_embed.training.schema import Faults, Part, check, declared, documented, fields_of, part
from st_llm_embed.training.training_args import LLMEmbedTrainingArguments

NUMBERS = {"2e-5": 2e-5, "1E3": 1000.0, "-1e2": -100.0, ".5e1": 5.0, "2.0e-5": 2e-5, "+3e0": 3.0, "7": 7}
TEXTS = ["e5", "2e-5x", "1e", "0e1f", "intfloat/e5", "1_e5"]


def test_numbers_of_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"- {text}\n" for text in [*NUMBERS, *TEXTS]))
    assert read_yaml(file) == [*NUMBERS.values(), *TEXTS]
    file.write_bytes("﻿a: 1e1\n".encode())  # what Windows' editors put first
    assert read_yaml(file) == {"a": 10.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output:\t[a\n\t- b: {", "a.yaml is not a YAML file: .* line 1, column 8"),
        ("a: 1\nb: {c: 1, c: 2}", "'c' is there twice .* line 2"),
        ("a: 1\n\na: 2", "'a' is there twice .* line 3"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_what_is_no_yaml_is_one_line(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_yaml(file)
    assert "\n" not in str(error.value)


def faults(schema: type[Part], given: object) -> dict[str, str]:
    with pytest.raises(Faults) as error:
        check(schema, given)
    return {".".join(map(str, place)): message for place, message in error.value.faults}


def test_kinds_of_every_training_argument():
    """Each takes its own default, and as text where it is a number; numbers are not read out of a flag."""
    schema = part("arguments", fields_of(LLMEmbedTrainingArguments))
    numbers = 0
    for name in schema.model_fields:
        default = LLMEmbedTrainingArguments.__dataclass_fields__[name].default
        default = getattr(default, "value", default)
        if isinstance(default, int | float | str | None):
            assert check(schema, {name: default}) == {name: default}, name
        if type(default) in (int, float):
            numbers += 1
            assert check(schema, {name: str(default)}) == {name: default}
            for wrong in ("fast", True, [1], None):
                message = faults(schema, {name: wrong})[name]
                assert message.startswith(f"has the value {wrong!r}. It takes a ") and "number" in message
    assert numbers > 20
    assert check(schema, {"max_steps": 1e3, "learning_rate": "2e-5"}) == {"max_steps": 1000, "learning_rate": 2e-5}
    wrong = {"bf16": "no", "fp16": 1, "max_steps": 1.5, "seed": "1.5", "run_name": 3, "report_to": ["none", 1]}
    wrong |= {"learning_rate": float("inf"), "lr_scheduler_type": "cosin", "eval_strategy": "step"}
    expected = {
        "bf16": "has the value 'no'. It takes true or false.",
        "fp16": "has the value 1. It takes true or false.",
        "max_steps": "has the value 1.5. It takes a whole number.",
        "seed": "has the value '1.5'. It takes a whole number.",
        "run_name": "has the value 3. It takes text.",
        "report_to.1": "has the value 1. It takes text.",
        "learning_rate": "has the value inf. It takes a finite number.",
        "eval_strategy": "has the value 'step'. It takes 'no', 'steps' or 'epoch'.",
    }
    found = faults(schema, wrong)  # all at once
    assert "cosine" in found.pop("lr_scheduler_type") and found == expected


def test_names_of_arguments():
    schema = part("data", fields_of(from_beir))
    assert "counts" not in schema.model_fields  # a counter, which YAML has not
    assert faults(schema, {"folder": "a", "spilt": "b"})["spilt"].startswith(
        "is an unknown key. Did you mean 'split'? It takes folder, split"
    )
    assert faults(schema, {}) == {"": "lacks folder."}
    assert faults(schema, ["folder"]) == {"": "has the value ['folder']. It takes a mapping."}
    schema = part("arguments", fields_of(LLMEmbedTrainingArguments))
    assert faults(schema, {"learning_rte": 1}) == {"learning_rte": "is an unknown key. Did you mean 'learning_rate'?"}
    ranged = part("data", fields_of(from_beir, limits={"negatives": {"ge": 0}, "min_score": {"gt": 0, "le": 1}}))
    assert faults(ranged, {"folder": "a", "negatives": -1, "min_score": 2}) == {
        "negatives": "has the value -1. It takes 0 or more.",
        "min_score": "has the value 2. It takes 1 or less.",
    }


def test_every_argument_of_this_package_is_described():
    for function in (from_beir, from_columns, build_model, RunConfig, Stage, Task, mine_negatives):
        undescribed = set(declared(function)) - set(documented(function)) - {"dataset", "counts"}
        assert not undescribed, (function, undescribed)
    assert documented(from_columns)["positive"] == "the names of the columns of anchors and of positives."
    assert documented(Stage)["early_stopping_patience"].endswith("the loss on the first of ``eval_data``.")


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    schema = part("data", fields_of(from_beir))
    home, here, elsewhere = (tmp_path / name for name in ("home", "here", "elsewhere"))
    for folder in (home, here / "set", elsewhere / "other"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    for given, expected in (
        ("set", str(here / "set")),
        ("~/set", str(home / "set")),
        ("./absent", str(here / "absent")),
        ("a/b/c.csv", str(here / "a/b/c.csv")),
        ("set/absent.csv", str(here / "set/absent.csv")),
        (str(elsewhere), str(elsewhere)),
        ("org/model", "org/model"),  # a Hub id
    ):
        assert check(schema, {"folder": given}, here) == {"folder": expected}
    with pytest.raises(Faults, match="Paths are relative to the file, and there is no .*here/other"):
        check(schema, {"folder": "other"}, here)


def test_each_fault_has_its_line_and_its_path(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "model:\n  lora: {r: 1}\nstages:\n  - name: one\n    data: [a]\n  - {name: two, data: [b]}\n7: x\n"
    )
    given = Given.read(file, {"stages.two.arguments": {}})
    for place, expected in (
        ((), "the configuration"),
        (("model", "lora", "r"), "line 2, model.lora.r"),
        (("stages", 0), "line 4, stages.one"),
        (("stages", 0, "data", 0), "line 5, stages.one.data.1"),
        (("stages", 1, "absent"), "line 6, stages.two.absent"),
        (("stages", 1, "arguments", "seed"), "--set stages.two.arguments.seed"),
        ((7,), "line 7, 7"),
    ):
        assert given.where(place) == expected
    with (
        pytest.raises(ConfigurationError, match="^[^\n]*a.yaml, line 2, model.lora: broken$"),
        given.naming("model", "lora"),
    ):
        raise OSError("broken")


def test_yaml_is_that_of_today(tmp_path):
    """ "no" is a word, 1:30 and a date are text, a merged key is none that is there twice."""
    file = tmp_path / "a.yaml"
    file.write_text("- [no, on, yes, True, 1:30, 010, 2024-01-01, .inf, ~]\n- &a {x: 1}\n- {<<: *a, x: 2, y: 3}\n")
    assert read_yaml(file) == [
        ["no", "on", "yes", True, "1:30", "010", "2024-01-01", float("inf"), None],
        {"x": 1},
        {"x": 2, "y": 3},
    ]
    with pytest.raises(IsADirectoryError, match="is a folder. Name a YAML file"):
        read_yaml(tmp_path)


def test_paths_lead_through_names_with_dots_and_what_is_not_said_yet():
    given = {"data": {"my.set": {"source": "a"}}, "stages": [{"name": "v1.0"}, {"name": "v1"}]}
    changed = override(given, {"data.my.set.source": "b", "stages.v1.0.arguments.stage": 2, "stages.v1.x": 1})
    assert changed["data"] == {"my.set": {"source": "b"}}
    assert changed["stages"] == [{"name": "v1.0", "arguments": {"stage": 2}}, {"name": "v1", "x": 1}]
    assert override({}, {"arguments.seed": 1}) == {"arguments": {"seed": 1}}
    with pytest.raises(ValueError, match="'seed' is set twice"):
        read_assignments(["seed=1", "seed=2"])


def test_all_faults_are_told_at_once(tmp_path):
    """Unknown keys at several depths, and wrong values beside and below them, each with its line."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "output: run\nsealed: true\nepochs: 3\nmodel: {base: x, recipe: mean, lora: {rank: 3, r: big}}\n"
        "data: {a: {read: from_sts, source: x, scor: y}}\n"
        "stages:\n- {name: one, data: a, arguments: {batch_size: 3, epochs: 1, seed: x}}\n"
    )
    with pytest.raises(ConfigurationError) as error:
        read_run(Given.read(file, {}))
    expected = {
        "line 2, sealed: is an unknown key. Did you mean 'seal'?",
        "line 3, epochs: is an unknown key. It takes output,",
        "line 4, model.lora.rank: is an unknown key.",
        "line 4, model.lora.r: has the value 'big'. It takes a whole number.",
        "line 5, data.a.scor: is an unknown key. Did you mean 'score'?",
        "line 7, stages.one.data: has the value 'a'. It takes a list.",
        "line 7, stages.one.arguments.batch_size: is an unknown key. Did you mean 'per_device_train_batch_size'?",
        "line 7, stages.one.arguments.epochs: is an unknown key. Did you mean 'num_train_epochs'?",
        "line 7, stages.one.arguments.seed: has the value 'x'. It takes a whole number.",
    }
    told = str(error.value).splitlines()[1:]
    assert len(told) == len(expected) and all(any(line.startswith(start) for line in told) for start in expected), told
