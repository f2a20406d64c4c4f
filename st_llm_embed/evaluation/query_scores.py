"""The main score of a retrieval task by query, which a paired comparison needs; kept beside mteb's results.

mteb reports means alone. What it retrieved is scored once more, query by query, by the judgements and by the code that
mteb itself uses, pytrec_eval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytrec_eval
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.results import TaskResult

from st_llm_embed.files import read_json, write_json, written_beside

# mteb's name of a figure -> pytrec_eval's.
MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P", "hit_rate": "success"}

QueryScores = dict[str, dict[str, dict[str, float]]]  # split -> subset -> query -> score, in mteb's order


def measure_of(task: AbsTask) -> str | None:
    """pytrec_eval's name of a task's main score, such as ``ndcg_cut_10``; None where it is no mean over queries."""
    figure, _, cutoff = task.metadata.main_score.rpartition("_at_")
    if not isinstance(task, AbsTaskRetrieval) or figure not in MEASURES or not cutoff.isdigit():
        return None
    return f"{MEASURES[figure]}_{cutoff}"


def score_queries(task: AbsTask, measure: str, predictions: Path) -> QueryScores:
    """The main score by query.

    Args:
        task: the task.
        measure: what ``measure_of`` says of it.
        predictions: the file that mteb wrote: subset, split, query, document, score.
    """
    name, _, cutoff = measure.rpartition("_")
    retrieved = json.loads(predictions.read_text(encoding="utf-8"))
    task.load_data()
    task.convert_v1_dataset_format_to_v2(num_proc=None)
    scores: QueryScores = {}
    for subset, splits in task.dataset.items():
        for split in splits.keys() & retrieved.get(subset, {}).keys():
            run = retrieved[subset][split]
            if task.ignore_identical_ids:
                run = {
                    query: {doc: score for doc, score in ranked.items() if doc != query}
                    for query, ranked in run.items()
                }
            judged = {query: grades for query, grades in splits[split]["relevant_docs"].items() if query in run}
            figures = pytrec_eval.RelevanceEvaluator(judged, {f"{name}.{cutoff}"}).evaluate(run)
            scores.setdefault(split, {})[subset] = {query: own[measure] for query, own in figures.items()}
    task.unload_data()
    return scores


def mean_score(scores: QueryScores) -> float:
    """The task's score as mteb has it: the mean of the means of the subsets of each split."""
    return float(
        np.mean([np.mean(list(queries.values())) for subsets in scores.values() for queries in subsets.values()])
    )


def keep_query_scores(folder: Path, task: AbsTask, scores: QueryScores) -> None:
    """Add scores to those of other splits and subsets of the same data."""
    kept = _read(folder, task)
    for split, subsets in scores.items():
        kept[split] = kept.get(split, {}) | subsets
    with written_beside(_file(folder, task)) as staged:
        write_json(staged, {"dataset_revision": task.metadata.revision, "scores": kept})


def kept_query_scores(folder: Path, task: AbsTask, result: TaskResult) -> QueryScores | None:
    """The scores by query behind a result; None where they are not all there."""
    kept = _read(folder, task)
    try:
        return {
            split: {subset["hf_subset"]: kept[split][subset["hf_subset"]] for subset in subsets}
            for split, subsets in result.scores.items()
        }
    except KeyError:
        return None


def _read(folder: Path, task: AbsTask) -> QueryScores:
    if not _file(folder, task).is_file():
        return {}
    kept: Mapping = read_json(_file(folder, task))
    return kept["scores"] if kept["dataset_revision"] == task.metadata.revision else {}


def _file(folder: Path, task: AbsTask) -> Path:
    return folder / "queries" / f"{task.metadata.name}.json"  # not in mteb's folder, of which it takes every file
