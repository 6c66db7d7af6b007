"""What audio rewards and encoders check at their door, and the two tools that their errors name.

Nothing is resampled, mixed down, normalised in loudness or cut unasked: each of these moves a FAD. Silence is audio, so
it is let through; `silent` says which clips are silent, for whoever must count them.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import InputError
from diffalign.rewards.inputs import audio_of
from diffalign.types import RewardBatch

_SILENCE = 1e-4
"""Peak below which a clip counts as silent: -80 dB of full scale."""
_PHASES = 10**7
"""Most elements of a resampling kernel; what common rates need is far below."""


def mono_clips(
    batch: RewardBatch, reward: str, *, rate_hz: int, shortest: int, requires: frozenset[str] = frozenset()
) -> list[Float[Tensor, " s"]]:
    """The clips of a batch, checked, without their channel axis.

    Args:
        batch: What is to be scored.
        reward: Who asks, for the message.
        rate_hz: Samples a second that it needs.
        shortest: Samples that it needs at least.
        requires: Other fields that must be there.

    Raises:
        InputError: No audio, another rate, values that are not finite in [-1, 1], more channels than one, or a clip
            that is too short.
    """
    clips, given = audio_of(batch, reward, requires)
    if clips and given != rate_hz:
        raise InputError(
            f"audio must have {rate_hz} samples a second for {reward!r}, got {given}; resample it first: "
            f"diffalign.rewards.audio.resample(clip, {given}, {rate_hz})"
        )
    for i, clip in enumerate(clips):
        if clip.dim() != 2 or clip.shape[0] != 1:
            raise InputError(
                f"{_named(batch, i)} must be mono, shape (1, samples), for {reward!r}, got {tuple(clip.shape)}; "
                "average its channels first: diffalign.rewards.audio.to_mono(clip)"
            )
        if clip.shape[1] < shortest:
            raise InputError(
                f"{_named(batch, i)} must have at least {shortest} samples ({shortest / rate_hz:g} s) for {reward!r}, "
                f"got {clip.shape[1]}"
            )
    return [clip[0] for clip in clips]


def _named(batch: RewardBatch, place: int) -> str:
    """A clip in words, with its file where one is known."""
    file = None if batch.metadata is None else batch.metadata[place].get("file")
    return f"audio[{place}]" if file is None else f"audio[{place}] ({str(file)!r})"


def silent(clips: Sequence[Float[Tensor, "c _"]]) -> Bool[Tensor, " b"]:
    """Which clips never leave -80 dB of full scale: scores of these say nothing."""
    return torch.tensor([clip.numel() == 0 or bool(clip.abs().max() < _SILENCE) for clip in clips], dtype=torch.bool)


def to_mono(clip: Float[Tensor, "c s"]) -> Float[Tensor, "1 s"]:
    """The mean of the channels, with gradient; channels in opposite phase cancel."""
    return clip.mean(0, keepdim=True)


def resample(clip: Float[Tensor, "c s"], from_hz: int, to_hz: int) -> Float[Tensor, "c t"]:
    """A clip at another rate, with gradient: ceil(s · to_hz / from_hz) samples.

    The filter is that of scipy.signal.resample_poly (a Kaiser window, beta 5, ten zero crossings on either side), and
    so is the result. Resamplers differ, and FAD with them: name yours with the number. A filter overshoots where music
    is at full scale; what leaves [-1, 1] is clamped, as writing a file would.

    Raises:
        InputError: Rates that are not positive, or whose ratio needs more phases than any common pair of rates.
    """
    if from_hz < 1 or to_hz < 1:
        raise InputError(f"from_hz and to_hz must be positive, got {from_hz} and {to_hz}")
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    if up == down:
        return clip
    if up * down > _PHASES:
        raise InputError(
            f"from_hz and to_hz must have a ratio of small numbers, got {from_hz} and {to_hz}, {down} to {up}"
        )
    kernel, before = _phases(up, down)
    length = -(-clip.shape[1] * up // down)
    steps = -(-length // up)
    after = max(0, (steps - 1) * down + kernel.shape[2] - before - clip.shape[1])
    padded = F.pad(clip[:, None], (before, after))
    phases = F.conv1d(padded, kernel.to(clip), stride=down)[:, :, :steps]  # [c, up, steps]
    return phases.transpose(1, 2).reshape(clip.shape[0], -1)[:, :length].clamp(-1, 1)


def _phases(up: int, down: int) -> tuple[Float[Tensor, "up 1 k"], int]:
    """(the filter of each of `up` output samples, input samples that they reach back).

    Output sample q·up + r is the sum over j of x[q·down + j] h[r·down - j·up + half].
    """
    from scipy.signal import firwin

    most = max(up, down)
    half = 10 * most
    taps = torch.from_numpy(firwin(2 * half + 1, 1 / most, window=("kaiser", 5.0)) * up)
    before = half // up
    j = torch.arange(-before, ((up - 1) * down + half) // up + 1)
    place = torch.arange(up)[:, None] * down - j * up + half
    kernel = torch.where((place >= 0) & (place <= 2 * half), taps[place.clamp(0, 2 * half)], 0)
    return kernel[:, None], before
