"""Several rewards as one: the sum over rewards of weight times normalised score."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.inputs import check_batch
from diffalign.rewards.normalise import check_how, flat_groups, normalise
from diffalign.strict import build
from diffalign.types import DifferentiableReward, Modality, Reward, RewardBatch, RewardOutput


@dataclass(frozen=True, kw_only=True)
class Part:
    """A reward in a sum."""

    reward: Reward
    weight: float = 1.0
    """Negative for a penalty."""
    normalise: str = "group"
    """One of `normalise.How`."""
    mean: float | None = None
    std: float | None = None
    """Of normalise = "fixed"."""
    name: str = ""
    """Under which its scores are kept; the reward's own unless it is given."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.reward.name)
        if not math.isfinite(self.weight) or self.weight == 0:
            raise InputError(f"part {self.name!r}: weight must be finite and not 0, got {self.weight!r}")
        check_how(self.normalise, self.mean, self.std, f"part {self.name!r}: normalise")

    @property
    def pointwise(self) -> bool:
        """Whether a sample's share depends on that sample alone."""
        return self.normalise in ("none", "fixed") and is_pointwise(self.reward)

    @property
    def scale(self) -> str:
        """What is done with the score, in words."""
        given = f" (mean {self.mean:g}, std {self.std:g})" if self.normalise == "fixed" else ""
        return f"{self.weight:g} x {self.normalise}{given}"

    def share(self, scores: Float[Tensor, " b"], group_ids: Sequence[int] | None) -> Float[Tensor, " b"]:
        """Weight times normalised score."""
        scaled = normalise(scores, self.normalise, group_ids=group_ids, mean=self.mean, std=self.std)
        return self.weight * scaled


class CompositeReward:
    """A weighted sum of rewards, each normalised: by default z-scores within the samples of one prompt.

    With "group", "batch" or "rank" a sample's score depends on the others of its batch: these compare samples that
    are scored together, and say nothing across batches. `pointwise` tells. A sample that one part could not judge is
    NaN, and is left out of every part's mean, std and ranks. `raw` holds each part's own scores under its name and its
    components under name.component; `flat` counts, by part, the groups whose scores were all equal and so gave 0.
    """

    differentiable: bool

    def __init__(self, parts: Sequence[Part], *, name: str = "composite") -> None:
        """Takes rewards as parts; `of` takes them by their specs.

        Raises:
            InputError: No parts, two of one name, or rewards of images and of audio together.
        """
        names = [part.name for part in parts]
        if not names:
            raise InputError(f"reward {name!r} must have parts, got none")
        double = sorted({n for n in names if names.count(n) > 1 or "." in n})
        if double:
            raise InputError(f"reward {name!r} must have parts of different names without '.', got {double[0]!r}")
        kinds = {part.reward.modality for part in parts}
        if len(kinds) > 1:
            raise InputError(f"reward {name!r} must have parts of one modality, got {' and '.join(sorted(kinds))}")
        self.name = name
        self.parts = tuple(parts)
        self.flat: Counter[str] = Counter()
        self.modality: Modality = kinds.pop()
        self.pointwise = all(part.pointwise for part in parts)
        self.differentiable = self.pointwise and all(part.reward.differentiable for part in parts)

    @classmethod
    def of(cls, tables: Sequence[Mapping[str, Any]], *, name: str = "composite") -> "CompositeReward":
        """From tables as a config holds them: `reward` (a spec or a reward), its `options`, and the fields of `Part`.

        Raises:
            InputError: An unknown key, a wrong type, a reward that cannot be loaded, or what `Part` refuses.
        """
        return cls([_part(table, f"parts[{i}]") for i, table in enumerate(tables)], name=name)

    @property
    def version(self) -> str:
        return "; ".join(f"{part.scale} {part.name} [{part.reward.version}]" for part in self.parts)

    @property
    def requires(self) -> frozenset[str]:
        """What the parts require, and group_ids for z-scores within a prompt."""
        groups = {"group_ids"} if any(part.normalise == "group" for part in self.parts) else set()
        return frozenset(groups).union(*(part.reward.requires for part in self.parts))

    @property
    def range(self) -> tuple[float, float]:
        """Sum of the parts' bounds; a z-score has none."""
        bounds = [sorted(part.weight * bound for bound in _bounds(part)) for part in self.parts]
        return (sum(low for low, _ in bounds), sum(high for _, high in bounds))

    @property
    def licence(self) -> str:
        return "; ".join(dict.fromkeys(part.reward.licence for part in self.parts))

    def to(self, device: torch.device | str) -> "CompositeReward":
        for part in self.parts:
            rewards.move(part.reward, device)
        return self

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """The sum over the samples that every part could judge."""
        check_batch(batch, self.name, self.requires)
        outs = [part.reward.score(batch) for part in self.parts]
        device = outs[0].scores.device
        raw: dict[str, Tensor] = {}
        for part, out in zip(self.parts, outs, strict=True):
            raw[part.name] = torch.where(_judged(out), out.scores, torch.nan).to(device)
            raw |= {f"{part.name}.{name}": values.to(device) for name, values in out.raw.items()}
        own = [raw[part.name] for part in self.parts]
        judged = torch.stack([scores.isfinite() for scores in own]).all(0)
        total = torch.zeros(len(judged), dtype=torch.float64, device=device)
        for part, scores in zip(self.parts, own, strict=True):
            kept = torch.where(judged, scores, torch.nan)
            total = total + part.share(kept.double(), batch.group_ids)
            if part.normalise in ("batch", "group", "rank"):
                ids = None if part.normalise == "batch" else batch.group_ids
                self.flat[part.name] += flat_groups(kept, ids)
        return RewardOutput(scores=total.float(), raw=raw, valid=judged)

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """The sum with its graph, where every part has one and none compares samples.

        Raises:
            InputError: A part without gradient, or one that is normalised over other samples.
        """
        check_batch(batch, self.name, self.requires)
        total: Tensor | None = None
        for part in self.parts:
            if not part.pointwise or not isinstance(part.reward, DifferentiableReward):
                raise InputError(
                    f"reward {self.name!r} must have differentiable parts with normalise 'none' or 'fixed' to give a "
                    f"gradient, got {part.name!r} with {part.normalise!r}"
                )
            share = part.share(part.reward.differentiable_score(batch), None)
            total = share if total is None else total + share.to(total.device)
        assert total is not None, "there are parts"
        return total


@runtime_checkable
class _SaysPointwise(Protocol):
    pointwise: bool


def is_pointwise(reward: Reward) -> bool:
    """Whether a sample's score depends on that sample alone; a reward that says nothing of it keeps the contract."""
    return reward.pointwise if isinstance(reward, _SaysPointwise) else True


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A part as a config writes it."""

    reward: Any
    weight: float = 1.0
    normalise: str = "group"
    mean: float | None = None
    std: float | None = None
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def _part(table: Mapping[str, Any], where: str) -> Part:
    row = build(_Row, table, where)
    reward = row.reward
    if isinstance(reward, str):
        reward = rewards.load(reward, **row.options)
    elif row.options or not rewards.DECLARED <= set(dir(reward)):
        raise InputError(f"{where}.reward must be a spec with options, or a reward without, got {reward!r}")
    return Part(
        reward=reward, weight=row.weight, normalise=row.normalise, mean=row.mean, std=row.std, name=row.name
    )  # fmt: skip


def _judged(out: RewardOutput) -> Bool[Tensor, " b"]:
    finite = out.scores.isfinite()
    return finite if out.valid is None else finite & out.valid.to(finite.device)


def _bounds(part: Part) -> tuple[float, float]:
    """Of a part's normalised score."""
    low, high = part.reward.range
    if part.normalise == "fixed" and part.mean is not None and part.std is not None:
        return (low - part.mean) / part.std, (high - part.mean) / part.std
    return {"none": (low, high), "rank": (-1.0, 1.0)}.get(part.normalise, (-math.inf, math.inf))
