"""Evaluations of models of sound: clips for pictures, distances of sets with intervals, players in the report."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffalign.data.sounds import read_wav, rounded, wav
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.evaluate import EvaluationSettings, evaluate, images, sets, terminal
from diffalign.evaluate.generate import initial_latents, prompt_seed
from diffalign.evaluate.media import Clips
from diffalign.evaluate.results import Results
from diffalign.evaluate.sets import Sets
from diffalign.evaluate.settings import parse_hearing
from diffalign.models.load import ModelSource, load_context, load_pipeline
from diffalign.rewards.audio import resample
from diffalign.rewards.clap import CLAPEncoder, CLAPReward
from diffalign.rewards.fad import FADReward
from diffalign.rewards.vggish import VGGishEncoder
from diffalign.types import RewardBatch
from tests import worlds
from tests.audio_builders import noise, tiny_clap, tiny_vggish, tone
from tests.audio_rewards import Bands

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
"""Diffusers' AutoencoderSAME is built with it."""

RATE, SECONDS, SAMPLES = 16_000, 1.19, 19_040
PROMPTS = [f"sound number {i}" for i in range(10)]
LOUD, BANDS = "tests.audio_rewards:Loudness", "fad:tests.audio_rewards:Bands"
MEL = "fad:log_mel"
SETTINGS = EvaluationSettings(
    images_per_prompt=1, steps=2, guidance=1.0, batch_size=4, device="cpu", seconds=SECONDS,
    encoder="tests.audio_rewards:Bands",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models and one of two channels, and reference sets."""
    root = tmp_path_factory.mktemp("sound")
    worlds.stable_audio_3(root / "base")
    worlds.stable_audio_3(root / "other", seed=1)
    worlds.stable_audio_3(root / "stereo", channels=2)
    for folder, rate in (("reference", RATE), ("slow", 8_000)):
        (root / folder).mkdir()
        for i in range(6):
            clip = tone(200.0 + 90 * i, rate + 800 * i, rate) + noise(i, rate + 800 * i, 0.02)
            (root / folder / f"{i}.wav").write_bytes(wav(clip, rate))
    (root / "lone").mkdir()
    (root / "lone" / "0.wav").write_bytes(wav(tone(300, RATE, RATE), RATE))
    shutil.copytree(root / "reference", root / "silent")
    (root / "silent" / "9.wav").write_bytes(wav(torch.zeros(1, RATE), RATE))
    (root / "empty").mkdir()
    return root


def run(models: Path, out: Path, **changes) -> Results:
    asked = {"base": "base", "aligned": "other", "prompts": PROMPTS, "rewards": [LOUD], "settings": SETTINGS, **changes}
    for arm in ("base", "aligned"):
        asked[arm] = str(models / asked[arm])
    return evaluate(output=out, **asked)


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory) -> tuple[Results, Path]:
    """base against other, with two distances to a folder of clips."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    settings = replace(SETTINGS, reference=str(models / "reference"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sets, "RESAMPLES", 100)
        return run(models, out, rewards=[LOUD, MEL, BANDS], settings=settings), out


def batch_of(folder: Path) -> RewardBatch:
    return RewardBatch(audio=[read_wav(f)[0] for f in sorted(folder.glob("*.wav"))], sample_rate=RATE)


# --- clips


def test_clips_lie_where_images_would_and_are_named_for_what_they_are(evaluated):
    results, out = evaluated
    assert {p.name for p in out.iterdir()} == {
        "prompts.jsonl", "manifest.json", "journal", "clips", "scores.parquet", "report.html", "summary.md",
        "results.json",
    }  # fmt: skip
    assert len(list((out / "clips" / "aligned").glob("*.wav"))) == 10
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert "clip_sha256" in table
    assert "image_sha256" not in table
    assert table["file_name"][3] == "00003-0.wav"
    found = json.loads((out / "results.json").read_text())
    assert [found["settings"][n] for n in ("seconds", "sample_rate_hz", "heard_hz", "mono")] == [
        1.19,
        RATE,
        None,
        False,
    ]
    assert "height" not in found["settings"]
    assert found["manifest"]["sampling"] == {
        "steps": 2, "guidance": 1.0, "seconds": 1.19, "sample_rate_hz": RATE, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert results.latents_sha256 is not None


def test_a_clip_is_that_of_the_stock_pipeline_from_the_noise_of_its_prompt(models, evaluated):
    family, source = FAMILIES["stable_audio_3"], ModelSource(path=str(models / "other"))
    context = load_context(source, family, seconds=SECONDS)
    latents = initial_latents(context.latents, [prompt_seed(PROMPTS[3], 0)])
    pipeline = load_pipeline(source)
    family.use_sampler(pipeline)
    made = family.sample(pipeline, [PROMPTS[3]], latents, steps=2, guidance=1.0, context=context)
    stored, rate = read_wav(evaluated[1] / "clips" / "aligned" / "00003-0.wav")
    assert (tuple(stored.shape), rate) == ((1, SAMPLES), RATE)
    # two 16-bit steps: sums differ in the last float32 bit with the batch size
    torch.testing.assert_close(stored, rounded(made[0]), atol=2.01 / 2**15, rtol=0)


def test_both_arms_start_from_the_same_noise_and_scores_are_those_of_the_files(evaluated):
    table = pq.read_table(evaluated[1] / "scores.parquet").to_pydict()
    assert table["latent_sha256"][:10] == table["latent_sha256"][10:]
    assert len(set(table["latent_sha256"])) == 10
    clip = read_wav(evaluated[1] / "clips" / "base" / "00007-0.wav")[0]
    assert table["loudness"][7] == pytest.approx(float(clip.square().mean().sqrt()), rel=1e-5)


def test_what_is_done_is_not_done_again_and_what_is_lost_is_made_again(models, tmp_path, monkeypatch):
    made, inner = [], images.make_batch

    def counted(*args, **kwargs):
        made.append(len(args[3]))
        return inner(*args, **kwargs)

    monkeypatch.setattr(images, "make_batch", counted)
    few = {"prompts": PROMPTS[:2], "settings": replace(SETTINGS, seconds=0.3)}
    run(models, tmp_path / "out", **few)
    lost = tmp_path / "out" / "clips" / "aligned" / "00001-0.wav"
    before = lost.read_bytes()
    lost.unlink()
    made.clear()
    run(models, tmp_path / "out", **few)
    assert made == [2]
    assert lost.read_bytes() == before
    with pytest.raises(InputError, match=r"seconds was 0\.3 and is 0\.4 now"):
        run(models, tmp_path / "out", prompts=PROMPTS[:2], settings=replace(SETTINGS, seconds=0.4))
    made.clear()
    again = run(models, tmp_path / "out", **{**few, "settings": replace(few["settings"], heard_hz=8_000, encoder=None)},
                rewards=["tests.audio_rewards:Fast"])  # fmt: skip
    assert not made
    assert again.comparisons[0].rewards["fast"].total.n == 2


def test_scores_of_another_hearing_are_given_anew(models, tmp_path):
    settings = replace(SETTINGS, encoder=None, seconds=0.3)
    fine = run(models, tmp_path / "out", prompts=PROMPTS[:2], settings=settings, aligned="stereo", base="stereo",
               rewards=["tests.audio_rewards:Ears"])  # fmt: skip
    mixed = run(models, tmp_path / "out", prompts=PROMPTS[:2], settings=replace(settings, mono=True), aligned="stereo",
                base="stereo", rewards=["tests.audio_rewards:Ears"])  # fmt: skip
    means = [found.comparisons[0].rewards["ears"].total.mean_arm for found in (fine, mixed)]
    assert means == [2.0, 1.0]


def test_finished_clips_score_as_the_models_that_made_them(models, evaluated, tmp_path):
    results, out = evaluated
    open_ = replace(SETTINGS, seconds=None)
    found = evaluate(
        str(out / "clips" / "base"), str(out / "clips" / "aligned"), PROMPTS, rewards=[LOUD], output=tmp_path / "out",
        settings=open_,
    )  # fmt: skip
    one, two = (r.comparisons[0].rewards["loudness"].total for r in (found, results))
    assert one == two
    assert found.latents_sha256 == results.latents_sha256
    assert found.models["base"]["scheduler"]["class"] == "finished clips"
    with pytest.raises(InputError, match="seconds must be left out where all clips are finished"):
        evaluate(
            str(out / "clips" / "base"), str(out / "clips" / "aligned"), PROMPTS, rewards=[LOUD],
            output=tmp_path / "no", settings=SETTINGS,
        )  # fmt: skip


# --- whole sets


def test_two_distances_of_one_name_are_told_apart_and_are_those_of_the_files(models, evaluated):
    results, out = evaluated
    assert [(s.spec, s.arm) for s in results.sets] == [(s, a) for s in (MEL, BANDS) for a in ("base", "aligned")]
    for spec, encoder in ((MEL, "log_mel"), (BANDS, Bands())):
        direct = FADReward(encoder)
        direct.fit_reference([batch_of(models / "reference")])
        for arm in ("base", "aligned"):
            [found] = [s for s in results.sets if (s.spec, s.arm) == (spec, arm)]
            assert found.score == pytest.approx(direct.score_set([batch_of(out / "clips" / arm)]).score, rel=1e-6)
            assert (found.samples, found.raw["distance"]) == (10, -found.score)
        [apart] = [d for d in results.set_differences if d.spec == spec]
        scores = {s.arm: s.score for s in results.sets if s.spec == spec}
        assert apart.difference == pytest.approx(scores["aligned"] - scores["base"])
        assert apart.low < apart.high
        assert (apart.samples, apart.resamples) == (10, 100)


def test_a_set_with_more_embeddings_than_its_width_is_extrapolated(models, evaluated):
    results, out = evaluated
    endless = {(s.spec, s.arm): s.endless for s in results.sets}
    assert endless[MEL, "base"] is None  # 10 clips of width 128
    direct = FADReward(Bands())
    direct.fit_reference([batch_of(models / "reference")])
    expected = direct.infinity([batch_of(out / "clips" / "base")])
    found = endless[BANDS, "base"]
    assert (found.value, found.r2) == pytest.approx((expected.value, expected.r2))
    assert found.sizes == expected.sizes


def by_rows(models: Path, arms: dict[str, list[torch.Tensor]], folder: Path) -> tuple[Sets, dict]:
    """Sets of clips that were written, as an evaluation holds them."""
    table = {n: [] for n in ("arm", "prompt", "prompt_index", "k", "file", "clip_sha256")}
    for arm, clips in arms.items():
        (folder / arm).mkdir(parents=True)
        for i, clip in enumerate(clips):
            (folder / arm / f"{i}.wav").write_bytes(wav(clip, RATE))
            row = (arm, f"prompt {i}", i, 0, f"{arm}/{i}.wav", f"{arm} {i}")
            for column, value in zip(table, row, strict=True):
                table[column].append(value)
    reward = FADReward(Bands())
    reward.fit_reference([batch_of(models / "reference")])
    held = Sets(rewards={"fad": reward}, table=table, folder=folder, reference=None, medium=Clips(rate_hz=RATE))
    return held, table


def near(i: int) -> torch.Tensor:
    """Like the reference's clips."""
    return tone(210.0 + 40 * i, RATE, RATE) + noise(50 + i, RATE, 0.02)


def test_the_interval_of_a_difference_knows_which_set_is_nearer(models, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "RESAMPLES", 200)
    arms = {"base": [noise(i, RATE, 0.5) for i in range(12)], "aligned": [near(i) for i in range(12)]}
    held, _ = by_rows(models, arms, tmp_path)
    up, down, still = held.compare([("aligned", "base"), ("base", "aligned"), ("base", "base")])
    assert 0 < up.low <= up.difference <= up.high
    assert (down.low, down.high) == pytest.approx((-up.high, -up.low))
    assert (still.difference, still.low, still.high) == (0, 0, 0)
    scores = {found.arm: found.score for found in held.score()}
    assert up.difference == pytest.approx(scores["aligned"] - scores["base"])


def test_the_interval_is_the_basic_one_of_prompts_drawn_in_both_arms(models, tmp_path, monkeypatch):
    """By a loop of our own over the same draws; every clip of a prompt comes with it."""
    monkeypatch.setattr(sets, "RESAMPLES", 40)
    arms = {"base": [near(i) for i in range(9)], "aligned": [near(2 * i) for i in range(9)]}
    held, _ = by_rows(models, arms, tmp_path)
    [found] = held.compare([("aligned", "base")])
    reward, rng, drawn = held.rewards["fad"], np.random.default_rng(0), []
    clips = {arm: [rounded(c) for c in of] for arm, of in arms.items()}
    for _ in range(40):
        chosen = rng.integers(0, 9, 9)
        of = [
            reward.score_set([RewardBatch(audio=[clips[arm][i] for i in chosen], sample_rate=RATE)]).score
            for arm in ("aligned", "base")
        ]
        drawn.append(of[0] - of[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((2 * found.difference - high, 2 * found.difference - low))


def test_few_prompts_have_a_difference_and_no_interval(models, tmp_path):
    held, _ = by_rows(
        models, {"base": [near(i) for i in range(7)], "aligned": [near(9 + i) for i in range(7)]}, tmp_path
    )
    [found] = held.compare([("aligned", "base")])
    assert (found.low, found.high, found.resamples) == (None, None, 0)


def test_the_clip_that_spoils_a_set_is_the_worst_and_is_listed(models, tmp_path):
    spoilt = [near(i) for i in range(9)]
    spoilt[4] = noise(1, RATE, 0.9)
    held, _ = by_rows(models, {"base": spoilt}, tmp_path)
    [found] = held.score()
    assert found.worst[0].prompt_index == 4
    assert found.worst[0].credit < 0 < found.best[0].credit
    assert len(found.best) == len(found.worst) == 4
    assert found.credit == "loo"
    without = [rounded(clip) for i, clip in enumerate(spoilt) if i != 4]
    left = held.rewards["fad"].score_set([RewardBatch(audio=without, sample_rate=RATE)]).score
    assert found.worst[0].credit == pytest.approx(found.score - left, rel=1e-5)


def test_sets_that_a_journal_knows_are_not_embedded_again(models, tmp_path, monkeypatch):
    held, table = by_rows(models, {"base": [near(i) for i in range(4)]}, tmp_path)
    first = held.score()
    again = Sets(rewards=held.rewards, table=table, folder=tmp_path, reference=None, medium=held.medium)
    monkeypatch.setattr(Sets, "_rows", None)
    assert again.score() == first


def test_one_kept_reference_serves_its_encoder_and_is_refused_by_another(models, evaluated, tmp_path):
    from typer.testing import CliRunner

    from diffalign import cli

    kept = str(tmp_path / "kept.safetensors")
    asked = ["reference", str(models / "reference"), "--reward", BANDS, "--out", kept]
    found = CliRunner().invoke(cli.app, asked, catch_exceptions=False)
    assert "6 clips, bands/1" in found.output
    few = {"prompts": PROMPTS[:2], "settings": replace(SETTINGS, reference=kept, encoder=None)}
    scores = [s.score for s in run(models, tmp_path / "out", rewards=[LOUD, BANDS], **few).sets]
    direct = FADReward(Bands())
    direct.fit_reference([batch_of(models / "reference")])
    batch = batch_of(tmp_path / "out" / "clips" / "base")
    assert scores[0] == pytest.approx(direct.score_set([batch]).score, rel=1e-6)
    with pytest.raises(InputError, match=r"must have encoder 'log_mel, 64 bands, 16000 Hz' .*got 'bands/1'"):
        run(models, tmp_path / "no", rewards=[LOUD, MEL], **few)


def test_two_encoders_of_other_rates_hear_the_same_clips_each_at_its_own(models, tmp_path):
    """CLAP at 48 kHz and VGGish at 16 kHz, tiny ones of the true classes, and the fit to the prompt by CLAP."""
    clap, vggish = CLAPEncoder("tiny", parts=tiny_clap()), VGGishEncoder(net=tiny_vggish())
    fads = [FADReward(clap), FADReward(vggish)]
    settings = replace(
        SETTINGS, encoder=None, reference=str(models / "reference"), heard_hz=48_000, heard_hz_of={"fad:vggish": RATE}
    )
    found = run(
        models, tmp_path / "out", prompts=PROMPTS[:3], rewards=[CLAPReward(encoder=clap), *fads],
        settings=replace(settings, heard_hz_of={f"fad:{fads[1].version}": RATE}),
    )  # fmt: skip
    by_clap, by_vggish = (s for s in found.sets if s.arm == "base")
    batch = batch_of(tmp_path / "out" / "clips" / "base")
    assert by_vggish.score == pytest.approx(fads[1].score_set([batch]).score, rel=1e-5)
    fine = RewardBatch(audio=[resample(clip, RATE, 48_000) for clip in batch.audio], sample_rate=48_000)
    assert by_clap.score == pytest.approx(fads[0].score_set([fine]).score, rel=1e-5)
    assert "clap" in found.comparisons[0].rewards
    assert found.comparisons[0].drift[0].encoder == clap.version  # the reward's own, since none was named
    with pytest.raises(InputError, match="heard_hz must name rewards by their spec, got 'fad:vggish'"):
        run(models, tmp_path / "no", prompts=PROMPTS[:3], rewards=[LOUD, *fads], settings=settings)


def test_hearing_on_a_command_line():
    assert parse_hearing(["48000", "fad:vggish:a=b.pth=16000"]) == (48_000, {"fad:vggish:a=b.pth": RATE})
    assert parse_hearing([]) == (None, {})
    for words, message in ((["high"], "or SPEC=NUMBER, got 'high'"), (["1", "2"], "once for each reward, got '2'")):
        with pytest.raises(InputError, match=message):
            parse_hearing(words)


# --- the report


def players(page: str) -> list[bytes]:
    return [base64.b64decode(m) for m in re.findall(r'<audio[^>]* src="data:audio/wav;base64,([^"]+)"', page)]


def test_the_report_plays_and_draws_clips_and_fetches_nothing(evaluated):
    page = (evaluated[1] / "report.html").read_text()
    assert "Clips that nobody chose" in page
    assert "Clips that help and hurt a set most" in page
    assert page.count("<audio") == page.count("data:audio/wav") == page.count('<img src="data:image/png')
    # 10 prompts of two arms, four of each end for two rewards and two arms, and the largest changes, of 3 prompts each
    assert 20 + 32 < len(players(page)) <= 20 + 32 + 18
    rate, samples = read_wav_bytes(players(page)[0])
    assert (rate, samples.shape[-1]) == (RATE, SAMPLES)
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def read_wav_bytes(data: bytes) -> tuple[int, np.ndarray]:
    from scipy.io import wavfile

    rate, samples = wavfile.read(io.BytesIO(data))
    return rate, samples


def test_the_report_speaks_of_clips_and_says_nothing_of_pixels(evaluated):
    page = (evaluated[1] / "report.html").read_text()
    body = re.sub(r"data:[^\"]+|<style>.*?</style>", "", page, flags=re.DOTALL)
    for word in (
        "saturation",
        "JPEG",
        "Laplacian",
        "pixels",
        "horizontal flip",
        "images",
        "real image",
        "writing, faces",
    ):
        assert not re.search(rf"\b{word}\b", body), word
    for word in ("Clips per prompt", "1.19 s", "16000", "loudness", "log-mel bands", "R²", "Difference, 95", "Players"):
        assert word in body, word
    assert "fad:log_mel" in body
    assert BANDS in body


def test_checks_are_those_that_make_sense_of_sound(evaluated):
    kinds = {check.name.partition(":")[0] for check in evaluated[0].comparisons[0].checks}
    assert {"held_out", "low_level", "drift", "diversity"} <= kinds <= Clips(rate_hz=RATE).checks
    names = {check.name for check in evaluated[0].comparisons[0].checks}
    assert {"low_level:loudness", "low_level:silence", "low_level:clipped", "low_level:brightness"} <= names
    drift = {d.metric for d in evaluated[0].comparisons[0].drift}
    assert drift == {"1 - cosine", "difference of log-mel bands, dB"}


def test_summary_and_terminal_tell_of_sets_with_intervals(evaluated):
    results, out = evaluated
    text = (out / "summary.md").read_text()
    assert "Whole sets of clips" in text
    assert "1.19 s at 16000 Hz" in text
    assert "one clip each" in text
    lines = "\n".join(str(line.title) for line in terminal.lines(results) if hasattr(line, "title"))
    assert "Rewards of sets" in lines


def test_every_key_of_results_of_clips_is_documented(evaluated):
    found = json.loads((evaluated[1] / "results.json").read_text())
    text = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    rows = [*found["sets"], *found["set_differences"], found["sets"][-1]["endless"], found["sets"][0]["best"][0]]
    assert {key for row in rows for key in row if f"`{key}`" not in text} == set()
    assert {key for key in found["settings"] if f"`{key}`" not in text} == set()


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": None}, r"^seconds must be there with the family 'stable_audio_3'"),
        ({"seconds": 9.0}, r"^seconds must be in \(0, 4\] with this model, got 9"),
        ({"seconds": 0.03}, r"^seconds must be at least 0\.04 to be drawn"),
        ({"rewards": ["tests.audio_rewards:Fast"]}, "audio must have 8000 samples a second for 'fast', got 16000; res"),
        ({"seconds": 0.05}, r"audio\[0\] must have at least 1600 samples \(0\.1 s\) for 'loudness', got 800"),
        ({"seconds": 0.2, "rewards": [LOUD, BANDS]}, r"must have at least 4000 samples \(0\.25 s\) for 'bands'"),
        ({"base": "stereo", "aligned": "stereo"}, r"audio\[0\] must be mono, shape \(1, samples\), for 'loudness'"),
        ({"aligned": "stereo"}, r"base and aligned must make clips of one rate and as many channels .*16000, 2"),
        ({"rewards": ["clip:tiny-clip"]}, "reward 'clip' must get images, got none"),
        ({"rewards": [LOUD, "vendi:clip:tiny-clip"]}, "rewards must judge clips and prompts alone, got 'vendi'"),
        ({"rewards": [LOUD, BANDS], "reference": None}, "must have a reference set; name its file or folder"),
        ({"rewards": [LOUD, BANDS], "prompts": PROMPTS[:1]}, "must have a set of two clips or more, got 1"),
        ({"rewards": [LOUD, BANDS], "reference": "lone"}, "must be a folder with two .wav files or more, got one in"),
        ({"rewards": [LOUD, BANDS], "reference": "empty"}, "must be a folder with .wav files, got none in"),
        ({"rewards": [LOUD, BANDS], "reference": "silent"}, r"9\.wav' must hold sound to be in a reference set"),
        ({"rewards": [LOUD, BANDS], "reference": "slow"}, r"0\.wav' must have 16000 .*8000; set heard_hz to the rate"),
        ({"rewards": [LOUD, BANDS], "reference": "gone"}, "must be a readable safetensors file"),
        ({"encoder": "clip:tiny-clip"}, "encoder must be of clips, got 'clip:tiny-clip' of image"),
        ({"heard_hz": 0}, "heard_hz must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_a_clip_is_made(models, tmp_path, changes, message):
    run_with = {n: changes[n] for n in ("base", "aligned", "rewards", "prompts") if n in changes}
    chosen = {"encoder": None, "reference": "reference" if BANDS in changes.get("rewards", ()) else None}
    chosen |= {n: v for n, v in changes.items() if n not in run_with}
    if chosen["reference"] is not None:
        chosen["reference"] = str(models / chosen["reference"])
    with pytest.raises(InputError, match=message) as caught:
        run(models, tmp_path / "out", settings=replace(SETTINGS, **chosen), **run_with)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_remedies_of_rate_and_channels_work(models, tmp_path):
    settings = replace(SETTINGS, seconds=0.3, mono=True, heard_hz=8_000, encoder=None)
    found = run(
        models, tmp_path / "out", base="stereo", aligned="stereo", rewards=["tests.audio_rewards:Fast"],
        prompts=PROMPTS[:2], settings=settings,
    )  # fmt: skip
    assert found.comparisons[0].rewards["fast"].total.n == 2
    assert read_wav(tmp_path / "out" / "clips" / "base" / "00000-0.wav")[0].shape == (2, 4800)


def test_a_reference_clip_that_is_too_short_is_named_with_its_file(models, tmp_path):
    shutil.copytree(models / "reference", tmp_path / "short")
    (tmp_path / "short" / "4b.wav").write_bytes(wav(tone(300, 300, RATE), RATE))
    settings = replace(SETTINGS, reference=str(tmp_path / "short"), encoder=None)
    with pytest.raises(InputError, match=r"audio\[5\] \('.*4b\.wav'\) must have at least 4000 samples .* got 300"):
        run(models, tmp_path / "out", rewards=[LOUD, BANDS], settings=settings)


def test_arms_of_images_and_of_clips_are_not_compared(models, evaluated, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{i:05d}-0.png")
    with pytest.raises(
        InputError, match="must all make images, or all make clips of sound, got base of audio, aligned"
    ):
        evaluate(
            str(evaluated[1] / "clips" / "base"), str(tmp_path / "pictures"), PROMPTS, rewards=[LOUD],
            output=tmp_path / "out", settings=replace(SETTINGS, seconds=None),
        )  # fmt: skip
    for name, value in (("seconds", 1.0), ("heard_hz", 8_000)):
        plain = replace(SETTINGS, **{"seconds": None, "encoder": None, name: value})
        with pytest.raises(InputError, match=f"^{name} .*must be left out with") as caught:
            evaluate(
                str(tmp_path / "pictures"), str(tmp_path / "pictures"), PROMPTS, rewards=["jpeg"],
                output=tmp_path / "out", settings=plain,
            )  # fmt: skip
        assert "\n" not in str(caught.value)
