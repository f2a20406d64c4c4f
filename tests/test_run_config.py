"""What a stage's settings say is what its trainer does: LoRA's numbers, losses, dev data, the base's LM head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_llm
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_llm_embed import build_model
from st_llm_embed.training import stages, train_stages

ROWS = [{"anchor": f"how {i}?", "positive": f"so {i}", "negative_1": f"no {i}"} for i in range(8)]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llm(tmp_path / "llm")
    save_llm(tmp_path / "untied", tie_word_embeddings=False)
    for name, rows in (("train", ROWS), ("dev", ROWS[:4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("documents.jsonl").write_text(json.dumps({"text": "One cat.\n\nTwo dogs.\n\nA fox."}) + "\n")
    read = {"read": "from_columns", "negatives": ["negative_1"], "instruction": "Find it"}
    return {
        "output": "run",
        "model": {"base": "llm", "recipe": "mean", "max_seq_length": 32},
        "arguments": {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3},
        "data": {
            "docs": {**read, "source": "train.jsonl"},
            "dev": {**read, "source": "dev.jsonl"},
            "texts": {"read": "consecutive_texts", "documents": "documents.jsonl"},
        },
        "stages": [{"name": "one", "data": ["docs"]}],
    }


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that a run makes, the rehearsals' too."""
    made = []
    make = stages._trainer
    monkeypatch.setattr(stages, "_trainer", lambda *arguments: made.append(make(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize("recipe", ["mean", "nv-embed"])
def test_loras_numbers_are_those_that_are_said(settings, recipe):
    settings["model"] |= {"recipe": recipe, "lora": {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"]}}
    model = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    config = model.transformers_model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (3, 12, {"q_proj"})
    assert config.lora_dropout == (0.1 if recipe == "nv-embed" else 0.0)  # the recipe's, where it has one


def test_unknown_numbers_of_lora_are_refused(settings, llm):
    for lora, message in (
        ({"rank": 3}, "lora has the unknown"),
        ({"r": "three"}, "has r='three'. It must be of the type int"),
    ):
        settings["model"]["lora"] = lora
        with pytest.raises(ValueError, match=message):
            train_stages(settings)
    for name, message in (
        ("lora_alfa", "Did you mean 'lora_alpha'"),
        ("layers_to_transform", "use model.add_adapter"),
    ):
        with pytest.raises(ValueError, match=f"lora has the argument '{name}'.*{message}"):
            build_model(llm, lora={name: 3})
    assert build_model(llm, lora={}).transformers_model.peft_config["default"].r == 16  # the recipe's
    assert not Path("run").exists()


def test_matryoshka_is_around_the_contrastive_loss(settings, trainers):
    settings["stages"][0]["loss"] = {"matryoshka_dims": [32, 8]}
    settings["arguments"]["temperature"] = 0.1
    train_stages(settings)
    loss = trainers[-1].loss
    assert isinstance(loss, MatryoshkaLoss) and list(loss.matryoshka_dims) == [32, 8]
    assert loss.loss.scale == pytest.approx(10)
    losses = [row["loss"] for row in trainers[-1].state.log_history if "train_loss" not in row and "loss" in row]
    assert trainers[-1].state.global_step == 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_best_model_by_dev_data_is_kept_and_the_stage_stops_early(settings, trainers):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = {**evaluation, "max_steps": 30, "learning_rate": 10.0}  # which only makes it worse
    settings["stages"][0] |= {"eval_data": ["dev"], "early_stopping_patience": 2, "arguments": arguments}
    train_stages(settings)
    state = trainers[-1].state
    assert state.global_step < 30
    losses = [row["eval_dev_loss"] for row in state.log_history if "eval_dev_loss" in row]
    assert len(losses) == state.global_step and state.best_metric == pytest.approx(min(losses))


def test_dev_data_leave_no_prompt_in_the_model(settings):
    settings["data"]["dev"]["instruction"] = "Something else"
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    settings["stages"][0] |= {"eval_data": ["dev"], "arguments": arguments}
    model = SentenceTransformer(str(train_stages(settings)), trust_remote_code=True)
    assert model.prompts["query"] == "Instruct: Find it\nQuery: " and "dev" not in model.prompts


def test_pretext_stages_have_dev_data_too(settings, trainers):
    settings["model"]["recipe"] = "llara"
    arguments = {"eval_strategy": "steps", "eval_steps": 1}
    settings["stages"][0] |= {"data": ["texts"], "eval_data": ["texts"], "arguments": arguments}
    train_stages(settings)
    assert [row for row in trainers[-1].state.log_history if "eval_loss" in row]


def test_an_untied_llm_is_adapted_by_its_own_lm_head(settings, trainers):
    settings["model"] |= {"base": "untied", "recipe": "llara"}
    settings["stages"][0] |= {"data": ["texts"]}
    with pytest.raises(ValueError, match="does not tie its LM head .*lm_head: base}"):
        train_stages(settings)
    settings["stages"][0]["loss"] = {"lm_head": "base"}
    train_stages(settings)
    loss = trainers[-1].loss
    assert loss.lm_head.weight.data_ptr() != trainers[-1].model[0].model.get_input_embeddings().weight.data_ptr()
    assert not loss.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"matryoshka_dim": [8]}}, "Did you mean 'matryoshka_dims'"),
        ({"loss": {"matryoshka_weights": [1]}}, "has matryoshka_dims=None"),
        (
            {"data": ["texts"], "loss": {"matryoshka_dims": [8]}},
            "of MatryoshkaLoss, and its data are of consecutive_texts",
        ),
        ({"loss": {"lm_head": "base"}}, "of PretextLoss, and has no data of consecutive_texts"),
        ({"eval_data": ["nope"]}, r"names the data sets \['nope'\]"),
        ({"eval_data": ["texts"]}, "of another kind than its data"),
        ({"eval_data": ["dev"]}, "do not go together"),
        ({"arguments": {"eval_strategy": "steps", "eval_steps": 1}}, "do not go together"),
        ({"early_stopping_patience": 2}, "of eval_data to stop by"),
        ({"eval_data": ["dev"], "early_stopping_patience": 0}, "1 or more, of eval_data"),
        ({"data": ["docs", "docs"]}, "names a data set twice"),
        ({"loss": {"matryoshka_dims": [8.5]}}, r"matryoshka_dims=\[8.5\]. It takes widths"),
        ({"loss": {"matryoshka_dims": [8, 4], "matryoshka_weights": [1]}}, "It takes a number for each width"),
        ({"data": ["texts"], "loss": {"lm_head": "basic"}}, "has lm_head='basic'. It must be of the type 'base'"),
        ({"eval_data": ["dev"], "early_stopping_patience": 2, "arguments": {"eval_strategy": "epoch"}}, "Stage 'one'"),
        (
            {"eval_data": ["dev"], "arguments": {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss"}},
            "metric_for_best_model='eval_loss' is not measured. There are: eval_dev_loss",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(settings, change, message, monkeypatch):
    monkeypatch.setattr(stages, "begin", None)
    settings["stages"][0] |= change
    with pytest.raises(ValueError, match=message):
        train_stages(settings)
    assert not Path("run").exists()
