"""What models are called in a table: short, and no two alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def model_names(sources: Sequence[str | Path]) -> list[str]:
    """A Hub id as it is; of a folder the shortest end of its path that no other source has.

    ``model``, as training calls the folder in that of each stage, is left out, and a stage goes by its run as well:
    ``runs/x/2-blended/model`` is ``x/2-blended``. A source that comes again is numbered.
    """
    paths = [_path(source) for source in sources]
    called = [_without_model(path, paths) for path in paths]
    names: list[str] = []
    for path, source in zip(called, sources, strict=True):
        others = [other for other in called if other != path]
        shortest = 2 if re.match(r"\d+-", path[-1]) else 1
        while any(other[-shortest:] == path[-shortest:] for other in others):
            shortest += 1
        name = "/".join(path[-shortest:]) if Path(source).is_dir() else str(source)
        again = sum(other == path for other in called[: len(names)])
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _without_model(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """A path without ``model`` at its end, unless that is another source's."""
    return path[:-1] if len(path) > 1 and path[-1] == "model" and path[:-1] not in paths else path


def _path(source: str | Path) -> tuple[str, ...]:
    """The folders down to a source."""
    return Path(source).resolve().parts[1:] if Path(source).is_dir() else tuple(str(source).split("/"))
