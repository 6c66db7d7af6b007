"""Rewards of whole sets in an evaluation: one number per arm, over all of its samples, and how two arms differ.

No interval stands beside an arm's own number: prompts that a resample draws twice make a set look less diverse and
further from its reference. In the difference of two arms of equal size, drawn again together, most of that cancels, and
what is left is taken off once more by the basic bootstrap: with d the difference found and q the quantiles of resampled
ones, the interval is [2 d - q(97.5 %), 2 d - q(2.5 %)]. Rewards whose rows can be kept (the Fréchet ones) have it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.errors import InputError
from diffalign.evaluate.form import Form
from diffalign.evaluate.media import Medium, check_takes
from diffalign.evaluate.score import Table, batches
from diffalign.evaluate.set_results import Endless, Outlier, SetDifference, SetResult
from diffalign.evaluate.store import appending, digest_of, key, read_journal
from diffalign.progress import bar
from diffalign.rewards import OnDevice
from diffalign.rewards.fad import FADReward
from diffalign.types import Credit, Embedded, RewardBatch, SetReward, SharedReward

BATCH = 32
MIN_PROMPTS = 8
"""Prompts below which no interval is given: resampling fewer says nothing about chance."""
OUTLIERS = 4
"""Samples at either end of an arm's credits that are listed."""
EXACT = 256
"""Samples up to which each is left out in turn; of more the first order is taken, which is as good there."""
RESAMPLES = 1000
_FEW, _COSTLY = 200, 10**9
"""Resamples where one costs more than so many multiplications: rows times the square of their width."""


def prepare(
    sets: Mapping[str, SetReward],
    reference: str | None,
    device: torch.device,
    form: Form,
    samples: int,
) -> None:
    """Gives rewards their device and reference set, and lets them hear or see a sample.

    Args:
        form: Of the arms' samples.
        samples: That each arm will have.

    Raises:
        InputError: One is of another kind of samples, or cannot take these; one needs a reference and there is none, or
            none needs the one that is there; or there will be fewer than two samples.
    """
    needing = [spec for spec, reward in sets.items() if reward.needs_reference]
    if needing and reference is None:
        raise InputError(f"reward {needing[0]!r} must have a reference set; name its file or folder as reference")
    if reference is not None and not needing:
        raise InputError(f"reference must belong to a reward of sets that needs one, got {reference!r} and none")
    trial = form.medium.trial(form.sample)[None]
    for spec, reward in sets.items():
        check_takes(reward, "rewards", form.medium)
        if samples < 2:
            raise InputError(f"reward {spec!r} must have a set of two {form.medium.folder} or more, got {samples}")
        if isinstance(reward, OnDevice):
            reward.to(device)
        if isinstance(reward, SharedReward):
            reward.embed(form.of(spec).asked(trial))
    for spec in needing:
        assert reference is not None, "checked above"
        if Path(reference).is_dir():
            sets[spec].fit_reference(form.of(spec).exemplars(Path(reference)))
        else:
            sets[spec].load_reference(reference)


@dataclass(kw_only=True)
class Sets:
    """The numbers of all arms and their differences; those that a journal knows are not computed again."""

    rewards: Mapping[str, SetReward]
    table: Table
    folder: Path
    reference: str | None
    medium: Medium
    media: Mapping[str, Medium] = field(default_factory=dict)
    """By spec, of rewards that get samples in another way."""
    seed: int = 0
    kept: dict[tuple[str, str], Embedded] = field(default_factory=dict)
    """Rows by reward's spec and arm."""

    def score(self) -> tuple[SetResult, ...]:
        """One number of each reward for each arm."""
        known, found = read_journal(self.folder, "sets"), []
        arms = list(dict.fromkeys(self.table["arm"]))
        with appending(self.folder, "sets", 0) as journal, bar("sets", len(self.rewards) * len(arms)) as shown:
            for spec, reward in self.rewards.items():
                for arm in arms:
                    own = self._key(spec, arm)
                    if own not in known:
                        known[own] = {"key": own, **self._measured(spec, arm)}
                        journal.write([known[own]])
                    found.append(_result(reward, spec, arm, known[own]))
                    shown.advance()
        return tuple(found)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> tuple[SetDifference, ...]:
        """How (arm, against) differ, by each reward whose rows can be kept."""
        known, found = read_journal(self.folder, "set-differences"), []
        shared = {spec: r for spec, r in self.rewards.items() if isinstance(r, SharedReward)}
        with (
            appending(self.folder, "set-differences", 0) as journal,
            bar("intervals of sets", len(shared) * len(pairs)) as shown,
        ):
            for spec, reward in shared.items():
                for arm, against in pairs:
                    own = key(self._key(spec, arm), self._key(spec, against), self.seed, RESAMPLES)
                    if own not in known:
                        known[own] = {"key": own, **self._difference(spec, arm, against)}
                        journal.write([known[own]])
                    values = {name: value for name, value in known[own].items() if name != "key"}
                    found.append(
                        SetDifference(
                            reward=reward.name, spec=spec, version=reward.version, arm=arm, against=against, **values
                        )
                    )
                    shown.advance()
        return tuple(found)

    def _measured(self, spec: str, arm: str) -> dict[str, Any]:
        """A reward's word on an arm, as the journal keeps it."""
        reward = self.rewards[spec]
        if not isinstance(reward, SharedReward):
            out = reward.score_set(self._batches(spec, arm))
            return {"score": out.score, "raw": out.raw, "samples": out.samples}
        rows = self._rows(spec, arm)
        out = reward.of_rows(rows)
        endless = reward.endless(rows) if isinstance(reward, FADReward) else None
        mode: Credit = "loo" if len(rows.counts) <= EXACT else "influence"
        return {
            "score": out.score,
            "raw": out.raw,
            "samples": out.samples,
            "endless": None if endless is None else asdict(endless),
            "credit": mode,
            "outliers": self._outliers(arm, reward.credit_rows(rows, mode).tolist()) if len(rows.counts) > 2 else None,
        }

    def _outliers(self, arm: str, credit: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
        """Samples that help the arm's number most, and those that hurt it most; none is both."""
        rows = self._places(arm)
        order = sorted(range(len(rows)), key=lambda i: -credit[i])
        count = min(OUTLIERS, len(order) // 2)
        ends = {"best": order[:count], "worst": order[::-1][:count]}
        return {
            end: [
                {
                    "prompt_index": self.table["prompt_index"][rows[i]],
                    "k": self.table["k"][rows[i]],
                    "credit": credit[i],
                }
                for i in chosen
            ]
            for end, chosen in ends.items()
        }

    def _difference(self, spec: str, arm: str, against: str) -> dict[str, Any]:
        """Difference of two arms' scores with its interval, as the journal keeps it."""
        reward = self.rewards[spec]
        one, other = self._rows(spec, arm), self._rows(spec, against)
        found = reward.of_rows(one).score - reward.of_rows(other).score
        places = [self.table["prompt_index"][row] for row in self._places(arm)]
        prompts = sorted(set(places))
        values: dict[str, Any] = {"samples": len(one.counts), "difference": found}
        if len(prompts) < MIN_PROMPTS or len(one.counts) != len(other.counts):
            return values | {"low": None, "high": None, "resamples": 0}
        members = [[i for i, place in enumerate(places) if place == prompt] for prompt in prompts]
        resamples = RESAMPLES if one.rows.numel() * one.rows.shape[1] <= _COSTLY else _FEW
        rng, drawn = np.random.default_rng(self.seed), []
        for _ in range(resamples):
            chosen = [i for p in rng.integers(0, len(members), len(members)) for i in members[p]]
            drawn.append(reward.of_rows(one.take(chosen)).score - reward.of_rows(other.take(chosen)).score)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return values | {"low": float(2 * found - high), "high": float(2 * found - low), "resamples": resamples}

    def _rows(self, spec: str, arm: str) -> Embedded:
        """An arm's samples in a reward's space."""
        if (spec, arm) not in self.kept:
            parts = [self.rewards[spec].embed(batch) for batch in self._batches(spec, arm)]
            counts = tuple(count for part in parts for count in part.counts)
            self.kept[spec, arm] = Embedded(rows=torch.cat([part.rows.cpu() for part in parts]), counts=counts)
        return self.kept[spec, arm]

    def _places(self, arm: str) -> list[int]:
        return [row for row, name in enumerate(self.table["arm"]) if name == arm]

    def _batches(self, spec: str, arm: str) -> Iterator[RewardBatch]:
        rows = self._places(arm)
        places = [self.table["prompt_index"][row] for row in rows]
        groups = places if len(set(places)) < len(places) else None  # one sample a prompt makes no group
        files = [self.folder / self.table["file"][row] for row in rows]
        return set_batches(files, self._medium(spec), [self.table["prompt"][row] for row in rows], groups)

    def _medium(self, spec: str) -> Medium:
        return self.media.get(spec, self.medium)

    def _key(self, spec: str, arm: str) -> str:
        reward = self.rewards[spec]
        content = _content(Path(self.reference)) if self.reference is not None and reward.needs_reference else None
        made = [self.table[self.medium.digest][row] for row in self._places(arm)]
        kept = ["rows"] if isinstance(reward, SharedReward) else []
        return key(reward.name, reward.version, content, made, *self._medium(spec).hearing, *kept)


def set_batches(
    files: Sequence[Path],
    medium: Medium,
    prompts: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
) -> Iterator[RewardBatch]:
    """Samples of files, read when they are asked for, with their prompts and the numbers of their groups."""
    position = 0
    for stack in batches((medium.read(file) for file in files), BATCH):
        rows = slice(position, position + len(stack))
        asked = medium.asked(stack, None if prompts is None else prompts[rows])
        yield RewardBatch(
            images=asked.images,
            audio=asked.audio,
            sample_rate=asked.sample_rate,
            prompts=asked.prompts,
            group_ids=None if groups is None else groups[rows],
        )
        position += len(stack)


def _content(reference: Path) -> str:
    """Hash of a reference set."""
    if not reference.is_dir():
        return digest_of(reference)
    lines = "".join(f"{file.name} {digest_of(file)}\n" for file in sorted(reference.iterdir()) if file.is_file())
    return hashlib.sha256(lines.encode()).hexdigest()


def _endless(known: Mapping[str, Any]) -> Endless:
    return Endless(**{**known, "sizes": tuple(known["sizes"]), "distances": tuple(known["distances"])})


def _result(reward: SetReward, spec: str, arm: str, known: Mapping[str, Any]) -> SetResult:
    endless, outliers = known.get("endless"), known.get("outliers") or {"best": [], "worst": []}
    return SetResult(
        reward=reward.name,
        spec=spec,
        version=reward.version,
        arm=arm,
        score=known["score"],
        raw=known["raw"],
        samples=known["samples"],
        endless=None if endless is None else _endless(endless),
        credit=known.get("credit"),
        best=tuple(Outlier(**one) for one in outliers["best"]),
        worst=tuple(Outlier(**one) for one in outliers["worst"]),
    )
