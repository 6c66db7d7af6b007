"""The tiny world's sound models: of the true classes, small, made again from seeds, and as good as is said."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.rewards.clap import CLAPReward
from diffalign.shipped import assets
from diffalign.tiny import build_sounds, hearing, measure_sounds, pretrain_sounds, sounds
from diffalign.tiny.pretrain_sounds import FRAME
from diffalign.types import RewardBatch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
"""Diffusers' AutoencoderSAME is built with it."""

HERE = assets() / "tiny"
CAPTIONS = [
    "a low flute plays three short even notes, getting louder",
    "shrill violin, one held note, with steady loudness",
    "four brief limping notes of a medium clarinet, fading out",
    "at a steady level, a high organ plays two long notes",
]


@pytest.fixture(scope="module")
def clips() -> pretrain_sounds.Clips:
    return pretrain_sounds.draw(8, seed=3, split="held_out", care=None)


@pytest.fixture
def dense():
    """Pre-training flushes small numbers to zero, for the whole process."""
    yield
    torch.set_flush_denormal(False)


def test_the_pipeline_is_of_the_true_classes_and_loads_in_float32():
    source = ModelSource(path="tiny-audio")
    assert detect_family(source).name == "stable_audio_3"
    pipeline = load_pipeline(source)
    assert type(pipeline).__name__ == "StableAudio3Pipeline"
    kinds = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert kinds == {
        "vae": "AutoencoderSAME",
        "text_encoder": "T5GemmaEncoderModel",
        "tokenizer": "GemmaTokenizer",
        "duration_embedder": "StableAudio3DurationEmbedder",
        "transformer": "StableAudio3DiTModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}
    assert pipeline.tokenizer.unk_token_id not in pipeline.tokenizer(" ".join(CAPTIONS)).input_ids


def test_files_are_small_and_name_nobodys_path():
    files = [file for name in ("audio", "clap") for file in (HERE / name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    for file in (file for file in files if file.suffix == ".json"):
        assert "_name_or_path" not in json.loads(file.read_text())


def test_the_autoencoder_keeps_what_the_ear_hears(clips):
    vae = build_sounds.load_sound_vae(HERE)
    with torch.no_grad():
        made = vae(torch.from_numpy(clips.waves)[:, None]).sample[:, 0].clamp(-1, 1)
    heard = measure_sounds.heard(made, clips.captions)
    assert heard["total"] > 0.85
    assert np.mean(list(heard["named"].values())) > 0.85


def test_clap_finds_the_caption_of_a_clip_among_a_few(clips):
    reward = CLAPReward("tiny-clap")
    near = []
    for k in range(len(clips.captions)):
        batch = RewardBatch(
            audio=[torch.from_numpy(clips.waves[k])[None]] * len(clips.captions),
            sample_rate=sounds.RATE_HZ,
            prompts=clips.captions,
        )
        near.append(int(reward.score(batch).scores.argmax()))
    assert sum(k == found for k, found in enumerate(near)) >= 7
    assert reward.version.startswith("tiny-clap")


def test_samples_are_the_same_by_seed_and_obey_captions_in_part():
    first, again, other = (measure_sounds.sample(HERE / "audio", CAPTIONS, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.05
    assert first.shape == (4, sounds.SAMPLES)
    many = CAPTIONS * 4
    total = measure_sounds.heard(measure_sounds.sample(HERE / "audio", many, seed=2), many)["total"]
    assert 0.4 < total < 0.95


def test_measured_numbers_are_those_of_the_shipped_files():
    found = json.loads((HERE / "sound-models-measured.json").read_text())
    assert found["autoencoder"]["total"] > found["audio"]["held_out"]["total"] > 0.4
    assert found["audio"]["held_out"]["total"] > found["audio"]["held_out"]["total_of_another_caption"] + 0.05
    assert found["clap"]["top1_of_32"] > 0.7


@pytest.mark.parametrize("cycles", [5, 40, 100])
def test_a_tone_is_brought_in_phase_at_its_own_level(cycles):
    """A tone that repeats with the frames is a cosine whose peak comes after the middle as its frequency says."""
    time, f = torch.arange(6 * FRAME, dtype=torch.float64), cycles / FRAME
    tone = (0.4 * torch.cos(2 * math.pi * f * time + 1.1)).float()
    expected = 0.4 * torch.cos(2 * math.pi * f * (time - FRAME / 2 - 80 * f))
    inner = slice(FRAME, 5 * FRAME)
    made, wanted = pretrain_sounds.in_phase(tone[None], torch.tensor([True]))[0, inner].double(), expected[inner]
    assert float(made @ wanted / (made.norm() * wanted.norm())) > 0.99
    assert float(made.norm() / wanted.norm()) == pytest.approx(1.0, abs=0.02)


def test_noise_keeps_its_power_and_becomes_no_click():
    noise = 0.1 * torch.randn(1, 40 * FRAME, generator=torch.Generator().manual_seed(0))
    made = pretrain_sounds.in_phase(noise, torch.tensor([False]))
    assert float(made[0, FRAME:-FRAME].square().mean().sqrt()) == pytest.approx(0.1, rel=0.06)
    assert made.abs().max() < 0.6


def test_the_ear_hears_clips_in_phase_as_it_hears_clips(clips):
    tonal = torch.tensor(["wind" not in caption for caption in clips.captions])
    assert 0 < tonal.sum() < len(tonal)
    waves = pretrain_sounds.in_phase(torch.from_numpy(clips.waves), tonal)
    named = [
        getattr(hearing.measure(wave).nearest, name, None) == getattr(sounds.parse(caption), name)
        for wave, caption in zip(waves.double().numpy(), clips.captions, strict=True)
        for name in hearing.ATTRIBUTES
    ]
    assert np.mean(named) > 0.94


def test_the_code_hears_magnitudes_alone_and_its_mean_variance_is_one(clips):
    waves = torch.from_numpy(clips.waves)
    code = pretrain_sounds.make_code(clips)
    z = code.of(waves)
    assert z.shape == (8, pretrain_sounds.CHANNELS, sounds.SAMPLES // FRAME)
    assert torch.allclose(code.of(-waves), z, atol=1e-5)
    flat = z.transpose(1, 2).flatten(0, 1)
    assert torch.allclose(flat.mean(0), torch.zeros(flat.shape[1]), atol=1e-4)
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert correlation.abs().max() < 1e-3
    deviations = flat.std(0)
    assert (deviations.diff() <= 1e-4).all()


def test_all_sound_models_can_be_made_again(tmp_path: Path, dense):
    clips = pretrain_sounds.draw(12, seed=71, split="train", care=pretrain_sounds.PLAYER)
    code = pretrain_sounds.make_code(clips)
    vae = pretrain_sounds.train_autoencoder(clips, code, steps=2, batch_size=2)
    assert vae.downsampling_ratio == FRAME
    vae.half().save_pretrained(tmp_path / "audio" / "vae")
    tokenizer = pretrain_sounds.make_gemma_tokenizer(clips.captions)
    latents = pretrain_sounds.Latents(
        code.of(torch.from_numpy(clips.waves)), *pretrain_sounds.tokenize(tokenizer, clips.captions)
    )
    net, text, length = pretrain_sounds.train_transformer(latents, len(tokenizer), steps=2, batch_size=2)
    assert net.proj_out.weight.abs().max() > 0  # it starts at zero
    build_sounds.save_pipeline(tmp_path, tokenizer, net, text, length)
    made = measure_sounds.sample(tmp_path / "audio", CAPTIONS[:1], seed=0, steps=2)
    assert torch.isfinite(made).all()

    tokenizer, extractor = pretrain_sounds.make_roberta_tokenizer(clips.captions), pretrain_sounds.make_extractor()
    clap = pretrain_sounds.train_clap(clips, tokenizer, extractor, steps=2, batch_size=3)
    for part in (clap, tokenizer, extractor):
        part.save_pretrained(tmp_path / "clap")
    assert -1 <= measure_sounds.clap_quality(tmp_path, count=32)["top1_of_32"] <= 1


def test_a_word_of_a_caption_is_one_token():
    captions = pretrain_sounds.draw_captions(400, seed=5, split="train")
    for tokenizer in (
        pretrain_sounds.make_gemma_tokenizer(captions),
        pretrain_sounds.make_roberta_tokenizer(captions),
    ):
        words = captions[0].replace(",", " ,").split()
        assert len(tokenizer.tokenize(captions[0])) == len(words)
    ids, mask = pretrain_sounds.tokenize(pretrain_sounds.make_gemma_tokenizer(captions), captions)
    assert ids.shape == mask.shape == (400, pretrain_sounds.TEXT_LENGTH)
    assert int(mask.sum(1).max()) < pretrain_sounds.TEXT_LENGTH  # none is cut
