"""Rewards as plug-ins: found by entry-point name or by `package.module:object`, imported only when named."""

import importlib
import importlib.metadata
import inspect
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from diffalign.errors import InputError, near_match
from diffalign.types import FunctionReward, Reward, RewardBatch, RewardOutput

GROUP = "diffalign.rewards"
"""Entry-point group in which ours and others' rewards are declared."""


@runtime_checkable
class OnDevice(Protocol):
    """A reward that holds a network, and so has a device."""

    def to(self, device: torch.device | str) -> "OnDevice": ...


@runtime_checkable
class _Scorer(Protocol):
    def score(self, batch: RewardBatch) -> RewardOutput: ...


def names() -> list[str]:
    """Names under which installed packages declare rewards, ours among them."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)})


def summary(name: str) -> str:
    """First line of what a declared reward says of itself; of one that cannot be imported, why."""
    [entry] = importlib.metadata.entry_points(group=GROUP, name=name)
    try:
        return (inspect.getdoc(entry.load()) or "").partition("\n")[0]
    except (ImportError, AttributeError) as error:
        return f"cannot be imported: {error}"


def load(spec: str, **options: Any) -> Reward:
    """A reward by its spec.

    Args:
        spec: A name of `names()`, optionally with a model after a colon ("clip", "clip:tiny-clip"); or
            "package.module:object", where the object is a class, a reward, or a plain `f(images, prompts) -> scores`.
            A known name wins over a module of that name.
        options: Keyword arguments of the reward's class.

    Raises:
        InputError: Nothing of that name, an import that fails, or options that the class does not take.
    """
    name, colon, rest = spec.partition(":")
    known = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name in known:
        if colon and "model" in options:
            raise InputError(f"reward must name its model once, got {spec!r} and model={options['model']!r}")
        return _make(known[name].load(), spec, {"model": rest, **options} if colon else options)
    if not colon or not rest:
        raise InputError(f"reward must be a known name or package.module:object, got {spec!r}{near_match(name, known)}")
    return _make(_imported(spec, name, rest, near_match(name, known)), spec, options)


def move(reward: Reward, device: torch.device | str) -> None:
    """Moves a reward that holds a network; others work where the images are."""
    if isinstance(reward, OnDevice):
        reward.to(device)


def _imported(spec: str, module: str, path: str, hint: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"reward must be importable, got {spec!r}: {error}{hint}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(f"reward must be in its module, got {spec!r}: {error}") from error
    return found


def _make(found: Any, spec: str, options: dict[str, Any]) -> Reward:
    """A reward from a class, a function or an instance."""
    if isinstance(found, type):
        try:
            inspect.signature(found).bind(**options)
        except TypeError as error:
            raise InputError(f"reward {spec!r} must get options that its class takes: {error}") from error
        return found(**options)
    if options:
        raise InputError(f"reward {spec!r} must be a class to take options, got {', '.join(options)}")
    if isinstance(found, _Scorer):
        return found  # type: ignore[return-value]
    if inspect.isroutine(found) or isinstance(found, partial):
        name = spec.rpartition(":")[2] if isinstance(found, partial) else found.__name__
        return FunctionReward(name=name, version=spec, function=found)
    raise InputError(f"reward {spec!r} must be a class, a reward or a function, got {type(found).__name__}")
