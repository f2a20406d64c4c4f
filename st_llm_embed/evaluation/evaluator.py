"""Tasks for a trainer: the model that is trained is evaluated as ``evaluate`` would evaluate it, once it is saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mteb
import numpy as np
import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks import AbsTask
from sentence_transformers.base import BaseModel
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from st_llm_embed.evaluation.encoder import PromptedEncoder, check_tasks
from st_llm_embed.evaluation.evaluate import check_settings, choose_tasks, named_if_offline, reseed


class TaskEvaluator(SentenceEvaluator):
    """The main scores of tasks, for ``evaluator=`` of ``LLMEmbedTrainer`` and sentence-transformers' trainers.

    A task's score is logged as ``eval_TASK_FIGURE``, such as ``eval_scifact_ndcg_at_10``, which is what
    ``metric_for_best_model`` takes too; for all of them more is better. The texts are under the prompts that the model
    has at the time. The data are read once, at the start, and nothing is kept on disk, as the weights change.

    Args:
        tasks: folders in the layouts of ``local_tasks``, and names of mteb's tasks or benchmarks.
        split: the split of the folders.
        batch_size: the number of texts encoded at once.

    Raises:
        FileNotFoundError: for a split that a folder does not have.
        ValueError: for an unknown task, two of one name, or a folder in another layout; see ``evaluate``.
        ConnectionError: for a task whose data are on the Hub, while it cannot be reached.
    """

    def __init__(self, tasks: Sequence[str | Path], split: str = "dev", batch_size: int = 32) -> None:
        super().__init__()
        check_settings(batch_size)
        self.batch_size = batch_size
        self.tasks = choose_tasks(tasks, split)
        for task in self.tasks:
            with named_if_offline(task):
                task.load_data()
        self.metrics = [_metric(task) for task in self.tasks]
        self.primary_metric = self.metrics[0]

    def __call__(
        self, model: BaseModel, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """The main score of each task, by ``TASK_FIGURE``. Called by the trainer; nothing is written."""
        check_tasks(type(model), self.tasks)
        encoder = PromptedEncoder(model, "model", "in training")
        metrics = {}
        with _undisturbed(model):
            for task in self.tasks:
                reseed(task)
                (result,) = mteb.evaluate(
                    encoder,
                    task,
                    cache=None,
                    co2_tracker=False,
                    encode_kwargs={"batch_size": self.batch_size, "show_progress_bar": False},
                    show_progress_bar=False,
                ).task_results
                metrics[_metric(task)] = float(result.get_score())
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics


def _metric(task: AbsTask) -> str:
    return f"{task.metadata.name}_{task.metadata.main_score}"


@contextmanager
def _undisturbed(model: BaseModel) -> Iterator[None]:
    """Leave training as it was: its random states, which mteb sets; which modules train; datasets' progress bars."""
    python, numpy, bars_were_off = random.getstate(), np.random.get_state(), are_progress_bars_disabled()
    modes = {module: module.training for module in model.modules()}
    disable_progress_bars()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        if not bars_were_off:
            enable_progress_bars()
