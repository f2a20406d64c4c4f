"""Several models on the same tasks: one table of all figures, and by how much each differs from the first.

Where a task's score is a mean over queries, a difference is paired over them and has an interval, that of a bootstrap.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mteb.abstasks import AbsTask
from mteb.results import TaskResult

from st_llm_embed.evaluation.bootstrap import DRAWS, paired_interval
from st_llm_embed.evaluation.evaluate import (
    Evaluated,
    check_length,
    check_settings,
    choose_tasks,
    evaluate_encoder,
    find_model,
    load_encoder,
    read_through,
)
from st_llm_embed.evaluation.model_names import model_names
from st_llm_embed.evaluation.query_scores import QueryScores, kept_query_scores, mean_score, measure_of
from st_llm_embed.files import check_writable, read_json, written_beside
from st_llm_embed.modules.root_config import inner_config
from st_llm_embed.trust import check_base, check_no_code, loading

ROUNDED = 1e-5  # mteb's scores are


class Difference(NamedTuple):
    """By how much a model scores higher than the first.

    Args:
        task: the name of the task.
        model: the name of the model in the table.
        difference: the difference of the main scores.
        interval: where the difference lies in 95 % of the samples of queries; None where there are no scores by query.
    """

    task: str
    model: str
    difference: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Compared:
    """What ``compare`` gives.

    Args:
        results: the results of each task, as mteb has them, by the name of the model in the table.
        differences: those of the other models to the first, task by task.
        table: all figures and differences as a table in Markdown.
        folder: the folder in which it is, ``comparison.md``.
    """

    results: dict[str, list[TaskResult]]
    differences: list[Difference]
    table: str
    folder: Path


def compare(
    sources: Sequence[str | Path],
    tasks: Sequence[str | Path],
    output: str | Path,
    *,
    split: str = "test",
    batch_size: int = 32,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    max_seq_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Compared:
    """Evaluate several models, one at a time, and compare them with the first.

    The results of each are kept as by ``evaluate``, and taken from there. Results without the scores by query that are
    needed, as other versions of this package left them, are computed anew.

    Args:
        sources: the models' folders or Hub ids, two or more.
        tasks, output, split, batch_size, dtype, attn_implementation, max_seq_length, device, trust_remote_code: see
            ``evaluate``.

    Raises:
        ValueError: for fewer than two models, or as ``evaluate`` does; before any model is loaded.
        FileNotFoundError, OSError, ConnectionError: as ``evaluate`` does.
    """
    if len(sources) < 2:
        raise ValueError(f"There are {len(sources)} models to compare. Name two or more, or use evaluate.")
    check_settings(batch_size, dtype, attn_implementation, device)
    check_writable(Path(output))
    chosen = choose_tasks(tasks, split)
    read_through(chosen)
    found = []
    for source in sources:
        with loading(source):  # says which it is that has an error
            root, commit = find_model(source)
            if max_seq_length is not None:
                check_length(max_seq_length, _positions(root))
        check_no_code(root, trust_remote_code)
        check_base(root, trust_remote_code)
        found.append((root, commit))
    evaluated: dict[str, Evaluated] = {}
    for name, source, model in zip(model_names(sources), sources, found, strict=True):
        evaluated[name] = evaluate_encoder(
            load_encoder(
                source, model, dtype, attn_implementation, max_seq_length, device, trust_remote_code=trust_remote_code
            ),
            name,
            chosen,
            Path(output),
            batch_size,
            by_query=True,
        )
        gc.collect()  # a model and its card hold each other: without, the next would be loaded beside it
    differences = _differences(chosen, evaluated)
    table = _table(chosen, evaluated, differences)
    with written_beside(Path(output, "comparison.md")) as staged:
        staged.write_text(table, encoding="utf-8")
    return Compared({name: own.results for name, own in evaluated.items()}, differences, table, Path(output))


def _positions(root: Path) -> int | None:
    """The positions of a saved model's LLM; None if its configuration does not say."""
    for file in (root / "config.json", *sorted(root.glob("*/config.json"))):
        config = inner_config(read_json(file)) if file.is_file() else {}
        for part in (config, config.get("text_config") or {}):
            if "max_position_embeddings" in part:
                return part["max_position_embeddings"]
    return None


def _differences(tasks: Sequence[AbsTask], evaluated: Mapping[str, Evaluated]) -> list[Difference]:
    first, *others = evaluated
    differences = []
    for place, task in enumerate(tasks):
        score, queries = _scores(evaluated[first], place, task)
        for name in others:
            other_score, other_queries = _scores(evaluated[name], place, task)
            paired = None if queries is None or other_queries is None else _pair(queries, other_queries)
            interval = None if paired is None else paired_interval(paired)
            differences.append(Difference(task.metadata.name, name, other_score - score, interval))
    return differences


def _scores(evaluated: Evaluated, place: int, task: AbsTask) -> tuple[float, QueryScores | None]:
    """The main score of a task and those of its queries, if they are what it is the mean of: some tasks have a way of
    their own to score what was retrieved."""
    result = evaluated.results[place]
    score = float(result.get_score())
    queries = kept_query_scores(evaluated.folder, task, result) if measure_of(task) else None
    return score, queries if queries is not None and abs(mean_score(queries) - score) <= ROUNDED else None


def _pair(first: QueryScores, other: QueryScores) -> list[np.ndarray]:
    """The differences of the scores of each query, subset by subset."""
    return [
        np.array([other[split][subset][query] - score for query, score in queries.items()])
        for split, subsets in first.items()
        for subset, queries in subsets.items()
    ]


def _table(tasks: Sequence[AbsTask], evaluated: Mapping[str, Evaluated], differences: Sequence[Difference]) -> str:
    """The main scores, the differences, and the mean of each kind of task."""
    first, *others = names = [name.replace("|", "\\|") for name in evaluated]
    scores = [[own.results[place].get_score() for own in evaluated.values()] for place in range(len(tasks))]
    lines = []
    for model in evaluated.values():
        prompts = dict.fromkeys(f"`{prompt}`".replace("\n", "\\n") if prompt else "none" for prompt in model.prompts)
        lines.append(f"- {model.table.splitlines()[0]} Queries' prompts: {', '.join(prompts)}.")
    lines += [
        "",
        f"Differences are to {first}. In brackets: where they lie in 95 % of {DRAWS:,} samples of the queries, which "
        "are the same for both models. No interval: the figure is no mean over queries.",
        "",
        f"| task | kind | figure | {' | '.join([*names, *(f'{name} minus {first}' for name in others)])} |",
        "|" + " --- |" * (3 + len(names) + len(others)),
    ]
    for task, own in zip(tasks, scores, strict=True):
        cells = [task.metadata.name, task.metadata.type, task.metadata.main_score, *(f"{score:.4f}" for score in own)]
        cells += [_shown(difference) for difference in differences if difference.task == task.metadata.name]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| kind | tasks | {' | '.join(f'mean of {name}' for name in names)} |"]
    lines += ["|" + " --- |" * (2 + len(names))]
    kinds: dict[str, list[list[float]]] = {}
    for task, own in zip(tasks, scores, strict=True):
        kinds.setdefault(task.metadata.type, []).append(own)
    for kind, rows in kinds.items():
        cells = [kind, f"{len(rows)}", *(f"{mean:.4f}" for mean in np.mean(rows, axis=0))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(difference: Difference) -> str:
    score, *interval = (round(value, 4) + 0.0 for value in (difference.difference, *(difference.interval or ())))
    if not interval:
        return f"{score:+.4f} (no interval)"
    return f"{score:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
