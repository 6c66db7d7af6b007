"""TOML tables to dataclasses and back, strictly: every mistake is one line with the full path of the key."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic

from diffalign.errors import InputError, near_match


def build(cls: Any, table: Any, where: str) -> Any:
    """A dataclass from a table.

    Raises:
        InputError: An unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"{where} must be a table, got {table!r}")
    check_keys(cls, table, where)
    hints = typing.get_type_hints(cls, include_extras=False)
    values = {name: typed(hints[name], value, f"{where}.{name}") for name, value in table.items()}
    return cls(**values)


def check_keys(cls: Any, table: Mapping[str, Any], where: str, skip: Sequence[str] = ()) -> None:
    """Raises InputError for a key that the dataclass does not have, or one that it needs and the table lacks."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{near_match(key, known)}")
    for key, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in table and key not in skip:
            raise InputError(f"{where}: missing key {key!r}")


def typed(hint: Any, value: Any, where: str) -> Any:
    """A value of the type `hint`, never converted; functions pass as they are."""
    if callable(value):
        return value
    inner = section_class(hint)
    if inner is not None:
        return build(inner, value, where)
    adapter = pydantic.TypeAdapter(hint)
    try:
        return adapter.validate_python(tuple(value) if isinstance(value, list) else value, strict=True)
    except pydantic.ValidationError as error:
        problems = error.errors()
        need = _need(hint)
        if need is None:
            need = problems[0]["msg"][0].lower() + problems[0]["msg"][1:]
            need = need.removeprefix("input should be ").removeprefix("value ")
        raise InputError(f"{where} must be {need}, got {value!r}") from error


def section_class(hint: Any) -> Any:
    """The dataclass in a type such as `X | None`; None if there is none."""
    for part in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(part):
            return part
    return None


def apply_override(table: dict[str, Any], override: str) -> None:
    """Sets one key of a table by `section.key=value`; a value that is not TOML is taken as a string."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override must have the form section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    place = table
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise InputError(f"override must set a key of a table, got {override!r}, but {section!r} is a value")
    place[last] = value


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text of a table of scalars, lists and one level of sections."""
    lines = [f"{k} = {_toml_value(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    for name, section in table.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]", *[f"{k} = {_toml_value(v)}" for k, v in section.items()]]
    return "\n".join(lines) + "\n"


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the keys that differ between two tables, each with both values."""
    a, b = dict(_flat(old)), dict(_flat(new))
    missing = object()
    return [
        f"{key} ({a.get(key, 'unset')!r} then, {b.get(key, 'unset')!r} now)"
        for key in sorted({*a, *b})
        if a.get(key, missing) != b.get(key, missing)
    ]


def _need(hint: Any) -> str | None:
    """The expectation of a type, in words."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        words = [_need(part) for part in typing.get_args(hint) if part is not type(None)]
        return " or ".join(w for w in words if w) or None
    if origin is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    if origin is tuple:
        return "a list of " + {str: "strings", float: "numbers"}.get(typing.get_args(hint)[0], "values")
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}.get(hint)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
