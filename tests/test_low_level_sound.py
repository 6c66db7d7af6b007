"""Loudness, clipping, silence, brightness and the difference of bands, by closed forms; clips in a page."""

import base64
import io

import pytest
import torch
from scipy.io import wavfile

from diffalign.data.sounds import wav
from diffalign.evaluate import low_level_sound as low
from diffalign.evaluate.diversity import unit_rows
from diffalign.evaluate.media import Clips
from diffalign.evaluate.showing import show_clip
from diffalign.types import Embedded, RewardBatch
from tests.audio_builders import noise, tone

RATE = 16_000


def test_a_sine_has_its_loudness_whatever_the_channels():
    mono = tone(440, RATE, RATE, 0.5)
    found = low.loudness(torch.stack([torch.cat([mono, mono]), torch.cat([mono, 0 * mono])]))
    assert found.tolist() == pytest.approx([0.5 / 2**0.5, 0.25], rel=1e-4)


def test_samples_at_full_scale_are_counted_at_either_end():
    clip = torch.zeros(1, 1, 8)
    clip[0, 0, :4] = torch.tensor([1.0, -1.0, 1 - 2**-15, 0.999])
    assert low.clipped(clip).tolist() == [3 / 8]


def test_silence_is_the_share_of_quiet_frames():
    half = torch.cat([tone(440, RATE, RATE, 0.1), torch.zeros(1, RATE)], dim=1)[None]
    assert low.silence(half, RATE).tolist() == [0.5]
    assert low.silence(0.5 * 10 ** (-60 / 20) * torch.ones(1, 1, RATE), RATE).tolist() == [1]
    assert low.silence(2 * 10 ** (-60 / 20) * torch.ones(1, 1, RATE), RATE).tolist() == [0]
    assert low.silence(torch.zeros(1, 1, 10), RATE).tolist() == [1]  # less than a frame


@pytest.mark.parametrize("hertz", [500, 1000, 3000])
def test_the_brightness_of_a_tone_is_its_frequency_at_any_level(hertz):
    both = torch.stack([tone(hertz, RATE, RATE, 0.5), tone(hertz, RATE, RATE, 0.01)])
    assert low.brightness(both, RATE).tolist() == pytest.approx([hertz] * 2, rel=0.01)
    assert low.brightness(torch.zeros(1, 1, RATE), RATE).tolist() == [0]


def test_half_the_level_is_6_decibels_in_every_band_and_phase_is_not_heard():
    clips = torch.stack([noise(0, RATE, 0.8), noise(1, RATE, 0.8)])
    assert low.band_difference(clips, 0.5 * clips, RATE).tolist() == pytest.approx([6.02] * 2, abs=0.2)
    assert low.band_difference(clips, -clips, RATE).tolist() == [0, 0]
    assert low.band_difference(clips, clips.flip(0), RATE).min() > 0.5
    quiet = 1e-6 * clips
    assert low.band_difference(quiet, 0.5 * quiet, RATE).max() < 0.1  # below the floor


def test_all_statistics_have_words():
    assert list(low.low_level(torch.zeros(2, 1, 800), RATE)) == list(low.WORDS)
    assert Clips(rate_hz=RATE).words is low.WORDS


@pytest.mark.parametrize(("rate", "played"), [(16_000, 16_000), (44_100, 22_050), (48_000, 24_000), (96_000, 24_000)])
def test_a_page_plays_the_first_seconds_in_mono_at_a_whole_part_of_the_rate(rate, played):
    clip = torch.cat([tone(440, 11 * rate, rate), -tone(440, 11 * rate, rate) / 2])
    shown = show_clip(clip, rate)
    assert shown.uri.startswith("data:image/png;base64,")
    assert shown.width is None
    found, samples = wavfile.read(io.BytesIO(base64.b64decode(shown.sound.removeprefix("data:audio/wav;base64,"))))
    assert (found, samples.shape) == (played, (10 * played,))
    assert abs(samples[: played // 2]).max() / 2**15 == pytest.approx(0.125, abs=0.005)


def test_finished_clips_are_taken_over_as_16_bits(tmp_path):
    wavfile.write(tmp_path / "a.wav", RATE, tone(440, 1600, RATE)[0].numpy())  # float32
    assert Clips(rate_hz=RATE).taken(tmp_path / "a.wav") == wav(tone(440, 1600, RATE), RATE)


class Windows:
    """Two rows a clip: its halves' means of the first two samples."""

    version, modality = "windows", "audio"

    def embed(self, batch: RewardBatch) -> Embedded:
        rows = torch.cat([torch.tensor([[3.0, 0.0], [1.0, 4.0]]) for _ in batch.audio or ()])
        return Embedded(rows=rows, counts=(2,) * len(batch))

    embed_with_graph = embed


def test_a_clip_of_several_rows_is_their_unit_mean():
    batch = RewardBatch(audio=[torch.zeros(1, 8)] * 3, sample_rate=RATE)
    torch.testing.assert_close(unit_rows(Windows(), batch), torch.tensor([[0.5**0.5, 0.5**0.5]] * 3))
