"""The tiny world's sounds: captions, splits, a renderer that does not alias, and folders of clips."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from diffalign.data.prompts import read_prompts
from diffalign.data.sounds import wav
from diffalign.errors import InputError
from diffalign.shipped import assets
from diffalign.tiny import __main__ as command
from diffalign.tiny import build, exemplars, playing, sounds
from diffalign.tiny.playing import Carelessness
from diffalign.tiny.sounds import RATE_HZ, Sound

FLUTE = Sound("low", "flute", "three even", "short", "fading in")


def draw(count: int, split: sounds.Split = "train", seed: int = 0) -> list[Sound]:
    rng = np.random.default_rng(seed)
    return [sounds.draw_sound(rng, split) for _ in range(count)]


def play(sound: Sound, seed: int = 0, care: Carelessness | None = None) -> np.ndarray:
    return playing.render(sound, np.random.default_rng(seed), care)


# --- captions


def test_a_caption_reads_back_as_its_sound():
    rng = np.random.default_rng(1)
    for sound in draw(500) + draw(200, "held_out"):
        assert sounds.parse(sounds.caption(sound, rng)) == sound


def test_captions_are_worded_in_many_ways():
    rng = np.random.default_rng(1)
    assert len({sounds.caption(FLUTE, rng) for _ in range(300)}) >= 20
    assert sounds.caption(FLUTE, np.random.default_rng(3)) == sounds.caption(FLUTE, np.random.default_rng(3))


@pytest.mark.parametrize(
    "text",
    [
        "a large red circle at the top left on a white background",
        "",
        "a low flute plays three short notes, getting louder",  # even or swung?
        "a low flute plays two short even notes, getting louder",  # two notes have no beat
        "a low flute plays one short note, getting louder",  # too short to fade
        "a low or high flute plays two short notes, getting louder",
        "a low flute plays two short notes",
    ],
)
def test_a_text_that_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="must be a caption of the tiny world's sounds"):
        sounds.parse(text)


def test_very_low_is_not_low():
    assert sounds.parse("a very low flute plays two short notes, getting louder").pitch == "deep"
    assert sounds.parse("a low flute plays two short notes, getting louder").pitch == "low"


def test_held_out_combinations_never_occur_in_training():
    def combinations(some: list[Sound]) -> set[tuple[str, str, str]]:
        return {(s.pitch, s.timbre, s.rhythm) for s in some}

    trained, held = combinations(draw(1500)), combinations(draw(600, "held_out"))
    assert not trained & held
    assert len(trained | held) == len(sounds.PITCHES) * len(sounds.TIMBRES) * len(sounds.RHYTHMS)
    assert 0.1 < len(held) / len(trained | held) < 0.25


def test_every_word_of_a_held_out_caption_is_learned_in_training():
    for place, table in enumerate((sounds.PITCHES, sounds.TIMBRES, sounds.RHYTHMS)):
        names = ("pitch", "timbre", "rhythm")
        assert {getattr(s, names[place]) for s in draw(1500)} == set(table)


def test_the_shipped_captions_are_of_their_splits_and_can_be_made_again(tmp_path):
    build.make_sound_prompts(tmp_path)
    for name, split, count in (("tiny-sounds", "held_out", 256), ("tiny-sounds-train", "train", 512)):
        found = read_prompts(name).prompts
        assert len(set(found)) == len(found) == count
        assert {sounds.split_of(sounds.parse(text)) for text in found} == {split}
    for name in ("sound-prompts.jsonl", "sound-train-prompts.jsonl"):
        assert (tmp_path / name).read_bytes() == (assets() / "tiny" / name).read_bytes()


# --- clips


def test_the_same_seed_plays_the_same_clip_and_another_seed_another():
    assert np.array_equal(play(FLUTE, 4), play(FLUTE, 4))
    assert abs(play(FLUTE, 4) - play(FLUTE, 5)).max() > 0.1


def test_clips_are_mono_float32_between_minus_12_and_minus_3_decibels():
    peaks = []
    for seed, sound in enumerate(draw(40)):
        clip = play(sound, seed)
        assert clip.dtype == np.float32
        assert clip.shape == (sounds.SAMPLES,)
        peaks.append(20 * np.log10(abs(clip).max()))
    assert -12.01 < min(peaks) < -10.5
    assert -4.5 < max(peaks) < -2.99


GOLDEN = {
    "flute": (0.164864, 410.81, [0.274333, 0.273716, 0.264913, -0.209743]),
    "clarinet": (0.169340, 410.81, [0.196025, 0.1831, 0.109341, -0.104497]),
    "organ": (0.114402, 410.81, [0.131266, 0.133571, 0.155573, -0.199992]),
    "violin": (0.193765, 410.81, [0.123685, 0.123358, 0.092027, -0.203275]),
    "wind": (0.143828, 289.71, [-0.002817, -0.205213, -0.09967, -0.115709]),
}
"""Effective level, loudest frequency in hertz, four samples."""


@pytest.mark.parametrize("timbre", sounds.TIMBRES)
def test_clips_are_those_of_the_first_build(timbre):
    clip = play(Sound("medium", timbre, "two", "long", "steady"), seed=12)
    level, loudest, samples = GOLDEN[timbre]
    found = clip[[2000, 5000, 14_000, 16_000]]
    assert np.sqrt(np.mean(clip.astype(float) ** 2)) == pytest.approx(level, abs=2e-5)
    assert np.abs(np.fft.rfft(clip)).argmax() * RATE_HZ / len(clip) == pytest.approx(loudest, abs=0.7)
    np.testing.assert_allclose(found, samples, atol=2e-5)  # exp and sin differ in the last bits between machines


@pytest.mark.parametrize("hertz", [1100.0, 1175.0, 1240.0])
def test_no_partial_folds_back_at_the_nyquist_frequency(hertz):
    wave = playing._tone(hertz, sounds.TIMBRES["violin"], np.random.default_rng(0)) * np.hanning(sounds.SAMPLES)
    power = np.abs(np.fft.rfft(wave)) ** 2
    place = np.arange(len(power)) * RATE_HZ / sounds.SAMPLES
    away = np.abs(place / hertz - np.round(place / hertz)) * hertz
    belongs = (away < 60 + 0.01 * place) & (place > hertz / 2)
    assert power[~belongs].sum() / power.sum() < 1e-7
    assert power[place > 7700].sum() / power.sum() < 1e-9


@pytest.mark.parametrize("timbre", sounds.TIMBRES)
def test_a_whole_clip_has_nothing_but_its_noise_floor_under_the_nyquist_frequency(timbre):
    clip = play(Sound("shrill", timbre, "four swung", "short", "steady"), seed=2)
    power = np.abs(np.fft.rfft(clip)) ** 2
    place = np.arange(len(power)) * RATE_HZ / sounds.SAMPLES
    assert power[place > 7700].sum() / power.sum() < 1e-4


def test_carelessness_slips_where_it_says_and_leaves_what_can_be_played():
    rng = np.random.default_rng(0)
    played = [playing._slip(FLUTE, rng, 0.25) for _ in range(400)]
    assert all(sounds.fits(sound) for sound in played)
    assert np.mean([sound.timbre == "flute" for sound in played]) == pytest.approx(0.75, abs=0.07)
    assert playing._slip(FLUTE, rng, 0.0) == FLUTE


def test_notes_do_not_run_past_the_end_of_the_clip():
    for seed, sound in enumerate(draw(200, seed=3)):
        notes = playing._notes(sound, np.random.default_rng(seed), 0.0)
        assert notes[0][0] > 0
        assert notes[-1][0] + notes[-1][1] < sounds.SAMPLES / RATE_HZ - 0.02
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(notes))
        onsets = [onset for onset, _ in playing._notes(sound, np.random.default_rng(seed), 0.5)]
        assert onsets == sorted(onsets)
        assert 0 <= onsets[0]
        assert onsets[-1] + 0.09 < sounds.SAMPLES / RATE_HZ


# --- folders


def test_a_folder_of_a_style_holds_clips_of_that_style_and_their_captions(tmp_path):
    style = {"timbre": "violin", "rhythm": "four even"}
    files = exemplars.write_clips(tmp_path / "violins", 14, seed=1, style=style)
    rows = [json.loads(line) for line in (tmp_path / "violins" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [file.name for file in files]
    for row in rows:
        sound = sounds.parse(row["prompt"])
        assert (sound.timbre, sound.rhythm, sounds.split_of(sound)) == ("violin", "four even", "train")
    rate, first = wavfile.read(files[0])
    assert (rate, first.dtype, first.shape) == (RATE_HZ, np.int16, (sounds.SAMPLES,))
    exemplars.write_clips(tmp_path / "fewer", 2, seed=1, style=style)
    assert (tmp_path / "fewer" / "00001.wav").read_bytes() == files[1].read_bytes()
    assert (tmp_path / "fewer" / "sheet.png").is_file()


def test_a_folder_of_clips_is_whole_or_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(exemplars, "sheet", full)
        with pytest.raises(OSError, match="no space left"):
            exemplars.write_clips(tmp_path / "x", 2, seed=0)
    assert not (tmp_path / "x").exists()
    assert not exemplars.is_written(tmp_path / "x")
    (tmp_path / "x").mkdir()
    exemplars.write_clips(tmp_path / "x", 2, seed=0)
    assert exemplars.is_written(tmp_path / "x")
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_wav_file_gives_samples_back_to_half_a_step(tmp_path):
    clip = np.array([-1.0, -0.5, 0.0, 1e-5, 0.25, 1.0], dtype=np.float32)
    (tmp_path / "x.wav").write_bytes(wav(torch.from_numpy(clip)[None], RATE_HZ))
    _, steps = wavfile.read(tmp_path / "x.wav")
    np.testing.assert_allclose(steps[:-1] / 2**15, clip[:-1], atol=2**-16)
    assert steps[-1] == 2**15 - 1


@pytest.mark.parametrize(
    ("style", "split", "message"),
    [
        ({"timber": "violin"}, "train", "style must name known attributes, got 'timber'; did you mean 'timbre'"),
        ({"timbre": "violn"}, "train", r"style\.timbre must be known, got 'violn'; did you mean 'violin'"),
        ({"rhythm": "one", "length": "short"}, "train", "style must be that of some sound of the split 'train', got"),
    ],
)
def test_a_style_that_does_not_exist_is_refused(style, split, message):
    with pytest.raises(InputError, match=message):
        exemplars.of_style(style, split)


def test_clips_are_not_written_over_others(tmp_path):
    (tmp_path / "00000.wav").touch()
    with pytest.raises(InputError, match="out must be an empty folder"):
        exemplars.write_clips(tmp_path, 2, seed=0)
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        exemplars.write_clips(tmp_path / "none", 0, seed=0)
    assert not (tmp_path / "none").exists()


def test_the_command_writes_clips_and_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    asked = ["tiny", "sounds", "--out", str(tmp_path / "winds"), "--count", "2", "--timbre", "wind"]
    monkeypatch.setattr(sys, "argv", asked)
    command.main()
    assert sorted(f.name for f in (tmp_path / "winds").iterdir()) == [
        "00000.wav", "00001.wav", "metadata.jsonl", "sheet.png"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "out must be an empty folder" in capsys.readouterr().err
