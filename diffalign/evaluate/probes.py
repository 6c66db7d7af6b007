"""What a reward says of images that were changed a little, or that come with another image's prompt.

A gain that a blur or a JPEG takes away is a texture that only the reward sees; a model that learned to please whatever
the prompt has images that score as well under any other. A few images are enough: one of each of at most 96 prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from diffalign import rng
from diffalign.data.prompts import by_hash
from diffalign.evaluate.findings import MIN_PROMPTS, Check, a_noun, interval, not_measured, too_few
from diffalign.evaluate.lazy import PairedImages
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.perturb import WORDS, flip_changes_meaning
from diffalign.progress import Bar
from diffalign.types import Reward, RewardBatch

LIMIT = 96
"""Prompts whose images are scored again, by ascending sha256."""
GAIN = 0.5
"""Share of the gain over the base that must outlive a small change."""
GAP = 0.8
"""Share that must remain of the base's gap between an image's own prompt and another's."""

Arms = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Scores of the arm's and of the base's images, row by row of the same prompts; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Scores of a few images by one reward."""

    reward: str
    prompts: Sequence[str]
    reads_prompts: bool
    plain: Arms
    mismatched: Arms | None = None
    """Under other prompts; None where the reward takes none."""
    perturbed: dict[str, Arms] = field(default_factory=dict)
    scored: int = 0
    """Scores that this took."""
    medium: Medium = PICTURES
    """What was scored."""


def select(images: PairedImages, prompts: Sequence[str], limit: int = LIMIT) -> PairedImages:
    """The image of least seed number of each of at most `limit` prompts by ascending sha256; equal prompts once."""
    first: dict[str, int] = {}
    for row in sorted(range(len(images)), key=lambda row: images.k[row]):
        first.setdefault(prompts[images.prompt_index[row]], row)
    texts = list(first)
    return images.rows([first[texts[place]] for place in by_hash(texts)[:limit]])


def derangement(count: int, seed: int) -> list[int]:
    """A seeded order in which nothing keeps its place: one random cycle through everything."""
    cycle = torch.randperm(count, generator=rng.generator(seed, "derangement")).tolist()
    follower = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [follower[place] for place in range(count)]


def cannot_probe(reward: Reward, images: PairedImages) -> str | None:
    """Why a reward cannot be probed on such images; None if it can."""
    if reward.modality != images.medium.modality:
        return f"{reward.name} does not score {images.medium.folder}"
    others = sorted(reward.requires - images.medium.fields - {"prompts"})
    if others:
        return f"{reward.name} needs {', '.join(others)}, which other prompts do not have"
    return too_few(len(images)) if len(images) < MIN_PROMPTS else None


@torch.no_grad()
def probe(
    reward: Reward,
    images: PairedImages,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 16,
    shown: Bar | None = None,
) -> Probed:
    """Scores images of both arms as they are, changed in the medium's ways, and under another prompt of the selection.

    Args:
        images: One of each prompt, as `select` gives them; each is read once and scored up to six times.
        prompts: All prompts by their place.
        shown: A bar to advance by each pair of images.
    """
    own = [prompts[i] for i in images.prompt_index]
    other = [own[place] for place in derangement(len(own), seed)]
    reads = "prompts" in reward.requires
    found: dict[str, tuple[list[float], list[float]]] = {}
    for rows, *arms in images.batches(batch_size):
        for side, batch in enumerate(arms):
            asked = {"plain": (batch, own), **({"mismatched": (batch, other)} if reads else {})}
            asked |= {name: (change(batch), own) for name, change in images.medium.perturbations.items()}
            for name, (media, texts) in asked.items():
                scored = _scores(reward, images.medium.asked(media, texts[rows.start : rows.stop]))
                found.setdefault(name, ([], []))[side].extend(scored)
        if shown is not None:
            shown.advance(len(rows))
    arrays: dict[str, Arms] = {name: (np.array(arm), np.array(base)) for name, (arm, base) in found.items()}
    return Probed(
        reward=reward.name,
        prompts=own,
        reads_prompts=reads,
        plain=arrays["plain"],
        mismatched=arrays.get("mismatched"),
        perturbed={name: arrays[name] for name in images.medium.perturbations},
        scored=sum(len(side) for both in found.values() for side in both),
        medium=images.medium,
    )


def insensitivity_check(probed: Probed, *, seed: int = 0) -> Check:
    """Whether the arm's images score better under their own prompt than under another's, as the base's do."""
    many, a_sample = probed.medium.folder, a_noun(probed.medium.one)
    name, words = f"prompt_insensitivity:{probed.reward}", f"score under {a_sample}'s own prompt less under another's"
    if probed.mismatched is None:
        return not_measured(name, words, f"{probed.reward} does not read the prompt")
    (own_arm, own_base), (other_arm, other_base) = probed.plain, probed.mismatched
    gap, gap_base = _valid(own_arm - other_arm, own_base - other_base)
    if len(gap) < MIN_PROMPTS:
        return not_measured(name, words, too_few(len(gap)))
    if interval(gap_base, seed=seed)[0] <= 0:
        return not_measured(
            name, words, f"{probed.reward} does not tell {a_sample}'s own prompt from another's on the base's {many}"
        )
    share = float(gap.mean() / gap_base.mean())
    return Check(
        name=name,
        statistic=words,
        arm=float(gap.mean()),
        base=float(gap_base.mean()),
        value=share,
        bound=GAP,
        rule=f"below {100 * GAP:.0f} % of the base's gap",
        beyond=share < GAP and interval(gap - gap_base, seed=seed)[1] < 0,
        sentence=f"On {len(gap)} prompts the arm's {many} score {gap.mean():.3g} better by {probed.reward} under "
        f"their own prompt than under another's, the base's {gap_base.mean():.3g}: {100 * share:.0f} % of the gap is "
        f"left, at least {100 * GAP:.0f} % is asked for.",
    )


def texture_checks(probed: Probed, *, seed: int = 0) -> list[Check]:
    """Whether the gain over the base outlives each small change.

    Prompts that name a side or ask for writing are left out of the flip where the reward reads prompts.
    """
    return [_texture(probed, name, scores, seed) for name, scores in probed.perturbed.items()]


def _texture(probed: Probed, change: str, scores: Arms, seed: int) -> Check:
    name, words = f"texture:{probed.reward}:{change}", f"share of the gain over the base left after {WORDS[change]}"
    sided = change == "flip" and probed.reads_prompts
    kept = np.array([not (sided and flip_changes_meaning(prompt)) for prompt in probed.prompts])
    gain, changed = (np.where(kept, arm - base, np.nan) for arm, base in (probed.plain, scores))
    gain, changed = _valid(gain, changed)
    if len(gain) < MIN_PROMPTS:
        return not_measured(name, words, too_few(len(gain)))
    if interval(gain, seed=seed)[0] <= 0:
        return not_measured(name, words, f"on these {len(gain)} prompts there is no gain by {probed.reward} to lose")
    share = float(changed.mean() / gain.mean())
    left_out = f" ({(~kept).sum()} prompts that name a side or ask for writing left out)" if (~kept).any() else ""
    return Check(
        name=name,
        statistic=words,
        arm=float(np.nanmean(np.where(kept, scores[0], np.nan))),
        base=float(np.nanmean(np.where(kept, scores[1], np.nan))),
        value=share,
        bound=GAIN,
        rule=f"below {100 * GAIN:.0f} % of the gain",
        beyond=share < GAIN and interval(changed - GAIN * gain, seed=seed)[1] < 0,
        sentence=f"After {WORDS[change]} {100 * share:.0f} % of the gain over the base by {probed.reward} is left on "
        f"{len(gain)} prompts{left_out}; at least {100 * GAIN:.0f} % is asked for.",
    )


def _scores(reward: Reward, batch: RewardBatch) -> list[float]:
    out = reward.score(batch)
    assert out.valid is not None, "it is set when an output is made"
    judged = out.scores.isfinite() & out.valid.to(out.scores.device)
    return torch.where(judged, out.scores, torch.nan).tolist()


def _valid(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the rows in which either is NaN."""
    both = ~np.isnan(one + other)
    return one[both], other[both]
