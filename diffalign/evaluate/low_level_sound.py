"""What can be measured of a clip without any model: loudness, clipping, silence, brightness; and how two clips differ.

Rewards can often be raised by these alone. Each function takes clips in [-1, 1], channels first, and gives one number a
clip. Amplitudes are shares of full scale, so that a change of 20 % means the same at any level.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from diffalign.rewards.log_mel import htk_filters, magnitudes

WORDS = {
    "loudness": "loudness (root mean square of the samples)",
    "clipped": "share of samples at full scale",
    "silence": "share of time below -60 dB of full scale",
    "brightness": "centre of the spectrum in hertz",
}

_FRAME_SECONDS = 0.04
_QUIET = 1e-3
"""-60 dB of full scale."""
_FULL = 1 - 2**-15
"""The greatest sample of a 16-bit file."""
_BANDS, _LOWEST_HZ, _FLOOR = 64, 60.0, 1e-4


def low_level(clips: Float[Tensor, "b c s"], rate_hz: int) -> dict[str, Float[Tensor, " b"]]:
    """All statistics by name."""
    return {
        "loudness": loudness(clips),
        "clipped": clipped(clips),
        "silence": silence(clips, rate_hz),
        "brightness": brightness(clips, rate_hz),
    }


def loudness(clips: Float[Tensor, "b c s"]) -> Float[Tensor, " b"]:
    """Root of the mean square over channels and samples; 0.707 for a full-scale sine."""
    return clips.square().mean((1, 2)).sqrt()


def clipped(clips: Float[Tensor, "b c s"]) -> Float[Tensor, " b"]:
    """Share of samples at the end of 16 bits."""
    return (clips.abs() >= _FULL).float().mean((1, 2))


def silence(clips: Float[Tensor, "b c s"], rate_hz: int) -> Float[Tensor, " b"]:
    """Share of frames of 40 ms whose root mean square lies below -60 dB of full scale."""
    size = _frame(rate_hz)
    frames = _filled(clips, size).unfold(-1, size, size)  # [b, c, frames, size]
    return (frames.square().mean((1, 3)).sqrt() < _QUIET).float().mean(1)


def brightness(clips: Float[Tensor, "b c s"], rate_hz: int) -> Float[Tensor, " b"]:
    """Mean frequency, weighted by power, in hertz; 0 for a clip without any."""
    power = _magnitudes(clips, rate_hz).square().mean(1)  # [b, bins]
    hertz = torch.linspace(0, rate_hz / 2, power.shape[1], dtype=power.dtype, device=power.device)
    total = power.sum(1)
    return ((power @ hertz) / torch.where(total == 0, 1, total)).float()


def band_difference(one: Float[Tensor, "b c s"], other: Float[Tensor, "b c s"], rate_hz: int) -> Float[Tensor, " b"]:
    """Mean absolute difference of log-mel bands over time, in dB; blind to phase, down to -80 dB of full scale."""
    return (_levels(one, rate_hz) - _levels(other, rate_hz)).abs().mean((1, 2)).float()


def _levels(clips: Float[Tensor, "b c s"], rate_hz: int) -> Float64[Tensor, "b f m"]:
    size = _frame(rate_hz)
    found = _magnitudes(clips, rate_hz)
    fft = 2 * (found.shape[2] - 1)
    filters = htk_filters(rate_hz=rate_hz, fft=fft, bands=_BANDS, low_hz=_LOWEST_HZ, high_hz=rate_hz * 15 / 32)
    return 20 * (found @ filters.to(found.device) / (size / 4) + _FLOOR).log10()


def _magnitudes(clips: Float[Tensor, "b c s"], rate_hz: int) -> Float64[Tensor, "b f n"]:
    """Of the mean of the channels, in frames of 40 ms that overlap by half."""
    size = _frame(rate_hz)
    mixed = _filled(clips.mean(1), size)
    return magnitudes(mixed, window=size, hop=max(1, size // 2), fft=1 << (size - 1).bit_length())


def _filled(clips: Float[Tensor, "*b s"], size: int) -> Float[Tensor, "*b _s"]:
    """With silence behind clips of less than a frame."""
    return F.pad(clips, (0, max(0, size - clips.shape[-1])))


def _frame(rate_hz: int) -> int:
    return max(1, round(rate_hz * _FRAME_SECONDS))
