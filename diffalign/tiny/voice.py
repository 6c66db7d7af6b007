"""What makes a sound's voice: its pitch, and its timbre by the weight of its second and third partial.

Pitch is the first period after which the clip repeats itself, or the middle of the spectrum where nothing repeats.
"""

import math

import numpy as np
from jaxtyping import Float

from diffalign.tiny.sounds import RATE_HZ

LOWEST_HZ, HIGHEST_HZ = 90.0, 1700.0
"""Between these pitches are searched for."""

_FINER = 4
"""Lags per sample."""
_REPEATS = 0.2


def voice(wave: Float[np.ndarray, " s"]) -> tuple[float, dict[str, float]]:
    """(pitch in hertz, share of each timbre)."""
    size = 1 << (2 * len(wave) - 1).bit_length()
    power = np.abs(np.fft.rfft(wave, size)) ** 2
    hertz, rest = _period(wave, power, size)
    tonal = sigmoid((0.4 - rest) / 0.05)
    second, third = (sigmoid((_partial(power, size, hertz, k) + 15) / 2) for k in (2, 3))
    timbre = {
        "flute": tonal * (1 - second) * (1 - third),
        "clarinet": tonal * (1 - second) * third,
        "organ": tonal * second * (1 - third),
        "violin": tonal * second * third,
        "wind": 1 - tonal,
    }
    return (hertz if tonal > 0.5 else _middle(power, size)), timbre


def _period(wave: np.ndarray, power: np.ndarray, size: int) -> tuple[float, float]:
    """(1 / period in hertz, share of the power that does not repeat after it).

    The difference of the clip and itself a lag later, over its mean over all shorter lags; the period is the bottom of
    the first dip below a threshold, or of the deepest.

    Paper: de Cheveigné and Kawahara, "YIN, a fundamental frequency estimator for speech and music", JASA 111 (2002),
    eqs. 7 and 8, on lags of a quarter of a sample.
    """
    most = math.ceil(RATE_HZ / LOWEST_HZ)
    together = np.fft.irfft(power, size * _FINER)[: most * _FINER + 1] * _FINER
    energy = np.concatenate([[0.0], np.cumsum(wave**2)])
    lags = np.arange(len(together)) / _FINER
    head = np.interp(len(wave) - lags, np.arange(len(energy)), energy)
    tail = energy[-1] - np.interp(lags, np.arange(len(energy)), energy)
    difference = (head + tail - 2 * together).clip(0)
    normed = difference[1:] * np.arange(1, len(lags)) / (np.cumsum(difference[1:]) + 1e-12)
    least = math.floor(RATE_HZ / HIGHEST_HZ * _FINER)
    searched = normed[least - 1 :]
    low = np.flatnonzero(searched < _REPEATS)
    best = int(searched.argmin())
    if len(low):
        best = int(low[0])
        while best + 1 < len(searched) and searched[best + 1] < searched[best]:
            best += 1
    return RATE_HZ * _FINER / (best + least), float(searched[best])


def _partial(power: np.ndarray, size: int, hertz: float, k: int) -> float:
    """Power of the k-th partial over that of the first in dB, less what lies between partials; at least -60."""

    def band(low: float, high: float) -> float:
        edges = [min(len(power), round(x * hertz * size / RATE_HZ)) for x in (low, high)]
        return float(power[edges[0] : edges[1]].sum())

    def line(k: int) -> float:
        return band(k - 0.25, k + 0.25) - band(k - 0.5, k - 0.25) - band(k + 0.25, k + 0.5)

    ratio = max(line(k), 0.0) / max(line(1), 1e-12)
    return 10 * math.log10(ratio + 1e-6)


def _middle(power: np.ndarray, size: int) -> float:
    """Mean of the logarithm of frequency over the power."""
    hertz = np.arange(len(power)) * RATE_HZ / size
    heard = hertz > LOWEST_HZ / 2
    return float(np.exp((np.log(hertz[heard]) * power[heard]).sum() / max(power[heard].sum(), 1e-30)))


def sigmoid(x: float) -> float:
    """A share of 0 to 1, one half at 0."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, x))))
