"""Run configs: TOML files that map one to one onto frozen dataclasses, loaded strictly.

An unknown key, a missing key and a wrong type are errors with the full path of the key. Sections are the dataclasses
of `settings` and of the parts that use them: `[model]` is `models.load.ModelSource`, `[method]` a method's own class.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffalign import losses
from diffalign.checks import check, method_name
from diffalign.errors import InputError, near_match
from diffalign.methods import METHODS
from diffalign.settings import TrainConfig
from diffalign.shipped import configs
from diffalign.strict import apply_override, build, check_keys, section_class, typed
from diffalign.types import Method


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run config by path or by the bare name of a shipped one, with `section.key=value` overrides.

    Raises:
        InputError: No such file, broken TOML, unknown or missing key, wrong type, or values that exclude each other.
    """
    file = find(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {str(file)!r} must be valid TOML: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return parse(table)


def find(path: str | Path) -> Path:
    """The file of a config: a path, or the bare name of a shipped config."""
    for file in (Path(path), configs() / path, configs() / f"{path}.toml"):
        if file.is_file():
            return file
    names = [file.stem for file in configs().glob("*.toml")]
    raise InputError(f"config must be a file or a shipped name, got {str(path)!r}{near_match(Path(path).stem, names)}")


def parse(table: Mapping[str, Any]) -> TrainConfig:
    """A config from a table as TOML gives it."""
    table = dict(table)
    method = _method(table.pop("method", None))
    check_keys(TrainConfig, {**table, "method": {}}, "config", skip=("method",))
    values = dict(table)
    sections = {f.name: section_class(f.type) for f in dataclasses.fields(TrainConfig)}
    for name, value in table.items():
        cls = sections[name]
        values[name] = build(cls, value, f"config.{name}") if cls is not None else _scalar(name, value)
    try:
        config = TrainConfig(method=method, **values)
    except TypeError as error:
        raise InputError(f"config: {error}") from error
    check(config)
    return config


def dump(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as a table for TOML: every key, defaults too; None is left out."""
    table: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name == "method":
            table["method"] = {"name": method_name(value), **_plain(value)}
        elif dataclasses.is_dataclass(value):
            table[item.name] = _plain(value)
        elif value is not None:
            table[item.name] = list(value) if isinstance(value, tuple) else value
    return table


_ABSENT = {
    "link": "its loss is not a link on two implicit rewards",
    "beta": "it has no KL strength",
    "safeguard": "it has no winner and loser at one shared noise, whose residuals could be compared",
    "scores": "it has no link on two images of the data, whose scores could weigh it",
    "share_noise": "its noise is not a choice",
}
"""Why a method may lack an option that others have."""


def _method(table: Any) -> Method:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise InputError(f"config.method.name must name a method: {', '.join(sorted(METHODS))}, got {table!r}")
    options = dict(table)
    name = options.pop("name")
    if name not in METHODS:
        raise InputError(f"config.method.name must be a known method, got {name!r}{near_match(name, METHODS)}")
    cls = METHODS[name]
    own = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key in _ABSENT and key not in own:
            raise InputError(f"config.method.{key} must be left out with method {name!r}: {_ABSENT[key]}")
    if "link" in own & options.keys():
        link = options["link"]
        spec = dict(link) if isinstance(link, Mapping) else {"name": link}
        if not isinstance(spec.get("name"), str):
            raise InputError(f"config.method.link must be a name or a table with a name, got {link!r}")
        options["link"] = losses.link(spec.pop("name"), **spec)
    return typing.cast(Method, build(cls, options, "config.method"))


def _scalar(name: str, value: Any) -> Any:
    return typed(typing.get_type_hints(TrainConfig)[name], value, f"config.{name}")


def _plain(value: Any) -> dict[str, Any]:
    out = {}
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if callable(inner):
            inner = _link_table(inner)
        elif dataclasses.is_dataclass(inner):
            inner = _plain(inner)
        if inner is not None and inner != {}:
            out[item.name] = list(inner) if isinstance(inner, tuple) else inner
    return out


def _link_table(link: Any) -> str | dict[str, Any]:
    name = losses.link_name(link)
    return {"name": name, **link.keywords} if isinstance(link, partial) else name
