"""What a configuration says is read as it is meant, or refused with the word that was probably meant."""

from __future__ import annotations

import pytest

from st_llm_embed.data import from_beir
from st_llm_embed.training.configuration import checked, declared, read_yaml, required
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


def test_kinds_of_every_training_argument():
    """Each takes its own default, and as text where it is a number; numbers are not read out of a flag."""
    kinds = declared(LLMEmbedTrainingArguments)
    made = LLMEmbedTrainingArguments("out", report_to=[])
    numbers = 0
    for name, kind in kinds.items():
        default = LLMEmbedTrainingArguments.__dataclass_fields__[name].default
        if isinstance(default, int | float | str | None):
            assert checked("x", {name: default}, kinds) == {name: default}, (name, kind)
        if type(default) in (int, float):
            numbers += 1
            assert checked("x", {name: str(default)}, kinds) == {name: default}
            for wrong in ("fast", True, [1], None):
                with pytest.raises(ValueError, match=f"x has {name}=.*. It must be of the type (int|float)"):
                    checked("x", {name: wrong}, kinds)
    assert numbers > 20 and made.learning_rate == 5e-5
    assert checked("x", {"max_steps": 1e3}, kinds) == {"max_steps": 1000}
    for name, wrong in (("bf16", "no"), ("bf16", 1), ("max_steps", 1.5), ("seed", "1.5"), ("run_name", 3)):
        with pytest.raises(ValueError, match=f"x has {name}={wrong!r}"):
            checked("x", {name: wrong}, kinds)


def test_the_nearest_name():
    assert required(from_beir) == ["folder"]
    with pytest.raises(ValueError, match=r"x has the unknown key 'spilt'. Did you mean 'split'\? It takes folder \("):
        checked("x", {"folder": "a", "spilt": "b"}, declared(from_beir), required(from_beir))
    with pytest.raises(ValueError, match="x lacks folder. It takes folder"):
        checked("x", {}, declared(from_beir), required(from_beir))
    with pytest.raises(ValueError, match=r"'learning_rte'. Did you mean 'learning_rate'\?$"):
        checked("x", {"learning_rte": 1}, declared(LLMEmbedTrainingArguments))
