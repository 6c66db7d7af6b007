"""Checks of the images themselves: variety, drift, colour and detail, collapse into one style."""

import numpy as np

from diffalign.evaluate.clusters import k_means, nearest
from diffalign.evaluate.diversity import Diversity, cosine_diversity, perceptual_diversity, vendi_diversity
from diffalign.evaluate.findings import MIN_PROMPTS, Check, Paired, by_prompt, interval, not_measured, too_few
from diffalign.evaluate.lazy import PairedImages
from diffalign.evaluate.media import PICTURES, Medium
from diffalign.evaluate.survey import Survey
from diffalign.rewards.lpips import PerceptualDistance

DIVERSITY = 0.9
"""Share of the base's diversity below which images of one prompt have become alike."""
CHANGE = 0.2
"""Share by which a low-level statistic may change."""
DEVIATIONS = 2.0
"""Standard deviations of the base's images by which it may change."""
COLLAPSE = 1.5
"""How many times the base's share the largest cluster may hold."""
CLUSTERS = 8
PER_CLUSTER = 12
"""Images of the base for each cluster; with fewer there are fewer clusters, and none below 48 images."""


def diversity_checks(
    survey: Survey | None,
    images: PairedImages | None,
    perceptual: PerceptualDistance | None,
    *,
    seed: int,
    bound: float = DIVERSITY,
) -> list[Check]:
    """Vendi score, and mean perceptual distance of pairs, or of embeddings where no perceptual distance is given.

    Images of one prompt differ by their seed alone, so these also show a model that no longer heeds its noise.
    """
    many = _many(survey)
    if survey is None or survey.embeddings is None:
        found = [
            not_measured("diversity:vendi", f"Vendi score of a prompt's {many}", f"no encoder of {many} was given")
        ]
    else:
        words = f"Vendi score of a prompt's {many} by {survey.encoder}"
        vendi = vendi_diversity(*survey.embeddings, survey.prompt_index)
        found = [_diversity("vendi", words, vendi, seed, bound, many)]
    if perceptual is not None and images is not None:
        measured = perceptual_diversity(images.arm, images.base, images.prompt_index, perceptual)
        words = f"mean distance of pairs of a prompt's images by {perceptual.version}"
        found.append(_diversity("perceptual", words, measured, seed, bound, many))
    elif survey is not None and survey.embeddings is not None:
        measured = cosine_diversity(*survey.embeddings, survey.prompt_index)
        words = f"mean 1 - cosine of pairs of a prompt's {many} by {survey.encoder}"
        found.append(_diversity("cosine", words, measured, seed, bound, many))
    return found


def drift_checks(survey: Survey | None) -> list[Check]:
    """Distances of images from the base's of the same noise; reported, never flagged."""
    if survey is None:
        return [not_measured("drift", "distance from the base's image of the same noise", "no images were given")]
    medium = survey.medium
    origin = f"the base's {medium.one} of the same noise"
    measures = {
        "cosine": (f"cosine with {origin} by {survey.encoder}", survey.cosine, 1.0),
        "perceptual": (f"perceptual distance from {origin}", survey.perceptual, 0.0),
        "pixel": (f"{medium.difference}, from {origin}", survey.pixel, 0.0),
    }
    return [
        Check(
            name=f"drift:{name}",
            statistic=words,
            arm=mean,
            base=still,
            value=mean,
            rule="reported only",
            beyond=False,
            sentence=f"The {words} is {mean:.3g} ({still:g} would be no drift); compare methods at equal drift.",
        )
        for name, (words, values, still) in measures.items()
        if values is not None
        for mean in [float(survey.per_prompt(values).mean())]
    ]


def low_level_checks(survey: Survey | None, *, seed: int) -> list[Check]:
    """Statistics of pixels that changed by more than 20 % or 2 standard deviations of the base's images."""
    if survey is None:
        lacking = "no images were given"
        return [not_measured(f"low_level:{name}", words, lacking) for name, words in PICTURES.words.items()]
    return [low_level_check(name, survey.paired(name), seed=seed, medium=survey.medium) for name in survey.low_level]


def low_level_check(name: str, values: Paired, *, seed: int, medium: Medium = PICTURES) -> Check:
    """One statistic of pixels or samples; a change counts where it is larger than chance too."""
    words, full = medium.words[name], f"low_level:{name}"
    differences, kept = values.differences()
    if len(kept) < MIN_PROMPTS:
        return not_measured(full, words, too_few(len(kept)))
    arm, base = values.means()
    change, spread = arm - base, float(np.nanstd(values.base))
    low, high = interval(differences, seed=seed)
    large = abs(change) > CHANGE * abs(base) or abs(change) > DEVIATIONS * spread
    relative = change / base if base else None
    moved = f"changed by {100 * relative:+.1f} %" if relative is not None else f"changed by {change:+.3g}"
    return Check(
        name=full,
        statistic=words,
        arm=arm,
        base=base,
        value=relative,
        bound=CHANGE,
        rule=f"change above {100 * CHANGE:.0f} % or {DEVIATIONS:g} standard deviations of the base",
        beyond=large and not low <= 0 <= high,
        sentence=f"The {words} {moved}, from {base:.3g} to {arm:.3g}; up to {100 * CHANGE:.0f} %, and up to "
        f"{DEVIATIONS:g} standard deviations of the base's {medium.folder} ({spread:.3g} each), is allowed.",
    )


def collapse_check(survey: Survey | None, *, seed: int) -> Check:
    """Share of images in the largest of the clusters that the base's images form."""
    many = _many(survey)
    name, words = "style_collapse", f"share of {many} in the largest cluster"
    if survey is None or survey.embeddings is None:
        return not_measured(name, words, f"no encoder of {many} was given")
    arm, base = (rows.double().numpy() for rows in survey.embeddings)
    clusters = min(CLUSTERS, len(base) // PER_CLUSTER)
    if clusters < 4:
        return not_measured(name, words, f"clusters need at least {4 * PER_CLUSTER} {many}, got {len(base)}")
    centroids = k_means(base, clusters, seed=seed)
    share_arm, in_arm = _largest(nearest(arm, centroids), clusters)
    share_base, in_base = _largest(nearest(base, centroids), clusters)
    differences, _ = by_prompt(in_arm, in_base, survey.prompt_index, survey.k).differences()
    ratio = share_arm / share_base
    return Check(
        name=name,
        statistic=f"{words} of {clusters} by {survey.encoder}",
        arm=share_arm,
        base=share_base,
        value=ratio,
        bound=COLLAPSE,
        rule=f"above {COLLAPSE:g} times the base",
        beyond=ratio > COLLAPSE and interval(differences, seed=seed)[0] > 0,
        sentence=f"Of {clusters} clusters of the base's {many} the largest holds {100 * share_arm:.0f} % of the arm's "
        f"{many} and {100 * share_base:.0f} % of the base's; up to {COLLAPSE:g} times the base's share is allowed.",
    )


def _diversity(name: str, words: str, found: Diversity, seed: int, bound: float, many: str) -> Check:
    full = f"diversity:{name}"
    if found.arm is None or found.base is None:
        return not_measured(full, words, found.reason or "")
    if found.ratio is None:
        return not_measured(full, words, f"the base's {many} of one prompt are all alike")
    if len(found.arm) < MIN_PROMPTS:
        return not_measured(full, words, too_few(len(found.arm)))
    _, high = interval(found.arm - found.base, seed=seed)
    arm, base = float(found.arm.mean()), float(found.base.mean())
    return Check(
        name=full,
        statistic=words,
        arm=arm,
        base=base,
        value=found.ratio,
        bound=bound,
        rule=f"below {100 * bound:.0f} % of the base",
        beyond=found.ratio < bound and high < 0,
        sentence=f"{many.capitalize()} of one prompt keep {100 * found.ratio:.0f} % of the base's variety over "
        f"{len(found.arm)} prompts ({words}: {arm:.3g} against {base:.3g}); at least {100 * bound:.0f} % is asked for.",
    )


def _many(survey: Survey | None) -> str:
    return (PICTURES if survey is None else survey.medium).folder


def _largest(owner: np.ndarray, clusters: int) -> tuple[float, np.ndarray]:
    """(share of the largest cluster, 1 for each image in it)."""
    counts = np.bincount(owner, minlength=clusters)
    inside = (owner == counts.argmax()).astype(np.float64)
    return float(counts.max() / len(owner)), inside
