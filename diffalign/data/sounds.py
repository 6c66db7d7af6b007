"""Clips of sound as WAV files: samples in [-1, 1], channels first, as they are; nothing is resampled or normalised."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError

FULL = 2**15
"""Of full scale in 16-bit PCM: one step is 1 / 32768, and 1 itself is a step below it."""


def rounded(clips: Float[Tensor, " *rest s"]) -> Float[Tensor, " *rest s"]:
    """Samples as a 16-bit file gives them back."""
    return _steps(clips) / FULL


def wav(clip: Float[Tensor, "c s"], rate_hz: int) -> bytes:
    """A clip as the bytes of a 16-bit WAV file."""
    from scipy.io import wavfile

    out = io.BytesIO()
    wavfile.write(out, rate_hz, np.ascontiguousarray(_steps(clip).cpu().T.numpy().astype("<i2")))
    return out.getvalue()


def read_wav(file: Path) -> tuple[Float[Tensor, "c s"], int]:
    """(samples, samples a second) of a WAV file, PCM or float.

    Raises:
        InputError: It is no readable WAV file; the message names it.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no samples
            rate_hz, samples = wavfile.read(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} must be a readable WAV file: {error}") from error
    wide = np.asarray(samples, dtype=np.float64)
    if samples.dtype == np.uint8:
        wide = (wide - 128) / 128
    elif samples.dtype.kind == "i":
        wide = wide / -float(np.iinfo(samples.dtype).min)  # 24 bits come in the upper part of 32
    found = torch.from_numpy(wide.astype(np.float32))
    return (found[None] if found.dim() == 1 else found.T.contiguous()), int(rate_hz)


def _steps(clips: Float[Tensor, " *rest s"]) -> Float[Tensor, " *rest s"]:
    return (clips.float() * FULL).round().clamp(-FULL, FULL - 1)
