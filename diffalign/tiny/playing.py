"""Plays the tiny world's sounds, from a seed: 1.536 s of mono at 16 kHz.

Tones are sums of partials below the Nyquist frequency, so nothing aliases; wind is a band of noise. No two clips of one
sound are alike: tuning, timing, colour, level and noise floor vary with the seed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from diffalign.tiny.sounds import (
    LENGTHS,
    LOUDNESS,
    PITCHES,
    RATE_HZ,
    RHYTHMS,
    SAMPLES,
    SPAN,
    TIMBRES,
    Sound,
    fits,
)

_HIGHEST_HZ = 7600.0
_ATTACK, _RELEASE = 0.012, 0.025
_LEAD = 0.03
_WIND_OCTAVES = 0.7


@dataclass(frozen=True)
class Carelessness:
    """How far a careless player strays from what the caption asks, beyond the variation that every clip has.

    Pre-training clips are played carelessly, as sounds on the web are captioned: the base model learns the mistakes,
    and preferences can teach it better.
    """

    slip: float = 0.0
    """Probability that one attribute is replaced by another of its kind."""
    detune: float = 0.0
    """Standard deviation of the pitch, in semitones."""
    stagger: float = 0.0
    """Standard deviation of each onset, in seconds."""


def render(sound: Sound, rng: np.random.Generator, care: Carelessness | None = None) -> Float32[np.ndarray, " s"]:
    """A clip of the sound: `SAMPLES` samples in [-1, 1] at `RATE_HZ`, its peak from -12 to -3 dB of full scale.

    Args:
        sound: What is asked for.
        rng: Draws what no caption says: tuning by 15 cents, onsets by 8 ms, lengths by 5 %, partials by 1 dB, vibrato,
            a noise floor of -65 to -50 dB under the peak, and the level.
        care: How far the player strays from what is asked; not at all without it.
    """
    care = care or Carelessness()
    played = _slip(sound, rng, care.slip)
    hertz = PITCHES[played.pitch] * 2 ** ((rng.normal(0.0, 0.15) + rng.normal(0.0, care.detune)) / 12)
    notes = _notes(played, rng, care.stagger)
    wave = _tone(hertz, TIMBRES[played.timbre], rng) if TIMBRES[played.timbre] else _wind(hertz, rng)
    wave = wave * _gain(notes, LOUDNESS[played.loudness], rng)
    wave /= np.abs(wave).max()
    wave += rng.standard_normal(SAMPLES) * 10 ** (rng.uniform(-65, -50) / 20)
    return (wave / np.abs(wave).max() * 10 ** (rng.uniform(-12, -3) / 20)).astype(np.float32)


def _notes(sound: Sound, rng: np.random.Generator, stagger: float) -> list[tuple[float, float]]:
    """(onset, length) of each note in seconds."""
    places = np.array([*RHYTHMS[sound.rhythm], 1.0]) * SPAN
    lengths = (
        np.diff(places) * LENGTHS["long"] if sound.length == "long" else np.full(len(places) - 1, LENGTHS["short"])
    )
    onsets = places[:-1] + rng.normal(0.0, 0.008, len(lengths)) + rng.normal(0.0, stagger, len(lengths))
    onsets = np.sort(onsets.clip(-_LEAD, SPAN - LENGTHS["short"])) + _LEAD + rng.uniform(0.0, _LEAD)
    return list(zip(onsets, lengths * np.exp(rng.normal(0.0, 0.05, len(lengths))), strict=True))


def _gain(notes: list[tuple[float, float]], change: float, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
    """Amplitude over time: each note rises and falls as half a cosine, all of them fade along one line in dB."""
    time = np.arange(SAMPLES) / RATE_HZ
    gain = np.zeros(SAMPLES)
    for onset, length in notes:
        up = ((time - onset) / _ATTACK + 0.5).clip(0, 1)
        down = ((onset + length - time) / _RELEASE + 0.5).clip(0, 1)
        note = np.sin(up * np.pi / 2) ** 2 * np.sin(down * np.pi / 2) ** 2 * 10 ** (rng.normal(0.0, 0.7) / 20)
        gain = np.maximum(gain, note)
    first, last = notes[0][0], notes[-1][0] + notes[-1][1]
    return gain * 10 ** (change * ((time - first) / (last - first) - 0.5).clip(-0.5, 0.5) / 20)


def _tone(hertz: float, partials: Iterable[float], rng: np.random.Generator) -> Float[np.ndarray, " s"]:
    """A sum of partials in random phase with a slight vibrato; those that would pass 7.6 kHz are left out."""
    time = np.arange(SAMPLES) / RATE_HZ
    rate, depth = rng.uniform(4.5, 6.0), rng.uniform(0.0, 0.003)
    phase = 2 * np.pi * hertz * time - hertz * depth / rate * np.cos(
        2 * np.pi * rate * time + rng.uniform(0, 2 * np.pi)
    )
    turn = np.exp(1j * phase)
    now, wave = np.ones(SAMPLES, dtype=complex), np.zeros(SAMPLES)
    for k, amplitude in enumerate(partials, start=1):
        now = now * turn
        start, colour = rng.uniform(0, 2 * np.pi), 10 ** (rng.normal(0.0, 1.0) / 20)
        if k * hertz * (1 + depth) < _HIGHEST_HZ:
            wave += amplitude * colour * (now * np.exp(1j * start)).imag
    return wave


def _wind(hertz: float, rng: np.random.Generator) -> Float[np.ndarray, " s"]:
    """Noise whose power is a bell over octaves around `hertz`, its loudness evened out over 20 ms."""
    frequencies = np.fft.rfftfreq(SAMPLES, 1 / RATE_HZ)[1:]
    bell = np.exp(-0.5 * (np.log2(frequencies / hertz) / _WIND_OCTAVES) ** 2)  # per octave, so over f per hertz
    shape = np.concatenate([[0.0], np.sqrt(bell / frequencies)])
    wave = np.fft.irfft(np.fft.rfft(rng.standard_normal(SAMPLES)) * shape, SAMPLES)
    window = np.hanning(round(0.04 * RATE_HZ))
    power = np.convolve(wave**2, window / window.sum(), mode="same")
    return wave / np.sqrt(power + 0.05 * power.mean())


def _slip(sound: Sound, rng: np.random.Generator, slip: float) -> Sound:
    """The sound with some attributes replaced, one that can be played."""

    def other(value: str, choices: Iterable[str]) -> str:
        return str(rng.choice([c for c in choices if c != value])) if rng.random() < slip else value

    while True:
        played = Sound(
            other(sound.pitch, PITCHES),
            other(sound.timbre, TIMBRES),
            other(sound.rhythm, RHYTHMS),
            other(sound.length, LENGTHS),
            other(sound.loudness, LOUDNESS),
        )
        if fits(played):
            return played
