"""The types of a configuration, read off the functions and dataclasses that take its values.

Each argument's name, type, default and description are said once, in Python. Of these pydantic makes what a YAML file
is checked by, and what editors read (``json_schema``). pydantic, because it names every fault at once with its place,
checks inside lists and mappings, and writes JSON schemas; ``huggingface_hub.dataclasses.strict`` does none of that.

Where a number is expected its text is one. Paths are relative to the file.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints, is_typeddict

from datasets import Dataset
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Place: TypeAlias = tuple[str | int, ...]
FEW = 12  # names that an error lists
OTHERWISE = {  # what others call it
    **{"batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs"},
    **{"lr": "learning_rate", "steps": "max_steps", "max_length": "max_seq_length"},
}
LONGEST = 200  # characters of a value that an error shows
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
UNSAYABLE = object()  # the type of what YAML cannot say


class Faults(ValueError):
    """What is wrong with a configuration.

    Args:
        faults: the place of each fault, and the fault in words.
    """

    def __init__(self, faults: Sequence[tuple[Place, str]]) -> None:
        super().__init__(" ".join(message for _, message in faults))
        self.faults = faults


class Part(BaseModel):
    """A mapping of a configuration, whose keys are all known."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _known(cls, given: Any, handler: Callable[[Any], Part]) -> Part:
        if isinstance(given, Part):
            return handler(given)
        if not isinstance(given, Mapping):
            raise PydanticCustomError("no_mapping", "{takes}", {"takes": cls._takes()})
        unknown = [name for name in given if name not in cls.model_fields and cls.model_config["extra"] == "forbid"]
        if not unknown:
            return handler(given)
        faults = [InitErrorDetails(type=cls._unknown(name), loc=(), input=given) for name in unknown]
        try:
            handler({name: value for name, value in given.items() if name not in unknown})
        except ValidationError as error:  # what else is wrong is told too
            for other in error.errors(include_url=False):
                kind = PydanticCustomError(other["type"], "{msg}", {**other.get("ctx", {}), "msg": other["msg"]})
                faults.append(InitErrorDetails(type=kind, loc=other["loc"], input=other["input"]))
        raise ValidationError.from_exception_data(cls.__name__, faults)

    @classmethod
    def _unknown(cls, name: Any) -> PydanticCustomError:
        names = [*cls.model_fields]
        meant = OTHERWISE.get(name)
        near = [meant] if meant in names else [known for known in names if str(name).startswith(known)]
        near = near or get_close_matches(str(name), names, n=1)
        hint = [f"Did you mean {near[0]!r}?"] if near else []
        listed = [cls._takes()] if len(names) <= FEW or not near else []
        return PydanticCustomError("unknown_key", "{fix}", {"key": name, "fix": " ".join([*hint, *listed])})

    @classmethod
    def _takes(cls) -> str:
        return f"It takes {', '.join(cls.model_fields)}."


class OpenPart(Part):
    """A mapping whose further keys are handed on."""

    model_config = ConfigDict(extra="allow")


def part(name: str, *fields: Mapping[str, Any], open_ended: bool = False) -> type[Part]:
    """A mapping of a configuration.

    Args:
        name: what it is called.
        fields: what ``fields_of`` gives; the first that has a name declares it.
        open_ended: whether further keys are handed on.
    """
    together = {key: field for given in reversed(fields) for key, field in given.items()}
    first = {key: together[key] for given in fields for key in given}  # in the order of the functions
    base: type[Part] = OpenPart if open_ended else Part
    return create_model(name, __base__=base, **first)


def fields_of(
    function: Callable[..., Any],
    *,
    without: Collection[str] = (),
    only: Collection[str] | None = None,
    needed: Collection[str] | None = None,
    limits: Mapping[str, Mapping[str, Any]] | None = None,
    kinds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments of a function, class or dataclass that a configuration can give.

    Args:
        function: what takes the arguments.
        without: the arguments that are set elsewhere.
        only: the arguments that can be set here. Default: all.
        needed: the arguments that must be set. Default: those without a default.
        limits: the range of numbers by argument, in pydantic's words: ``{"max_steps": {"ge": 1}}``.
        kinds: types in place of those that are declared.
    """
    descriptions, musts = documented(function), required(function) if needed is None else needed
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    fields: dict[str, Any] = {}
    for name, hint in declared(function).items():
        if name in without or (only is not None and name not in only):
            continue
        if is_dataclass(function) and (choices := function.__dataclass_fields__[name].metadata.get("choices")):
            hint = Literal[tuple(choices)] if defaults[name] is not None else Literal[tuple(choices)] | None
        kind = (kinds or {}).get(name, _kind(hint, (limits or {}).get(name, {})))
        if kind is not UNSAYABLE:
            default = defaults[name] if isinstance(defaults[name], bool | int | float | str | list) else None
            fields[name] = (kind, Field(... if name in musts else default, description=descriptions.get(name)))
    return fields


def path_keys(kind: type[Part]) -> list[str]:
    """The keys of a mapping whose values are paths, or may hold some."""
    return [key for key, field in kind.model_fields.items() if _holds_paths(field.rebuild_annotation())]


def _holds_paths(kind: Any) -> bool:
    if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Part):
        return bool(path_keys(kind))
    marks = getattr(kind, "__metadata__", ())
    return any(isinstance(mark, BeforeValidator) and mark.func is _path for mark in marks) or any(
        map(_holds_paths, get_args(kind))
    )


def declared(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function or class that can be given by name, and the types that they are declared with."""
    owner = function.__init__ if inspect.isclass(function) and not is_dataclass(function) else function
    try:
        hints = get_type_hints(owner)
    except NameError:  # of a type that its file imports for type checkers only
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.items()
    return {name: hints.get(name, Any) for name, parameter in parameters if parameter.kind in named}


def required(function: Callable[..., Any]) -> list[str]:
    """The arguments of a function that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function or class says of each argument; "see ``other``" is what that one's says."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", inspect.getdoc(function) or "", re.MULTILINE)
    entry = re.compile(r"^ {4}([\w*, ]+)(?: \([^\n]*\))?:\s+((?:.*\n?)(?: {5,}.*\n?|\n)*)", re.MULTILINE)
    described: dict[str, str] = {}
    for names, text in entry.findall(section[1] if section else ""):
        other = re.match(r"see ``(\w+)``", text)
        owner = vars(sys.modules[function.__module__]).get(other[1]) if other else None
        elsewhere = documented(owner) if owner and owner is not function else {}
        described |= {name: elsewhere.get(name, " ".join(text.split())) for name in names.split(", ")}
    return described


def _whole(value: Any) -> Any:
    """A number that is whole, however it is written: ``"1e3"`` too."""
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_written(number: float) -> float:
    return int(number) if number.is_integer() else number


def _path(value: Any, info: ValidationInfo) -> Any:
    """A path as seen from the folder of the configuration; what may be a Hub id, and is no file, stays.

    Raises:
        ValueError: for a path that only the current folder has.
    """
    if not isinstance(value, str) or not value:
        return value
    folder = _folder(info)
    path = folder / _expanded(value)
    if path.exists():
        return str(path)
    if not HUB_ID.fullmatch(value) or (folder / value.partition("/")[0]).is_dir():
        return str(path.absolute())
    if Path(value).exists():
        raise PydanticCustomError(
            "elsewhere", "Paths are relative to the file, and there is no {path}.", {"path": str(path)}
        )
    return value


def _new_path(value: Any, info: ValidationInfo) -> Any:
    return str(_folder(info) / _expanded(value)) if isinstance(value, str) and value else value


def _folder(info: ValidationInfo) -> Path:
    return (info.context or {}).get("folder", Path())


def _expanded(value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("no_home", "There is no such home folder.") from error


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Number = Annotated[
    float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False), AfterValidator(_as_written)
]
PathText = Annotated[str, BeforeValidator(_path), Field(strict=True, min_length=1)]
NewPath = Annotated[str, BeforeValidator(_new_path), Field(strict=True, min_length=1)]  # of what is to be written
PLAIN: dict[Any, Any] = {
    **{bool: StrictBool, int: Whole, float: Number, str: StrictStr, Path: PathText, os.PathLike: PathText},
    **{type(None): None, None: None, Any: Any, object: Any, list: list[Any], dict: dict[str, Any]},
}


def _kind(hint: Any, limits: Mapping[str, Any]) -> Any:
    """The type that pydantic checks for one that a function declares; ``UNSAYABLE`` where YAML has none."""
    origin, members = get_origin(hint), get_args(hint)
    if isinstance(hint, Hashable) and hint in PLAIN:
        return Annotated[PLAIN[hint], Field(**limits)] if limits and hint in (int, float) else PLAIN[hint]
    if origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        return _either(members, limits)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return Literal[tuple(member.value for member in hint)]  # type: ignore[valid-type]
    if is_typeddict(hint):
        return dict[str, Any]
    inner = [_kind(member, limits) for member in members if member is not ...]
    if UNSAYABLE in inner:
        return UNSAYABLE
    if origin is tuple and ... not in members:
        return tuple[tuple(inner)]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[inner[0], inner[1]] if len(inner) == 2 else UNSAYABLE  # type: ignore[valid-type]
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return list[inner[0]]  # type: ignore[valid-type]
    return UNSAYABLE


def _either(members: Iterable[Any], limits: Mapping[str, Any]) -> Any:
    members = set(members)
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members.discard(str)  # which stands for the names of its values
    if members & {Path, os.PathLike}:
        members -= {str, bytes, Dataset}
    kinds = [kind for member in sorted(members, key=str) if (kind := _kind(member, limits)) is not UNSAYABLE]
    return UNSAYABLE if all(kind is None for kind in kinds) else Union[tuple(kinds)]  # noqa: UP007


def choice(*kinds: tuple[str, type[Part]], key: str, of: Callable[[Any], str], valid: str) -> Any:
    """One of several parts.

    Args:
        kinds: each part with its name.
        key: the key that says which.
        of: a function from what is given to the name of its part.
        valid: what is valid, for the message.
    """

    # In brackets, lest they are taken for keys.
    def name_of(given: Any) -> str | None:
        if isinstance(given, Part):
            return next(f"({name})" for name, kind in kinds if isinstance(given, kind))
        return f"({of(given) if isinstance(given, Mapping) else kinds[0][0]})"

    return Annotated[
        Union[tuple(Annotated[kind, Tag(f"({name})")] for name, kind in kinds)],  # noqa: UP007
        Discriminator(
            name_of,
            custom_error_type="unknown_choice",
            custom_error_message="{valid}",
            custom_error_context={"key": key, "valid": valid},
        ),
    ]


def check(part: type[Part], given: Any, folder: Path = Path()) -> dict[str, Any]:
    """``given``, with numbers in place of their text and paths as seen from ``folder``.

    Raises:
        Faults: for keys that are unknown or missing, and values of another type, all that there are.
    """
    try:
        return part.model_validate(given, context={"folder": folder}).model_dump(exclude_unset=True)
    except ValidationError as error:
        found: dict[Place, list[dict[str, Any]]] = {}
        for fault in error.errors(include_url=False):
            found.setdefault(_place(given, fault["loc"]), []).append(dict(fault))
        told: list[tuple[Place, str]] = []
        for place, faults in found.items():
            has_inner = any(place == other[: len(place)] != other for other in found)
            told += _in_words(given, place, faults, has_inner)
        raise Faults(told) from None


def _place(given: Any, location: Iterable[Any]) -> Place:
    """The keys of a place, without the names of types that pydantic puts between them."""
    place: list[str | int] = []
    for step in location:
        if (isinstance(given, Mapping) and step in given) or (
            isinstance(given, list | tuple) and isinstance(step, int) and step < len(given)
        ):
            given = given[step]
            place.append(step)
    return tuple(place)


WANTED = {
    **{"int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number"},
    **{"bool_type": "true or false", "string_type": "text", "list_type": "a list", "tuple_type": "a list"},
    **{"dict_type": "a mapping", "none_required": "null", "finite_number": "a finite number"},
    **{"no_mapping": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping"},
}


def _in_words(
    given: Any, place: Place, faults: Sequence[Mapping[str, Any]], has_inner: bool
) -> list[tuple[Place, str]]:
    """The faults of one place: unknown keys, missing ones, or a value of none of the types that it may have.

    Args:
        given: the whole.
        place: the place.
        faults: what pydantic says of it, once for each type that it may have.
        has_inner: whether something inside of it is at fault, which says more than that it is of none of the types.
    """
    value = given
    for step in place:
        value = value[step]
    unknown = [fault["ctx"] for fault in faults if fault["type"] == "unknown_key"]
    if unknown:
        return [((*place, context["key"]), f"is an unknown key. {context['fix']}") for context in unknown]
    if missing := [str(fault["loc"][-1]) for fault in faults if fault["type"] == "missing"]:
        return [(place, f"lacks {', '.join(missing)}.")]
    if chosen := [fault["ctx"] for fault in faults if fault["type"] == "unknown_choice"]:
        key, valid = chosen[0]["key"], chosen[0]["valid"]
        if key not in value:
            return [(place, f"lacks {key}. {valid}")]
        return [((*place, key), f"has the value {value[key]!r}. {valid}")]
    if has_inner:
        return []
    wanted = dict.fromkeys(_wanted(fault) for fault in faults)
    shown = repr(value) if len(repr(value)) <= LONGEST else f"{repr(value)[:LONGEST]}..."
    return [(place, f"has the value {shown}. It takes {' or '.join(wanted)}.")]


def _wanted(fault: Mapping[str, Any]) -> str:
    context = fault.get("ctx", {})
    match fault["type"]:
        case "literal_error":
            return str(context["expected"])
        case "greater_than_equal":
            return f"{context['ge']:g} or more"
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "less_than_equal":
            return f"{context['le']:g} or less"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "too_short":
            return f"{context['min_length']} or more of them"
        case kind:
            return WANTED.get(kind, fault["msg"].rstrip("."))
