"""How an evaluation is made: what a caller may choose, and what the protocol chooses where nobody did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffalign.denoisers import Family
from diffalign.errors import InputError

SEEDS = {"full": 4, "quick": 1}
"""Images per prompt of a tier."""

_LATENT_PIXELS = 32_768
"""Latent pixels of a batch: 8 images of 512 pixels a side, 2 of 1024, which 24 GB of GPU memory hold."""
_MOST_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How images are made, and with what the statistics are seeded; None leaves it to tier, family or size."""

    tier: str = "full"
    """"full" takes all prompts; "quick" 96 of them, 8 of each of PartiPrompts' categories."""
    images_per_prompt: int | None = None
    """Seeds per prompt; the same in all arms. None is 4, or 1 in the quick tier."""
    steps: int | None = None
    guidance: float | None = None
    """Weight w in uncond + w (cond - uncond); 1 is off."""
    batch_size: int | None = None
    """Images at a time; None goes by the size of the model's latents."""
    sweep: tuple[float, ...] = ()
    """Guidances at which all arms are compared too, on the quick tier's prompts with one seed."""
    pairwise: bool = False
    """Compare every arm with every other, not only with the base."""
    encoder: str | None = None
    """Spec of the encoder by which images are compared for diversity, drift and checks; None takes a reward's own."""
    reference: str | None = None
    """The reference set, for rewards of sets that need one: a folder of samples, or what was kept of one in a file."""
    seconds: float | None = None
    """Length of a clip, for models of sound, which need it."""
    heard_hz: int | None = None
    """Samples a second at which rewards and encoders hear clips; None is as they were made."""
    heard_hz_of: Mapping[str, int] = field(default_factory=dict)
    """The same of single rewards, by their spec, since encoders were made for different rates."""
    mono: bool = False
    """They hear the mean of a clip's channels."""
    fresh: bool = False
    """Start anew where the output folder holds an evaluation with other settings."""
    device: str = "auto"
    """"auto" takes the GPU if there is one."""
    dtype: str = "float32"
    """Of the pipelines: float32, float16 or bfloat16; rewards run in float32."""
    seed: int = 0
    """Of resampling in the statistics; an image takes its noise from its prompt alone."""
    command: str | None = None
    """What a person typed, for the report; None shows the Python call."""

    def __post_init__(self) -> None:
        for name, value in (
            ("images_per_prompt", self.images_per_prompt),
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("heard_hz", self.heard_hz),
            *((f"heard_hz of {spec!r}", value) for spec, value in self.heard_hz_of.items()),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.tier not in SEEDS:
            raise InputError(f"tier must be one of 'full', 'quick', got {self.tier!r}")
        if len(set(self.sweep)) < len(self.sweep):
            raise InputError(f"sweep must name each guidance once, got {list(self.sweep)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"dtype must be one of 'float32', 'float16', 'bfloat16', got {self.dtype!r}")

    @property
    def seeds(self) -> int:
        """Images per prompt."""
        return self.images_per_prompt or SEEDS[self.tier]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sample depends on, beside its prompt, its noise and its model."""

    steps: int
    guidance: float
    size: Mapping[str, int | float | None]
    """How large one is."""
    dtype: str
    device: str
    """Its type: other kinds of processors round otherwise."""

    @property
    def table(self) -> dict[str, Any]:
        """For manifest and keys."""
        return {
            "steps": self.steps, "guidance": self.guidance, **self.size, "dtype": self.dtype, "device": self.device
        }  # fmt: skip


def sampling_of(
    settings: EvaluationSettings, family: Family, size: Mapping[str, int | float | None], device: str
) -> Sampling:
    """The settings, with the family's own where nobody chose."""
    return Sampling(
        steps=family.steps if settings.steps is None else settings.steps,
        guidance=family.guidance if settings.guidance is None else settings.guidance,
        size=size,
        dtype=settings.dtype,
        device=device,
    )


def parse_hearing(words: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """(rate, rates by reward's spec) as a command line has them, `RATE` or `SPEC=RATE` each.

    Raises:
        InputError: No whole number, or one thing twice.
    """
    found: dict[str, int] = {}
    for word in words:
        spec, _, rate = word.rpartition("=")
        if not rate.isdigit():
            raise InputError(f"heard_hz must be a number of samples a second, or SPEC=NUMBER, got {word!r}")
        if spec in found:
            raise InputError(f"heard_hz must be given once for each reward, got {word!r} again")
        found[spec] = int(rate)
    return found.pop("", None), found


def batch_size(asked: int | None, shape: tuple[int, int, int]) -> int:
    """Images at a time: what was asked for, or by the size (channels, height, width) of the latents."""
    if asked is not None:
        return asked
    return max(1, min(_MOST_IMAGES, _LATENT_PIXELS // (shape[1] * shape[2])))


def as_table(
    settings: EvaluationSettings,
    sampling: Sampling | None,
    batch: int | None,
    size: Mapping[str, int | float | None],
) -> dict[str, Any]:
    """`settings` of results.json: what was used, not what was left open."""
    used = {name: getattr(settings, name) for name in EvaluationSettings.__dataclass_fields__}
    used |= {
        "heard_hz_of": dict(settings.heard_hz_of),
        "images_per_prompt": settings.seeds,
        "batch_size": batch,
        "sweep": list(settings.sweep),
    }
    names = ("steps", "guidance")
    return used | {name: None if sampling is None else getattr(sampling, name) for name in names} | dict(size)
