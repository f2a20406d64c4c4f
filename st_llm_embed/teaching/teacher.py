"""What a teacher says of tasks' data sets: the vector of every text, under the teacher's own prompts, kept on disk.

A teacher that takes instructions gets each task's, in its own format; another encodes queries and documents as it
always does. A text that many rows share is encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from st_llm_embed.data.columns import TEACHER_EMBEDDING as COLUMN
from st_llm_embed.data.columns import text_columns
from st_llm_embed.encoding.cache import SHARD_SIZE, EmbeddingCache
from st_llm_embed.encoding.shards import column_hashes
from st_llm_embed.mining.negatives import distinct
from st_llm_embed.mining.teachers import check_teacher
from st_llm_embed.tasks import Task, takes_instructions
from st_llm_embed.teaching.embeddings import TeacherEmbeddings


class Teaching(Protocol):
    """Whoever has vectors of a task's texts."""

    def encode(self, rows: Dataset, task: Task) -> Mapping[str, TeacherEmbeddings]:
        """The vectors of every column of texts, by its name."""


@dataclass(frozen=True)
class Taught:
    """Vectors that were taken before, by the names of the tasks: the teacher itself is needed no more."""

    by_task: Mapping[str, Mapping[str, TeacherEmbeddings]]

    def encode(self, rows: Dataset, task: Task) -> Mapping[str, TeacherEmbeddings]:
        """The vectors of every column of texts, by its name."""
        return self.by_task[task.name]


class Teacher:
    """A large embedding model that gives the vectors to learn from.

    Args:
        model: the teacher, any model that gives each text one vector.
        cache_folder: the folder that keeps the vectors, for later runs and for mining too. Processes that come here at
            once share the work.
        instructions: whether it gets the tasks' instructions. Default: if its prompt for queries has a place for one.
        tokens_per_batch: the number of tokens encoded at once, padding included. Default: 2,048 on a CPU, 32,768
            elsewhere.
        shard_size: the number of vectors in a file, which an interruption loses at most.
        show_progress_bar: whether to show how many texts have their vectors.

    Raises:
        ValueError: for another kind of model, and instructions that the teacher has no place for.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        cache_folder: str | Path,
        *,
        instructions: bool | None = None,
        tokens_per_batch: int | None = None,
        shard_size: int = SHARD_SIZE,
        show_progress_bar: bool = False,
    ) -> None:
        check_teacher(model)
        has_place = takes_instructions(model.prompts, model.default_prompt_name)
        if instructions and not has_place:
            raise ValueError(
                f"instructions=True, and the teacher's prompts {model.prompts} have no place for a task's. Leave it "
                "out: the teacher encodes queries and documents as it always does."
            )
        self.model = model
        self.instructions = has_place if instructions is None else instructions
        self.cache = EmbeddingCache(model, cache_folder, tokens_per_batch, shard_size, show_progress_bar)

    def encode(self, rows: Dataset, task: Task) -> dict[str, TeacherEmbeddings]:
        """The vectors of every column of texts of a task's data set, by its name.

        Raises:
            ValueError: if one is not finite.
        """
        columns = text_columns(rows.column_names)
        prompts: dict[str, str] = {}
        if self.instructions:
            theirs = replace(task, query_prompt=None, document_prompt=None)  # which are for the model that is trained
            prompts = theirs.column_prompts(columns, self.model.prompts, self.model.default_prompt_name)
        sides = task.column_sides(columns)
        encoded = {}
        for column in columns:
            texts = texts_of(rows, column)
            first, number = distinct(column_hashes(texts))
            encode = {"query": self.cache.queries, "document": self.cache.documents}.get(
                sides.get(column, ""), self.cache.texts
            )
            shards = encode(texts, first, prompts.get(column))
            encoded[column] = TeacherEmbeddings.of_shards(shards, number)
        return encoded


def embeddings_of(rows: Dataset, task: Task, teacher: Teaching | None) -> Mapping[str, TeacherEmbeddings]:
    """The vectors of every column of texts of a data set: those that it brings, or else the teacher's.

    Raises:
        ValueError: for columns without vectors, another number of them than of rows, different widths, and vectors
            that are not finite.
    """
    texts = text_columns(rows.column_names)
    brought = sorted(column for column in rows.column_names if column.endswith(COLUMN))
    embeddings: Mapping[str, TeacherEmbeddings]
    if brought and brought != sorted(f"{column}{COLUMN}" for column in texts):
        raise ValueError(
            f"Data set {task.name!r} has the texts {texts}, and vectors of a teacher in {brought}. Give each column "
            f"of texts one, such as {texts[0]}{COLUMN}."
        )
    if brought:
        embeddings = {column: TeacherEmbeddings.of_column(rows, f"{column}{COLUMN}") for column in texts}
    elif teacher is not None:
        embeddings = teacher.encode(rows.select_columns(texts), task)
    else:
        raise ValueError(
            f"Data set {task.name!r} has no vectors of a teacher, and others have. Give the trainer a teacher, or the "
            f"data set a column {texts[0]}{COLUMN}."
        )
    for column, vectors in embeddings.items():
        if vectors.rows != len(rows):
            raise ValueError(
                f"Column {column!r} of data set {task.name!r} has {len(rows)} rows, and the teacher's vectors "
                f"{vectors.rows}."
            )
    return embeddings


def texts_of(rows: Dataset, column: str) -> Dataset:
    """One column of a data set, as ``text``."""
    texts = rows.with_format(None).select_columns([column])
    return texts if column == "text" else texts.rename_column(column, "text")
