"""DRAGON's rewards of sound on the roads that a user walks: reference sets from folders, specs in configs, rounds."""

import json
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign import cli, shipped
from diffalign.data.sounds import wav
from diffalign.errors import InputError
from diffalign.evaluate.media import Clips
from diffalign.online.scoring import load_judges
from diffalign.online.settings import OnlineSettings
from diffalign.rewards.clap import CLAPEncoder
from diffalign.rewards.fad import FADReward
from diffalign.rewards.vendi import VendiReward
from diffalign.tiny import exemplars
from tests import worlds
from tests.audio_builders import noise, tiny_clap, tone
from tests.test_families_audio import table
from tests.test_train import metrics

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
"""Diffusers' AutoencoderSAME is built with it."""

RATE = 16_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    worlds.stable_audio_3(root / "sa3")
    (root / "prompts.txt").write_text("a red circle\nsmall blue square on white\n")
    exemplars.write_clips(root / "reference", 6, seed=0)
    return root


def folder(place: Path, *clips: torch.Tensor, rate_hz: int = RATE) -> Path:
    place.mkdir()
    for i, clip in enumerate(clips):
        (place / f"{i}.wav").write_bytes(wav(clip, rate_hz))
    return place


def judges(place: Path | None, reward: str = "fad:log_mel", medium: Clips | None = None):
    settings = OnlineSettings(set_reward=reward, set_reference=None if place is None else str(place))
    return load_judges(settings, medium or Clips(rate_hz=RATE))


def statistics(world: Path, place: Path, encoder: str) -> Path:
    """Of the reference clips."""
    fad = FADReward(encoder)
    fad.fit_reference(Clips(rate_hz=RATE).exemplars(world / "reference"))
    fad.save_reference(place)
    return place


# --- reference sets


def test_the_statistics_of_a_folder_of_clips_serve_in_place_of_the_folder(world, tmp_path):
    file = statistics(world, tmp_path / "r.safetensors", "log_mel")
    held, fitted = (judges(place).of_sets.held() for place in (file, world / "reference"))
    torch.testing.assert_close(held.mean, fitted.mean)
    torch.testing.assert_close(held.covariance, fitted.covariance)


def test_folders_of_clips_that_will_not_do_end_in_one_clear_line(world, tmp_path):
    sound = [tone(300, 8000, RATE), noise(0, 8000)]
    cases = {
        "rate": (folder(tmp_path / "rate", *sound, rate_hz=44_100), r"rate/0\.wav' must have 16000 samples a second"),
        "short": (
            folder(tmp_path / "short", sound[0], noise(1, 399)),
            r"short/1\.wav'\) must have at least 400 samples",
        ),
        "stereo": (
            folder(tmp_path / "stereo", *[noise(2, 8000).repeat(2, 1)] * 2),
            r"stereo/0\.wav'\) must be mono.*to_mono",
        ),
        "one": (folder(tmp_path / "one", sound[0]), r"a folder with two \.wav files or more, got one"),
        "none": (folder(tmp_path / "none"), r"a folder with (two )?\.wav files( or more)?, got none"),
    }
    for place, message in cases.values():
        with pytest.raises(InputError, match=message) as caught:
            judges(place)
        assert "\n" not in str(caught.value)
    frames = statistics(world, tmp_path / "frames.safetensors", "log_mel:frames")
    with pytest.raises(InputError, match=r"must have encoder 'log_mel, 64 bands, 16000 Hz' .* got 'log_mel, frames"):
        judges(frames)
    with pytest.raises(InputError, match=r"online\.set_reference must be there with set reward 'fad'"):
        judges(None)


# --- rounds


def clap() -> CLAPEncoder:
    """Found by its path; it hears 48 kHz."""
    return CLAPEncoder("tiny", parts=tiny_clap())


def clap_vendi() -> VendiReward:
    """Found by its path."""
    return VendiReward(clap())


@pytest.mark.parametrize("kind", ["fad", "per_clip", "vendi", "mixed"])
def test_dragon_goes_a_round_by_each_kind_of_reward(world, tmp_path, kind):
    one = {
        "rewards": [f"per_sample:fad:log_mel:frames@{statistics(world, tmp_path / 'r.safetensors', 'log_mel:frames')}"]
    }
    of_sets = {"set_reward": "fad:log_mel", "set_reference": str(world / "reference")}
    heard = {"set_reward": "tests.test_audio_dragon:clap_vendi", "heard_hz": 48_000}
    online = {"fad": of_sets, "per_clip": one, "vendi": heard, "mixed": one | of_sets}[kind]
    run = table(world, tmp_path / "run", train={"steps": 1})
    for key in ("set_reward", "set_reference"):
        del run["online"][key]
    run["online"] |= online
    lines = metrics(diffalign.train(run).folder)
    this = next(line for line in lines if "round" in line)
    assert this["pairs"] == 2
    assert lines[-1]["rewards/margins"] == 0.0
    if kind == "per_clip":
        assert this["score/per_sample"] < 0
        assert this["score/per_sample/std"] > 0
    else:
        assert this["set_plus"] > this["set_minus"]


# --- the demo


@pytest.mark.slow
def test_the_demo_of_sounds_goes_its_whole_road_and_goes_on_where_it_is_done(world, tmp_path, monkeypatch):
    parts = tiny_clap(rate_hz=RATE)
    for part in (parts.net, parts.extractor, parts.tokenizer):
        part.save_pretrained(tmp_path / "clap")
    monkeypatch.setitem(shipped.MODELS, "tiny-audio", str(world / "sa3"))
    monkeypatch.setitem(shipped.MODELS, "tiny-clap", str(tmp_path / "clap"))
    smaller = {
        "--count 256": "--count 8",
        "train.steps=40 checkpoint.every=40": "train.steps=2 train.batch_size=2 online.prompts=2 online.group=2 "
        "online.updates=1 online.steps=2 lora.rank=2",
        "--prompts tiny-sounds": "--prompts tiny-sounds --limit 8",
        "--steps 10": "--steps 2",
    }
    found = "\n".join(cli.SOUND_DEMO)
    for words, fewer in smaller.items():
        assert words in found
        found = found.replace(words, fewer)
    monkeypatch.setattr(cli, "SOUND_DEMO", tuple(found.splitlines()))
    monkeypatch.setattr(cli, "COMMAND", [])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cli.app(["demo", "--audio"], standalone_mode=False)
    assert (tmp_path / "runs" / "demo-sounds" / "sheet.png").is_file()
    place = tmp_path / "runs" / "demo-audio"
    assert [line["round"] for line in metrics(place) if "round" in line] == [1, 2]
    assert "<audio" in (place / "report.html").read_text()
    results = json.loads((place / "results.json").read_text())
    assert set(results["comparisons"][0]["rewards"]) == {"sound_oracle", "clap"}
