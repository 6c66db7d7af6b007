"""CLAP: transformers' own front end and logits as oracles; windows at fixed places; what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.clap import CLAPEncoder, CLAPParts, CLAPReward, log_mel, unit_means, window_starts
from diffalign.types import DifferentiableReward, Embedded, MediaEncoder, RewardBatch
from tests.audio_builders import audio_batch, noise, tiny_clap, tone

RATE = 48_000
PROMPTS = ["a low hum", "rain", "a low hum", "a bell that rings twice"]


@pytest.fixture(scope="module")
def parts() -> CLAPParts:
    return tiny_clap()


@pytest.fixture(scope="module")
def fused() -> CLAPParts:
    return tiny_clap(fused=True)


@pytest.fixture(scope="module")
def sounds() -> list[torch.Tensor]:
    """A hum, noise, a chirp and a beep after silence, of 1 s or less."""
    chirp = torch.cat([tone(500.0 * k, RATE // 8, RATE) for k in range(1, 9)], dim=1)
    beep = torch.cat([torch.zeros(1, RATE // 4), tone(2000, RATE // 4, RATE)], dim=1)
    return [tone(200, RATE, RATE), noise(0, RATE // 3, 0.8), chirp, beep]


def batch_of(clips: list[torch.Tensor], prompts: list[str] | None = None) -> RewardBatch:
    return audio_batch(*clips, rate_hz=RATE, prompts=prompts)


def reference(parts: CLAPParts, clip: torch.Tensor) -> torch.Tensor:
    """Unit embedding of a clip of at most one window, by transformers alone."""
    features = parts.extractor(clip[0].numpy(), sampling_rate=RATE, return_tensors="pt")
    features["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)  # it draws one to be fused
    return F.normalize(parts.net.get_audio_features(**features).pooler_output, dim=1)[0]


# --- front end


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("bands", [16, 64])
def test_log_mel_is_that_of_the_feature_extractor(sounds, truncation, bands):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(feature_size=bands, max_length_s=1, frequency_min=50, truncation=truncation)
    clips = [sounds[0], sounds[2], noise(5, RATE, 1.0), torch.zeros(1, RATE)]
    theirs = [extractor(c[0].numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"][0, 0] for c in clips]
    ours = log_mel(torch.cat(clips), extractor)
    assert ours.shape == (4, 101, bands)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-4, rtol=0)  # dB; float32 of 100 has 8e-6


def test_a_float32_transform_would_miss_the_quiet_bands_of_a_tone(fused, sounds):
    [exact] = log_mel(sounds[0], fused.extractor)
    padded = F.pad(sounds[0], (512, 512), mode="reflect")[0].unfold(0, 1024, 480)
    power = torch.fft.rfft(padded * torch.hann_window(1024)).abs().square()
    bands = power @ torch.as_tensor(fused.extractor.mel_filters).float()
    assert (10 * bands.clamp(min=1e-10).log10() - exact).abs().max() > 0.1


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("samples", [1024, 5000, 24_000, 30_000, 48_000])
def test_short_clips_are_filled_up_as_the_feature_extractor_does(parts, padding, samples):
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(
        feature_size=16, max_length_s=1, frequency_min=50, truncation="rand_trunc", padding=padding
    )
    given = dataclasses.replace(parts, extractor=extractor)
    clip = noise(1, samples)
    [row] = CLAPEncoder(parts=given).embed(batch_of([clip])).rows
    torch.testing.assert_close(row, reference(given, clip), atol=1e-5, rtol=0)


def test_embeddings_are_those_of_transformers_fused_or_not(parts, fused, sounds):
    for given in (parts, fused):
        embedded = CLAPEncoder(parts=given).embed(batch_of(sounds))
        expected = torch.stack([reference(given, clip) for clip in sounds])
        torch.testing.assert_close(embedded.rows, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(embedded.rows.norm(dim=1), torch.ones(4))
        assert embedded.counts == (1, 1, 1, 1)


def test_the_fusion_of_a_fused_model_is_never_drawn_by_lot(fused):
    clip = noise(0, 3 * RATE)
    state = np.random.get_state()[1].copy()
    first, second = (CLAPEncoder(parts=fused).embed(batch_of([clip])).rows for _ in range(2))
    assert torch.equal(first, second)
    assert (np.random.get_state()[1] == state).all()


def test_a_front_end_for_another_kind_of_network_is_refused(parts, fused):
    with pytest.raises(InputError, match="an unfused network, got truncation 'fusion'"):
        CLAPEncoder(parts=dataclasses.replace(parts, extractor=fused.extractor))
    with pytest.raises(InputError, match="a fused network, got truncation 'rand_trunc'"):
        CLAPEncoder(parts=dataclasses.replace(fused, extractor=parts.extractor))


# --- windows


@pytest.mark.parametrize(
    ("samples", "hop", "starts"),
    [
        (7, 10, [0]),
        (10, 10, [0]),
        (11, 10, [0, 1]),
        (20, 10, [0, 10]),
        (25, 10, [0, 10, 15]),
        (20, 5, [0, 5, 10]),
        (12, 1, [0, 1, 2]),
    ],
)
def test_windows_start_at_fixed_places_and_end_with_the_clip(samples, hop, starts):
    assert window_starts(samples, window=10, hop=hop) == starts


@pytest.mark.parametrize("hop", [0, -1, 11])
def test_a_hop_that_leaves_gaps_is_refused(hop):
    with pytest.raises(InputError, match="hop must be from 1"):
        window_starts(30, window=10, hop=hop)


def test_long_clips_are_their_windows(parts):
    clip = noise(0, 2 * RATE + RATE // 2)
    embedded = CLAPEncoder(parts=parts).embed(batch_of([clip, clip[:, :RATE]]))
    assert embedded.counts == (3, 1)
    alone = [clip[:, :RATE], clip[:, RATE : 2 * RATE], clip[:, -RATE:], clip[:, :RATE]]
    torch.testing.assert_close(
        embedded.rows, torch.stack([reference(parts, window) for window in alone]), atol=1e-5, rtol=0
    )
    halves = CLAPEncoder(parts=parts, hop_seconds=0.5).embed(batch_of([clip]))
    assert halves.counts == (4,)
    torch.testing.assert_close(halves.rows[::2], embedded.rows[:2])


def test_the_random_crop_of_the_feature_extractor_is_not_ours(parts):
    clip = torch.cat([noise(0, RATE), tone(3000, RATE, RATE)], dim=1)
    crops = [parts.extractor(clip[0].numpy(), sampling_rate=RATE)["input_features"][0] for _ in range(4)]
    assert any(not np.array_equal(crops[0], crop) for crop in crops[1:])
    first, second = (CLAPEncoder(parts=parts).embed(batch_of([clip])).rows for _ in range(2))
    assert torch.equal(first, second)


def test_pooling_gives_the_unit_mean_of_the_windows(parts, sounds):
    clips = [noise(0, 2 * RATE), sounds[0]]
    windows = CLAPEncoder(parts=parts).embed(batch_of(clips))
    pooled = CLAPEncoder(parts=parts, pooling="mean").embed(batch_of(clips))
    assert pooled.counts == (1, 1)
    both = windows.rows[0] + windows.rows[1]
    torch.testing.assert_close(pooled.rows[0], both / both.norm())
    torch.testing.assert_close(pooled.rows[1], windows.rows[2])


def test_opposite_windows_have_no_mean_direction():
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert unit_means(Embedded(rows=rows, counts=(2, 1))).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_version_tells_embeddings_apart_that_are_not_comparable(parts):
    versions = {
        CLAPEncoder("a/b").version,
        CLAPEncoder("a/b", revision="1").version,
        CLAPEncoder("a/b", pooling="mean").version,
        CLAPEncoder("a/b", hop_seconds=1.0).version,
        CLAPEncoder("a/c").version,
    }
    assert len(versions) == 5
    assert CLAPReward("a/b").version == "a/b, windows, end to end, x100"


def test_an_unknown_pooling_is_refused():
    with pytest.raises(InputError, match="did you mean 'windows'"):
        rewards.load_encoder("diffalign.rewards.clap:CLAPEncoder", pooling="window")


# --- rows and scores


def test_score_is_the_diagonal_of_the_models_own_logits(parts, sounds):
    features = parts.extractor([c[0].numpy() for c in sounds], sampling_rate=RATE, return_tensors="pt")
    tokens = parts.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    out = parts.net(
        input_features=features["input_features"],
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
    )
    expected = out.logits_per_audio.diagonal()
    ours = CLAPReward(encoder=CLAPEncoder(parts=parts), scale="logit").score(batch_of(sounds, PROMPTS))
    torch.testing.assert_close(ours.scores, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.raw["cos"], expected / parts.net.logit_scale_a.exp(), atol=1e-5, rtol=1e-4)


def test_scales_differ_by_their_factor_only(parts, sounds):
    batch = batch_of(sounds, PROMPTS)
    scores = {s: CLAPReward(encoder=CLAPEncoder(parts=parts), scale=s).score(batch).scores for s in ("cos", "x100")}
    torch.testing.assert_close(scores["x100"], 100 * scores["cos"])
    assert scores["cos"].abs().max() <= 1
    assert CLAPReward(encoder=CLAPEncoder(parts=parts)).range == (-100, 100)
    with pytest.raises(InputError, match="x1000"):
        CLAPReward(encoder=CLAPEncoder(parts=parts), scale="x1000")


def test_scores_do_not_depend_on_batch_order_neighbours_or_batch_size(parts, sounds):
    clips = [*sounds[:3], noise(4, 3 * RATE)]

    def score(order: list[int], batch_size: int) -> torch.Tensor:
        reward = CLAPReward(encoder=CLAPEncoder(parts=parts, batch_size=batch_size))
        return reward.score(batch_of([clips[i] for i in order], [PROMPTS[i] for i in order])).scores

    whole = score([0, 1, 2, 3], 32)
    torch.testing.assert_close(score([0, 1, 2, 3], 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score([3, 1, 0, 2], 3), whole[[3, 1, 0, 2]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score([1, 1, 2], 2), whole[[1, 1, 2]], atol=1e-5, rtol=1e-4)


def test_a_clip_is_scored_alike_whatever_the_encoders_pooling(parts):
    batch = batch_of([noise(0, 2 * RATE)], ["rain"])
    first, second = (
        CLAPReward(encoder=CLAPEncoder(parts=parts, pooling=p)).score(batch).scores for p in ("windows", "mean")
    )
    torch.testing.assert_close(first, second)


def test_silence_is_scored_and_told(parts, sounds):
    out = CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch_of([torch.zeros(1, RATE), sounds[0]], PROMPTS[:2]))
    assert out.scores.isfinite().all()
    assert out.raw["silent"].tolist() == [1.0, 0.0]


def test_differentiable_score_is_the_score(parts, sounds):
    reward = CLAPReward(encoder=CLAPEncoder(parts=parts))
    assert isinstance(reward, DifferentiableReward)
    batch = batch_of(sounds, PROMPTS)
    torch.testing.assert_close(reward.differentiable_score(batch), reward.score(batch).scores)
    assert not reward.score(batch).scores.requires_grad


def test_gradient_reaches_the_samples_and_not_the_weights(parts, sounds):
    clips = [*(clip.clone().requires_grad_() for clip in sounds[:2]), torch.zeros(1, RATE, requires_grad=True)]
    reward = CLAPReward(encoder=CLAPEncoder(parts=parts))
    reward.differentiable_score(batch_of(clips, PROMPTS[:3])).sum().backward()
    assert all(clip.grad.isfinite().all() for clip in clips)
    assert all((clip.grad != 0).float().mean() > 0.9 for clip in clips[:2])
    assert all(p.grad is None for p in parts.net.parameters())


@pytest.mark.parametrize("which", ["parts", "fused"])
def test_gradient_is_that_of_finite_differences(which, request):
    reward = CLAPReward(encoder=CLAPEncoder(parts=request.getfixturevalue(which)))
    clip = noise(0, 30_000, 0.5).requires_grad_()
    reward.differentiable_score(batch_of([clip], ["rain"])).sum().backward()
    way, step = clip.grad.sign(), 1e-4
    with torch.no_grad():
        ahead, behind = (reward.differentiable_score(batch_of([clip + s * way], ["rain"])) for s in (step, -step))
    assert (clip.grad * way).sum().item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=0.02)


def test_autocast_does_not_reach_the_batch_norm(parts, sounds):
    plain = CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch_of(sounds, PROMPTS)).scores
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch_of(sounds, PROMPTS)).scores, plain
        )


def test_prompts_are_unit_rows_encoded_once_whatever_their_neighbours(parts):
    seen = []
    encoder = CLAPEncoder(parts=parts, batch_size=2)
    original = encoder._text_features
    encoder._text_features = lambda texts: seen.extend(texts) or original(texts)
    rows = encoder.embed_texts(PROMPTS)
    assert sorted(seen) == sorted(set(PROMPTS))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(rows[3:], CLAPEncoder(parts=parts).embed_texts(PROMPTS[3:]), atol=1e-5, rtol=1e-4)


def test_prompts_longer_than_the_text_tower_are_cut_with_their_end_token_kept(parts):
    embedded = CLAPEncoder(parts=parts).embed_texts(["x" * 30, "x" * 31, "x" * 200])  # 32 places, two are marks
    torch.testing.assert_close(embedded[0], embedded[1])
    torch.testing.assert_close(embedded[0], embedded[2])


def test_old_and_new_return_types_of_transformers_give_one_embedding(parts, sounds):
    class Old:
        """transformers 4: the towers return tensors."""

        config = parts.net.config

        def get_audio_features(self, **inputs):
            return parts.net.get_audio_features(**inputs).pooler_output

        def to(self, device):
            return self

    old = CLAPEncoder(parts=dataclasses.replace(parts, net=Old()))
    torch.testing.assert_close(old.embed(batch_of(sounds)).rows, CLAPEncoder(parts=parts).embed(batch_of(sounds)).rows)


def test_no_clips_have_no_rows_and_no_scores(parts):
    embedded = CLAPEncoder(parts=parts).embed(batch_of([]))
    assert embedded.rows.shape == (0, 12)
    assert CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch_of([], [])).scores.shape == (0,)


# --- files, and what is refused


def test_clap_from_a_folder_scores_as_from_memory(parts, sounds, tmp_path):
    for part in (parts.net, parts.extractor, parts.tokenizer):
        part.save_pretrained(tmp_path)
    batch = batch_of(sounds, PROMPTS)
    loaded = CLAPReward(str(tmp_path))
    torch.testing.assert_close(
        loaded.score(batch).scores, CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch).scores
    )
    assert not loaded.encoder.parts.net.training
    assert {p.dtype for p in loaded.encoder.parts.net.parameters()} == {torch.float32}


def test_a_file_may_lack_positions_but_no_weight(parts, sounds, tmp_path):
    for part in (parts.net, parts.extractor, parts.tokenizer):
        part.save_pretrained(tmp_path)
    batch = batch_of(sounds, PROMPTS)
    state = load_file(tmp_path / "model.safetensors")
    positions = {name for name in state if name.endswith(("position_ids", "token_type_ids", "relative_position_index"))}
    assert positions
    save_file({k: v for k, v in state.items() if k not in positions}, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        CLAPReward(str(tmp_path)).score(batch).scores, CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch).scores
    )
    for name in ("audio_projection.linear2.weight", "audio_model.audio_encoder.batch_norm.running_mean"):
        save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=f"must hold all weights, got .* without {name}"):
            CLAPReward(str(tmp_path)).score(batch)


def test_clap_reads_no_weights_before_it_scores_and_names_a_missing_model(sounds):
    reward = CLAPReward("no/such/folder")
    with pytest.raises(InputError, match="no/such/folder"):
        reward.score(batch_of(sounds[:1], ["a"]))


def test_moving_moves_the_network(parts):
    reward = CLAPReward(encoder=CLAPEncoder(parts=parts))
    rewards.move(reward, "cpu")
    assert reward.encoder.device == torch.device("cpu")
    assert isinstance(reward.encoder, MediaEncoder)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (audio_batch(noise(0, 44_100), rate_hz=44_100, prompts=["a"]), "48000 samples a second .* got 44100; resample"),
        (audio_batch(noise(0, RATE).repeat(2, 1), rate_hz=RATE, prompts=["a"]), r"must be mono.*to_mono"),
        (audio_batch(noise(0, 1023), rate_hz=RATE, prompts=["a"]), "at least 1024 samples .* got 1023"),
        (audio_batch(torch.full((1, RATE), torch.inf), rate_hz=RATE, prompts=["a"]), r"samples in \[-1, 1\].* inf"),
        (audio_batch(noise(0, RATE), rate_hz=RATE), "must get prompts, got none"),
        (audio_batch(noise(0, RATE), rate_hz=RATE, prompts=["a", "b"]), "one entry per sample, 2, got 1|1, got 2"),
        (RewardBatch(audio=[noise(0, RATE)], prompts=["a"]), "must get sample_rate, got none"),
        (RewardBatch(prompts=["a"]), "must get audio, got none"),
    ],
)
def test_bad_audio_ends_in_one_clear_line(parts, batch, message):
    with pytest.raises(InputError, match=message) as caught:
        CLAPReward(encoder=CLAPEncoder(parts=parts)).score(batch)
    assert "\n" not in str(caught.value)


# --- true size: transformers' defaults are laion/clap-htsat-unfused; the larger models have another HTSAT

LARGER = {"patch_embeds_hidden_size": 128, "hidden_size": 1024, "depths": [2, 2, 12, 2]}
"""HTSAT-base of laion/larger_clap_*, as in diffusers' conversion script of AudioLDM 2."""
SHAPES = {
    "audio_model.audio_encoder.batch_norm.weight": (64,),
    "audio_model.audio_encoder.patch_embed.proj.weight": (96, 1, 4, 4),
    "audio_projection.linear1.weight": (512, 768),
    "audio_projection.linear2.weight": (512, 512),
    "text_model.embeddings.word_embeddings.weight": (50265, 768),
    "text_model.embeddings.position_embeddings.weight": (514, 768),
    "text_projection.linear1.weight": (512, 768),
    "logit_scale_a": (),
    "logit_scale_t": (),
}


@pytest.mark.parametrize("larger", [False, True])
def test_the_layout_is_that_of_the_published_weights(larger):
    from transformers import ClapConfig, ClapModel

    with torch.device("meta"):
        state = ClapModel(ClapConfig(audio_config=LARGER if larger else {})).state_dict()
    wide = {"audio_model.audio_encoder.patch_embed.proj.weight": (128, 1, 4, 4)}
    wide["audio_projection.linear1.weight"] = (512, 1024)
    for key, shape in (SHAPES | (wide if larger else {})).items():
        assert tuple(state[key].shape) == shape, key


@pytest.mark.slow
@pytest.mark.parametrize("larger", [False, True])
def test_a_model_of_true_size_scores_a_long_and_a_short_clip(larger):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ClapModel(ClapConfig(audio_config=LARGER if larger else {})).eval().requires_grad_(False)
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")  # as in the published folders
    parts = CLAPParts(net=net, extractor=extractor, tokenizer=tiny_clap().tokenizer)
    short, long = noise(0, 3 * RATE), tone(440, 12 * RATE, RATE)
    embedded = CLAPEncoder(parts=parts).embed(batch_of([short, long]))
    assert embedded.counts == (1, 2)
    torch.testing.assert_close(embedded.rows[0], reference(parts, short), atol=1e-4, rtol=0)
    clip = short.clone().requires_grad_()
    reward = CLAPReward(encoder=CLAPEncoder(parts=parts))
    score = reward.differentiable_score(batch_of([clip], ["rain"]))
    torch.testing.assert_close(score.detach(), reward.score(batch_of([short], ["rain"])).scores, atol=1e-3, rtol=1e-4)
    score.sum().backward()
    assert clip.grad.isfinite().all()
    assert clip.grad.abs().max() > 0
