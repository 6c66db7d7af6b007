"""Rewards as plug-ins: found by entry-point name or by `package.module:object`, imported only when named."""

import importlib
import importlib.metadata
import inspect
from functools import partial
from typing import Any

import torch
from typing_extensions import Protocol, runtime_checkable

from diffalign.errors import InputError, near_match
from diffalign.types import FunctionReward, MediaEncoder, Reward, RewardBatch, RewardOutput, SetReward

GROUP = "diffalign.rewards"
"""Entry-point group in which ours and others' rewards are declared."""
SET_GROUP = "diffalign.set_rewards"
"""Of rewards of whole sets."""
ENCODER_GROUP = "diffalign.encoders"
"""Of encoders for sets and similarities."""
DECLARED = frozenset({"name", "version", "modality", "requires", "range", "differentiable", "licence"})
"""What every reward says of itself."""


@runtime_checkable
class OnDevice(Protocol):
    """A reward that holds a network, and so has a device."""

    def to(self, device: torch.device | str) -> "OnDevice": ...


@runtime_checkable
class Encoding(Protocol):
    """A reward that holds an encoder of images, of their prompts too or of other media."""

    @property
    def encoder(self) -> Any: ...


@runtime_checkable
class _Scorer(Protocol):
    def score(self, batch: RewardBatch) -> RewardOutput: ...


def names(group: str = GROUP) -> list[str]:
    """Names under which installed packages declare rewards (or what else the group holds), ours among them."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=group)})


def summary(name: str, group: str = GROUP) -> str:
    """First line of what a declared reward says of itself; of one that cannot be imported, why."""
    [entry] = importlib.metadata.entry_points(group=group, name=name)
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
    found, options = _found(spec, options, GROUP, "reward", "model")
    made = _make(found, spec, options)
    missing = sorted(name for name in DECLARED if name not in dir(made))
    if missing:
        declared = ", ".join(sorted(DECLARED))
        raise InputError(f"reward {spec!r} must declare {declared}, got one without {', '.join(missing)}")
    return made


def load_set(spec: str, **options: Any) -> SetReward:
    """A set reward by its spec: a name, with the encoder after a colon ("frechet:clip:tiny-clip"), or a class's path.

    Raises:
        InputError: Nothing of that name, an import that fails, or options that the class does not take.
    """
    found, options = _found(spec, options, SET_GROUP, "set reward", "encoder")
    return _built(found, f"set reward {spec!r}", options)


def load_encoder(spec: str, **options: Any) -> MediaEncoder:
    """An encoder by its spec: a name, with a model after a colon ("clip:tiny-clip"), or a class's path.

    Raises:
        InputError: Nothing of that name, an import that fails, or options that the class does not take.
    """
    found, options = _found(spec, options, ENCODER_GROUP, "encoder", "model")
    return _built(found, f"encoder {spec!r}", options)


def move(reward: Reward, device: torch.device | str) -> None:
    """Moves a reward that holds a network; others work where the images are."""
    if isinstance(reward, OnDevice):
        reward.to(device)


def _found(spec: str, options: dict[str, Any], group: str, kind: str, tail: str) -> tuple[Any, dict[str, Any]]:
    """(what a spec names, options with what followed the name's colon as `tail`)."""
    name, colon, rest = spec.partition(":")
    known = {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}
    if name in known:
        if colon and tail in options:
            raise InputError(f"{kind} must name its {tail} once, got {spec!r} and {tail}={options[tail]!r}")
        return known[name].load(), {tail: rest, **options} if colon else options
    if not colon or not rest:
        raise InputError(f"{kind} must be a known name or package.module:object, got {spec!r}{near_match(name, known)}")
    return _imported(spec, name, rest, kind, near_match(name, known)), options


def _imported(spec: str, module: str, path: str, kind: str, hint: str) -> Any:
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{kind} must be importable, got {spec!r}: {error}{hint}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(f"{kind} must be in its module, got {spec!r}: {error}") from error
    return found


def _built(found: Any, what: str, options: dict[str, Any]) -> Any:
    """An instance of a class."""
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise InputError(f"{what} must get options that its class takes: {error}") from error
    return found(**options)


def _make(found: Any, spec: str, options: dict[str, Any]) -> Any:
    """A reward from a class, a function or an instance."""
    if isinstance(found, type):
        return _built(found, f"reward {spec!r}", options)
    if options:
        raise InputError(f"reward {spec!r} must be a class to take options, got {', '.join(options)}")
    if isinstance(found, _Scorer):
        return found
    if inspect.isroutine(found) or isinstance(found, partial):
        name = spec.rpartition(":")[2] if isinstance(found, partial) else found.__name__
        return FunctionReward(name=name, version=spec, function=found)
    raise InputError(f"reward {spec!r} must be a class, a reward or a function, got {type(found).__name__}")
