"""What all arms of an evaluation make alike: the kind of sample, how large one is, the noise that it starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffalign.data.sounds import read_wav
from diffalign.denoisers import Context
from diffalign.denoisers.family import PLAIN
from diffalign.errors import InputError, near_match
from diffalign.evaluate.arms import Arm
from diffalign.evaluate.clips import clip_files
from diffalign.evaluate.media import Medium, medium_of
from diffalign.evaluate.score import IMAGES, read_image
from diffalign.evaluate.settings import EvaluationSettings, batch_size
from diffalign.models.load import ModelSource, detect_family, load_context, load_net_config, vae_factor
from diffalign.types import Modality

SHORTEST = 0.04
"""Seconds of a clip that can be drawn."""
_SECONDS_AT_ONCE = 80
"""Of clips that are made together."""
_MOST = 64


@dataclass(frozen=True, kw_only=True)
class Form:
    """What every arm makes."""

    medium: Medium
    sample: tuple[int, ...]
    """Shape of one; of finished clips that of the first."""
    latents: tuple[int, int, int] | None
    """Shape of the noise of one; None where all are finished."""
    context: Context
    """What a pipeline is told of it."""
    size: Mapping[str, int | float | None]
    """How large one is, as manifest and results name it."""
    batch: int
    """Samples that are made at a time where nobody chose."""
    media: Mapping[str, Medium] = field(default_factory=dict)
    """By reward's spec, where one gets samples in another way than the rest."""

    def of(self, spec: str) -> Medium:
        """What a reward gets."""
        return self.media.get(spec, self.medium)


def form_of(arms: Sequence[Arm], settings: EvaluationSettings, specs: Sequence[str]) -> Form:
    """The form that the arms share.

    Args:
        specs: Of all rewards.

    Raises:
        InputError: They make different things, or what was asked for does not fit them.
    """
    found = {arm.name: _modality(arm) for arm in arms}
    if len(set(found.values())) > 1:
        words = ", ".join(f"{name} of {modality}" for name, modality in found.items())
        raise InputError(f"arms must all make images, or all make clips of sound, got {words}")
    form = _FORMS[next(iter(found.values()))](arms, settings)
    unknown = [spec for spec in settings.heard_hz_of if spec not in specs]
    if unknown:
        raise InputError(f"heard_hz must name rewards by their spec, got {unknown[0]!r}{near_match(unknown[0], specs)}")
    return replace(form, media={spec: form.medium.heard_at(rate) for spec, rate in settings.heard_hz_of.items()})


def common_size(sources: Mapping[str, ModelSource]) -> tuple[int, int]:
    """(height, width) of the images, after the check that all arms start from noise of one shape."""
    shapes, sizes = {}, []
    for arm, source in sources.items():
        family = detect_family(source)
        channels, height, width = family.latent_shape(load_net_config(source, family))
        factor = vae_factor(source)
        shapes[arm] = (channels, height, width)
        sizes.append((height * factor, width * factor))
    _check_alike("start from latents of one shape", shapes)
    return sizes[0]


def _modality(arm: Arm) -> Modality:
    if arm.source is not None:
        return detect_family(arm.source).modality
    assert arm.images is not None, "an arm is a model or finished"
    return "image" if any(f.suffix.lower() in IMAGES for f in arm.images.iterdir()) else "audio"


def _images(arms: Sequence[Arm], settings: EvaluationSettings) -> Form:
    if settings.seconds is not None:
        raise InputError(f"seconds must be left out with arms that make images, got {settings.seconds}")
    medium = medium_of("image", PLAIN, heard_hz=settings.heard_hz, mono=settings.mono, where="")
    models = _models(arms)
    sizes = {"models": common_size(models)} if models else {}
    for arm in arms:
        if arm.images is not None:
            first = next(f for f in sorted(arm.images.iterdir()) if f.suffix.lower() in IMAGES)
            sizes[arm.name] = (int(read_image(first).shape[1]), int(read_image(first).shape[2]))
    if len(set(sizes.values())) > 1:
        raise InputError(f"arms must have images of one size, got {sizes}")
    height, width = next(iter(sizes.values()))
    latents = None
    if models:
        first_model = next(iter(models.values()))
        family = detect_family(first_model)
        latents = family.latent_shape(load_net_config(first_model, family))
    return Form(
        medium=medium,
        sample=(3, height, width),
        latents=latents,
        context=PLAIN,
        size={"height": height, "width": width},
        batch=1 if latents is None else batch_size(None, latents),
    )


def _clips(arms: Sequence[Arm], settings: EvaluationSettings) -> Form:
    models = _models(arms)
    contexts = {
        name: load_context(source, detect_family(source), seconds=settings.seconds, where="")
        for name, source in models.items()
    }
    if settings.seconds is not None and not models:
        raise InputError(f"seconds must be left out where all clips are finished, got {settings.seconds}")
    if settings.seconds is not None and settings.seconds < SHORTEST:
        raise InputError(f"seconds must be at least {SHORTEST} to be drawn in a report, got {settings.seconds}")
    _check_alike("start from latents of one shape", {name: c.latents for name, c in contexts.items()})
    made = {name: (c.sample_rate_hz or 0, c.channels or 1) for name, c in contexts.items()}
    shapes = {name: (c.channels or 1, int((c.seconds or 0) * (c.sample_rate_hz or 0))) for name, c in contexts.items()}
    for arm in arms:
        if arm.images is not None:
            clip, rate_hz = read_wav(clip_files(arm.images)[0])
            made[arm.name] = (rate_hz, clip.shape[0])
            shapes[arm.name] = (clip.shape[0], clip.shape[1])
    _check_alike("make clips of one rate and as many channels (samples a second, channels)", made)
    rate_hz = next(iter(made.values()))[0]
    context = next(iter(contexts.values()), Context(sample_rate_hz=rate_hz))
    return Form(
        medium=medium_of("audio", context, heard_hz=settings.heard_hz, mono=settings.mono, where=""),
        sample=next(iter(shapes.values())),
        latents=context.latents if contexts else None,
        context=context,
        size={"seconds": settings.seconds, "sample_rate_hz": rate_hz},
        batch=max(1, min(_MOST, int(_SECONDS_AT_ONCE / (settings.seconds or _SECONDS_AT_ONCE)))),
    )


_FORMS: dict[Modality, Callable[[Sequence[Arm], EvaluationSettings], Form]] = {"image": _images, "audio": _clips}


def _models(arms: Sequence[Arm]) -> dict[str, ModelSource]:
    return {arm.name: arm.source for arm in arms if arm.source is not None}


def _check_alike(what: str, found: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(found.values())) > 1:
        raise InputError(f"{' and '.join(found)} must {what}, got {dict(found)}")
