"""How well the tiny world's ear hears: what share of the renderer's own clips it names right, clean and spoilt."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from diffalign.tiny import hearing, playing, sounds
from diffalign.tiny.sounds import RATE_HZ, Sound

_PASSED_HZ = 4000.0
_NOISE_DB = -20.0
_TAPS = 255


def measure_hearing(count: int = 2000, seed: int = 93) -> dict[str, Any]:
    """Accuracy and confusions by attribute, and the mean score of clips by right and by wrong captions.

    Half of the clips are of training combinations, half of held-out ones.
    """
    rng = np.random.default_rng(seed)
    drawn, clips = [], []
    for row in range(count):
        drawn.append(sounds.draw_sound(rng, "train" if row % 2 else "held_out"))
        clips.append(playing.render(drawn[-1], rng))
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": lambda clip: clip,
        "spoilt": lambda c: spoil(c, rng),
    }
    return {"clips": count, **{name: _heard(drawn, map(way, clips)) for name, way in ways.items()}}


def spoil(clip: Float[np.ndarray, " s"], rng: np.random.Generator) -> Float[np.ndarray, " s"]:
    """The clip as a poor autoencoder leaves it: nothing above 4 kHz, and white noise 20 dB below it."""
    place = np.arange(_TAPS) - _TAPS // 2
    kernel = np.sinc(2 * _PASSED_HZ / RATE_HZ * place) * np.hanning(_TAPS)
    dull = np.convolve(clip, kernel / kernel.sum(), mode="same")
    level = np.sqrt(np.mean(dull**2)) * 10 ** (_NOISE_DB / 20)
    return dull + level * rng.standard_normal(len(dull))


def _heard(drawn: list[Sound], clips: Iterable[np.ndarray]) -> dict[str, Any]:
    right: Counter[str] = Counter()
    confused: dict[str, Counter[str]] = {name: Counter() for name in hearing.ATTRIBUTES}
    scores = []
    for sound, other, clip in zip(drawn, [*drawn[1:], drawn[0]], clips, strict=True):
        heard = hearing.measure(clip)
        nearest = heard.nearest
        for name in hearing.ATTRIBUTES:
            true, got = getattr(sound, name), getattr(nearest, name, "more notes")
            right[name] += true == got
            confused[name][f"{true} as {got}"] += true != got
        scores.append([hearing.compare(heard, asked)["total"] for asked in (sound, other)])
    mine, wrong = np.mean(scores, axis=0).round(4).tolist()
    return {
        "named": {name: round(right[name] / len(drawn), 4) for name in hearing.ATTRIBUTES},
        "confused": {name: dict((+errors).most_common()) for name, errors in confused.items()},
        "total": mine,
        "total_of_another_caption": wrong,
    }
