"""What a configuration says, checked before anything acts on it: known names, right kinds, numbers that are numbers.

YAML 1.1, which PyYAML reads, takes ``2e-5`` for text, and the last of two equal keys. Here a number is one wherever a
number is expected, and a key that comes twice is an error.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MOST_PARTS = 100_000


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 has them, and each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: naming the line that is not YAML, or whose key is there twice.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        if (parts := _expanded(yaml.compose(text, _Loader), {})) > MOST_PARTS:
            raise ValueError(f"{file} has {parts:.0e} keys and values once its anchors are followed, which none has.")
        return yaml.load(text, _Loader)
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
        try:
            values[name] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
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
        *parents, last = path.split(".")
        place = changed
        for name in parents:
            place = _part(place, name, path)
        if isinstance(place, list):
            place[_index(place, last, path)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ValueError(f"{path!r} cannot be set: {'.'.join(parents)} is {place!r}.")
    return changed


def _part(place: Any, name: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, name, path)]
    parts = {str(key): part for key, part in place.items()} if isinstance(place, dict) else {}
    if name not in parts:
        listed = f"There are: {', '.join(parts)}." if parts else f"There is {place!r}."
        raise ValueError(f"{path!r} cannot be set: there is no {name!r}. {listed}")
    return parts[name]


def _index(parts: list[Any], name: str, path: str) -> int:
    """The place of the part that has this name, or this number from 1."""
    names = [str(part["name"]) for part in parts if isinstance(part, dict) and "name" in part]
    if names.count(name) == 1:
        return next(i for i, part in enumerate(parts) if isinstance(part, dict) and str(part.get("name")) == name)
    if name.isdecimal() and 1 <= int(name) <= len(parts) and name not in names:
        return int(name) - 1
    raise ValueError(
        f"{path!r} cannot be set: there is no {name!r}. There are: {', '.join(names) or f'1 to {len(parts)}'}."
    )


def _expanded(node: yaml.Node | None, counts: dict[int, float]) -> float:
    """How many keys and values there are where each alias is what it stands for."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # what holds itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        counts[id(node)] = 1.0 + sum(_expanded(part, counts) for part in inner)
    return counts[id(node)]


def declared(*functions: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of functions or classes that can be given by name, and the types that they are declared with; the
    first that has a name declares it."""
    kinds: dict[str, Any] = {}
    for function in functions:
        owner = function.__init__ if inspect.isclass(function) and not is_dataclass(function) else function
        try:
            hints = get_type_hints(owner)
        except NameError:  # of a type that its file imports for type checkers only
            hints = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                kinds.setdefault(name, hints.get(name, Any))
    return kinds


def required(function: Callable[..., Any]) -> list[str]:
    """The arguments of a function that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def checked(
    what: str, given: Any, kinds: Mapping[str, Any], needed: Collection[str] = (), *, open_ended: bool = False
) -> dict[str, Any]:
    """``given``, with numbers in place of their text.

    Args:
        what: the part of the configuration that is checked, for the message.
        given: the names and values of that part.
        kinds: the type of each name that it may have.
        needed: the names that it must have.
        open_ended: whether other names are handed on.

    Raises:
        ValueError: if ``given`` is no mapping, lacks a name, has a name that is unknown (the message has the nearest
            that is known), or a value of another type.
    """
    few = len(kinds) <= 12
    takes = ", ".join(f"{name} ({_described(kind)})" if few else name for name, kind in kinds.items())
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} is {given!r}, no mapping. It takes {takes}.")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{what} lacks {', '.join(missing)}. It takes {takes}.")
    values = {}
    for name, value in given.items():
        if name in kinds:
            try:
                values[name] = _fitting(value, kinds[name])
            except ValueError as error:
                kind = _described(kinds[name])
                raise ValueError(f"{what} has {name}={value!r}. It must be of the type {kind}.") from error
        elif open_ended and isinstance(name, str):
            values[name] = value
        else:
            near = [f"Did you mean {nearest!r}?" for nearest in get_close_matches(str(name), kinds, n=1)]
            listed = [f"It takes {takes}."] if few or not near else []
            raise ValueError(" ".join([f"{what} has the unknown key {name!r}.", *near, *listed]))
    return values


def _fitting(value: Any, kind: Any) -> Any:
    """``value``, or the number that it says, if it is of the type ``kind``. What cannot be told is let through."""
    members = [member for part in _members(kind) for member in _members(part)]
    if any(_is_a(value, member) for member in members):
        return value
    if isinstance(value, str | float) and (int in members or float in members):
        number = float(value)  # of text that is none, a ValueError
        if int in members and number.is_integer():
            return int(number)
        if float in members:
            return number
    raise ValueError(value)


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    kind = type(None) if kind is None else get_origin(kind) or kind
    if kind is Any or not isinstance(kind, type):  # a Literal, a name that is not there
        return True
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (kind, int) if kind is float else (kind, list) if kind is tuple else kind)


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
