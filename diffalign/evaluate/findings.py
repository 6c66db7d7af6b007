"""What a check found, in numbers and in words, and the numbers that it is made of."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from diffalign.errors import InputError
from diffalign.evaluate import stats

MIN_PROMPTS = 8
"""Prompts below which no check is made: resampling fewer says nothing about chance."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of an arm against its base."""

    name: str
    """What is checked, with the reward or statistic after a colon: `texture:clip:blur`."""
    statistic: str
    """What was measured, and in what unit."""
    arm: float | None = None
    base: float | None = None
    value: float | None = None
    """What is held against the bound."""
    bound: float | None = None
    """None where the number is only reported."""
    rule: str = ""
    """What passes the bound, in words."""
    beyond: bool | None = None
    """Whether the bound is passed, and by more than chance; None: not measured."""
    flagged: bool | None = None
    """Beyond the bound, and the reward that was trained on did improve or nobody knows; None: not measured."""
    sentence: str
    """The finding in words; for what was not measured, why."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Numbers by prompt and seed of an arm and its base, from the same initial noise; NaN where there is none."""

    arm: Float[np.ndarray, "n k"]
    base: Float[np.ndarray, "n k"]

    def __post_init__(self) -> None:
        if self.arm.shape != self.base.shape:
            raise InputError(f"arm must have shape {self.base.shape} like base, got {self.arm.shape}")

    @property
    def invalid(self) -> int:
        """Pairs with a number missing on either side; they are left out of both."""
        return int(np.isnan(self.arm - self.base).sum())

    def differences(self) -> tuple[Float[np.ndarray, " m"], list[int]]:
        """(mean over seeds of arm - base by prompt, places of the prompts that have one)."""
        return stats.per_prompt(self.arm - self.base)

    def means(self) -> tuple[float, float]:
        """(arm, base): means over prompts of the means over seeds, of the pairs that count."""
        hole = np.isnan(self.arm - self.base)
        arm, base = (np.where(hole, np.nan, values) for values in (self.arm, self.base))
        return float(stats.per_prompt(arm)[0].mean()), float(stats.per_prompt(base)[0].mean())


def by_prompt(
    arm: Float[np.ndarray, " n"], base: Float[np.ndarray, " n"], prompt_index: Sequence[int], k: Sequence[int]
) -> Paired:
    """One number an image, laid out by prompt and seed; prompts without an image are left out."""
    rows = {prompt: row for row, prompt in enumerate(sorted(set(prompt_index)))}
    places = ([rows[i] for i in prompt_index], list(k))
    empty = np.full((len(rows), max(k) + 1), np.nan)
    held = Paired(arm=empty.copy(), base=empty.copy())
    held.arm[places], held.base[places] = arm, base
    return held


def interval(
    values: Float[np.ndarray, " n"], *, seed: int, strata: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95 % interval of a mean over prompts by the bootstrap."""
    return stats.bootstrap_interval(values, seed=seed, strata=strata)


def improved(scores: Paired, *, seed: int = 0) -> bool:
    """Whether the whole interval of the mean difference lies above 0: the arm gained on this reward."""
    return interval(scores.differences()[0], seed=seed)[0] > 0


def not_measured(name: str, statistic: str, reason: str) -> Check:
    """A check that could not be made."""
    return Check(name=name, statistic=statistic, sentence=f"Not measured: {reason}.")


def too_few(count: int, what: str = "prompts") -> str:
    """The reason why nothing was measured on so few."""
    return f"at least {MIN_PROMPTS} {what} are needed, got {count}"


def a_noun(noun: str) -> str:
    """With its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def with_training(check: Check, trained_on_improved: bool | None) -> Check:
    """The same check, flagged where it is beyond its bound and training's own reward rose, or may have."""
    if not check.beyond:
        return replace(check, flagged=check.beyond)
    tail = {
        True: " The reward that was trained on rose meanwhile, which is how reward hacking looks.",
        False: " The reward that was trained on did not rise, so this is damage but no reward hacking.",
        None: " Whether the reward that was trained on rose is not known.",
    }[trained_on_improved]
    return replace(check, flagged=trained_on_improved is not False, sentence=check.sentence + tail)
