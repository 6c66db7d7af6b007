"""The sounds of the tiny world: what there is to hear, and how captions say it.

A sound is one to four notes of one pitch and timbre, even or swung, short or long, steady or fading. `caption` says it
in varied wording, `parse` reads a caption back; `playing.render` plays it and `hearing.judge` judges it. Combinations
of pitch, timbre and rhythm are split once into training and held-out ones.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

RATE_HZ = 16_000
SAMPLES = 24_576
"""Of every clip: 3 · 2^13, which autoencoders can halve."""

PITCHES = {"deep": 147.0, "low": 247.0, "medium": 415.0, "high": 698.0, "shrill": 1175.0}
"""Fundamental in hertz, or the middle of the wind's band; neighbours are three quarters of an octave apart."""
TIMBRES: dict[str, tuple[float, ...]] = {
    "flute": (1.0, 0.05, 0.025),
    "clarinet": tuple(k**-0.7 if k % 2 else 0.015 for k in range(1, 14)),
    "organ": (1.0, 0.7, 0.015, 0.45, 0.0, 0.0, 0.0, 0.25),
    "violin": tuple(k**-0.6 for k in range(1, 25)),
    "wind": (),
}
"""Amplitude of each partial; wind has none and is a band of noise. Second and third partial tell the others apart."""
RHYTHMS: dict[str, tuple[float, ...]] = {
    "one": (0.0,),
    "two": (0.0, 1 / 2),
    "three even": (0.0, 1 / 3, 2 / 3),
    "three swung": (0.0, 4 / 9, 2 / 3),
    "four even": (0.0, 1 / 4, 1 / 2, 3 / 4),
    "four swung": (0.0, 1 / 3, 1 / 2, 5 / 6),
}
"""Onsets in units of `SPAN`; swung notes are long and short by turns, two to one."""
LENGTHS = {"short": 0.09, "long": 0.75}
"""Seconds of a short note; of a long one, its share of the time to the next onset."""
LOUDNESS = {"steady": 0.0, "fading in": 12.0, "fading out": -12.0}
"""Change from the first onset to the end of the last note, in dB."""
SPAN = 1.44
"""Seconds from the first onset to where the next one would be."""

_PITCH_WORDS = {
    "deep": ("deep", "very low"),
    "low": ("low",),
    "medium": ("medium", "middle"),
    "high": ("high",),
    "shrill": ("shrill", "very high"),
}
_LENGTH_WORDS = {"short": ("short", "brief"), "long": ("long", "held")}
_BEAT_WORDS = {"even": ("even", "regular"), "swung": ("swung", "limping")}
_LOUDNESS_WORDS = {
    "steady": ("at a steady level", "with steady loudness"),
    "fading in": ("fading in", "getting louder"),
    "fading out": ("fading out", "getting softer"),
}
_HELD_OUT_ONE_IN = 6

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Sound:
    """What is heard, by the names of the tables above."""

    pitch: str
    timbre: str
    rhythm: str
    length: str
    loudness: str


def is_held_out(sound: Sound) -> bool:
    """Whether the combination of pitch, timbre and rhythm is kept out of all training captions."""
    digest = hashlib.sha256(f"{sound.pitch}|{sound.timbre}|{sound.rhythm}".encode()).digest()
    return digest[0] % _HELD_OUT_ONE_IN == 0


def split_of(sound: Sound) -> Split:
    return "held_out" if is_held_out(sound) else "train"


def fits(sound: Sound) -> bool:
    """A single short note is too short to fade."""
    return len(RHYTHMS[sound.rhythm]) > 1 or sound.length == "long"


def draw_sound(rng: np.random.Generator, split: Split) -> Sound:
    """A random sound of a split, every attribute evenly; a single note is always long."""
    while True:
        sound = Sound(*(str(rng.choice(list(t))) for t in (PITCHES, TIMBRES, RHYTHMS, LENGTHS, LOUDNESS)))
        if fits(sound) and split_of(sound) == split:
            return sound


def caption(sound: Sound, rng: np.random.Generator) -> str:
    """The sound in words; the wording varies with `rng`."""
    count, _, beat = sound.rhythm.partition(" ")
    words = [count, str(rng.choice(_LENGTH_WORDS[sound.length]))]
    if beat:
        words.insert(int(rng.integers(1, 3)), str(rng.choice(_BEAT_WORDS[beat])))
    notes = " ".join([*words, "note" if count == "one" else "notes"])
    voice = f"{rng.choice(_PITCH_WORDS[sound.pitch])} {sound.timbre}"
    loudness = str(rng.choice(_LOUDNESS_WORDS[sound.loudness]))
    if rng.random() < 0.3:
        return f"{voice}, {notes}, {loudness}"
    said = f"a {voice} plays {notes}" if rng.random() < 0.5 else f"{notes} of a {voice}"
    return f"{said}, {loudness}" if rng.random() < 0.5 else f"{loudness}, {said}"


def parse(text: str) -> Sound:
    """The sound that a caption of this world describes.

    Raises:
        ValueError: The text is not a caption of this world.
    """
    found = [
        _said(text, _PITCH_WORDS),
        _said(text, {name: (name,) for name in TIMBRES}),
        _said(text, {name.partition(" ")[0]: (name.partition(" ")[0],) for name in RHYTHMS}),
        _said(text, _LENGTH_WORDS),
        _said(text, _LOUDNESS_WORDS),
    ]
    beats = _said(text, _BEAT_WORDS)
    if all(len(names) == 1 for names in found):
        pitch, timbre, count, length, loudness = (names.pop() for names in found)
        sound = Sound(pitch, timbre, " ".join([count, *sorted(beats)]), length, loudness)
        if sound.rhythm in RHYTHMS and fits(sound):
            return sound
    raise ValueError(f"prompt must be a caption of the tiny world's sounds, such as {_EXAMPLE!r}, got {text!r}")


def _said(text: str, words: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Names of which a word occurs; read from the left, so that "very low" is not low."""
    names = {word: name for name, some in words.items() for word in some}
    return {names[word] for word in re.findall(rf"\b({'|'.join(names)})\b", text.lower())}


_EXAMPLE = "a low flute plays three short even notes, getting louder"
