"""Checks of the images themselves: variety, drift, colour and detail, collapse into one style."""

import numpy as np

from diffalign.evaluate.clusters import k_means, nearest
from diffalign.evaluate.diversity import Diversity, cosine_diversity, perceptual_diversity, vendi_diversity
from diffalign.evaluate.findings import MIN_PROMPTS, Check, Paired, by_prompt, interval, not_measured, too_few
from diffalign.evaluate.lazy import PairedImages
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

WORDS = {
    "saturation": "colour saturation (HSV)",
    "contrast": "contrast (standard deviation of luma)",
    "clipped": "share of clipped pixels",
    "detail": "fine detail (variance of the Laplacian)",
    "jpeg_kb": "size as JPEG of quality 95, kB",
}


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
    if survey is None or survey.embeddings is None:
        found = [not_measured("diversity:vendi", "Vendi score of a prompt's images", "no encoder of images was given")]
    else:
        words = f"Vendi score of a prompt's images by {survey.encoder}"
        found = [_diversity("vendi", words, vendi_diversity(*survey.embeddings, survey.prompt_index), seed, bound)]
    if perceptual is not None and images is not None:
        measured = perceptual_diversity(images.arm, images.base, images.prompt_index, perceptual)
        words = f"mean distance of pairs of a prompt's images by {perceptual.version}"
        found.append(_diversity("perceptual", words, measured, seed, bound))
    elif survey is not None and survey.embeddings is not None:
        measured = cosine_diversity(*survey.embeddings, survey.prompt_index)
        words = f"mean 1 - cosine of pairs of a prompt's images by {survey.encoder}"
        found.append(_diversity("cosine", words, measured, seed, bound))
    return found


def drift_checks(survey: Survey | None) -> list[Check]:
    """Distances of images from the base's of the same noise; reported, never flagged."""
    if survey is None:
        return [not_measured("drift", "distance from the base's image of the same noise", "no images were given")]
    measures = {
        "cosine": (f"cosine with the base's image of the same noise by {survey.encoder}", survey.cosine, 1.0),
        "perceptual": ("perceptual distance from the base's image of the same noise", survey.perceptual, 0.0),
        "pixel": ("mean absolute difference from the base's image of the same noise", survey.pixel, 0.0),
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
        return [not_measured(f"low_level:{name}", words, "no images were given") for name, words in WORDS.items()]
    return [low_level_check(name, survey.paired(name), seed=seed) for name in survey.low_level]


def low_level_check(name: str, values: Paired, *, seed: int) -> Check:
    """One statistic of pixels; a change counts where it is larger than chance too."""
    words, full = WORDS[name], f"low_level:{name}"
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
        f"{DEVIATIONS:g} standard deviations of the base's images ({spread:.3g} each), is allowed.",
    )


def collapse_check(survey: Survey | None, *, seed: int) -> Check:
    """Share of images in the largest of the clusters that the base's images form."""
    name, words = "style_collapse", "share of images in the largest cluster"
    if survey is None or survey.embeddings is None:
        return not_measured(name, words, "no encoder of images was given")
    arm, base = (rows.double().numpy() for rows in survey.embeddings)
    clusters = min(CLUSTERS, len(base) // PER_CLUSTER)
    if clusters < 4:
        return not_measured(name, words, f"clusters need at least {4 * PER_CLUSTER} images, got {len(base)}")
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
        sentence=f"Of {clusters} clusters of the base's images the largest holds {100 * share_arm:.0f} % of the arm's "
        f"images and {100 * share_base:.0f} % of the base's; up to {COLLAPSE:g} times the base's share is allowed.",
    )


def _diversity(name: str, words: str, found: Diversity, seed: int, bound: float) -> Check:
    full = f"diversity:{name}"
    if found.arm is None or found.base is None:
        return not_measured(full, words, found.reason or "")
    if found.ratio is None:
        return not_measured(full, words, "the base's images of one prompt are all alike")
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
        sentence=f"Images of one prompt keep {100 * found.ratio:.0f} % of the base's variety over {len(found.arm)} "
        f"prompts ({words}: {arm:.3g} against {base:.3g}); at least {100 * bound:.0f} % is asked for.",
    )


def _largest(owner: np.ndarray, clusters: int) -> tuple[float, np.ndarray]:
    """(share of the largest cluster, 1 for each image in it)."""
    counts = np.bincount(owner, minlength=clusters)
    inside = (owner == counts.argmax()).astype(np.float64)
    return float(counts.max() / len(owner)), inside
