"""Folders: tried before the work, written beside their target and renamed; and what a crash left of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")  # reading them may run code
LARGEST_CONFIGURATION = 1 << 26  # bytes


def check_empty(folder: Path) -> None:
    """Check that a new folder can be written at ``folder``, before the work whose result goes there.

    Raises:
        FileExistsError: if it is there and holds something, or is a file.
        OSError: if it cannot be written.
    """
    check_writable(folder)
    if folder.is_dir() and (held := sorted(file.name for file in folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not an empty folder. Choose another, or remove it first. It holds "
            f"{', '.join(held[:5])}."
        )


def check_writable(folder: Path) -> None:
    """Try whether a folder, and a file in it, can be written at ``folder``. Nothing of it stays.

    Raises:
        FileExistsError: if it is a file.
        OSError: if it cannot be: no permission, a read-only or full disk, a file in the place of a parent, a name too
            long.
    """
    try:
        parent = _existing(folder)
        if parent == folder and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, "it exists and is not an empty folder")
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as temporary:
            trial = Path(temporary, folder.relative_to(parent))
            trial.mkdir(parents=True, exist_ok=True)
            (trial / "trial").write_bytes(bytes(4096))
    except OSError as error:
        raise type(error)(f"{folder} cannot be written: {error.strerror}. Choose another place.") from error


def check_file_writable(file: Path) -> None:
    """Try whether a file can be written at ``file``, in the place of one that is there.

    Raises:
        OSError: if it cannot be.
    """
    check_writable(file.parent if file.exists() else file)


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` at the end: an error or an interruption leaves nothing of it.

    A folder that is there already is kept, as it may be a mount point, or its parent not ours to write to: the path
    lies in it, and what was written moves up.

    Raises:
        OSError: if something came into the target's place meanwhile; it says where the work was left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    parent = target if target.is_dir() else target.parent
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name[:32]}-"))
    staged = temporary / target.name
    try:
        yield staged
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        if parent == target:
            for entry in list(staged.iterdir()):
                entry.rename(target / entry.name)
        else:
            staged.rename(target)
    except OSError as error:
        raise OSError(
            f"{target} could not be put in place: {error.strerror}. Nothing is lost: what was written is in {staged}."
        ) from error
    shutil.rmtree(temporary, ignore_errors=True)


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of ``folder``, which need not be there yet, has no room for ``needed`` bytes and a
    tenth more."""
    if (free := shutil.disk_usage(_existing(folder)).free) < 1.1 * needed:
        raise OSError(
            f"{folder} has {free / 1e6:,.0f} MB free, and {1.1 * needed / 1e6:,.0f} MB are needed. Make room, or "
            "choose another folder."
        )


def size_of(model: SentenceTransformer) -> int:
    """The bytes of a model's weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _existing(path: Path) -> Path:
    """``path``, or the nearest of its parents that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def find_damaged(folder: Path) -> list[str]:
    """The files of a saved model or checkpoint that a crash cut off: safetensors, PyTorch's archives and JSON; and the
    shards that are missing."""
    damaged = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # compares its length with its header
                    pass
            elif any(file.match(pattern) for pattern in PICKLES):
                zipfile.ZipFile(file).close()  # its directory is its end
            elif file.suffix == ".json":
                content = read_json(file)
                if file.name.endswith(".index.json"):
                    shards = {file.with_name(name) for name in content["weight_map"].values()}
                    damaged += sorted(str(shard) for shard in shards if not shard.is_file())
        except (SafetensorError, zipfile.BadZipFile, ValueError, TypeError, KeyError, AttributeError):
            damaged.append(str(file))
    return damaged


def files_of(root: Path) -> list[Path]:
    """The files of a model, by their path in its folder: not those of checkpoints, nor hidden ones."""
    files = []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
        files += [inside / name for name in names if not name.startswith(".")]
    return sorted(files)


def hash_files(root: Path, files: Iterable[Path]) -> str:
    """Sixteen digits that name this state of some files in ``root``, by their paths and contents."""
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(str(file.relative_to(root)).encode())
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                hashed.update(block)
    return hashed.hexdigest()[:16]


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: naming the file that is not JSON, is nested too deeply, or is too large to be a configuration.
    """
    if file.stat().st_size > LARGEST_CONFIGURATION:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no configuration has.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply to be read.") from error
    except ValueError as error:  # of its JSON, its encoding, a number of thousands of digits
        raise ValueError(f"{file} is not JSON: {error}.") from error


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file. ``np.save`` says nothing where the disk is full."""
    array = np.ascontiguousarray(array)
    with file.open("wb") as content:
        np.lib.format.write_array_header_1_0(content, np.lib.format.header_data_from_array_1_0(array))
        content.write(array.reshape(-1).view(np.uint8).data)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
