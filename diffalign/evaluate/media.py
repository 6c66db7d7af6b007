"""What a model's samples are, as files and as rewards take them: pictures, or clips of sound.

The one place where the two part. Engines hold batches [B, ...] of samples, write and read them through a `Medium`, and
ask rewards with the batch that it makes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from diffalign.data.sounds import read_wav, rounded, wav
from diffalign.denoisers import Context
from diffalign.errors import InputError
from diffalign.evaluate.score import batches, image_files, png, read_image
from diffalign.rewards.audio import resample, to_mono
from diffalign.types import Modality, RewardBatch

EXEMPLARS = 16
"""Files of a reference set that are embedded at a time."""


@runtime_checkable
class Medium(Protocol):
    """What samples are."""

    @property
    def modality(self) -> Modality: ...

    @property
    def folder(self) -> str:
        """Of the files; what messages call them too."""
        ...

    @property
    def suffix(self) -> str: ...

    @property
    def fields(self) -> frozenset[str]:
        """What of a `RewardBatch` they fill."""
        ...

    def stored(self, samples: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        """As they will be read back, so that rewards judge what lies on disk."""
        ...

    def encoded(self, sample: Float[Tensor, " *rest"]) -> bytes:
        """The bytes of a file."""
        ...

    def read(self, file: Path) -> Float[Tensor, " *rest"]:
        """A sample that was written; an unreadable or foreign file is an InputError."""
        ...

    def asked(
        self, samples: Float[Tensor, " b *rest"], prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> RewardBatch:
        """What rewards are asked with."""
        ...

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        """The files of a reference set; none, or one that cannot be read, is an InputError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """RGB in [0, 1], 8 bits on disk."""

    modality: Modality = "image"
    folder: str = "images"
    suffix: str = ".png"
    fields: frozenset[str] = frozenset({"images"})

    def stored(self, samples: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return ((samples.clamp(0, 1) * 255).round() / 255).contiguous()  # in one layout, as from disk

    def encoded(self, sample: Float[Tensor, "3 h w"]) -> bytes:
        return png(sample)

    def read(self, file: Path) -> Float[Tensor, "3 h w"]:
        return read_image(file)

    def asked(
        self, samples: Float[Tensor, "b 3 h w"], prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> RewardBatch:
        return RewardBatch(images=samples, prompts=prompts, metadata=metadata)

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        for stack in batches((read_image(file) for file in image_files(folder)), EXEMPLARS):
            yield RewardBatch(images=stack)


PICTURES = Pictures()


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Waveforms in [-1, 1], channels first, 16 bits on disk at the model's rate.

    Rewards hear them as they are, or as `heard_hz` and `mono` say: nothing is resampled or mixed down unasked.
    """

    rate_hz: int
    """Samples a second as the model makes them."""
    heard_hz: int | None = None
    """Samples a second as rewards hear them; None is as they were made."""
    mono: bool = False
    """Rewards hear the mean of the channels."""
    modality: Modality = "audio"
    folder: str = "clips"
    suffix: str = ".wav"
    fields: frozenset[str] = frozenset({"audio", "sample_rate"})

    def stored(self, samples: Float[Tensor, "b c s"]) -> Float[Tensor, "b c s"]:
        return rounded(samples)

    def encoded(self, sample: Float[Tensor, "c s"]) -> bytes:
        return wav(sample, self.rate_hz)

    def read(self, file: Path) -> Float[Tensor, "c s"]:
        clip, rate_hz = read_wav(file)
        if rate_hz != self.rate_hz:
            raise InputError(
                f"{str(file)!r} must have {self.rate_hz} samples a second, as the model makes them, got {rate_hz}"
            )
        return clip

    def asked(
        self, samples: Float[Tensor, "b c s"], prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> RewardBatch:
        heard = [self._heard(clip, self.rate_hz) for clip in samples]
        return RewardBatch(audio=heard, sample_rate=self._rate, prompts=prompts, metadata=metadata)

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        """The WAV files of a folder, which may differ in length; at the rate that rewards hear, if one is named.

        Raises:
            InputError: There are none, one cannot be read, or one has another rate and no rate is named.
        """
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() == self.suffix)
        if not files:
            raise InputError(f"clips must be a folder with {self.suffix} files, got none in {str(folder)!r}")
        for start in range(0, len(files), EXEMPLARS):
            read = [self._exemplar(file) for file in files[start : start + EXEMPLARS]]
            yield RewardBatch(audio=read, sample_rate=self._rate)

    def _exemplar(self, file: Path) -> Float[Tensor, "c _"]:
        clip, rate_hz = read_wav(file)
        if self.heard_hz is None and rate_hz != self.rate_hz:
            raise InputError(
                f"{str(file)!r} must have {self.rate_hz} samples a second like the model's clips, got {rate_hz}; set "
                "online.heard_hz to the rate that rewards hear, and both are resampled to it"
            )
        return self._heard(clip, rate_hz)

    def _heard(self, clip: Float[Tensor, "c s"], rate_hz: int) -> Float[Tensor, "_c _s"]:
        mixed = to_mono(clip) if self.mono else clip
        return mixed if self.heard_hz is None else resample(mixed, rate_hz, self.heard_hz)

    @property
    def _rate(self) -> int:
        return self.heard_hz or self.rate_hz


def _pictures(context: Context, heard_hz: int | None, mono: bool) -> Medium:
    if heard_hz is not None or mono:
        named = f"heard_hz {heard_hz}" if heard_hz is not None else "mono"
        raise InputError(f"online.heard_hz and .mono must be left out with a model of images, got {named}")
    return PICTURES


def _clips(context: Context, heard_hz: int | None, mono: bool) -> Medium:
    assert context.sample_rate_hz is not None, "a family of sound says how many samples a second it makes"
    return Clips(rate_hz=context.sample_rate_hz, heard_hz=heard_hz, mono=mono)


MEDIA: dict[Modality, Callable[[Context, int | None, bool], Medium]] = {"image": _pictures, "audio": _clips}


def medium_of(modality: Modality, context: Context, *, heard_hz: int | None = None, mono: bool = False) -> Medium:
    """What a family's samples are, and how rewards get them.

    Raises:
        InputError: A way to hear images.
    """
    return MEDIA[modality](context, heard_hz, mono)
