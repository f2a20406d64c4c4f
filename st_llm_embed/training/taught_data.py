"""Teaching as a part of a stage: ``teach: {teacher: org/model}`` gives each text of its data the teacher's vector.

The vectors lie in the run's folder ``vectors``, those of mining among them, or where the configuration says. The model
gets a projection into the teacher's space first, in closed form, fitted to the vectors of a sample of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from st_llm_embed.data.columns import TEACHER_EMBEDDING as COLUMN
from st_llm_embed.data.columns import text_columns
from st_llm_embed.encoding.shards import column_hashes
from st_llm_embed.files import read_json, write_json
from st_llm_embed.hub.teacher import FILE, TeacherName, name_teacher
from st_llm_embed.mining import load_teacher
from st_llm_embed.mining.teachers import find_teacher
from st_llm_embed.model import Outline
from st_llm_embed.tasks import Task, encoding_prompts, takes_instructions
from st_llm_embed.teaching import Teacher, TeacherEmbeddings
from st_llm_embed.teaching.alignment import ProjectionFit, of_modules, with_projection, without_length
from st_llm_embed.teaching.embeddings import brings_embeddings
from st_llm_embed.teaching.teacher import Taught, embeddings_of, texts_of
from st_llm_embed.training.configuration import Given
from st_llm_embed.training.run_config import RunConfig, Teach
from st_llm_embed.training.start import unprojected

logger = logging.getLogger(__name__)
Data = Mapping[str, tuple[Dataset, Task]]
ENCODED_AT_ONCE = 2_000  # texts
FEWEST = 10  # that a projection is fitted to


def check_teachers(
    config: RunConfig, data: Mapping[str, Any], outlines: list[Outline | None], given: Given
) -> list[int]:
    """The width of each stage's teacher, once what cannot be taught is refused.

    Raises:
        ValueError: naming the stage.
    """
    widths = []
    space: tuple[int, str | None] | None = None  # that the model is in: its width and its teacher
    for number, stage in enumerate(config.stages):
        teach = stage.teach
        widths.append(0)
        with given.naming("stages", number):
            brings = [name for name in (*stage.data, *stage.eval_data) if _brings_vectors(data[name])]
            if teach is None and brings:
                raise ValueError(
                    f"its data {brings} bring vectors of a teacher, and nothing reads them. Say teach: {{}} in the "
                    "stage, or leave the vectors out."
                )
            if teach is None:
                if space:
                    logger.warning("Stage %s has no teacher: the model leaves the space of %s.", stage.name, space[1])
                continue
            outline = outlines[number]
            arguments = {**config.arguments, **stage.arguments}
            if outline is not None and outline.model is not SentenceTransformer:
                if issubclass(outline.model, SparseEncoder):
                    raise ValueError("has teach, and a model of sparse vectors learns from no teacher. Leave it out.")
                if config.projects(number) or arguments.get("distill_weight", 1.0):
                    raise ValueError(
                        "has teach, and a MultiVectorEncoder has no single vector that could match a teacher's. Match "
                        "its scores: teach: {projection: false}, distill_weight: 0, score_weight: 1.0."
                    )
            matches = arguments.get("distill_weight", 1.0)
            if not (matches or arguments.get("score_weight")):
                raise ValueError(
                    "has teach, and distill_weight and score_weight are 0. Give one of them a value, or leave it out."
                )
            of_stage = {name: data[name] for name in (*stage.data, *stage.eval_data)}
            widths[-1] = check_teach(teach, of_stage, config.model.get("load"))
            trained = [data[name][0] for name in stage.data]
            texts = sum(len(rows) * len(text_columns(rows.column_names)) for rows in trained)
            if config.projects(number) and texts < FEWEST:
                raise ValueError(f"has {texts} texts, and a projection needs {FEWEST} or more, better ten thousand.")
            width = space[0] if space else outline and outline.width
            if space and config.projects(number):
                raise ValueError(
                    f"has a projection into the space of {teach.teacher}, and the model is in that of {space[1]}, "
                    "which it would leave. Say projection: false, or train two models."
                )
            if not config.is_projected(number) and "load" not in config.model:
                for key in ("refit", "train_projection"):
                    if getattr(teach, key):
                        raise ValueError(f"has {key}: true, and no stage has made a projection. Leave it out.")
            if not config.projects(number) and matches and width is not None and width != widths[-1]:
                raise ValueError(
                    f"has a teacher of {widths[-1]} dimensions, and the model has {width}. Leave out projection: "
                    "false, or say truncate_dim, if it is a Matryoshka teacher of more."
                )
            if space and None not in (space[1], teach.teacher) and space[1] != teach.teacher and matches:
                raise ValueError(
                    f"has the teacher {teach.teacher}, and the model is in the space of {space[1]}, which it would "
                    "leave. Say distill_weight: 0 to learn its scores alone, or train two models."
                )
            space = space or (widths[-1], teach.teacher)
    return widths


def _brings_vectors(part: Any) -> bool:
    return isinstance(part, tuple) and brings_embeddings(part[0])


def check_teach(teach: Teach, data: Data, trained: Any) -> int:
    """Check what can be checked of a teacher before it is loaded.

    Args:
        teach: the stage's teacher.
        data: the stage's data sets.
        trained: the folder or Hub id of the model that the run begins with, or None.

    Returns:
        The width of its vectors.

    Raises:
        ValueError: for a teacher that is none or the student, vectors that do not fit each other, settings of a
            teacher that is not there, and instructions that it has no place for.
        OSError: for a teacher that is not there.
    """
    brought = {
        f"{column} of {name}": TeacherEmbeddings.of_column(rows, f"{column}{COLUMN}").dim
        for name, (rows, _) in data.items()
        for column in text_columns(rows.column_names)
        if f"{column}{COLUMN}" in rows.column_names
    }
    without = [name for name, (rows, _) in data.items() if not brings_embeddings(rows)]
    if teach.teacher is None:
        if without:
            raise ValueError(f"has a teach without a teacher, and {without} bring no vectors of one. Name a teacher.")
        default = Teach()
        for key in (
            "revision",
            "trust_remote_code",
            "model_kwargs",
            "truncate_dim",
            "instructions",
            "tokens_per_batch",
        ):
            if getattr(teach, key) != getattr(default, key):
                raise ValueError(f"has {key} in its teach, and no teacher that it could be of. Leave it out.")
        widths = brought
    else:
        if not without:
            raise ValueError(
                f"has the teacher {teach.teacher}, and its data bring all vectors. Leave out one of them."
            )
        if trained is not None and str(trained) == str(teach.teacher):
            raise ValueError(f"has the teacher {teach.teacher}, which is the student. Name another model.")
        if teach.revision is not None and Path(teach.teacher).is_dir():
            raise ValueError(f"has revision={teach.revision!r}, of a Hub repository, and {teach.teacher} is a folder.")
        root = find_teacher(teach.teacher, teach.trust_remote_code, teach.revision)
        saved = root / "config_sentence_transformers.json"
        config = read_json(saved) if saved.is_file() else {}
        if teach.instructions and not takes_instructions(
            config.get("prompts") or {}, config.get("default_prompt_name")
        ):
            raise ValueError(
                f"has instructions: true, and the teacher {teach.teacher} has the prompts "
                f"{config.get('prompts') or {}}, without a place for a task's. Leave it out."
            )
        whole = width_of(root) or _load(teach).get_embedding_dimension()
        if teach.truncate_dim is not None and teach.truncate_dim > whole:
            raise ValueError(f"has truncate_dim={teach.truncate_dim}, and the teacher's vectors {whole} dimensions.")
        widths = {teach.teacher: teach.truncate_dim or whole, **brought}
    if len(set(widths.values())) > 1:
        raise ValueError(f"has vectors of a teacher of different widths: {widths}.")
    return next(iter(widths.values()))


def width_of(root: Path) -> int | None:
    """The width of the vectors of the model in a folder, by its settings alone; None if they do not say."""
    modules = read_json(root / "modules.json") if (root / "modules.json").is_file() else [{"path": ""}]
    whole = root / "config_sentence_transformers.json"
    if whole.is_file() and read_json(whole).get("truncate_dim"):
        return None  # how that and the modules go together is for sentence-transformers to say
    for module in reversed(modules):
        file = root / module["path"] / "config.json"
        settings = read_json(file) if file.is_file() else {}
        modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
        if len(modes) > 1 or not isinstance(settings.get("pooling_mode", ""), str):
            return None  # of several poolings, one beside the other
        for source in (settings, settings.get("text_config") or {}):
            for key in ("out_features", "embedding_dimension", "word_embedding_dimension", "hidden_size"):
                if isinstance(source.get(key), int):
                    return source[key]
    return None


def _load(teach: Teach) -> SentenceTransformer:
    assert teach.teacher is not None  # as its caller has seen
    return load_teacher(
        teach.teacher,
        teach.trust_remote_code,
        teach.revision,
        model_kwargs=teach.model_kwargs or {},
        truncate_dim=teach.truncate_dim,
    )


class StandIn:
    """A teacher of any width that knows nothing, to try a stage with."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode(self, rows: Dataset, task: Task) -> dict[str, TeacherEmbeddings]:
        """Vectors of 0."""
        nothing = TeacherEmbeddings(len(rows), self.dim, self._take)
        return dict.fromkeys(text_columns(rows.column_names), nothing)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), self.dim), np.float32)


def without_vectors(rows: Dataset) -> Dataset:
    """Rows for a stand-in of the teacher."""
    return rows.remove_columns([column for column in rows.column_names if column.endswith(COLUMN)])


@dataclass(frozen=True)
class StageTeacher:
    """What a stage's teacher does: before it, at its beginning and at its end.

    Args:
        teach: the settings.
        data: the stage's data sets.
        eval_data: those that it is evaluated on.
        width: the width of the teacher's vectors.
        vectors: the folder of teachers' vectors.
        projects: whether the stage begins with a new projection.
        seed: the seed of the sample that the projection is fitted to.
        batch_size: the number of texts that the student encodes at once.
        precision: ``bf16`` or ``fp16`` of a student that is trained so.
        matches: whether the student's vectors become the teacher's, and not its scores alone.
    """

    teach: Teach
    data: Data
    eval_data: Data
    width: int
    vectors: Path
    projects: bool
    seed: int
    batch_size: int
    precision: str | None
    matches: bool

    def encode(self) -> Taught:
        """The teacher's vectors of all texts; the teacher is in memory meanwhile only."""
        teacher = None
        if self.teach.teacher is not None:
            teacher = Teacher(
                _load(self.teach),
                self.vectors,
                instructions=self.teach.instructions,
                tokens_per_batch=self.teach.tokens_per_batch,
                show_progress_bar=logger.getEffectiveLevel() <= logging.INFO,
            )
        everything = {**self.data, **self.eval_data}.values()
        return Taught({task.name: embeddings_of(rows, task, teacher) for rows, task in everything})

    def begin(self, model: SentenceTransformer, taught: Taught, fits: bool) -> SentenceTransformer:
        """The model with the projection that it needs.

        Args:
            model: the student.
            taught: what ``encode`` gave.
            fits: whether a new projection is fitted; else its weights are still to be loaded.
        """
        if self.projects and fits:
            pooled = without_length(model)
            model = with_projection(pooled, self._fit(pooled, taught, "begins in"))
        elif self.projects:
            model = unprojected(model, self.width)
        projection = projection_of(model)
        if projection is not None:
            projection.requires_grad_(self.teach.train_projection or not self.matches)
        elif self.teach.refit or self.teach.train_projection:
            raise ValueError(
                "has refit or train_projection, and the model has no projection at its end. Leave it out."
            )
        return model

    def end(self, model: SentenceTransformer, taught: Taught) -> None:
        """Fit the projection once more, where that is asked for."""
        projection = projection_of(model)
        if self.teach.refit and projection is not None:
            before = of_modules(list(model)[: list(model).index(projection)], model)
            projection.load_state_dict(self._fit(before, taught, "ends in").state_dict())

    def space(self) -> TeacherName | None:
        """The teacher whose space the student is in after the stage, if it is known."""
        if self.teach.teacher is None or not self.matches:
            return None
        return name_teacher(self.teach.teacher, self.teach.revision)._replace(dimensions=self.teach.truncate_dim)

    def pin(self, folder: Path, goes_on: bool) -> None:
        """Write which teacher a stage has, or check that one that goes on has the same.

        Raises:
            ValueError: if its files are others than when the stage began.
        """
        if self.teach.teacher is None:
            return
        file, now = folder / FILE, name_teacher(self.teach.teacher, self.teach.revision)
        if goes_on and file.is_file() and (before := read_json(file)) != now._asdict():
            raise ValueError(
                f"has the teacher {now.name} (revision {now.revision}), and began with {before['name']} (revision "
                f"{before['revision']}). Put that back, or choose another output."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now._asdict())

    def _fit(self, pooled: SentenceTransformer, taught: Taught, how: str) -> Dense:
        """A projection that is fitted to a sample of the data, under the training prompts."""
        names = [(name, column) for name, (rows, _) in self.data.items() for column in text_columns(rows.column_names)]
        texts = np.concatenate([column_hashes(texts_of(self.data[name][0], column)) for name, column in names])
        different = np.unique(texts, return_index=True)[1]
        chosen = np.sort(np.random.default_rng(self.seed).permutation(different)[: self.teach.sample])
        starts = np.cumsum([0, *(len(self.data[name][0]) for name, _ in names)])
        fit = ProjectionFit(pooled.get_embedding_dimension(), self.width, texts[chosen], seed=self.seed)
        tasks, default = [task for _, task in self.data.values()], pooled.default_prompt_name
        prompts = pooled.prompts | encoding_prompts(tasks, pooled.prompts, default)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision or "")
        for place, (name, column) in enumerate(names):
            rows, task = self.data[name]
            of_column = chosen[(starts[place] <= chosen) & (chosen < starts[place + 1])] - starts[place]
            prompt = task.column_prompts([column], prompts, default).get(column, "")
            how_encoded = {"prompt": prompt, "task": task.column_sides([column]).get(column)}
            for part in _parts(of_column, ENCODED_AT_ONCE):
                with torch.autocast(pooled.device.type, half, enabled=half is not None):
                    x = pooled.encode(
                        list(rows.with_format(None)[part][column]),
                        batch_size=self.batch_size,
                        show_progress_bar=False,
                        normalize_embeddings=False,
                        **how_encoded,
                    )
                fit.add(np.asarray(x, np.float32), taught.by_task[task.name][column].take(part))
        projection, alignment = fit.solve()
        count = alignment.held_out + alignment.texts
        logger.warning(
            f"The student {how} its teacher's space: mean cosine {alignment.cosine:.3f} on {alignment.held_out} texts "
            f"held out of {count}."
        )
        return projection


def projection_of(model: SentenceTransformer) -> Dense | None:
    """The ``Dense`` module that a model ends in, before its ``Normalize``; None of a model that ends otherwise."""
    last = [module for module in model if not isinstance(module, Normalize)][-1]
    return last if isinstance(last, Dense) else None


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
