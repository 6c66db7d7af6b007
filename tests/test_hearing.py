"""The ear of the tiny world: known tones, bursts and slopes, the renderer's own clips, and what has no answer."""

import math

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.sound_oracle import SoundOracleReward
from diffalign.tiny import audition, hearing, playing, sounds, voice
from diffalign.tiny.playing import Carelessness
from diffalign.tiny.sounds import RATE_HZ, Sound
from diffalign.types import RewardBatch
from tests.audio_builders import audio_batch

CLEAN = Sound("low", "clarinet", "three even", "short", "fading in")
TEXT = "a low clarinet plays three short even notes, getting louder"
TIME = np.arange(sounds.SAMPLES) / RATE_HZ


def tone(hertz: float, partials: tuple[float, ...] = (1.0,)) -> np.ndarray:
    return sum(a * np.sin(2 * np.pi * k * hertz * TIME + k) for k, a in enumerate(partials, start=1))


def bursts(onsets: list[float], seconds: float, hertz: float = 500.0) -> np.ndarray:
    gate = sum(((t <= TIME) & (t + seconds > TIME)).astype(float) for t in onsets)
    return 0.5 * tone(hertz) * gate


def play(sound: Sound, seed: int = 0) -> np.ndarray:
    return playing.render(sound, np.random.default_rng(seed))


# --- what is measured


@pytest.mark.parametrize("hertz", [101.0, 147.0, 333.3, 698.0, 1175.0, 1600.0])
@pytest.mark.parametrize("partials", [(1.0,), (1.0, 0.0, 0.5), (1.0, 0.8), (0.7, 0.7, 0.7, 0.7)])
def test_pitch_is_that_of_the_tone(hertz, partials):
    assert hearing.measure(tone(hertz, partials)).hertz == pytest.approx(hertz, rel=0.013)  # a quarter of a sample


def test_pitch_is_heard_where_the_fundamental_is_missing():
    assert hearing.measure(tone(247.0, (0.0, 1.0, 1.0, 1.0))).hertz == pytest.approx(247.0, rel=0.01)


def test_what_repeats_after_two_periods_too_is_not_heard_an_octave_lower():
    steady = tone(400.0, (1.0, 0.5, 0.3))
    assert hearing.measure(steady + 0.02 * tone(200.0)).hertz == pytest.approx(400.0, rel=0.01)


@pytest.mark.parametrize(
    ("partials", "timbre"),
    [
        ((1.0,), "flute"),
        ((1.0, 0.0, 0.5), "clarinet"),
        ((1.0, 0.5), "organ"),
        ((1.0, 0.5, 0.5), "violin"),
    ],
)
def test_timbre_is_told_by_the_second_and_third_partial(partials, timbre):
    assert hearing.measure(tone(300.0, partials)).timbre[timbre] > 0.9


def test_a_partial_is_weighed_in_decibels():
    power = np.abs(np.fft.rfft(tone(300.0, (1.0, 0.1)), 65_536)) ** 2
    assert voice._partial(power, 65_536, 300.0, 2) == pytest.approx(-20, abs=0.3)
    assert voice._partial(power, 65_536, 300.0, 3) < -40


def test_a_partial_that_wavers_weighs_as_much_as_a_steady_one():
    phase = 2 * np.pi * 300 * TIME + 3 * np.sin(2 * np.pi * 4 * TIME)
    power = np.abs(np.fft.rfft(np.sin(phase) + 0.5 * np.sin(3 * phase), 65_536)) ** 2
    assert voice._partial(power, 65_536, 300.0, 3) == pytest.approx(-6, abs=0.3)


def test_noise_is_not_taken_for_a_partial():
    clips = [tone(300.0) + noise(seed) for seed in range(9)]
    found = [voice._partial(np.abs(np.fft.rfft(clip, 65_536)) ** 2, 65_536, 300.0, 3) for clip in clips]
    assert np.median(found) < -22  # the band itself holds -14 dB of it


def test_noise_repeats_nothing_and_its_pitch_is_the_middle_of_its_band():
    heard = hearing.measure(playing._wind(415.0, np.random.default_rng(0)))
    assert heard.timbre["wind"] > 0.95
    assert abs(math.log2(heard.hertz / 415.0)) < 0.15


def test_shares_of_timbres_add_up():
    for clip in (tone(300.0, (1.0, 0.2, 0.17)), tone(300.0) + np.random.default_rng(0).standard_normal(len(TIME))):
        assert sum(hearing.measure(clip).timbre.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("onsets", "seconds"), [([0.1], 0.9), ([0.05, 0.8], 0.1), ([0.1, 0.5, 0.75], 0.15), ([0.0, 0.4, 0.8, 1.2], 0.3)]
)
def test_notes_are_where_they_begin_and_as_long_as_they_are(onsets, seconds):
    heard = hearing.measure(bursts(onsets, seconds))
    np.testing.assert_allclose(heard.onsets, onsets, atol=0.008)
    np.testing.assert_allclose(heard.lengths, seconds, atol=0.016)


def test_a_soft_note_close_behind_a_loud_one_is_one_note():
    heard = hearing.measure(bursts([0.1], 0.4) + 0.3 * bursts([0.55], 0.09))
    np.testing.assert_allclose(heard.onsets, [0.1, 0.55], atol=0.008)
    np.testing.assert_allclose(heard.lengths, [0.4, 0.09], atol=0.016)


def test_swing_is_the_ratio_of_neighbouring_intervals_in_octaves():
    assert hearing.measure(bursts([0.1, 0.7, 1.0], 0.1)).swing == pytest.approx(1.0, abs=0.08)
    assert hearing.measure(bursts([0.1, 0.4, 1.0], 0.1)).swing == pytest.approx(-1.0, abs=0.08)
    assert hearing.measure(bursts([0.1, 0.45, 0.8, 1.15], 0.1)).swing == pytest.approx(0.0, abs=0.05)
    assert hearing.measure(bursts([0.1, 0.7], 0.1)).swing is None


@pytest.mark.parametrize("change", [-18.0, -12.0, 0.0, 7.0, 12.0])
@pytest.mark.parametrize(("onsets", "seconds"), [([0.1], 1.2), ([0.1, 0.6, 1.1], 0.2)])
def test_the_change_of_loudness_is_that_between_the_ends(change, onsets, seconds):
    span = onsets[-1] + seconds - onsets[0]
    ramp = 10 ** (change * ((TIME - onsets[0]) / span - 1.0) / 20) / max(1.0, 10 ** (-change / 20))
    assert hearing.measure(bursts(onsets, seconds) * ramp).change == pytest.approx(change, abs=0.8)


def test_level_polarity_and_offset_change_nothing_and_a_delay_moves_the_onsets():
    clip = play(CLEAN).astype(float)
    heard = hearing.measure(clip)
    for other in (0.01 * clip, -clip, 0.5 * clip + 0.3):
        again = hearing.measure(other)
        assert again.onsets == heard.onsets
        assert again.hertz == heard.hertz
        assert again.timbre == pytest.approx(heard.timbre, abs=1e-6)
    later = hearing.measure(np.concatenate([np.zeros(800), clip]))
    np.testing.assert_allclose(later.onsets, np.array(heard.onsets) + 0.05, atol=1e-9)


# --- what is scored


def test_the_ear_gives_rendered_clips_nearly_full_marks_and_names_them_right():
    found = audition.measure_hearing(40, seed=7)
    for way, least in (("clean", 0.98), ("spoilt", 0.97)):
        assert found[way]["total"] > least
        assert min(found[way]["named"].values()) >= 0.97, found[way]["confused"]
        assert found[way]["total_of_another_caption"] < 0.6


@pytest.mark.parametrize(
    ("attribute", "wrong"),
    [
        ("pitch", "medium"),
        ("timbre", "flute"),
        ("rhythm", "three swung"),
        ("rhythm", "four even"),
        ("length", "long"),
        ("loudness", "steady"),
    ],
)
def test_the_ear_hears_which_attribute_is_wrong(attribute, wrong):
    right = hearing.judge(play(CLEAN), TEXT)
    found = hearing.judge(play(Sound(**{**vars(CLEAN), attribute: wrong})), TEXT)
    lost = {name: right[name] - found[name] for name in hearing.ATTRIBUTES}
    assert lost[attribute] > 0.2
    assert all(lost[name] < 0.05 for name in hearing.ATTRIBUTES if name != attribute)
    assert found["total"] == pytest.approx(np.mean([found[name] for name in hearing.ATTRIBUTES]))


def test_further_from_the_asked_count_scores_less_and_an_unheard_beat_nothing():
    asked = "a low flute plays four even short notes, at a steady level"
    counts = [hearing.judge(bursts([0.1, 0.45, 0.8, 1.15][:n], 0.09), asked)["rhythm"] for n in (4, 3, 2, 1)]
    assert counts == pytest.approx([1.0, 0.75, 0.0, 0.0], abs=0.02)
    three = "a low flute plays three even short notes, at a steady level"
    assert hearing.judge(bursts([0.1, 0.6], 0.09), three)["rhythm"] == pytest.approx(0.25)


def test_a_pitch_between_two_names_scores_between():
    asked = "a low flute plays two long notes, at a steady level"
    scores = [hearing.judge(bursts([0.1, 0.8], 0.5, hertz), asked)["pitch"] for hertz in (247, 300, 350, 415)]
    assert scores[0] > 0.99 > scores[1] > scores[2] > scores[3]
    assert scores[3] < 0.02


def test_more_carelessness_scores_less():
    means = []
    for slip in (0.0, 0.3, 0.7):
        rng = np.random.default_rng(0)
        drawn = [sounds.draw_sound(rng, "train") for _ in range(20)]
        care = Carelessness(slip=slip, detune=3 * slip, stagger=0.05 * slip)
        means.append(
            np.mean([hearing.compare(hearing.measure(playing.render(s, rng, care)), s)["total"] for s in drawn])
        )
    assert means[0] > means[1] + 0.1 > means[2] + 0.2


# --- what has no answer


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(sounds.SAMPLES)


ODD = {
    "noise": noise(0),
    "clipped noise": np.sign(noise(1)),
    "a clipped tone": (20 * play(CLEAN)).clip(-1, 1),
    "an offset": np.full(sounds.SAMPLES, 0.5),
    "a click": np.eye(1, sounds.SAMPLES, 9000)[0],
    "a click at the end": np.eye(1, sounds.SAMPLES, sounds.SAMPLES - 1)[0],
    "a rumble": np.sin(2 * np.pi * 11 * TIME),
    "a whistle": np.sin(2 * np.pi * 7900 * TIME),
    "a quarter of a second": play(CLEAN)[: hearing.SHORTEST],
    "quiet": 1e-3 * play(CLEAN),
    "every other sample": np.tile([1.0, -1.0], sounds.SAMPLES // 2),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_clips_have_finite_scores(name):
    scores = hearing.judge(ODD[name], TEXT)
    assert all(0 <= score <= 1 for score in scores.values()), scores  # NaN is in no range


def test_silence_has_nothing_of_what_was_asked():
    for quiet in (np.zeros(sounds.SAMPLES), 5e-5 * noise(2).clip(-1, 1), np.full(sounds.SAMPLES, 0.2)):
        assert set(hearing.judge(quiet, TEXT).values()) == {0.0}
        assert hearing.measure(quiet).nearest is None


def test_clips_that_cannot_be_heard_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(samples,\) with 4000 samples or more, got \(3999,\)"):
        hearing.measure(np.zeros(3999))
    with pytest.raises(ValueError, match="must have finite samples, got nan"):
        hearing.measure(np.where(TIME > 1, np.nan, 0.1))


# --- as a reward


def clip(sound: Sound, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(play(sound, seed))[None]


def test_the_reward_is_the_ear_with_a_column_for_each_attribute():
    reward = rewards.load("diffalign.rewards.sound_oracle:SoundOracleReward")
    other = Sound("shrill", "wind", "one", "long", "steady")
    found = reward.score(audio_batch(clip(CLEAN), clip(other, 1), rate_hz=RATE_HZ, prompts=[TEXT, TEXT]))
    assert (reward.name, reward.modality, reward.range) == ("sound_oracle", "audio", (0.0, 1.0))
    assert set(found.raw) == {*hearing.ATTRIBUTES, "silent"}
    assert found.scores[0] > 0.95 > 0.5 > found.scores[1]
    expected = hearing.judge(clip(other, 1)[0].double().numpy(), TEXT)
    assert found.scores[1].item() == pytest.approx(expected["total"], abs=1e-6)
    assert found.raw["pitch"][1].item() == pytest.approx(expected["pitch"], abs=1e-6)


def test_silence_scores_0_and_is_counted():
    found = SoundOracleReward().score(
        audio_batch(torch.zeros(1, 16_000), clip(CLEAN), rate_hz=RATE_HZ, prompts=[TEXT] * 2)
    )
    assert found.scores[0] == 0
    assert found.raw["silent"].tolist() == [1, 0]
    assert found.valid is not None
    assert found.valid.all()


def test_no_clips_have_no_scores():
    assert SoundOracleReward().score(RewardBatch(audio=[], prompts=[], sample_rate=RATE_HZ)).scores.shape == (0,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (audio_batch(torch.zeros(1, 48_000), rate_hz=48_000, prompts=[TEXT]), "must have 16000 samples a second"),
        (audio_batch(torch.zeros(2, 16_000), rate_hz=RATE_HZ, prompts=[TEXT]), r"audio\[0\] must be mono"),
        (audio_batch(torch.zeros(1, 3999), rate_hz=RATE_HZ, prompts=[TEXT]), "at least 4000 samples"),
        (audio_batch(torch.full((1, 8000), torch.nan), rate_hz=RATE_HZ, prompts=[TEXT]), r"in \[-1, 1\]"),
        (audio_batch(torch.zeros(1, 8000), rate_hz=RATE_HZ), "must get prompts, got none"),
        (RewardBatch(prompts=[TEXT]), "must get audio, got none"),
        (
            audio_batch(torch.zeros(1, 8000), rate_hz=RATE_HZ, prompts=["a photo of a cat"]),
            "reward 'sound_oracle', prompt 0: prompt must be a caption of the tiny world's sounds",
        ),
    ],
)
def test_the_reward_refuses_what_it_would_mishear(batch, message):
    with pytest.raises(InputError, match=message) as caught:
        SoundOracleReward().score(batch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [1, 4, 5, 6])
def test_no_two_notes_begin_at_once_in_noise_whose_level_jumps(seed):
    rng = np.random.default_rng(seed)
    levels = np.repeat(rng.normal(0.0, 1.0, 48), 512)
    heard = hearing.measure(0.1 * np.exp(levels) * rng.standard_normal(sounds.SAMPLES))
    assert len(heard.onsets) > 3
    assert (np.diff(heard.onsets) > 0).all()
    assert heard.nearest is None or heard.nearest.rhythm in sounds.RHYTHMS
