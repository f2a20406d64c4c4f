"""TaskEvaluator: what the trainer logs is what evaluate finds in its checkpoints, and training goes on as before."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_evaluation import TASKS, lines, make_retrieval, text

from st_llm_embed import LLMEmbedTrainer, LLMEmbedTrainingArguments, build_model
from st_llm_embed.evaluation import TaskEvaluator, evaluate, local_task


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A retrieval set, STS, classification, and clustering, which samples; as development sets."""
    root = tmp_path_factory.mktemp("data")
    make_retrieval(root / "questions")
    (root / "questions" / "qrels" / "test.tsv").rename(root / "questions" / "qrels" / "dev.tsv")
    pairs = [{"sentence1": text(2, i), "sentence2": text(3, i), "score": i % 6} for i in range(30)]
    lines(root / "similar" / "dev.jsonl", pairs)
    labelled = [{"text": text(6, i), "label": i % 3} for i in range(60)]
    lines(root / "moods" / "train.jsonl", labelled)
    lines(root / "moods" / "dev.jsonl", labelled[:30])
    lines(root / "topics" / "dev.jsonl", labelled)
    return root


def make_trainer(llm, folder, folders, **kwargs):
    torch.manual_seed(0)
    model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
    rows = {"anchor": [text(1, i) for i in range(12)], "positive": [text(0, 7 * i % 40) for i in range(12)]}
    defaults = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    quiet = {"disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "learning_rate": 0.3, "report_to": []}
    args = LLMEmbedTrainingArguments(str(folder), stage=1, **{**defaults, **quiet, **kwargs})
    evaluator = TaskEvaluator([folders / "similar", folders / "questions"])
    rows = {"questions": Dataset.from_dict(rows)}
    return LLMEmbedTrainer(model, args, rows, tasks=TASKS[:1], evaluator=evaluator)


def test_the_trainer_logs_what_evaluate_finds_and_keeps_the_best_by_it(llm, folders, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_questions_ndcg_at_10"}
    trainer = make_trainer(llm, tmp_path / "run", folders, **best)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "eval_questions_ndcg_at_10" in row]
    figures = [row["eval_questions_ndcg_at_10"] for row in logged]
    assert len(logged) == 5 and len(set(figures)) > 1 and all("eval_similar_cosine_spearman" in row for row in logged)
    tasks = [folders / "questions", folders / "similar"]
    for row in logged:
        found = evaluate(tmp_path / "run" / f"checkpoint-{row['step']}", tasks, tmp_path / "results", split="dev")
        expected = [result.get_score() for result in found.results]
        own = [row["eval_questions_ndcg_at_10"], row["eval_similar_cosine_spearman"]]
        assert own == pytest.approx(expected, abs=1e-6)
    assert trainer.state.best_metric == max(figures) != figures[-1]
    trainer.model.save_pretrained(str(tmp_path / "best"))
    found = evaluate(tmp_path / "best", tasks[:1], tmp_path / "results", split="dev").results[0].get_score()
    assert found == pytest.approx(max(figures), abs=1e-6)
    assert "similar_cosine_spearman" in (tmp_path / "best" / "README.md").read_text()
    assert not list((tmp_path / "run" / "eval").iterdir())


def test_it_gives_the_same_each_time_and_leaves_training_as_it_was(llm, folders, tmp_path, capfd, monkeypatch):
    model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
    evaluator = TaskEvaluator(sorted(folders.iterdir()), batch_size=8)
    assert evaluator.primary_metric == "moods_accuracy" and evaluator.greater_is_better
    capfd.readouterr()
    monkeypatch.setattr(type(evaluator.tasks[0]), "_read", None)  # the data are read once
    model.train()
    model[1].eval()  # frozen, say
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first = evaluator(model, output_path=str(tmp_path), epoch=0.5, steps=3)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert model.training and model[0].training and not model[1].training
    assert evaluator(model) == first
    assert "".join(capfd.readouterr()) == "" and not list(tmp_path.iterdir())
    monkeypatch.undo()
    model.save_pretrained(str(tmp_path / "model"))
    found = evaluate(tmp_path / "model", sorted(folders.iterdir()), tmp_path / "results", split="dev")
    names = [f"{path.name}_{local_task(path, 'dev').metadata.main_score}" for path in sorted(folders.iterdir())]
    assert [*first] == names
    assert [*first.values()] == pytest.approx([result.get_score() for result in found.results], abs=1e-6)


def test_prompts_are_those_of_the_moment(llm, folders):
    model = build_model(llm, "nv-embed", num_latents=8, head_dim=8)
    evaluator = TaskEvaluator([folders / "questions"])
    before = evaluator(model)
    model.prompts["questions"] = TASKS[0].prompt
    assert evaluator(model) != before


def test_what_is_wrong_is_said_before_training(folders):
    with pytest.raises(FileNotFoundError, match="Splits of .*: dev"):
        TaskEvaluator([folders / "questions"], split="test")
    with pytest.raises(ValueError, match="named twice"):
        TaskEvaluator([folders / "questions"] * 2)
    with pytest.raises(ValueError, match="There are no tasks"):
        TaskEvaluator([])
    with pytest.raises(ValueError, match="batch_size=0"):
        TaskEvaluator([folders / "questions"], batch_size=0)
    with pytest.raises(ConnectionError, match="The data of STS13 are on the Hub"):
        TaskEvaluator(["STS13"])


def test_training_needs_no_mteb():
    script = "import sys, st_llm_embed.training; print('mteb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
