"""The audio table: cells are what their configs say, sets and clips are measured, and toy cells make the table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import audio, audio_measures, audio_runs, audio_table, method_runs, online_measures
from benchmarks.audio_measures import LOOKED, SCORED, SETS, Ear
from benchmarks.audio_runs import AudioCell
from benchmarks.method_measures import TRIAL_SEED
from diffalign.data.sounds import wav
from diffalign.errors import InputError
from diffalign.paths import FlowPath
from diffalign.rewards.gaussians import Gaussian, frechet_distance
from diffalign.tiny import playing, sounds
from diffalign.types import Cond
from tests import worlds

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
"""Diffusers' AutoencoderSAME is built with it."""

PROMPTS = 200
MODEL = "tiny-audio"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder in the place of benchmarks/audio/."""
    monkeypatch.setattr(audio_runs, "RUNS", tmp_path / "runs")
    for folder in (f"runs/{MODEL}", "docs", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few clips, and encoders without weights."""
    monkeypatch.setattr(audio_measures, "CACHE", tmp_path)
    monkeypatch.setattr(audio_measures, "EXEMPLARS", {"count": 12, "seed": 0, "style": {}})
    encoders = {"clap": ("log_mel", {"bands": 4}), "log_mel": ("log_mel", {"bands": 3, "rises": True})}
    monkeypatch.setattr(audio_measures, "ENCODERS", encoders)
    monkeypatch.setattr(audio_measures, "FRAMES", ("log_mel:frames", {"bands": 4}))
    monkeypatch.setattr(audio_measures, "JUDGES", {"oracle": "sound_oracle", "clap": "tests.audio_rewards:Loudness"})
    return tmp_path


def cells(*names, seeds=(0, 1)):
    rows = {row.name: row for row in audio.ROWS}
    return [AudioCell(model=MODEL, row=rows[name], seed=seed) for name in names for seed in seeds]


def scores(rate, seed):
    """Scores that beat a base of zeros on about a share `rate` of the captions."""
    return np.where(np.random.default_rng(seed).random(PROMPTS) < rate, 1.0, -1.0).tolist()


def record(cell, rate, clap=-0.1, log_mel=-0.1):
    def change(by):
        return {"value": 0.3 + by, "base": 0.3, "change": by, "low": by - 0.05, "high": by + 0.05}

    rounds = [{"round": k, "images": 64 * k, "own": {}, **dict.fromkeys(LOOKED, 0.5 - k / 10)} for k in (1, 2, 3)]
    return {
        "seed": cell.seed,
        "digest": method_runs.digest(cell.described()),
        "described": cell.described(),
        "environment": {},
        "scores": {name: scores(rate, cell.seed) for name in SCORED},
        "attributes": {"pitch": 0.8, "timbre": 0.7},
        "movement": {"prediction_drift": 0.03},
        "sets": {"fad_clap": change(clap), "fad_log_mel": change(log_mel), "vendi": change(0.5)},
        "curve": rounds,
        "cost": {
            "seconds": 10.0,
            "cpu_seconds": 9.0,
            "sampling_seconds": 4.0,
            "update_seconds": 5.0,
            "process_peak_bytes": 1e9,
        },
    }


def base():
    numbers = dict.fromkeys(SETS, 0.3)
    zeros = {name: [0.0] * PROMPTS for name in SCORED}
    return {"digest": "x", "scores": zeros, "attributes": {"pitch": 0.9, "timbre": 0.6}, "sets": numbers}


def test_two_cells_make_the_table(runs):
    chosen = cells("dragon_fad", "dragon_clap", seeds=(0,))
    audio_runs.base_file(MODEL).write_text(json.dumps(base()))
    for cell, rate in zip(chosen, (0.5, 0.3), strict=True):
        cell.file.write_text(json.dumps(record(cell, rate)))
    audio_table.write(chosen, root=runs)
    page = runs / "docs" / "audio-results.md"
    page.write_text(f"Before.\n{page.read_text()}After.\n")
    audio_table.write(chosen, root=runs)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "| dragon_fad | `fad_clap` (1) | 0.2000 (-0.1000: -0.1500 to -0.0500) |" in text
    assert "| dragon_clap ✗ | `clap` (1) |" in text
    assert "Not as asked. dragon_clap: nothing else was tried yet." in text
    assert "| base | 0.900 | 0.600 |" in text
    assert "| dragon_fad | 0.800 | 0.700 |" in text
    model = json.loads((runs / "benchmarks" / "audio.json").read_text())["models"][MODEL]
    assert [row["as_asked"] for row in model["rows"]] == [True, False]
    assert [point["fad_clap"] for point in model["rows"][0]["curve"]] == [0.4, 0.3, 0.2]
    assert (runs / "docs" / "audio.png").stat().st_size > 5000


def test_a_distance_must_fall_by_both_encoders():
    [cell] = cells("dragon_fad", seeds=(0,))
    falls = {(a, b): record(cell, 0.5, a, b) for a in (-0.1, 0.0) for b in (-0.1, 0.0)}
    asked = {k: audio_table.summary(cell.row, MODEL, [one], base())["as_asked"] for k, one in falls.items()}
    assert asked == {(-0.1, -0.1): True, (-0.1, 0.0): False, (0.0, -0.1): False, (0.0, 0.0): False}
    mixed = [record(cell, 0.5), record(cell, 0.5, log_mel=0.02)]  # intervals -0.15 to -0.05 and -0.03 to 0.07
    found = audio_table.summary(cell.row, MODEL, mixed, base())
    assert not found["as_asked"]
    assert found["sets"]["fad_log_mel"]["low"] == pytest.approx(-0.09)
    assert found["sets"]["fad_log_mel"]["high"] == pytest.approx(0.01)
    assert [one["change"] for one in found["sets_by_seed"]["fad_log_mel"]] == [-0.1, 0.02]


def test_the_plan_goes_seed_by_seed_and_names_what_is_not_there():
    found = audio.plan([MODEL], None, (0, 1))
    assert [(c.name, c.seed) for c in found] == [(row.name, seed) for seed in (0, 1) for row in audio.ROWS]
    with pytest.raises(InputError, match="did you mean 'dragon_fad'"):
        audio.plan([MODEL], ["dragon_fd"], (0,))


def test_every_cell_has_settings_of_its_own_clips(small, tmp_path):
    asked = {"fad_clap": "fad:clap:tiny-clap", "vendi": "vendi:clap:tiny-clap"}
    for cell in audio.plan([MODEL], None, (1,)):
        cfg = cell.settings()
        assert (cfg.seed, cfg.train.device, cfg.model.path) == (1, "cpu", MODEL)
        assert cfg.data.seconds == pytest.approx(audio_measures.SECONDS)
        here = audio_runs.placed(cfg, tmp_path / "run").online
        if cell.row.reward in asked:
            assert here.set_reward == asked[cell.row.reward]
            assert here.set_reference == (str(audio_measures.clips_folder()) if "fad" in here.set_reward else None)
        elif cell.row.reward == "per_clip":
            assert here.rewards == (f"per_sample:fad:log_mel:frames@{audio_measures.reference_file('per_clip')}",)
        else:
            assert here.rewards == ("clap:tiny-clap",)
        assert cell.described()["protocol"]["prompts"] == 256


def test_captions_are_held_out_and_those_of_trials_are_others():
    shown, tried = audio_measures.captions(), audio_measures.captions(TRIAL_SEED)
    assert len(set(shown)) == len(set(tried)) == 256
    assert not set(shown) & set(tried)
    assert all(sounds.split_of(sounds.parse(text)) == "held_out" for text in (*shown, *tried))


def played(count, timbre=None, seed=0):
    """(clips, their captions), all of one timbre where it is named."""
    rng = np.random.default_rng(seed)
    drawn = [sounds.draw_sound(rng, "train") for _ in range(count)]
    drawn = [replace(sound, timbre=timbre) for sound in drawn] if timbre else drawn
    clips = torch.stack([torch.from_numpy(playing.render(sound, rng))[None] for sound in drawn])
    return clips, [sounds.caption(sound, rng) for sound in drawn]


def test_an_ear_hears_which_set_is_nearer_and_by_how_much(small):
    ear = Ear()
    clips, captions = played(16)
    quiet_winds = 0.05 * played(16, "wind")[0]
    found = ear.set_changes(clips, quiet_winds, resamples=20)
    assert set(found) == set(SETS)
    for name in ("fad_clap", "fad_log_mel"):
        one = found[name]
        assert one["low"] < one["change"] < one["high"] < 0
        assert one["value"] == pytest.approx(ear.sets(clips)[name], abs=1e-9)
    assert found["vendi"]["change"] > 0
    judged, attributes = ear.judge(clips, captions)
    assert set(judged) == set(SCORED)
    assert np.mean(judged["oracle"]) > 0.95
    assert all(len(values) == 16 for values in [*judged.values(), *attributes.values()])
    assert "silent" not in attributes
    assert max(judged["per_clip"]) < 0


def test_an_interval_is_reflected_at_the_change():
    found = audio_measures.basic({"value": 1.0, "base": 2.0, "change": -1.0, "low": -1.5, "high": -0.8})
    assert found == pytest.approx({"value": 1.0, "base": 2.0, "change": -1.0, "low": -1.2, "high": -0.5})


def test_resampled_sets_are_further_away_and_their_reflected_change_is_not():
    """Two sets of one distance, one of them in a wider space: percentiles lean to it, the basic interval does not."""
    rng = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(60, 1, generator=rng), torch.randn(60, 12, generator=rng)
    reference = Gaussian(mean=torch.zeros(12), covariance=torch.eye(12))
    arm, base = torch.cat([narrow, torch.zeros(60, 11)], dim=1), wide
    numbers = {"fad": lambda rows: float(frechet_distance(rows, reference))}
    found = online_measures.set_changes(arm, base, numbers, resamples=60)["fad"]
    middle = (found["low"] + found["high"]) / 2
    assert middle < found["change"]  # the base, spread wider, is thrown further back
    reflected = audio_measures.basic(found)
    assert (reflected["low"] + reflected["high"]) / 2 > found["change"]


def test_a_round_is_looked_at_as_a_set_is_measured(small, tmp_path):
    ear = Ear()
    clips, captions = played(6)
    entries = []
    for place, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        (tmp_path / f"{place}.wav").write_bytes(wav(clip, sounds.RATE_HZ))
        entries.append({"audio": f"{place}.wav", "prompt": caption})
    seen = ear.look(tmp_path, entries)
    assert set(seen) == set(LOOKED)
    assert seen["fad_clap"] == pytest.approx(ear.sets(clips)["fad_clap"], rel=1e-3)  # 16 bits
    judged, _ = ear.judge(clips, captions)
    assert seen["oracle"] == pytest.approx(np.mean(judged["oracle"]), abs=1e-3)


def test_predictions_that_are_further_apart_drift_more():
    class Plus:
        def __init__(self, more):
            self.more, self.path = more, FlowPath()

        def __call__(self, x_t, t, cond):
            return x_t + self.more

    x_0 = torch.randn(3, 4, 5, 1, generator=torch.Generator().manual_seed(0))
    assert audio_measures.drift(Plus(0.0), Plus(0.0), x_0, Cond({})) == 0.0
    assert audio_measures.drift(Plus(0.5), Plus(0.0), x_0, Cond({})) == pytest.approx(0.25)


def test_reference_clips_are_written_once(small):
    folder = audio_measures.clips_folder()
    first = audio_measures.reference_file("clap")
    stamps = [first.stat().st_mtime_ns, (folder / "00000.wav").stat().st_mtime_ns]
    assert audio_measures.clips_folder() == folder
    assert audio_measures.reference_file("clap") == first
    assert [first.stat().st_mtime_ns, (folder / "00000.wav").stat().st_mtime_ns] == stamps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dragon_fad", "dragon_per_clip"])
def test_a_cell_is_made_from_start_to_end(runs, small, monkeypatch, name):
    captions = audio_measures.captions()[:6]
    monkeypatch.setattr(audio_measures, "captions", lambda seed=0: captions)
    monkeypatch.setattr(audio_measures, "DRIFT_CLIPS", 4)
    monkeypatch.setattr(audio_runs, "CACHE", runs)
    monkeypatch.setattr(method_runs, "CACHE", runs)
    world = worlds.stable_audio_3(runs / "sa3")
    changes = (f"model.path={world}", "online.prompts=2", "online.group=4", "online.updates=1", "online.steps=3")
    changes += ("online.batch_size=8", "train.steps=2", "train.batch_size=4", "lora.rank=2")
    changes += ("online.set_reward=fad:log_mel",) if name == "dragon_fad" else ()
    [cell] = cells(name, seeds=(0,))
    cell = replace(cell, row=replace(cell.row, changes=changes))
    if name == "dragon_per_clip":
        monkeypatch.setattr(audio_measures, "FRAMES", ("log_mel:frames", {}))
    made = audio_runs.run(cell)
    assert json.loads(cell.file.read_text()) == made
    assert method_runs.is_current(cell, made)
    assert [one["images"] for one in made["curve"]] == [8, 16]
    assert all(len(values) == len(captions) for values in made["scores"].values())
    assert made["movement"]["prediction_drift"] > 0
    assert any(one["change"] != 0 for one in made["sets"].values())
    audio_table.write([cell], root=runs)
    assert f"| {name}" in (runs / "docs" / "audio-results.md").read_text()
