"""A configuration as it was given: the values of a YAML file and of the command line, and where each of them stands.

PyYAML reads YAML 1.1, which takes ``2e-5`` for text, ``no`` for false and the last of two equal keys. Here words and
numbers are those of YAML 1.2, and a key that comes twice is an error.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetsError

from st_llm_embed.training.schema import Faults, Place

MOST_PARTS = 100_000


class _Loader(yaml.SafeLoader):
    """Numbers, true and false as YAML 1.2 has them, where "no" is a word and 1:30 none of 90; and each key once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is there twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("int", r"[-+]?(0|[1-9]\d*)$", "-+0123456789"),
    (
        "float",
        r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
        "-+.0123456789",
    ),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


class ConfigurationError(ValueError):
    """What is wrong with a configuration, each fault with its line and its path."""


@dataclass(frozen=True)
class Given:
    """A configuration as it was given.

    Args:
        values: the values of the file, with those of the command line in their place.
        file: the YAML file; None for a configuration of Python.
        node: the file's content with its lines.
        assigned: the paths that the command line set.
    """

    values: Any
    file: Path | None = None
    node: yaml.Node | None = field(default=None, repr=False)
    assigned: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: str | Path | Mapping[str, Any], assignments: Mapping[str, Any]) -> Given:
        """Read a configuration, and put values of the command line in the place of the file's.

        Raises:
            ValueError: for a file that is no YAML, and a path that is not there.
        """
        if isinstance(config, str | Path):
            values, node = _read(Path(config))
            return cls(override(values, assignments), Path(config), node, tuple(assignments))
        return cls(override(config, assignments), assigned=tuple(assignments))

    @property
    def folder(self) -> Path:
        """What paths are relative to."""
        return self.file.parent if self.file else Path()

    def where(self, place: Place) -> str:
        """The line of a place, and its path as ``override`` takes it."""
        names: list[str] = []
        values, node, line = self.values, self.node, None
        for step in place:
            if isinstance(values, list) and isinstance(step, int):
                values = values[step] if step < len(values) else None
                name = values.get("name") if isinstance(values, Mapping) else None
                names.append(name if name and isinstance(name, str) else str(step + 1))
            else:
                values = values.get(step) if isinstance(values, Mapping) else None
                names.append(str(step))
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == str(step)]
                line, node = (pairs[-1][0].start_mark.line + 1, pairs[-1][1]) if pairs else (line, None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
        path = ".".join(names)
        if any(path == own or path.startswith(f"{own}.") for own in self.assigned):
            return f"--set {path}"
        return ", ".join([*([f"line {line}"] if line else []), path or "the configuration"])

    @contextmanager
    def naming(self, *place: str | int) -> Iterator[None]:
        """Errors that say which part of the configuration they are about."""
        try:
            yield
        except ConfigurationError:
            raise
        except Faults as error:
            raise self._error([f"{self.where((*place, *inner))}: {text}" for inner, text in error.faults]) from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, DatasetsError) as error:
            raise self._error([f"{self.where(place)}: {error}"]) from error

    def _error(self, faults: list[str]) -> ConfigurationError:
        file = f"{self.file}, " if self.file and len(faults) == 1 else f"{self.file}:\n" if self.file else ""
        return ConfigurationError(file + "\n".join(faults))


def read_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: naming the line that is not YAML, or whose key is there twice.
    """
    return _read(file)[0]


def _read(file: Path) -> tuple[Any, yaml.Node | None]:
    """The content of a YAML file, and the nodes that know its lines."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder. Name a YAML file, such as {file / 'config.yaml'}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
        if (parts := _expanded(node, {})) > MOST_PARTS:
            raise ValueError(f"{file} has {parts:.0e} keys and values once its anchors are followed, which none has.")
        return yaml.load(text, _Loader), node
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not a YAML file: {' '.join(str(error).split())}") from error


def read_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """Names and values of a command line, ``name=value``, the values read as in a YAML file.

    Raises:
        ValueError: for a text without ``=``, or a value that is not YAML.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name in values:
            raise ValueError(f"{name!r} is set twice. Set it once.")
        try:
            read = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{text!r} has a value that is not YAML: {' '.join(str(error).split())}. Put text that begins with a "
                f"brace into quotes of its own: '{name}=\"...\"'."
            ) from error
        # A mapping without braces is a prompt that ends in a colon.
        values[name] = value if isinstance(read, Mapping) and not value.startswith("{") else read
        if not (name and equals):
            raise ValueError(f"{text!r} sets nothing. Write NAME=VALUE, such as max_seq_length=256.")
    return values


def override(configuration: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values.

    Args:
        configuration: the configuration, as YAML reads it.
        values: the new values by their path, its parts joined by dots; a stage goes by its name or its number from 1,
            such as ``stages.blended.arguments.max_steps``.

    Raises:
        ValueError: for a path whose parts but for the last are not there.
    """
    changed = copy.deepcopy(configuration)
    for path, value in values.items():
        place, step, left = changed, None, path
        while left:
            if step is not None:
                place = place[step]
            step, left = _step(place, left, path)
        place[step] = value
    return changed


def _step(place: Any, left: str, path: str) -> tuple[Any, str]:
    """The key that a path goes on with, and what is left of it; names may have dots in them.

    Raises:
        ValueError: for a path that does not lead on.
    """
    parts = left.split(".")
    starts = [(".".join(parts[:count]), ".".join(parts[count:])) for count in range(len(parts), 0, -1)]
    if isinstance(place, dict):
        keys = {str(key): key for key in place}
        for name, rest in starts:
            if name in keys:
                if rest and place[keys[name]] is None:
                    place[keys[name]] = {}
                return keys[name], rest
        if len(parts) > 1:
            place[parts[0]] = {}  # as yet unsaid; a name that is unknown is refused where the whole is checked
        return parts[0], ".".join(parts[1:])
    if not isinstance(place, list):
        raise ValueError(f"{path!r} cannot be set: {path.removesuffix(f'.{left}')} is {place!r}.")
    names = [str(part["name"]) if isinstance(part, dict) and "name" in part else None for part in place]
    for name, rest in starts:
        if names.count(name) == 1:
            return names.index(name), rest
    name, rest = starts[-1]
    if name.isdecimal() and 1 <= int(name) <= len(place) and name not in names:
        return int(name) - 1, rest
    listed = ", ".join(filter(None, names)) or f"1 to {len(place)}"
    raise ValueError(f"{path!r} cannot be set: there is no {name!r}. There are: {listed}.")


def _expanded(node: yaml.Node | None, counts: dict[int, float]) -> float:
    """How many keys and values there are where each alias is what it stands for."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # what holds itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        counts[id(node)] = 1.0 + sum(_expanded(part, counts) for part in inner)
    return counts[id(node)]
