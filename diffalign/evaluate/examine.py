"""What stands beside the scores of a comparison: variety within prompts, drift from the base, checks for hacking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diffalign.evaluate.comparison import matrix
from diffalign.evaluate.diversity import Diversity as Variety
from diffalign.evaluate.diversity import cosine_diversity, vendi_diversity
from diffalign.evaluate.findings import Check as Finding
from diffalign.evaluate.findings import Paired, improved, interval
from diffalign.evaluate.hacking import Evidence, run_checks
from diffalign.evaluate.lazy import PairedImages, paired_files
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.results import Check, Comparison, Diversity, Drift, Role
from diffalign.evaluate.score import Table
from diffalign.evaluate.survey import Survey, survey
from diffalign.progress import bar
from diffalign.rewards import Encoding
from diffalign.types import MediaEncoder, Modality, Reward

_UNSAFE = "safety.flagged"
"""Column of the safety reward's verdicts."""


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """What a comparison is examined with."""

    prompts: Sequence[str]
    strata: Sequence[str] | None
    """A label of each prompt, within which prompts are drawn again."""
    rewards: Sequence[Reward]
    encoder: MediaEncoder | None
    folder: Path
    seed: int
    medium: Medium = PICTURES
    media: Mapping[str, Medium] = field(default_factory=dict)
    """What each reward gets, by its name."""

    def examine(self, comparison: Comparison, table: Table) -> Comparison:
        """The comparison with its diversity, drift and checks; reads every image of both arms once."""
        images = images_of(table, self.folder, comparison.arm, comparison.against, self.medium)
        with bar(f"looking at {self.medium.folder}", len(images)) as shown:
            seen = survey(images, encoder=self.encoder, shown=shown)
        with bar("checking", None) as shown:
            found = run_checks(
                self.evidence(comparison, table, images, seen),
                trained_on_improved=rose(comparison, table, seed=self.seed),
                seed=self.seed,
                shown=shown,
            )
        return replace(
            comparison,
            diversity=diversities(seen, self.seed),
            drift=drifts(seen, self.seed),
            checks=tuple(as_check(finding) for finding in found),
        )

    def evidence(self, comparison: Comparison, table: Table, images: PairedImages, seen: Survey) -> Evidence:
        """What there is to check."""
        roles = {name: result.role for name, result in comparison.rewards.items()}
        held_out = [name for name, role in roles.items() if role == "held_out"]
        reads = {reward.name for reward in self.rewards if "prompts" in reward.requires}
        return Evidence(
            prompts=self.prompts,
            scores={name: paired(table, comparison, name) for name in roles},
            held_out=held_out,
            alignment=[name for name in held_out if name in reads],
            survey=seen,
            images=images,
            probed=[reward for reward in self.rewards if roles[reward.name] != "held_out"],
            unsafe=paired(table, comparison, _UNSAFE) if _UNSAFE in table else None,
            strata=self.strata,
            medium=self.medium,
            media=self.media,
        )


def encoder_of(rewards: Sequence[Reward], modality: Modality = "image") -> MediaEncoder | None:
    """The encoder of the first reward of images, or of clips, that holds one."""
    held = [reward.encoder for reward in rewards if isinstance(reward, Encoding)]
    return next((one for one in held if isinstance(one, MediaEncoder) and one.modality == modality), None)


def images_of(table: Table, folder: Path, arm: str, against: str, medium: Medium = PICTURES) -> PairedImages:
    """Images or clips of two arms by the table's column `file`."""
    files: dict[str, dict[tuple[int, int], Path]] = {arm: {}, against: {}}
    for name, place, k, file in zip(table["arm"], table["prompt_index"], table["k"], table["file"], strict=True):
        if name in files:
            files[name][place, k] = folder / file
    return paired_files(files[arm], files[against], medium)


def paired(table: Table, comparison: Comparison, column: str) -> Paired:
    """A column of both arms, by prompt and seed."""
    return Paired(arm=matrix(table, comparison.arm, column), base=matrix(table, comparison.against, column))


def rose(comparison: Comparison, table: Table, *, seed: int) -> bool | None:
    """Whether what training optimised, or whose labels it learned from, rose; None if no such reward is there."""
    of: Mapping[Role, list[str]] = {
        role: [name for name, result in comparison.rewards.items() if result.role == role]
        for role in ("trained_on", "labeller")
    }
    names = of["trained_on"] or of["labeller"]
    return any(improved(paired(table, comparison, name), seed=seed) for name in names) if names else None


def diversities(seen: Survey, seed: int) -> tuple[Diversity, ...]:
    """Variety within prompts by the survey's encoder; nothing where it could not be measured."""
    if seen.embeddings is None or seen.encoder is None:
        return ()
    measured = {
        "vendi": vendi_diversity(*seen.embeddings, seen.prompt_index),
        "mean 1 - cosine of pairs": cosine_diversity(*seen.embeddings, seen.prompt_index),
    }
    return tuple(
        found for name, one in measured.items() if (found := _diversity(name, seen.encoder, one, seed)) is not None
    )


def drifts(seen: Survey, seed: int) -> tuple[Drift, ...]:
    """Distances from the base's images of the same noise, with intervals over prompts."""
    encoder = seen.encoder or ""
    measured: dict[str, tuple[str, Float[np.ndarray, " n"] | None]] = {
        "1 - cosine": (encoder, None if seen.cosine is None else 1 - seen.cosine),
        "perceptual distance": ("", seen.perceptual),
        seen.medium.difference: ("", seen.pixel),
    }
    found = []
    for name, (by, values) in measured.items():
        if values is None:
            continue
        means = seen.per_prompt(values)
        low, high = interval(means, seed=seed)
        found.append(Drift(metric=name, encoder=by, mean=float(means.mean()), low=low, high=high, n=len(means)))
    return tuple(found)


def as_check(finding: Finding) -> Check:
    """A finding for results.json."""
    return Check(
        name=finding.name,
        statistic=finding.statistic,
        value_arm=finding.arm,
        value_base=finding.base,
        bound=finding.rule,
        flagged=finding.flagged,
        sentence=finding.sentence,
    )


def _diversity(name: str, encoder: str, found: Variety, seed: int) -> Diversity | None:
    if found.arm is None or found.base is None or found.ratio is None:
        return None
    ends = found.interval(seed=seed)
    return Diversity(
        metric=name,
        encoder=encoder,
        value_arm=float(found.arm.mean()),
        value_base=float(found.base.mean()),
        ratio=found.ratio,
        ratio_low=None if ends is None else ends[0],
        ratio_high=None if ends is None else ends[1],
        n=len(found.arm),
    )
