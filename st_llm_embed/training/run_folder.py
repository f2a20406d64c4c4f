"""The output folder of a run: one run's at a time, one process's at a time, and what a killed run left in it."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from st_llm_embed.files import check_writable, find_damaged, written_beside
from st_llm_embed.training.configuration import read_yaml

logger = logging.getLogger(__name__)
TOKENS = ("hub_token", "push_to_hub_token", "token", "use_auth_token")
LOCK = ".lock"
OF_STAGE = re.compile(r"\d+-.*")  # the names of stages' folders
WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")  # whole; FSDP's; DeepSpeed's
WAIT = 10  # seconds; the workers of a killed run outlive it by half of that, and hold its lock


def check_whole(folder: Path) -> None:
    if damaged := find_damaged(folder):
        raise ValueError(
            f"The model in {folder} is damaged: cut off or missing are {', '.join(damaged)}. Remove that folder; its "
            "stage then goes on from its last checkpoint."
        )


def check_ours(output: Path, changes: Callable[[Path, Any], list[str]]) -> list[str]:
    """Check that the output can be written, and holds nothing, or this run, or one that never began: without a
    checkpoint nothing of it can be lost.

    Args:
        output: the folder of the run.
        changes: a function that tells what is other than in the configuration that the run has had, or refuses it.

    Returns:
        What changed in a run that goes on.
    """
    check_writable(output)
    file = output / "config.yaml"
    if file.is_file():
        if any(output.glob("*-*/checkpoint-*")) or any(output.glob("*-*/model")):
            return changes(output, read_yaml(file))
    known = ("config.yaml", LOCK, "mined", "vectors", "sealed", "sealed.json", "results")
    if output.is_dir() and any(
        entry.name not in known and not OF_STAGE.fullmatch(entry.name) for entry in output.iterdir()
    ):
        raise ValueError(f"{output} holds something that is no run of this command. Choose another output.")
    return []


@contextmanager
def claimed(output: Path, text: str, changes: Callable[[Path, Any], list[str]]) -> Iterator[None]:
    """The output, as this configuration's, which no other process can run in meanwhile."""
    output.mkdir(parents=True, exist_ok=True)
    with lock_of(output):
        check_ours(output, changes)
        with written_beside(output / "config.yaml") as staged:
            staged.write_text(text, encoding="utf-8")
        yield


def lock_of(output: Path) -> FileLock:
    """Take the operating system's lock on a file in ``output``: it ends with the process, however that ends.

    Raises:
        RuntimeError: if another process holds it.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        logger.warning("Another process is running in %s. Waiting %d s for its end.", output, WAIT)
    try:
        lock.acquire(timeout=WAIT)
    except Timeout as error:
        raise RuntimeError(
            f"Another process is running in {output}. Wait for its end, or choose another output."
        ) from error
    return lock


def without_tokens(given: Any) -> Any:
    """The configuration as it is written beside its models: others may read it there."""
    if isinstance(given, Mapping):
        return {name: without_tokens(value) for name, value in given.items() if name not in TOKENS}
    return [without_tokens(value) for value in given] if isinstance(given, list | tuple) else given


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process had half-written beside a model."""
    for left in (*folder.glob(".model-*"), *folder.glob(".sealed-*")):
        shutil.rmtree(left)


def last_checkpoint(folder: Path) -> str | None:
    """The newest one that is whole: the trainer's state comes last, but a crash may cut off what came before it."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*[0-9]")}
    for _, checkpoint in sorted(checkpoints.items(), reverse=True):
        damaged = find_damaged(checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            damaged.append("trainer_state.json")
        if not any(file for pattern in WEIGHTS for file in checkpoint.rglob(pattern)):
            damaged.append("the weights")
        if not damaged:
            return str(checkpoint)
        logger.warning("%s is passed over: cut off or missing are %s.", checkpoint, ", ".join(damaged))
    return None
