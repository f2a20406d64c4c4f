"""Mining as a step of a run: ``mine: {teacher: ..., num_negatives: 7}`` gives a data set's rows hard negatives first.

What is mined lies in the run's folder ``mined/NAME``, as the command ``mine`` writes it, with the vectors beside it in
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

from datasets import Dataset, concatenate_datasets
from filelock import FileLock

from st_llm_embed.data import load_corpus, load_rows
from st_llm_embed.files import read_json
from st_llm_embed.mining import load_teacher, mine_negatives
from st_llm_embed.mining.negatives import check_numbers
from st_llm_embed.mining.search import check_faiss
from st_llm_embed.mining.teachers import find_teacher
from st_llm_embed.tasks import Task, takes_instructions
from st_llm_embed.training.run_config import MINE
from st_llm_embed.training.schema import required

logger = logging.getLogger(__name__)
OF_SOURCES = ("teacher", "trust_remote_code", "corpus", "corpus_columns")


def check_mining(rows: Dataset, settings: Mapping[str, Any], stages: list[str]) -> None:
    """Check what can be checked of mining before it.

    Args:
        rows: the data set.
        settings: the configuration's ``mine``.
        stages: the names of the stages, of which one may be its teacher.

    Raises:
        ValueError: for rows that have negatives already, a teacher that is none, or a corpus that cannot be read.
        OSError: for a teacher or a corpus that is not there.
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
    if settings["teacher"] not in stages:
        find_teacher(settings["teacher"], settings.get("trust_remote_code", False))
    if settings.get("corpus"):
        load_corpus(settings["corpus"], settings.get("corpus_columns"))
    elif "corpus_columns" in settings:
        raise ValueError("mine has corpus_columns, and no corpus whose columns they could be. Leave it out.")


def stand_in(rows: Dataset, settings: Mapping[str, Any]) -> Dataset:
    """Rows of the columns that mining gives, to try the training with: each positive stands for its negatives."""
    positives = rows.select_columns(["positive"])
    number = settings.get("num_negatives", MINE.model_fields["num_negatives"].default)
    columns = [positives.rename_column("positive", f"negative_{i + 1}") for i in range(number)]
    return concatenate_datasets([rows.select_columns(["anchor", "positive"]), *columns], axis=1)


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
            teacher = load_teacher(
                str(teachers.get(mine["teacher"], mine["teacher"])), mine.get("trust_remote_code", False)
            )
            prompts = {}
            if "query_prompt" not in mine and takes_instructions(teacher.prompts, teacher.default_prompt_name):
                theirs = replace(task, query_prompt=None)  # which is for the model that is trained
                prompt = theirs.encoding_prompt(teacher.prompts, teacher.default_prompt_name)
                prompts = {"query_prompt": prompt, **({"corpus_prompt": prompt} if task.symmetric else {})}
            mined = mine_negatives(
                rows,
                teacher,
                load_corpus(mine["corpus"], mine.get("corpus_columns")) if mine.get("corpus") else None,
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
