"""model_init and hyperparameter search: each trial trains the model that was made for it, as its arguments say."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_llm_embed import (
    InstructionContrastiveLoss,
    LLMEmbedTrainer,
    LLMEmbedTrainingArguments,
    PretextLoss,
    Task,
    build_model,
)

DOCS = Task("docs", "Find it")
COLUMNS = ("anchor", "positive", "negative")
ROWS = Dataset.from_dict({column: [f"{column} about cats {i}" for i in range(16)] for column in COLUMNS})
PRETEXT = Dataset.from_dict({"text": [f"the cat sat on {i}" for i in range(8)], "next": ["dogs bark"] * 8})


@pytest.fixture
def arguments(tmp_path) -> LLMEmbedTrainingArguments:
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return LLMEmbedTrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=2, **quiet)


@pytest.fixture
def made() -> list[SentenceTransformer]:
    return []


def trial(trainer: LLMEmbedTrainer, **parameters) -> list[float]:
    """The losses of a run with a new model: a search sets the arguments of each trial in the same way."""
    for name, value in parameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recipe", ["mean", "llara"])
@pytest.mark.parametrize("loss", [None, InstructionContrastiveLoss, "around"])
def test_a_trial_trains_its_own_model_under_its_own_prompts(llm, arguments, made, recipe, loss):
    def model_init() -> SentenceTransformer:
        made.append(build_model(llm, recipe))
        return made[-1]

    if loss == "around":

        def loss(model: SentenceTransformer) -> MatryoshkaLoss:
            return MatryoshkaLoss(model, InstructionContrastiveLoss(model), [32, 8])

    trainer = LLMEmbedTrainer(None, arguments, {"docs": ROWS}, loss=loss, tasks=[DOCS], model_init=model_init)
    plain = build_model(llm, recipe)
    expected = DOCS.column_prompts(COLUMNS, plain.prompts, plain.default_prompt_name)
    losses = [trial(trainer, learning_rate=rate) for rate in (1e-3, 1e-3, 1e-2)]
    assert losses[0] == losses[1] and losses[1][1] != losses[2][1]
    model = made[-1]
    assert trainer.model is model and all(module is model for module in _models(trainer.loss))
    assert trainer.args.prompts["docs"] == expected
    assert model.prompts["docs"] == model.prompts["query"] == expected["anchor"]
    fixed = build_model(llm, recipe)
    again = LLMEmbedTrainer(fixed, arguments, {"docs": ROWS}, loss=loss and loss(fixed), tasks=[DOCS])
    again.args.learning_rate = 1e-2
    again.train()
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses[2]
    for name, weight in fixed.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)


def _models(loss: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in loss.modules() if isinstance(module, SentenceTransformer)]


def test_a_trials_arguments_reach_loss_groups_and_collator(llm, arguments):
    trainer = LLMEmbedTrainer(None, arguments, {"docs": ROWS}, tasks=[DOCS], model_init=lambda: build_model(llm))
    trial(trainer, temperature=0.5, mini_batch_size=2)
    assert trainer.loss.get_config_dict()["scale"] == 2.0 and trainer.loss.mini_batch_size == 2
    trial(trainer, stage=2)
    assert not trainer.loss.in_batch_negatives and set(trainer.data_collator.groups.values()) == {-1}
    assert arguments.temperature is None and arguments.stage == 1  # the caller's own


def test_a_trials_argument_without_effect_is_refused(llm, arguments):
    loss = InstructionContrastiveLoss
    trainer = LLMEmbedTrainer(
        None, arguments, {"docs": ROWS}, None, loss, tasks=[DOCS], model_init=lambda: build_model(llm)
    )
    with pytest.raises(ValueError, match="temperature=0.5 has no effect: the loss is one of your own"):
        trial(trainer, temperature=0.5)


def test_each_trial_reads_its_models_length(llm, arguments):
    lengths = [64, 64, 32]  # the host makes two models before it trains

    def model_init() -> SentenceTransformer:
        return build_model(llm, max_seq_length=lengths.pop(0))

    long = Dataset.from_dict({column: ["a cat " * 80] * 8 for column in COLUMNS})
    task = Task("docs", "Find it", in_batch_negatives=False)
    trainer = LLMEmbedTrainer(None, arguments, {"docs": long}, tasks=[task], model_init=model_init)
    trainer.train()
    assert not lengths and next(iter(trainer.get_train_dataloader()))["positive_input_ids"].shape[1] == 32


@pytest.mark.parametrize("as_function", [True, False])
def test_pretext_trials_project_with_their_own_embeddings(llm, arguments, as_function):
    """The loss reads the model's vocabulary when it is made: a stale one would predict through another model's."""

    def loss(model: SentenceTransformer) -> PretextLoss:
        return PretextLoss(model, num_tokens=2)

    given = loss if as_function else loss(build_model(llm, "llara"))
    trainer = LLMEmbedTrainer(None, arguments, PRETEXT, loss=given, model_init=lambda: build_model(llm, "llara"))
    first, second = trial(trainer, learning_rate=1e-2), trial(trainer, learning_rate=1e-2)
    fixed = build_model(llm, "llara")
    plain = LLMEmbedTrainer(fixed, arguments, PRETEXT, loss=loss(fixed))
    plain.args.learning_rate = 1e-2
    plain.train()
    assert first == second == [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert trainer.loss._vocabulary_projection()[0] is trainer.model[0].model.get_input_embeddings().weight


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")
@pytest.mark.slow
def test_optuna_finds_the_temperature(llm, arguments):
    arguments.eval_strategy, arguments.eval_steps = "steps", 2
    trainer = LLMEmbedTrainer(
        None, arguments, {"docs": ROWS}, {"docs": ROWS}, tasks=[DOCS], model_init=lambda: build_model(llm, "llara")
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"temperature": trial.suggest_categorical("temperature", [0.02, 100.0])},
        compute_objective=lambda metrics: metrics["eval_docs_loss"],
        backend="optuna",
        direction="maximize",
        n_trials=4,
    )
    assert best.objective > 0
