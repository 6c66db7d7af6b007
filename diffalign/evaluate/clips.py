"""Clips of sound as files, as rewards hear them, and in a report: see `media`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data.sounds import read_wav, rounded, wav
from diffalign.errors import InputError
from diffalign.evaluate import low_level_sound
from diffalign.evaluate.showing import RATE_HZ, SECONDS, Shown, show_clip
from diffalign.rewards.audio import resample, silent, to_mono
from diffalign.types import Modality, RewardBatch

EXEMPLARS = 16
"""Files of a reference set that are embedded at a time."""
_TRIAL_HZ, _TRIAL_LEVEL = 440, 0.1


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
    where: str = "online."
    """What stands before `heard_hz` in a message."""
    modality: Modality = "audio"
    folder: str = "clips"
    one: str = "clip"
    suffix: str = ".wav"
    accepts: frozenset[str] = frozenset({".wav"})
    fields: frozenset[str] = frozenset({"audio", "sample_rate"})
    digest: str = "clip_sha256"
    checks: frozenset[str] = frozenset(
        {"held_out", "alignment", "diversity", "drift", "low_level", "style_collapse", "prompt_insensitivity"}
    )
    words: Mapping[str, str] = field(default_factory=lambda: low_level_sound.WORDS)
    difference: str = "difference of log-mel bands, dB"
    perturbations: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    gallery: str = "Clips that nobody chose"
    prompts_shown: int = 12
    changes_shown: int = 4
    note: str = (
        f"Players hold the first {SECONDS} s, mono, at {RATE_HZ // 1000} kHz or less. All pictures have one scale: "
        "full scale is the height of a waveform, a full-scale tone has the darkest colour, 70 dB below it the lightest."
    )

    @property
    def hearing(self) -> tuple[object, ...]:
        return (self._rate, self.mono)

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

    def taken(self, file: Path) -> bytes:
        """As a 16-bit file."""
        return self.encoded(self.read(file))

    def asked(
        self,
        samples: Float[Tensor, "b c s"],
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, object]] | None = None,
    ) -> RewardBatch:
        heard = [self._heard(clip, self.rate_hz) for clip in samples]
        return RewardBatch(audio=heard, sample_rate=self._rate, prompts=prompts, metadata=metadata)

    def heard_at(self, rate_hz: int) -> "Clips":
        return replace(self, heard_hz=rate_hz)

    def exemplars(self, folder: Path) -> Iterator[RewardBatch]:
        """The WAV files of a folder, which may differ in length; at the rate that rewards hear, if one is named.

        Raises:
            InputError: There are fewer than two, one cannot be read or is silent, or one has another rate and no rate
                is named.
        """
        files = clip_files(folder)
        if len(files) < 2:
            raise InputError(f"clips must be a folder with two {self.suffix} files or more, got one in {str(folder)!r}")
        for start in range(0, len(files), EXEMPLARS):
            some = files[start : start + EXEMPLARS]
            read = [self._exemplar(file) for file in some]
            yield RewardBatch(audio=read, sample_rate=self._rate, metadata=[{"file": str(file)} for file in some])

    def trial(self, shape: Sequence[int]) -> Float[Tensor, "c s"]:
        """A soft tone."""
        channels, samples = shape
        time = torch.arange(samples, dtype=torch.float64) / self.rate_hz
        tone = _TRIAL_LEVEL * torch.sin(2 * torch.pi * _TRIAL_HZ * time)
        return tone.float().repeat(channels, 1)

    def statistics(self, samples: Float[Tensor, "b c s"]) -> dict[str, Float[Tensor, " b"]]:
        return low_level_sound.low_level(samples, self.rate_hz)

    def moved(self, one: Float[Tensor, "b c s"], other: Float[Tensor, "b c s"]) -> Float[Tensor, " b"]:
        return low_level_sound.band_difference(one, other, self.rate_hz)

    def shown(self, file: Path, arms: int) -> Shown:
        return show_clip(self.read(file), self.rate_hz)

    def facts(self, settings: Mapping[str, Any]) -> dict[str, str]:
        heard, length = f"{self._rate} Hz" if self.heard_hz else "as made", settings.get("seconds")
        heard = "; ".join([heard, *(f"{spec} {hz} Hz" for spec, hz in settings.get("heard_hz_of", {}).items())])
        return {
            "Length": "as they are" if length is None else f"{length:g} s",
            "Samples a second": str(self.rate_hz),
            "Heard by rewards": f"{heard}, mean of the channels" if self.mono else heard,
        }

    def size(self, settings: Mapping[str, Any]) -> str:
        length = settings.get("seconds")
        made = f"{'' if length is None else f'{length:g} s '}at {self.rate_hz} Hz"
        heard = [f"heard at {self._rate} Hz"] if self.heard_hz else []
        heard += [f"by {spec} at {hz} Hz" for spec, hz in settings.get("heard_hz_of", {}).items()]
        return ", ".join([made, *heard, *(["heard in mono"] if self.mono else [])])

    def _exemplar(self, file: Path) -> Float[Tensor, "c _"]:
        clip, rate_hz = read_wav(file)
        if self.heard_hz is None and rate_hz != self.rate_hz:
            raise InputError(
                f"{str(file)!r} must have {self.rate_hz} samples a second like the model's clips, got {rate_hz}; set "
                f"{self.where}heard_hz to the rate that rewards hear, and both are resampled to it"
            )
        if bool(silent([clip]).any()):
            raise InputError(
                f"{str(file)!r} must hold sound to be in a reference set, got a clip that never leaves -80 dB of full "
                "scale; take it out"
            )
        return self._heard(clip, rate_hz)

    def _heard(self, clip: Float[Tensor, "c s"], rate_hz: int) -> Float[Tensor, "_c _s"]:
        mixed = to_mono(clip) if self.mono else clip
        return mixed if self.heard_hz is None else resample(mixed, rate_hz, self.heard_hz)

    @property
    def _rate(self) -> int:
        return self.heard_hz or self.rate_hz


def clip_files(folder: Path) -> list[Path]:
    """The WAV files of a folder, by name.

    Raises:
        InputError: There are none.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".wav") if folder.is_dir() else []
    if not files:
        raise InputError(f"clips must be a folder with .wav files, got none in {str(folder)!r}")
    return files
