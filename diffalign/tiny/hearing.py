"""The ear of the tiny world's simulated person: measures from samples what a caption asked for.

No network. Power over time, weighted by the clip's own spectrum so that what sounds elsewhere counts little, is
searched for sudden rises and falls: these are the notes, and they give rhythm, length and the change in loudness. Pitch
and timbre are found in `voice`. Every attribute is in [0, 1], and so is `total`, their mean; of silence all are 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from diffalign.tiny import sounds
from diffalign.tiny.sounds import RATE_HZ, Sound
from diffalign.tiny.voice import LOWEST_HZ, sigmoid, voice

ATTRIBUTES = ("pitch", "timbre", "rhythm", "length", "loudness")
SHORTEST = RATE_HZ // 4
"""Samples of the shortest clip that is heard: a quarter of a second."""

_SILENCE = 1e-4
_FRAME, _HOP = 768, 80
_JUMP_DB, _REACH, _DEPTH_DB = 7.0, 16, 24.0
"""A note begins where power rises by this much within so many frames, above this depth under the loudest frame."""
_LEAST_NOTE = 0.025
_FAINT = 0.01
"""Share of the loudest frequency's power at which a frequency counts half."""
_PITCH_SPREAD = 0.25


@dataclass(frozen=True)
class Heard:
    """What a clip sounds like; the measured counterpart of a `Sound`."""

    hertz: float
    """Pitch; 0 for silence."""
    timbre: dict[str, float]
    """Share of each timbre; they add up to 1, or to 0 for silence."""
    onsets: tuple[float, ...]
    """Seconds."""
    lengths: tuple[float, ...]
    """Seconds of each note, at half its amplitude."""
    change: float
    """From the first onset to the end of the last note, in dB."""

    @property
    def swing(self) -> float | None:
        """How much longer the odd intervals are than the even ones, as a logarithm to base 2; None of two notes."""
        between = np.diff(self.onsets)
        return math.log2(between[::2].mean() / between[1::2].mean()) if len(between) > 1 else None

    @property
    def nearest(self) -> Sound | None:
        """The sound that it is most like, if there is one."""
        count = {1: "one", 2: "two", 3: "three", 4: "four"}.get(len(self.onsets))
        if count is None:
            return None
        beat = [] if self.swing is None else ["even" if self.swing < 0.5 else "swung"]
        return Sound(
            min(sounds.PITCHES, key=lambda name: abs(math.log2(self.hertz / sounds.PITCHES[name]))),
            max(self.timbre, key=lambda name: self.timbre[name]),
            " ".join([count, *beat]),
            max(sounds.LENGTHS, key=lambda name: _length(self, name)),
            max(sounds.LOUDNESS, key=lambda name: _loudness(self, name)),
        )


def judge(samples: Float[np.ndarray, " s"], prompt: str) -> dict[str, float]:
    """How well a clip sounds like what its caption asks, per attribute and in `total`.

    Args:
        samples: Mono in [-1, 1] at 16 kHz.
        prompt: A caption of the tiny world's sounds.

    Returns:
        Scores in [0, 1] under the names in `ATTRIBUTES`, and their mean as `total`; higher is better.

    Raises:
        ValueError: The prompt is not a caption of this world, or the clip is too short, not mono, or not finite.
    """
    return compare(measure(samples), sounds.parse(prompt))


def compare(heard: Heard, asked: Sound) -> dict[str, float]:
    """Scores by attribute and in `total` of a clip that is measured already."""
    scores = dict.fromkeys(ATTRIBUTES, 0.0)
    if heard.onsets:
        away = math.log2(heard.hertz / sounds.PITCHES[asked.pitch])
        scores["pitch"] = math.exp(-0.5 * (away / _PITCH_SPREAD) ** 2)
        scores["timbre"] = heard.timbre[asked.timbre]
        scores["rhythm"] = _rhythm(heard, asked.rhythm)
        scores["length"] = _length(heard, asked.length)
        scores["loudness"] = _loudness(heard, asked.loudness)
    return scores | {"total": float(np.mean([scores[name] for name in ATTRIBUTES]))}


def measure(samples: Float[np.ndarray, " s"]) -> Heard:
    """Pitch, timbre, notes and loudness of a clip at 16 kHz.

    Raises:
        ValueError: Fewer than `SHORTEST` samples, more channels than one, or samples that are not finite.
    """
    if samples.ndim != 1 or len(samples) < SHORTEST:
        raise ValueError(f"clip must have shape (samples,) with {SHORTEST} samples or more, got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(f"clip must have finite samples, got {samples[~np.isfinite(samples)][0]}")
    wave = np.asarray(samples, dtype=np.float64)
    wave = wave - wave.mean()
    peak = np.abs(wave).max()
    if peak < _SILENCE:
        return Heard(0.0, dict.fromkeys(sounds.TIMBRES, 0.0), (), (), 0.0)
    level = _level(wave / peak)
    notes = _notes(level)
    first, last = notes[0][0], notes[-1][1]
    hertz, timbre = voice(wave / peak)
    step = _HOP / RATE_HZ
    return Heard(
        hertz=hertz,
        timbre=timbre,
        onsets=tuple(start * step for start, _ in notes),
        lengths=tuple((end - start) * step for start, end in notes),
        change=_slope(level, notes) * (last - first),
    )


def _level(wave: np.ndarray) -> Float[np.ndarray, " f"]:
    """Power over time in dB, every 5 ms from the first sample on, each frequency weighted by its share of the clip."""
    padded = np.pad(wave, (_FRAME // 2 + _REACH * _HOP, _FRAME))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP] * np.hanning(_FRAME)
    power = np.abs(np.fft.rfft(frames)) ** 2
    power[:, : round(LOWEST_HZ / 2 * _FRAME / RATE_HZ)] = 0.0
    spectrum = power.mean(0)
    matched = power @ (spectrum / (spectrum + _FAINT * spectrum.max()))
    decibels = 10 * np.log10(matched / max(matched.max(), 1e-30) + 1e-12)
    return decibels.clip(-_DEPTH_DB)


def _notes(level: Float[np.ndarray, " f"]) -> list[tuple[int, int]]:
    """(first, last frame) of each note at half its amplitude; the loudest frame's where nothing rises.

    Frame 0 is the first sample; `level` begins `_REACH` frames before it.
    """
    found, begun = [], None
    for now in range(_REACH, len(level)):
        recent = level[now - _REACH : now + 1]
        if begun is None and level[now] > recent.min() + _JUMP_DB:
            begun = now
        elif begun is not None and level[now] < recent[max(0, begun - now + _REACH) :].max() - _JUMP_DB:
            found.append((begun, now))
            begun = None
    if begun is not None:
        found.append((begun, len(level) - 1))
    earlier = [0, *(end for _, end in found)]
    notes = [_trimmed(level, *ends, least) for ends, least in zip(found, earlier, strict=False)]
    kept = [(a - _REACH, b - _REACH) for a, b in notes if (b - a) * _HOP / RATE_HZ >= _LEAST_NOTE]
    loudest = int(level.argmax()) - _REACH
    return kept or [(loudest, loudest + 1)]


def _trimmed(level: Float[np.ndarray, " f"], begin: int, end: int, least: int) -> tuple[int, int]:
    """From where a note comes within 6 dB of its beginning's peak to where it leaves that of its end.

    It begins after frame `least`, where the note before it has ended: so no two notes begin at once.
    """
    inside = level[begin : end + 1]
    first = inside[:_REACH].max() - 6.0
    last = inside[-_REACH - 4 :].max() - 6.0
    while begin > least and level[begin - 1] >= first:
        begin -= 1
    above = np.flatnonzero(level[begin : end + 1] >= first)
    below = np.flatnonzero(level[begin : end + 1] >= last)
    return begin + int(above[0]), begin + int(below[-1])


def _slope(level: Float[np.ndarray, " f"], notes: list[tuple[int, int]]) -> float:
    """Decibels a frame along a line through the middle three fifths of every note."""
    places = np.concatenate([np.arange(a + round(0.2 * (b - a)), b - round(0.2 * (b - a)) + 1) for a, b in notes])
    around = places - places.mean()
    spread = float(around @ around)
    return float(around @ level[places + _REACH]) / spread if spread else 0.0


def _rhythm(heard: Heard, name: str) -> float:
    """How near the number of notes is; in equal part, where three or more are asked for, whether they swing."""
    _, _, beat = name.partition(" ")
    count = max(0.0, 1.0 - 0.5 * abs(len(heard.onsets) - len(sounds.RHYTHMS[name])))
    if not beat:
        return count
    if heard.swing is None:
        return count / 2
    swung = sigmoid((heard.swing - 0.5) / 0.1)
    return (count + (swung if beat == "swung" else 1 - swung)) / 2


def _length(heard: Heard, name: str) -> float:
    long = sigmoid(math.log(float(np.median(heard.lengths)) / 0.13) / 0.1)
    return long if name == "long" else 1 - long


def _loudness(heard: Heard, name: str) -> float:
    rising, falling = (sigmoid((side * heard.change - 6.0) / 1.2) for side in (1, -1))
    return {"fading in": rising, "fading out": falling, "steady": max(0.0, 1 - rising - falling)}[name]
