"""Does a folder that was made elsewhere hold data alone, in files that can be read? What the data name is for
``code.py`` to say."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from st_llm_embed.files import PICKLES, read_json

# What a trainer leaves beside a model, and what loading the model never reads.
LEFT_BY_TRAINERS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)
# What the loaders read; of other files, what is not JSON is nothing to them either.
CONFIGURATIONS = ("*config*.json", "modules.json", "*.index.json", "special_tokens_map.json", "added_tokens.json")
DATA_LIST = (
    "data_config.json"  # of what sentence-transformers' first models were trained on: a list, which nobody reads
)
VOCABULARIES = ("tokenizer.json", "vocab.json")  # which name no code, and are large
# What no honest folder comes near.
MOST_FILES = 20_000
MOST_LAYERS = 2_000
FEW_LAYERS = 200  # several may share their weights
MOST_PROMPTS = 1_000
LONGEST_PATTERN = 1_000  # characters of an adapter's regular expression
MOST_TOKENS = 200_000  # to pad texts to
LARGEST_SIZE = 300_000  # of a vocabulary, say, where no tensor is as large
DEPTH = re.compile(r"layers?(_replication)?$|depths?$|blocks?$")
SIZE = re.compile(r"(size|dim|dimension|features|latents|heads|experts|channels|width|rank|embd|inner)s?$|^(r|d_\w+)$")
NO_SIZE = re.compile(r"position|length|window|batch|chunk|block|kernel|patch|image|shard|cache|total|sample|group")


def check_data(root: Path, *, pickles: bool = False) -> None:
    """Check that a folder holds data alone, in files that can be read: whatever they name is another question.

    Raises:
        ValueError: for what is neither a file nor a folder, a link or a name that leads out of the folder, a pickle
            of weights, a configuration that is none, and sizes that no model has.
    """
    homes = [root.resolve()]
    if root.resolve().parent.name == "snapshots":  # of the Hub's cache, whose files are links
        homes.append(root.resolve().parents[1] / "blobs")
    files = []
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                _check_inside_link(path, homes)
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                files.append(path)
            elif not stat.S_ISDIR(mode):
                raise ValueError(f"{str(path)!r} is no regular file, so reading it may never end. Remove it.")
        if len(files) > MOST_FILES:
            raise ValueError(f"{root} holds more than {MOST_FILES:,} files, which no model does.")
    if not pickles:
        _check_no_pickles(root, files)
    tensors, largest = _measure_tensors(files)
    for file, content in configurations(files):
        if file.name == "modules.json":
            _check_modules(file, content)
        elif file.name.endswith(".index.json"):
            _check_index(file, content)
        elif not isinstance(content, dict):
            if file.name == DATA_LIST:
                continue
            raise ValueError(f"{file} is no JSON object.")
        _check_sizes(file, content, tensors, largest)


def check_model(root: Path) -> None:
    """Check that a folder is one that sentence-transformers saved, and holds data alone.

    Raises:
        FileNotFoundError: if it has no modules.json.
        ValueError: see ``check_data``.
    """
    check_saved(root)
    check_data(root)


def check_saved(root: Path) -> None:
    """Check that a folder is one that sentence-transformers saved, whatever else it holds.

    Raises:
        FileNotFoundError: if ``root`` has no modules.json.
    """
    if not (root / "modules.json").is_file():
        raise FileNotFoundError(f"{root} is not a folder that sentence-transformers saved: it has no modules.json.")


def left_by_trainer(file: Path) -> bool:
    """Is ``file`` a pickle that a trainer left beside a model?"""
    return any(file.match(name) for name in LEFT_BY_TRAINERS)


def configurations(files: list[Path]) -> Iterator[tuple[Path, Any]]:
    """The JSON files among ``files`` and their contents, without vocabularies.

    Raises:
        ValueError: for a file that is not JSON, if the loaders read files of its name.
    """
    for file in files:
        if file.suffix == ".json" and file.name not in VOCABULARIES:
            try:
                yield file, read_json(file)
            except ValueError:
                if any(file.match(pattern) for pattern in CONFIGURATIONS):
                    raise


def _check_inside_link(path: Path, homes: list[Path]) -> None:
    try:
        to = path.resolve(strict=True)
        inside = to.is_file() and any(to.is_relative_to(home) for home in homes)
    except (OSError, RuntimeError):  # to nothing, or to itself
        inside = False
    if not inside:
        raise ValueError(
            f"{str(path)!r} is one of the links that lead out of the folder, to another, or to nothing. Put what it "
            "points to in its place, or remove it."
        )


def _check_no_pickles(root: Path, files: list[Path]) -> None:
    """Pickles of weights that a loader might read; not those beside safetensors, which all loaders prefer."""
    safe = {file.parent for file in files if file.suffix == ".safetensors"}
    pickles = [file for file in files if any(file.match(pattern) for pattern in PICKLES) and not left_by_trainer(file)]
    # An index of pickled weights may name any file.
    pickles += [file for file in files if file.match("*.bin.index.json")]
    if read := sorted(str(file) for file in pickles if file.parent not in safe):
        raise ValueError(
            f"{root} holds {read}, which may run code when read, and which no model needs. Weights belong into "
            "safetensors files."
        )


def _measure_tensors(files: list[Path]) -> tuple[int, int]:
    """The number of tensors in safetensors files, whose headers must be sound, but not of adapters; and the largest
    dimension of any."""
    tensors, largest = 0, 0
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as content:
                    names = list(content.keys())
                    largest = max([largest, *(n for name in names for n in content.get_slice(name).get_shape())])
                    tensors += 0 if file.name.startswith("adapter_model") else len(names)
            except (SafetensorError, OSError) as error:
                with file.open("rb") as content:
                    pointer = content.read(32).startswith(b"version https://git-lfs")
                fix = " It is a pointer of git LFS: run git lfs pull." if pointer else ""
                raise ValueError(f"{file} is damaged or cut off: {error}.{fix}") from error
    return tensors, largest


def _check_sizes(file: Path, content: dict[str, Any], tensors: int, largest: int) -> None:
    """Check that a configuration asks for no model that its weights are not, and for no endless work.

    Args:
        file: the configuration.
        content: the configuration's content.
        tensors: the number of tensors beside it, but for adapters'.
        largest: the largest dimension of any tensor.
    """
    most = max(4 * largest, LARGEST_SIZE)  # tiny models keep the sizes of the large ones that they stand for
    for holder in objects(content):
        for key, value in holder.items():
            numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
            number = max(numbers, default=0)
            if DEPTH.search(key):
                number = max(number, len(value) if isinstance(value, list) else 0)
                if number > MOST_LAYERS or (tensors and number > max(tensors, FEW_LAYERS)):
                    raise ValueError(f"{file} says {number:,} in {key!r}, and the weights are {tensors:,} tensors.")
            elif SIZE.search(key) and not NO_SIZE.search(key) and number > most:
                raise ValueError(f"{file} says {number:,} in {key!r}, and the largest of its weights has {largest:,}.")
            elif key == "prompts" and isinstance(value, dict) and len(value) > MOST_PROMPTS:
                raise ValueError(f"{file} has {len(value):,} prompts, which no model has.")
            elif key == "processing_kwargs":
                lengths = [n for part in objects(value) for n in part.values() if isinstance(n, int)]
                if max(lengths, default=0) > MOST_TOKENS:
                    raise ValueError(f"{file} says {max(lengths):,} in 'processing_kwargs', to pad texts to.")
    if file.name == "adapter_config.json":
        patterns = [content.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
        patterns += [name for key in ("rank_pattern", "alpha_pattern") for name in content.get(key) or ()]
        for pattern in patterns:
            # A group that repeats, or many that do, can take Python's re longer than anybody lives.
            if isinstance(pattern, str) and (
                len(pattern) > LONGEST_PATTERN
                or re.search(r"\)[*+{?]", pattern)
                or len(re.findall(r"[*+{]", pattern)) > 4
            ):
                raise ValueError(f"{file} has the regular expression {pattern[:80]!r}, which may never end.")


def _check_modules(file: Path, content: Any) -> None:
    entries = content if isinstance(content, list) else []
    shape = {"type": str, "path": str, "name": str}
    if not entries or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in shape.items())
        for entry in entries
    ):
        raise ValueError(f"{file} is no list of modules, each with its {', '.join(shape)}.")
    for entry in entries:
        _check_inside(file, entry["path"])
        if not all(part.isidentifier() for part in entry["type"].split(".")):
            raise ValueError(f"{file} names {entry['type']!r}, which is not a class.")


def _check_index(file: Path, content: Any) -> None:
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file} is no index of weights: it has no weight_map of file names.")
    for name in set(names.values()):
        _check_inside(file, name)
        if not name.endswith((".safetensors", ".bin")):
            raise ValueError(f"{file} names {name!r}. Weights belong into safetensors files.")


def _check_inside(file: Path, path: str) -> None:
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    if posix.is_absolute() or windows.is_absolute() or ".." in (*posix.parts, *windows.parts):
        raise ValueError(f"{file} names {path!r}, which is outside of the folder.")


def objects(content: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in ``content``, at every depth."""
    waiting = [content]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield here
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
