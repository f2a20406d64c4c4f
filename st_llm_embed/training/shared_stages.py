"""Finished stages that runs share (``shared_stages: FOLDER``): what runs begin with in the same way is trained once.

A stage's model lies there under its name and a hash of its *beginning*: all that its weights go by, of this stage and
those before it. That is the seed, the model, the data, the arguments, the losses, the teachers, the name of the model,
the version of this package and the number of processes. What leaves the weights as they are is not in it
(``changes.HARMLESS``). Evaluations are: besides ending a stage early, they draw from the random numbers that dropout
draws from too.

Files count by their paths, as an adapter names its base by one, and by the SHA-256 of their contents, which a process
reads once as long as size and time stay: a file that was written again with the same content is the same. A model of
the Hub counts by the commits in the Hub's cache on this machine, a data set of the Hub by its name and ``revision``
alone.

A model comes there whole or not at all. The run's own folder of the stage keeps the beginning too, from the first
step: what began otherwise than the configuration says now, with other files or in larger batches, is not handed on.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from st_llm_embed.files import files_of, find_damaged, hash_files, read_json, write_json, written_beside
from st_llm_embed.training.changes import EVALUATION, HARMLESS, model_kind, said
from st_llm_embed.training.run_config import (
    ARGUMENTS,
    LOSS,
    MINE,
    READS,
    STAGE,
    TEACH,
    RunConfig,
    Stage,
)
from st_llm_embed.training.run_folder import LOCK
from st_llm_embed.training.schema import HUB_ID, Part, path_keys
from st_llm_embed.training.stage_data import files_beside
from st_llm_embed.version import __version__

logger = logging.getLogger(__name__)
BEGINNING = "beginning.json"
# Text to the schema, as other things than paths may be said there.
PATHS_AS_TEXT = ("path", "data_files", "data_dir", "tokenizer_name_or_path", "teacher", "judge")


@dataclass(frozen=True)
class SharedStages:
    """The folder of finished stages, as a run sees it.

    Args:
        folder: the folder.
        beginnings: the beginning of each stage of the run.
        places: the folder of each stage in the run's output.
    """

    folder: Path
    beginnings: list[dict[str, Any]]
    places: list[Path]

    def find(self, number: int) -> Path | None:
        """Where the model of a stage lies, if it is there and whole."""
        found = self._place(number)
        if not found.is_dir():
            return None
        if faults := self._faults(number):
            logger.warning("%s is passed over: %s.", found, faults)
            return None
        return found / "model"

    def take(self, number: int) -> None:
        """Put the model of a stage that is there into the run, as if it had been trained."""
        model = self.places[number] / "model"
        if not model.is_dir() and self._begun_so(number) and (found := self.find(number)) is not None:
            logger.warning("Stage %s is taken from %s.", self.beginnings[number]["stages"][-1]["name"], found)
            self.note(number)
            with written_beside(model) as staged:
                shutil.copytree(found, staged)

    def note(self, number: int) -> None:
        """Write beside a stage that begins what it begins with."""
        with written_beside(self.places[number] / BEGINNING) as staged:
            write_json(staged, self.beginnings[number])

    def keep(self, number: int) -> None:
        """Put a finished stage's model there, for other runs, unless it is there already. What hinders that is a
        warning, as the run has its own."""
        found, model = self._place(number), self.places[number] / "model"
        if not self._begun_so(number + 1):
            logger.warning(
                "The model in %s is not kept for other runs: its stage, or one before it, did not begin as the "
                "configuration says now.",
                model,
            )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK):  # of two processes that bring the same stage, the first one's is kept
                if found.is_dir() and self._faults(number):
                    shutil.rmtree(found)
                if not found.is_dir():
                    with written_beside(found) as staged:
                        shutil.copytree(model, staged / "model")
                        write_json(
                            staged / BEGINNING, {"model": _content(model), "beginning": self.beginnings[number]}
                        )
        except OSError as error:
            logger.warning("The model in %s is not kept for other runs: %s", model, error)

    def _place(self, number: int) -> Path:
        beginning = self.beginnings[number]
        return self.folder / f"{beginning['stages'][-1]['name']}-{_digest(beginning)}"

    def _begun_so(self, count: int) -> bool:
        """Whether the run's first stages began as its configuration says now, and with files as they are now."""
        files = [place / BEGINNING for place in self.places[:count]]
        return all(_read(file) == beginning for file, beginning in zip(files, self.beginnings, strict=False))

    def _faults(self, number: int) -> str | None:
        """What is wrong with the model of a stage there, in words."""
        found = self._place(number)
        if damaged := find_damaged(found):
            return f"cut off or missing are {', '.join(damaged)}"
        of = _read(found / BEGINNING)
        if of.get("beginning") != self.beginnings[number]:
            return f"its {BEGINNING} is missing, damaged or of another stage"
        return None if _content(found / "model") == of.get("model") else "its files are not those that were put there"


def _read(file: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing of one that is not there, or cut off."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def beginnings(config: RunConfig, arguments: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What the weights go by that each stage leaves, as JSON.

    Args:
        config: the configuration.
        arguments: the training arguments of each stage.
        folder: what the configuration's paths are relative to.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    run = {
        "version": __version__,
        # Each takes a batch; one process alone spreads over all GPUs.
        "processes": world if world > 1 else max(1, torch.cuda.device_count()),
        "seed": config.seed,
        "name": config.name,
    }
    stages = [_of_stage(stage, config, own, folder) for stage, own in zip(config.stages, arguments, strict=True)]
    found = [{**run, "stages": stages[:count]} for count in range(1, len(stages) + 1)]
    return json.loads(json.dumps(found, default=str))  # tuples and paths as they are read again


def _of_stage(stage: Stage, config: RunConfig, arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the weights go by, of one stage."""
    # Of what was saved the best model is taken, where one is.
    harmless = tuple(name for name in HARMLESS if name != "save_" or not arguments.get("load_best_model_at_end"))
    counted = {key: value for key, value in arguments.items() if not key.startswith(harmless)}
    model = config.model_of(stage)
    return {
        "name": stage.name,
        "data": [_of_data(name, config, folder) for name in stage.data],  # in their order, by which rows are drawn
        "arguments": _stated(counted, ARGUMENTS),
        "model": _stated(model, model_kind(model)),
        "loss": _stated(stage.loss, LOSS),
        "teach": None if stage.teach is None else _stated(asdict(stage.teach), TEACH),
        **_stated({key: getattr(stage, key) for key in EVALUATION}, STAGE),
        "eval_data": [_of_data(name, config, folder) for name in stage.eval_data],
    }


def _of_data(name: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    settings = {**config.data[name], **files_beside(folder, config.data[name])}
    return {"name": name, **_stated(settings, READS[settings["read"]])}


def _stated(settings: Mapping[str, Any], kind: type[Part]) -> dict[str, Any]:
    """The settings that are not at their defaults, each path with the state of what is there."""
    paths, told = {*path_keys(kind), *PATHS_AS_TEXT}, said(settings, kind)
    mine = told.pop("mine", None)
    stated = {key: _with_state(value) if key in paths else value for key, value in told.items()}
    return stated if mine is None else {**stated, "mine": _stated(mine, MINE)}


def _with_state(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_state(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_state(inner) for inner in value]
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    if found := [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)):
        return {str(place): _content(place) for place in (Path(one).resolve() for one in found)}
    commits = _commits(value) if HUB_ID.fullmatch(value) else {}
    return {value: commits} if commits else value


def _content(path: Path) -> str:
    """The hash of a file, or of a folder's files."""
    folder, files = (path.parent, [Path(path.name)]) if path.is_file() else (path, files_of(path))
    states = [(file, (folder / file).stat()) for file in files]
    return _digest([(str(file), _hash(folder / file, state.st_size, state.st_mtime_ns)) for file, state in states])


@cache
def _hash(file: Path, size: int, time: int) -> str:
    """The hash of a file in this state: each is read once in a process, whatever number of stages and runs name it."""
    return hash_files(file.parent, [file])


def _commits(name: str) -> dict[str, str]:
    """The commits of a repository's branches that the Hub's cache knows, as which models were looked up last."""
    refs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs")
    return {str(file.relative_to(refs)): file.read_text() for file in sorted(refs.rglob("*")) if file.is_file()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
