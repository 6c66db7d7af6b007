"""Log-mel spectra in torch, with gradient to the samples, and an encoder made of nothing else.

A frame of samples times a periodic Hann window, zero padded to the length of the FFT, gives magnitudes; triangles on
the mel scale sum them up into bands; the logarithm makes loudness additive. The Fourier transform runs in float64, as
that of numpy in the reference code does: in float32 its rounding shows in the quiet bands beside a loud tone.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.rewards.audio import mono_clips
from diffalign.types import Embedded, Modality, RewardBatch

_OF = ("clips", "frames")
_LEAST_VARIANCE = 1e-12
_STRIDE = 5
"""Frames over which a rise is measured, and over which both its ends are averaged."""


def magnitudes(samples: Float[Tensor, "*b s"], *, window: int, hop: int, fft: int) -> Float64[Tensor, "*b f n"]:
    """Magnitudes of the short-time Fourier transform: 1 + floor((s - window) / hop) frames of fft / 2 + 1 bins.

    Frames start at the first sample and nothing is padded. The gradient where a magnitude is 0 is 0.
    """
    hann = torch.hann_window(window, periodic=True, dtype=torch.float64, device=samples.device)
    return torch.fft.rfft(samples.double().unfold(-1, window, hop) * hann, n=fft).abs()


def htk_filters(*, rate_hz: int, fft: int, bands: int, low_hz: float, high_hz: float) -> Float64[Tensor, "n m"]:
    """Mel filters of HTK, bins by bands: triangles of height 1 that are straight on the mel scale, not in hertz.

    mel(f) = 1127 ln(1 + f / 700); the corners are equally spaced on it from `low_hz` to `high_hz`; the bin of 0 Hz
    belongs to no band.
    """
    low, high = (1127 * math.log1p(hz / 700) for hz in (low_hz, high_hz))
    corners = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    bins = 1127 * torch.log1p(torch.linspace(0, rate_hz / 2, fft // 2 + 1, dtype=torch.float64) / 700)
    rise = (bins[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - bins[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


class LogMelEncoder:
    """Log-mel bands without weights: of a clip their mean and deviation over time, or of every frame the bands.

    Frames of 25 ms every 10 ms, ln(mel magnitude + 0.01), bands from 125 Hz to 7.5 kHz or to 15/16 of the highest
    frequency there is. `model` says what has a row. "clips": one of 2 or 3 x `bands` a clip, which hears level and
    colour of the sound and nothing of their order. A deviation is at least 1e-6, and has no gradient there; `rises`
    adds how much each band rises within 50 ms, in all and per tenth of a second, which grows with the rate of onsets.
    "frames": one of `bands` a frame, so that a clip is a set by itself, as distances of single clips need it.
    """

    modality: Modality = "audio"

    def __init__(
        self,
        model: str = "clips",
        *,
        rate_hz: int = 16_000,
        bands: int = 64,
        rises: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """Names what has a row, the rate of the clips to come, their bands, and whether to count their rises."""
        if model not in _OF:
            raise InputError(f"encoder log_mel: model must be clips or frames, got {model!r}{near_match(model, _OF)}")
        if rises and model == "frames":
            raise InputError("encoder log_mel: rises must be left out with model 'frames', for they are of whole clips")
        if rate_hz < 1000 or bands < 1:
            raise InputError(
                f"encoder log_mel must have rate_hz of 1000 or more and at least 1 band, got {rate_hz} and {bands}"
            )
        self.model, self.rate_hz, self.bands, self.rises = model, rate_hz, bands, rises
        self.device = torch.device(device)
        self._window, self._hop = round(rate_hz * 0.025), round(rate_hz * 0.01)
        self._fft = 1 << (self._window - 1).bit_length()
        self._filters = htk_filters(
            rate_hz=rate_hz, fft=self._fft, bands=bands, low_hz=125.0, high_hz=min(7500.0, rate_hz * 15 / 32)
        )
        if not bool((self._filters.sum(0) > 0).all()):
            raise InputError(
                f"encoder log_mel must have bands wider than the {rate_hz / self._fft:g} Hz of an FFT bin, got "
                f"{bands} bands at {rate_hz} Hz; take fewer"
            )

    @property
    def version(self) -> str:
        frames = ", frames" if self.model == "frames" else ""
        return f"log_mel{frames}, {self.bands} bands, {self.rate_hz} Hz{', rises' if self.rises else ''}"

    @property
    def width(self) -> int:
        return (1 if self.model == "frames" else 3 if self.rises else 2) * self.bands

    def to(self, device: torch.device | str) -> "LogMelEncoder":
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def embed(self, batch: RewardBatch) -> Embedded:
        """One row a clip, or a frame."""
        return self.embed_with_graph(batch)

    def embed_with_graph(self, batch: RewardBatch) -> Embedded:
        """The same rows with gradient to the samples."""
        clips = mono_clips(batch, self.version, rate_hz=self.rate_hz, shortest=self._shortest)
        rows = [self._rows(clip) for clip in clips]
        home = clips[0].device if clips else self.device
        joined = torch.cat([row.to(home) for row in (torch.zeros(0, self.width), *rows)])
        return Embedded(rows=joined, counts=tuple(map(len, rows)))

    @property
    def _shortest(self) -> int:
        """Samples of one frame, or of the frames that one rise needs."""
        return self._window + (2 * _STRIDE - 1 if self.rises else 0) * self._hop

    def _rows(self, clip: Float[Tensor, " s"]) -> Float[Tensor, "_n d"]:
        spectrum = magnitudes(clip.to(self.device), window=self._window, hop=self._hop, fft=self._fft)
        bands = torch.log(spectrum @ self._filters.to(self.device) + 0.01)
        if self.model == "frames":
            return bands.float()
        deviation = bands.var(0, correction=0).clamp(min=_LEAST_VARIANCE).sqrt()
        rises = [_rises(bands)] if self.rises else []
        return torch.cat([bands.mean(0), deviation, *rises])[None].float()


def _rises(bands: Float64[Tensor, "f m"]) -> Float64[Tensor, " m"]:
    """Nats by which each band rises, in a tenth of a second."""
    smooth = bands.unfold(0, _STRIDE, 1).mean(-1)
    steps = (smooth[_STRIDE:] - smooth[:-_STRIDE]).clamp(min=0)
    return steps.sum(0) / _STRIDE / (len(bands) / 10)
