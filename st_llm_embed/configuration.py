"""What a configuration says, checked before anything acts on it: known names, right kinds, numbers that are numbers.

YAML 1.1, which PyYAML reads, takes ``2e-5`` for text, and the last of two equal keys. Here a number is one wherever a
number is expected, and a key that comes twice is an error.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Hashable, Mapping
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


def _expanded(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many keys and values there are where each alias is what it stands for."""
    if id(node) not in known:
        known[id(node)] = math.inf  # what holds itself
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1.0 + sum(_expanded(part, known) for part in inner)
    return known[id(node)]


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
        what: that it is part of, for the message.
        given: names and values.
        kinds: the types of the names it may have.
        needed: the names it must have.
        open_ended: whether other names are handed on.

    Raises:
        ValueError: for what is no mapping, and names that are missing or unknown, with the nearest that are not, or
            have a value of another type.
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
            near = [f"Did you mean {found!r}?" for found in get_close_matches(str(name), kinds, n=1)]
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
