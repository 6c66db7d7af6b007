"""Audio tools: scipy's resampler and slow loops as oracles; what is refused, and in which words."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from transformers.audio_utils import mel_filter_bank

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.audio import mono_clips, resample, silent, to_mono
from diffalign.rewards.fad import FADReward
from diffalign.rewards.log_mel import LogMelEncoder, htk_filters, magnitudes
from diffalign.rewards.vggish import log_mel
from diffalign.tiny import playing
from diffalign.tiny.sounds import Sound
from diffalign.types import MediaEncoder, RewardBatch
from tests.audio_builders import audio_batch, noise, tone

# --- resample


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(44_100, 48_000), (48_000, 44_100), (44_100, 16_000), (16_000, 48_000), (48_000, 16_000)]
)
@pytest.mark.parametrize("samples", [1, 7, 1601])
def test_resample_is_scipys_resample_poly(from_hz, to_hz, samples):
    clip = torch.cat([noise(0, samples), noise(1, samples)])
    common = math.gcd(from_hz, to_hz)
    expected = resample_poly(clip.double().numpy(), to_hz // common, from_hz // common, axis=1)
    ours = resample(clip, from_hz, to_hz)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32), atol=2e-7, rtol=0)


def test_a_resampled_tone_is_the_tone_at_the_new_rate():
    ours = resample(tone(440, 44_100, 44_100), 44_100, 48_000)
    truth = tone(440, 48_000, 48_000)
    assert (ours - truth)[:, 1000:-1000].abs().max() < 2e-3  # away from the ends, where the filter sees silence


def test_resampling_down_removes_what_the_new_rate_cannot_hold():
    assert resample(tone(15_000, 44_100, 44_100), 44_100, 16_000)[:, 500:-500].abs().max() < 1e-3


def test_equal_rates_leave_a_clip_alone():
    clip = noise(0, 100)
    assert resample(clip, 48_000, 48_000) is clip


def test_overshoot_of_a_full_scale_square_wave_is_clamped():
    square = tone(100, 4410, 44_100).sign()
    assert resample(0.5 * square, 44_100, 48_000).abs().max() > 0.5  # there is an overshoot
    assert resample(square, 44_100, 48_000).abs().max() <= 1


def test_gradient_runs_through_the_resampler():
    clip = noise(0, 40).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample(x, 3, 4), clip)


def test_odd_rates_are_refused():
    with pytest.raises(InputError, match="must be positive, got 0 and 48000"):
        resample(noise(0, 10), 0, 48_000)
    with pytest.raises(InputError, match="ratio of small numbers, got 44100 and 47999"):
        resample(noise(0, 10), 44_100, 47_999)


# --- the door


def test_mono_is_the_mean_of_the_channels():
    left, right = noise(0, 10), noise(1, 10)
    mono = to_mono(torch.cat([left, right]))
    torch.testing.assert_close(mono, (left + right) / 2)
    torch.testing.assert_close(to_mono(mono), mono)
    torch.testing.assert_close(to_mono(torch.cat([left, -left])), torch.zeros(1, 10))


def test_silence_is_told_from_quiet_sound():
    clips = [torch.zeros(1, 50), tone(440, 50, 48_000, level=9e-5), tone(440, 500, 48_000, level=2e-4)]
    assert silent(clips).tolist() == [True, True, False]
    assert silent([]).tolist() == []


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (RewardBatch(prompts=["a"]), r"reward 'x' must get audio, got none"),
        (RewardBatch(audio=[noise(0, 100)]), r"audio must come with its sample_rate, got None"),
        (
            audio_batch(noise(0, 100), rate_hz=44_100),
            r"audio must have 16000 samples a second for 'x', got 44100; resample it first: .*\(clip, 44100, 16000\)",
        ),
        (audio_batch(noise(0, 100).repeat(2, 1), rate_hz=16_000), r"audio\[0\] must be mono, .* \(2, 100\); .*to_mono"),
        (
            audio_batch(noise(0, 100), noise(0, 49), rate_hz=16_000),
            r"audio\[1\] must have at least 50 samples \(0.003125 s\) for 'x', got 49",
        ),
        (audio_batch(torch.zeros(1, 0), rate_hz=16_000), r"audio\[0\] must have at least 50 samples .* got 0"),
        (audio_batch(torch.full((1, 100), torch.nan), rate_hz=16_000), r"audio must be samples in \[-1, 1\].*nan"),
        (audio_batch(noise(0, 100) * 32768, rate_hz=16_000), r"audio must be samples in \[-1, 1\]"),
    ],
)
def test_audio_that_would_be_misheard_is_refused(batch, message):
    with pytest.raises(InputError, match=message) as caught:
        mono_clips(batch, "x", rate_hz=16_000, shortest=50)
    assert "\n" not in str(caught.value)


def test_the_remedies_that_the_errors_name_are_remedies():
    stereo = torch.cat([noise(0, 4410), noise(1, 4410)])
    [clip] = mono_clips(
        audio_batch(resample(to_mono(stereo), 44_100, 16_000), rate_hz=16_000), "x", rate_hz=16_000, shortest=50
    )
    assert clip.shape == (1600,)


# --- log-mel


def test_magnitudes_are_those_of_a_slow_fourier_sum():
    samples = noise(3, 57)[0]
    fast = magnitudes(samples, window=20, hop=9, fft=32)
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / 20) for n in range(20)]
    assert fast.shape == (5, 17)
    for frame in (0, 4):
        for k in (0, 3, 16):
            terms = [samples[9 * frame + n].item() * hann[n] * np.exp(-2j * np.pi * k * n / 32) for n in range(20)]
            assert fast[frame, k].item() == pytest.approx(abs(sum(terms)), abs=1e-12)


def test_gradient_of_magnitudes_is_exact_and_finite_in_silence():
    samples = noise(3, 30)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: magnitudes(x, window=20, hop=5, fft=32), samples)
    quiet = torch.zeros(30, requires_grad=True)
    magnitudes(quiet, window=20, hop=5, fft=32).sum().backward()
    assert quiet.grad.isfinite().all()


@pytest.mark.parametrize(("rate_hz", "fft", "bands"), [(16_000, 512, 64), (48_000, 2048, 64), (8_000, 256, 20)])
def test_htk_filters_are_those_of_a_public_implementation(rate_hz, fft, bands):
    high = min(7500.0, rate_hz * 15 / 32)
    public = mel_filter_bank(
        fft // 2 + 1, bands, 125, high, rate_hz, norm=None, mel_scale="htk", triangularize_in_mel_space=True
    )
    ours = htk_filters(rate_hz=rate_hz, fft=fft, bands=bands, low_hz=125.0, high_hz=high).numpy()
    np.testing.assert_allclose(ours, public, atol=1e-12)  # the factor of the mel scale cancels in the slopes


def test_triangles_in_hertz_would_be_other_filters():
    public = mel_filter_bank(257, 64, 125, 7500, 16_000, norm=None, mel_scale="htk")
    ours = htk_filters(rate_hz=16_000, fft=512, bands=64, low_hz=125.0, high_hz=7500.0).numpy()
    assert abs(ours - public).max() > 0.004


def test_the_bin_of_0_hertz_belongs_to_no_band():
    assert htk_filters(rate_hz=16_000, fft=512, bands=8, low_hz=0.0, high_hz=7500.0)[0].abs().max() == 0


def test_neighbouring_triangles_add_up_to_one():
    filters = htk_filters(rate_hz=16_000, fft=512, bands=64, low_hz=125.0, high_hz=7500.0)
    inside = filters.sum(1)[10:200]  # between the outermost centres
    torch.testing.assert_close(inside, torch.ones_like(inside))


# --- the encoder without weights


def test_log_mel_encoder_hears_where_the_sound_is():
    encoder = LogMelEncoder(bands=32)
    assert isinstance(encoder, MediaEncoder)
    rows = encoder.embed(audio_batch(*(tone(f, 16_000, 16_000) for f in (300, 1000, 4000)), rate_hz=16_000)).rows
    assert rows.shape == (3, 64) == (3, encoder.width)
    centres = [1127 * math.log1p(f / 700) for f in (125, 7500)]
    step = (centres[1] - centres[0]) / 33
    for row, hertz in zip(rows, (300, 1000, 4000), strict=True):
        expected = (1127 * math.log1p(hertz / 700) - centres[0]) / step - 1
        assert abs(row[:32].argmax().item() - expected) <= 1
        assert row[32:].max() < 0.5  # a steady tone


def test_log_mel_rows_are_the_mean_and_deviation_of_the_frames_of_vggish():
    clip = noise(0, 8000, 0.5)
    frames = log_mel(clip[0]).double().numpy()
    [row] = LogMelEncoder().embed(audio_batch(clip, rate_hz=16_000)).rows
    expected = np.concatenate([frames.mean(0), frames.std(0)])
    np.testing.assert_allclose(row.numpy(), expected, atol=1e-5)


def test_log_mel_of_silence_is_the_logarithm_of_the_offset():
    [row] = LogMelEncoder().embed(audio_batch(torch.zeros(1, 1600), rate_hz=16_000)).rows
    torch.testing.assert_close(row[:64], torch.full((64,), math.log(0.01)))
    torch.testing.assert_close(row[64:], torch.full((64,), 1e-6))


def test_log_mel_deviation_sees_a_pulse_that_the_mean_of_a_louder_hum_would_hide():
    hum = tone(1000, 16_000, 16_000, level=0.1)
    pulsed = hum.clone()
    pulsed[:, 8000:] = 0
    steady, broken = LogMelEncoder().embed(audio_batch(hum, pulsed, rate_hz=16_000)).rows[:, 64:]
    assert broken.max() > 1 > steady.max()


def test_log_mel_rows_do_not_depend_on_neighbours_and_have_a_gradient():
    clips = [noise(i, n).requires_grad_() for i, n in enumerate((1600, 4000, 16_000))]
    encoder = LogMelEncoder()
    embedded = encoder.embed_with_graph(audio_batch(*clips, rate_hz=16_000))
    assert embedded.counts == (1, 1, 1)
    alone = torch.cat([encoder.embed(audio_batch(clip.detach(), rate_hz=16_000)).rows for clip in clips])
    torch.testing.assert_close(embedded.rows.detach(), alone)
    embedded.rows.square().sum().backward()
    assert all(clip.grad.isfinite().all() and clip.grad.abs().max() > 0 for clip in clips)


def test_log_mel_gradient_of_silence_is_finite():
    clip = torch.zeros(1, 1600, requires_grad=True)
    LogMelEncoder().embed_with_graph(audio_batch(clip, rate_hz=16_000)).rows.sum().backward()
    assert clip.grad.isfinite().all()


def test_log_mel_refuses_what_it_cannot_cut():
    with pytest.raises(InputError, match="at least 400 samples"):
        LogMelEncoder().embed(audio_batch(noise(0, 399), rate_hz=16_000))
    with pytest.raises(InputError, match="take fewer"):
        LogMelEncoder(bands=400)
    with pytest.raises(InputError, match="at least 1 band"):
        LogMelEncoder(bands=0)


def test_no_clips_have_no_rows():
    assert LogMelEncoder().embed(RewardBatch(audio=[], sample_rate=16_000)).rows.shape == (0, 128)


# --- frames


def test_frames_are_the_log_mel_frames_of_vggish_and_make_a_clip_a_set():
    clips = noise(0, 8000, 0.5), noise(1, 1600)
    encoder = rewards.load_encoder("log_mel:frames")
    assert isinstance(encoder, LogMelEncoder)
    embedded = encoder.embed(audio_batch(*clips, rate_hz=16_000))
    assert embedded.counts == (48, 8)
    assert embedded.rows.shape == (56, 64) == (56, encoder.width)
    torch.testing.assert_close(embedded.rows[:48], log_mel(clips[0][0]), atol=1e-5, rtol=0)
    statistics = LogMelEncoder().embed(audio_batch(clips[0], rate_hz=16_000)).rows[0]
    torch.testing.assert_close(embedded.rows[:48].mean(0), statistics[:64], atol=1e-5, rtol=0)
    assert encoder.version != LogMelEncoder().version
    assert LogMelEncoder().version == "log_mel, 64 bands, 16000 Hz"  # in the metadata of reference files


def test_frames_of_no_clips_are_none_and_the_last_part_of_a_frame_is_left_out():
    encoder = LogMelEncoder("frames", bands=8)
    assert encoder.embed(RewardBatch(audio=[], sample_rate=16_000)).rows.shape == (0, 8)
    assert encoder.embed(audio_batch(noise(0, 559), rate_hz=16_000)).counts == (1,)
    assert encoder.embed(audio_batch(noise(0, 560), rate_hz=16_000)).counts == (2,)


def test_frames_have_a_gradient():
    clip = noise(0, 1600).requires_grad_()
    LogMelEncoder("frames").embed_with_graph(audio_batch(clip, rate_hz=16_000)).rows.sum().backward()
    assert clip.grad.isfinite().all()
    assert clip.grad.abs().max() > 0


def test_a_row_is_of_clips_or_of_frames():
    with pytest.raises(InputError, match="model must be clips or frames, got 'frame'; did you mean 'frames'"):
        LogMelEncoder("frame")
    with pytest.raises(InputError, match="rises must be left out with model 'frames'"):
        LogMelEncoder("frames", rises=True)


# --- rises


def test_rises_are_nats_in_a_tenth_of_a_second():
    clip = tone(1000, 16_000, 16_000, level=0.5)
    clip[:, :8000] = 0
    encoder = LogMelEncoder(bands=32, rises=True)
    [row] = encoder.embed(audio_batch(clip, rate_hz=16_000)).rows
    assert row.shape == (96,) == (encoder.width,)
    loudest = row[64:].argmax()
    frames = torch.log(magnitudes(clip[0], window=400, hop=160, fft=512) @ encoder._filters + 0.01)[:, loudest]
    assert row[64:][loudest].item() == pytest.approx((frames[-1] - frames[0]).item() / (len(frames) / 10), rel=1e-3)


def test_rises_count_onsets_which_mean_and_deviation_do_not():
    once, often = (tone(1000, 16_000, 16_000, level=0.5) for _ in range(2))
    once[:, 8000:] = 0
    often *= (torch.arange(16_000) % 4000 < 2000).float()
    rows = LogMelEncoder(bands=32, rises=True).embed(audio_batch(once.flip(1), often.flip(1), rate_hz=16_000)).rows
    peak = rows[0, :32].argmax()
    assert abs(rows[0, peak] - rows[1, peak]) < 0.6
    assert rows[1, 64 + peak] / rows[0, 64 + peak] == pytest.approx(4, abs=0.3)


def test_rises_have_a_gradient_and_need_a_tenth_of_a_second():
    clip = noise(0, 4000).requires_grad_()
    LogMelEncoder(rises=True).embed_with_graph(audio_batch(clip, rate_hz=16_000)).rows[:, 128:].sum().backward()
    assert clip.grad.isfinite().all()
    assert clip.grad.abs().max() > 0
    with pytest.raises(InputError, match="at least 1840 samples"):
        LogMelEncoder(rises=True).embed(audio_batch(noise(0, 1839), rate_hz=16_000))
    assert LogMelEncoder(rises=True).embed(audio_batch(noise(0, 1840), rate_hz=16_000)).rows.isfinite().all()


def test_a_distance_of_sounds_hears_a_style_and_refuses_the_reference_of_another_encoder(tmp_path):
    rng = np.random.default_rng(0)
    styles = [Sound("low", "violin", "two", "long", "steady"), Sound("high", "flute", "four even", "short", "steady")]
    clips = [[torch.from_numpy(playing.render(style, rng))[None] for _ in range(10)] for style in styles]
    fad = FADReward(LogMelEncoder(bands=8, rises=True))
    fad.fit_reference([audio_batch(*clips[0][:5], rate_hz=16_000)])
    same, other = (fad.score_set([audio_batch(*c[5:], rate_hz=16_000)]).raw["distance"] for c in clips)
    assert other > 5 * same
    fad.save_reference(tmp_path / "violins.safetensors")
    with pytest.raises(InputError, match=r"violins\.safetensors"):
        FADReward(LogMelEncoder(bands=8)).load_reference(tmp_path / "violins.safetensors")
