"""Pictures of clips: one scale for all, tones at their height, and what cannot be drawn."""

import math

import numpy as np
import pytest
import torch

from diffalign.errors import InputError
from diffalign.evaluate import sound_pictures
from diffalign.evaluate.sound_pictures import clip_picture, sheet
from tests.audio_builders import noise, tone


def drawn(clip: torch.Tensor, rate_hz: int = 16_000) -> np.ndarray:
    """Darkness of the log-mel bands alone, [height, width], 0 to 255."""
    return 255.0 - np.asarray(sound_pictures._mel(clip[0], rate_hz).convert("L"), dtype=float)


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
@pytest.mark.parametrize("hertz", [150.0, 1000.0, 5000.0])
def test_a_tone_is_a_dark_line_at_its_height(hertz, rate_hz):
    dark = drawn(tone(hertz, rate_hz, rate_hz, level=1.0), rate_hz)
    rows = dark[:, 50:-50].mean(1)
    asked = (1 - sound_pictures._height(hertz, rate_hz)) * len(rows)
    assert abs(rows.argmax() + 0.5 - asked) <= 3
    assert rows.max() > 215
    assert np.median(rows) < 60


def test_a_quieter_clip_is_drawn_lighter_and_lower():
    loud, quiet = tone(1000, 16_000, 16_000, level=0.8), tone(1000, 16_000, 16_000, level=0.05)
    assert drawn(loud).max() > drawn(quiet).max() + 40
    heights = [(np.asarray(sound_pictures._waveform(c[0]).convert("L")) < 200).sum(0).max() for c in (loud, quiet)]
    assert heights[0] > 8 * heights[1]


def test_silence_is_drawn_blank():
    assert np.ptp(drawn(torch.zeros(1, 16_000))) == 0


def test_a_sound_is_drawn_when_it_sounds():
    clip = tone(1000, 16_000, 16_000, level=0.8)
    clip[:, :8000] = 0
    dark = drawn(clip).max(0)
    assert dark[: len(dark) // 2 - 15].max() < 15
    assert dark[len(dark) // 2 + 15 :].min() > 150


def test_channels_are_drawn_as_their_mean():
    mono = noise(0, 8000)
    both = clip_picture(torch.cat([mono, mono]), 16_000, "a title")
    assert np.array_equal(np.asarray(both), np.asarray(clip_picture(mono, 16_000, "a title")))


def test_a_sheet_has_a_place_for_every_clip():
    clips = [tone(300.0 * (i + 1), 8000 + 800 * i, 16_000) for i in range(5)]
    one = clip_picture(clips[0], 16_000, "tone 0")
    whole = sheet(clips, [f"tone {i}" for i in range(5)], 16_000, columns=2)
    assert whole.size == (2 * one.width, 3 * one.height)
    assert np.array_equal(np.asarray(whole)[: one.height, : one.width], np.asarray(one))
    empty = np.asarray(whole)[2 * one.height :, one.width :]
    assert math.isclose(empty.mean(), 255.0)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="clip must have 40 ms or more"):
        clip_picture(noise(0, 639), 16_000)
    with pytest.raises(InputError, match="sheet must have clips with a title each, got 0 clips"):
        sheet([], [], 16_000)
    with pytest.raises(InputError, match="got 1 clips and 2 titles"):
        sheet([noise(0, 8000)], ["a", "b"], 16_000)
