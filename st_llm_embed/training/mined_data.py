"""Mining as a step of a run: ``mine: {teacher: ..., num_negatives: 7}`` gives a data set's rows hard negatives first.

With a ``judge`` they also get its scores, which a stage reads that has a ``soft_label_weight``. What is mined lies in
the run's folder ``mined/NAME``, as the command ``mine`` writes it, with the vectors and the scores beside it in
``vectors``, where what teaches finds them too: a run that was killed goes on there.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from sentence_transformers import SentenceTransformer

from st_llm_embed.data import load_corpus, load_rows
from st_llm_embed.data.columns import SCORES, score_column
from st_llm_embed.files import read_json
from st_llm_embed.mining import load_judge, load_teacher, mine_negatives
from st_llm_embed.mining.judges import check_judged, find_judge
from st_llm_embed.mining.negatives import check_numbers
from st_llm_embed.mining.search import check_faiss
from st_llm_embed.mining.teachers import find_teacher
from st_llm_embed.tasks import Task, takes_instructions
from st_llm_embed.training.run_config import MINE
from st_llm_embed.training.schema import required

logger = logging.getLogger(__name__)
PROMPT_OF = {"query": "query_prompt", "document": "corpus_prompt"}
OF_SOURCES = ("teacher", "trust_remote_code", "corpus", "corpus_columns", "judge")


def check_mining(rows: Dataset, settings: Mapping[str, Any], stages: list[str]) -> None:
    """Check what can be checked of mining before it.

    Args:
        rows: the data set.
        settings: the configuration's ``mine``.
        stages: the names of the stages, of which one may be its teacher or its judge.

    Raises:
        ValueError: for rows that have negatives already, a teacher or a judge that is none, a judge's settings without
            a judge, or a corpus that cannot be read.
        OSError: for a teacher, a judge or a corpus that is not there; whether a server answers is seen when it is
            asked.
        ImportError: for what is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("mine draws a picture of the scores. Fix: pip install 'st-llm-embed[plots]'.")
    check_faiss(settings.get("use_faiss"))
    if "positive" not in rows.column_names:
        raise ValueError(f"mine finds negatives of pairs, and the rows have the columns {rows.column_names}.")
    if negatives := [name for name in rows.column_names if name.startswith("negative")]:
        raise ValueError(f"mine would replace {', '.join(negatives)}. Leave out negatives, or mine.")
    check_numbers(**{name: settings.get(name, MINE.model_fields[name].default) for name in required(check_numbers)})
    trusts, judge = settings.get("trust_remote_code", False), settings.get("judge")
    if settings["teacher"] not in stages:
        find_teacher(settings["teacher"], trusts)
    margins = (settings.get(f"judge_{of}_margin") for of in ("relative", "absolute"))
    check_judged(judge is not None, settings.get("judged", "drop"), *margins)
    if judge is not None and judge not in stages:
        find_judge(judge, trusts)
    if settings.get("corpus"):
        load_corpus(settings["corpus"], settings.get("corpus_columns"))
    elif "corpus_columns" in settings:
        raise ValueError("mine has corpus_columns, and no corpus whose columns they could be. Leave it out.")


def stand_in(rows: Dataset, settings: Mapping[str, Any]) -> Dataset:
    """Rows of the columns that mining gives, to try the training with: each positive stands for its negatives, and 0
    for a judge's scores."""
    positives = rows.select_columns(["positive"])
    number = settings.get("num_negatives", MINE.model_fields["num_negatives"].default)
    columns = [positives.rename_column("positive", f"negative_{i + 1}") for i in range(number)]
    if settings.get("judge") is not None:
        columns.append(score_column(np.zeros((len(rows), 1 + number), np.float32)))
    return concatenate_datasets([rows.select_columns(["anchor", "positive"]), *columns], axis=1)


def without_scores(rows: Dataset) -> Dataset:
    """Rows for a stage that does not read a judge's scores."""
    return rows.remove_columns(SCORES) if SCORES in rows.column_names else rows


def mined_rows(
    rows: Dataset,
    task: Task,
    settings: Mapping[str, Any],
    folder: Path,
    vectors: Path,
    teachers: Mapping[str, Path],
) -> Dataset:
    """The rows with their negatives: mined by the first process that comes here, read by the others.

    Args:
        rows: the data set.
        task: its task, whose instruction the teacher gets if its prompts have a place for one.
        settings: what the configuration says of the data set, ``mine`` too.
        folder: the folder to write, of the name of the data set; what other settings gave there is replaced.
        vectors: the folder of the teachers' vectors.
        teachers: the models of the stages that are finished, by name.
    """
    from st_llm_embed.mining.histogram import write_mined  # which needs matplotlib

    mine = settings["mine"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        report = folder / "report.json"
        if report.is_file() and read_json(report)["settings"] != settings:
            shutil.rmtree(folder)
        if not report.is_file():
            trusts, judge = mine.get("trust_remote_code", False), None
            if mine.get("judge") is not None:  # first: a server may not answer
                judge = load_judge(str(teachers.get(mine["judge"], mine["judge"])), trusts, task.instruction)
                if isinstance(judge, SentenceTransformer):
                    judge.prompts |= _prompts(judge, task)
            teacher = load_teacher(str(teachers.get(mine["teacher"], mine["teacher"])), trusts)
            of_sides = {} if "query_prompt" in mine else _prompts(teacher, task)
            prompts = {PROMPT_OF[side]: prompt for side, prompt in of_sides.items()}
            mined = mine_negatives(
                rows,
                teacher,
                load_corpus(mine["corpus"], mine.get("corpus_columns")) if mine.get("corpus") else None,
                judge=judge,
                cache_folder=vectors,
                **{**prompts, **{key: value for key, value in mine.items() if key not in OF_SOURCES}},
            )
            write_mined(mined, folder, settings)
            if len(mined.dropped):
                logger.warning(
                    "Of %s, %d of %d rows got too few negatives, and are left out: %s says why.",
                    folder.name,
                    len(mined.dropped),
                    mined.report.rows,
                    folder / "dropped.jsonl",
                )
    return load_rows(folder / "train.jsonl")


def _prompts(model: SentenceTransformer, task: Task) -> dict[str, str]:
    """The prompts of both sides with the task's instruction; none for a model that has no place for one."""
    if not takes_instructions(model.prompts, model.default_prompt_name):
        return {}
    theirs = replace(task, query_prompt=None)  # which is for the model that is trained
    prompt = theirs.encoding_prompt(model.prompts, model.default_prompt_name)
    return {"query": prompt, **({"document": prompt} if task.symmetric else {})}
