"""VGGish: frame arithmetic of rewards.md 12.2, a slow loop for the front end, the published layout of the weights."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards import vggish
from diffalign.rewards.vggish import VGGish, VGGishEncoder, examples, log_mel, stft_frames
from diffalign.types import MediaEncoder, RewardBatch
from tests.audio_builders import audio_batch, noise, tiny_vggish, tone

RATE = 16_000
SHAPES = {  # harritaylor/torchvggish, torchvggish/vggish.py
    "features.0": (64, 1, 3, 3),
    "features.3": (128, 64, 3, 3),
    "features.6": (256, 128, 3, 3),
    "features.8": (256, 256, 3, 3),
    "features.11": (512, 256, 3, 3),
    "features.13": (512, 512, 3, 3),
    "embeddings.0": (4096, 12288),
    "embeddings.2": (4096, 4096),
    "embeddings.4": (128, 4096),
}


@pytest.fixture(scope="module")
def net() -> VGGish:
    return tiny_vggish()


@pytest.fixture
def small(monkeypatch, net):
    """Files are read into a network of the tiny sizes."""
    monkeypatch.setattr(vggish, "VGGish", tiny_vggish)
    return {key: value.clone() for key, value in net.state_dict().items()}


# --- front end


@pytest.mark.parametrize(
    ("samples", "frames", "rows"),
    [(16_000, 98, 1), (160_000, 998, 10), (15_600, 96, 1), (15_599, 95, 0), (15_360, 94, 0), (400, 1, 0), (399, 0, 0)],
)
def test_frames_and_examples_of_a_clip(samples, frames, rows):
    assert (stft_frames(samples), examples(samples)) == (frames, rows)
    if frames:
        assert log_mel(torch.zeros(samples)).shape == (frames, 64)


def test_zero_samples_have_no_frames():
    assert (stft_frames(0), examples(0)) == (0, 0)


def slow_log_mel(samples: np.ndarray, frame: int) -> list[float]:
    """One frame's bands from the formulas, one product at a time, float64."""
    windowed = [samples[160 * frame + n] * (0.5 - 0.5 * math.cos(2 * math.pi * n / 400)) for n in range(400)]
    bins = np.abs(np.fft.fft(windowed + [0.0] * 112))[:257]

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    step = (mel(7500) - mel(125)) / 65
    bands = []
    for band in range(64):
        left = mel(125) + band * step
        total = 0.0
        for k in range(1, 257):
            place = (mel(k * RATE / 512) - left) / step  # 0 at the left corner, 1 at the top, 2 at the right one
            total += bins[k] * max(0.0, min(place, 2 - place))
        bands.append(math.log(total + 0.01))
    return bands


@pytest.mark.parametrize("clip", [noise(0, 1600, 1.0), tone(1000, 1600, RATE), torch.zeros(1, 1600)])
def test_log_mel_is_that_of_a_slow_loop(clip):
    fast = log_mel(clip[0])
    for frame in (0, 7):
        slow = slow_log_mel(clip[0].double().numpy(), frame)
        torch.testing.assert_close(fast[frame], torch.tensor(slow, dtype=torch.float32), atol=1e-6, rtol=1e-6)


def test_loudness_is_an_offset_where_sound_is():
    clip = noise(0, 4000, 0.9)[0]
    shift = log_mel(clip) - log_mel(0.5 * clip)
    assert (shift - math.log(2)).abs().max() < 0.05  # the offset 0.01 is small beside noise of this level


# --- network


def test_the_layout_is_that_of_the_published_weights():
    with torch.device("meta"):
        state = VGGish().state_dict()
    expected = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in SHAPES.items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_the_network_is_its_layers_by_hand(net):
    x = torch.randn(2, 1, 96, 64, generator=torch.Generator().manual_seed(0))
    state = net.state_dict()
    maps = x
    for block in ((0,), (3,), (6, 8), (11, 13)):
        for place in block:
            maps = F.conv2d(maps, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1).relu()
        maps = F.max_pool2d(maps, 2, 2)
    flat = torch.stack([m.transpose(0, 2).transpose(0, 1).reshape(-1) for m in maps])  # time, band, channel
    for place in (0, 2, 4):
        flat = F.linear(flat, state[f"embeddings.{place}.weight"], state[f"embeddings.{place}.bias"])
        flat = flat.relu() if place < 4 else flat
    torch.testing.assert_close(net(x), flat)


# --- encoder


def test_rows_are_of_the_network_on_consecutive_frames(net):
    encoder = VGGishEncoder(net=net)
    assert isinstance(encoder, MediaEncoder)
    clips = [noise(0, 16_000), noise(1, 40_000)]
    embedded = encoder.embed(audio_batch(*clips, rate_hz=RATE))
    assert embedded.counts == (1, 2)
    assert embedded.rows.shape == (3, encoder.width)
    second = log_mel(clips[1][0])[96:192]
    torch.testing.assert_close(embedded.rows[2:], net(second[None, None]))


def test_rows_do_not_depend_on_batch_size_or_neighbours(net):
    clips = [noise(i, n) for i, n in enumerate((16_000, 64_000, 33_000))]
    whole = VGGishEncoder(net=net).embed(audio_batch(*clips, rate_hz=RATE))
    split = VGGishEncoder(net=net, batch_size=1).embed(audio_batch(*clips[::-1], rate_hz=RATE))
    torch.testing.assert_close(
        torch.cat(split.rows.split(list(split.counts))[::-1]), whole.rows, atol=1e-6, rtol=1e-5
    )  # sums run in another order


def test_the_last_relu_is_dropped_unless_asked_for(net):
    batch = audio_batch(*(noise(i, 16_000, 0.5) for i in range(3)), rate_hz=RATE)
    plain = VGGishEncoder(net=net).embed(batch).rows
    assert plain.min() < 0
    torch.testing.assert_close(VGGishEncoder(net=net, use_activation=True).embed(batch).rows, plain.relu())
    assert VGGishEncoder(net=net).version != VGGishEncoder(net=net, use_activation=True).version


def test_gradient_reaches_the_samples_and_not_the_weights(net):
    clips = [noise(0, 16_000).requires_grad_(), torch.zeros(1, 15_600, requires_grad=True)]
    VGGishEncoder(net=net).embed_with_graph(audio_batch(*clips, rate_hz=RATE)).rows.sum().backward()
    assert clips[0].grad.abs().max() > 0
    assert all(clip.grad.isfinite().all() for clip in clips)
    assert clips[0].grad[:, 15_600:].abs().max() == 0  # what is left after the last example is not heard
    assert all(p.grad is None for p in net.parameters())


def test_gradient_is_that_of_finite_differences(net):
    encoder = VGGishEncoder(net=net)
    clip = noise(0, 15_600, 0.5).requires_grad_()

    def total(x: torch.Tensor) -> torch.Tensor:
        return encoder.embed_with_graph(audio_batch(x, rate_hz=RATE)).rows.double().sum()

    total(clip).backward()
    way, step = clip.grad.sign(), 1e-5
    with torch.no_grad():
        slope = (total(clip + step * way) - total(clip - step * way)) / (2 * step)
    assert (clip.grad * way).sum().item() == pytest.approx(slope.item(), rel=0.02)


def test_autocast_does_not_reach_the_network(net):
    batch = audio_batch(noise(0, 16_000), rate_hz=RATE)
    plain = VGGishEncoder(net=net).embed(batch).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(VGGishEncoder(net=net).embed(batch).rows, plain)


def test_no_clips_have_no_rows(net):
    embedded = VGGishEncoder(net=net).embed(RewardBatch(audio=[], sample_rate=RATE))
    assert embedded.rows.shape == (0, 6)
    assert embedded.counts == ()


# --- files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file_embed_as_from_memory(small, net, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(small | {"pproc.pca_matrix": torch.eye(6), "pproc.pca_means": torch.zeros(6, 1)}, file)
    else:
        save_file(small, file)
    batch = audio_batch(noise(0, 16_000), rate_hz=RATE)
    encoder = VGGishEncoder(str(file))
    assert torch.equal(encoder.embed(batch).rows, VGGishEncoder(net=net).embed(batch).rows)
    assert encoder.version.startswith(f"vggish weights{suffix} (sha256 ")


def test_no_weights_are_read_before_they_are_needed(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"not a pickle")
    encoder = VGGishEncoder(str(tmp_path / "broken.pth"))
    with pytest.raises(InputError, match="file must be readable"):
        encoder.embed(audio_batch(noise(0, 16_000), rate_hz=RATE))


@pytest.mark.parametrize("kind", ["tensors", "arrays", "module"])
def test_whitening_is_that_of_audioset(net, tmp_path, kind):
    rng = np.random.default_rng(0)
    matrix, means = rng.normal(size=(6, 6)).astype("float32"), rng.normal(size=6).astype("float32")
    state = {
        "tensors": {"pca_eigen_vectors": torch.tensor(matrix), "pca_means": torch.tensor(means)},
        "arrays": {"pca_eigen_vectors": matrix, "pca_means": means},
        "module": {"pproc.pca_matrix": torch.tensor(matrix), "pproc.pca_means": torch.tensor(means)[:, None]},
    }[kind]
    torch.save(state, tmp_path / "pca.pth")
    encoder = VGGishEncoder(net=net, use_activation=True, pca=str(tmp_path / "pca.pth"))
    batch = audio_batch(*(noise(i, 16_000, 0.5) for i in range(3)), rate_hz=RATE)
    [row, *_] = VGGishEncoder(net=net, use_activation=True).embed(batch).rows.double().numpy()
    projected = [sum(matrix[i, j] * (row[j] - means[j]) for j in range(6)) for i in range(6)]
    expected = [round((min(2, max(-2, p)) + 2) / 4 * 255) for p in projected]
    ours = encoder.embed(batch).rows
    assert ours[0].tolist() == expected
    assert len(set(expected)) > 2
    with pytest.raises(InputError, match="must have no pca for a gradient"):
        encoder.embed_with_graph(batch)


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    torch.save({"weight": tmp_path}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="file must be readable"):
        VGGishEncoder(str(tmp_path / "bad.pth")).embed(audio_batch(noise(0, 16_000), rate_hz=RATE))


def test_other_weights_are_refused_with_the_key_that_is_wrong(small, tmp_path):
    def message(state: dict[str, torch.Tensor]) -> str:
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(InputError) as caught:
            VGGishEncoder(str(tmp_path / "w.pth")).width  # noqa: B018
        return str(caught.value)

    assert "without features.0.bias" in message({k: v for k, v in small.items() if k != "features.0.bias"})
    assert "got also head.weight" in message(small | {"head.weight": torch.zeros(1)})
    wrong = small | {"features.0.weight": torch.zeros(2, 3, 3, 3)}
    assert "features.0.weight of shape (2, 1, 3, 3), got (2, 3, 3, 3)" in message(wrong)
    assert "must be a state dict, got list" in message([torch.zeros(1)])


def test_a_pca_file_of_other_tensors_is_refused(net, tmp_path):
    torch.save({"pca_eigen_vectors": torch.eye(5), "pca_means": torch.zeros(5)}, tmp_path / "pca.pth")
    encoder = VGGishEncoder(net=net, pca=str(tmp_path / "pca.pth"))
    with pytest.raises(InputError, match=r"pca_eigen_vectors \(6, 6\).* got pca_eigen_vectors \(5, 5\)"):
        encoder.embed(audio_batch(noise(0, 16_000), rate_hz=RATE))


def test_no_weights_and_missing_weights_say_what_to_give():
    with pytest.raises(InputError, match=r"vggish-10086976\.pth of harritaylor/torchvggish"):
        VGGishEncoder()
    with pytest.raises(InputError, match=r"'nowhere\.pth', which is missing"):
        rewards.load_encoder("diffalign.rewards.vggish:VGGishEncoder", model="nowhere.pth")


@pytest.mark.parametrize(
    ("clip", "rate_hz", "message"),
    [
        (noise(0, 15_360), RATE, r"at least 15600 samples \(0.975 s\) for 'vggish', got 15360"),
        (noise(0, 48_000), 48_000, r"16000 samples a second for 'vggish', got 48000; resample it first"),
        (noise(0, 16_000).repeat(2, 1), RATE, "must be mono"),
    ],
)
def test_audio_that_does_not_fit_is_refused(net, clip, rate_hz, message):
    with pytest.raises(InputError, match=message):
        VGGishEncoder(net=net).embed(audio_batch(clip, rate_hz=rate_hz))


@pytest.mark.slow
def test_a_published_file_at_true_size_goes_through(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VGGish()
    torch.save(net.state_dict(), tmp_path / "vggish.pth")
    clip = tone(440, 160_000, RATE)
    embedded = VGGishEncoder(str(tmp_path / "vggish.pth")).embed(audio_batch(clip, rate_hz=RATE))
    assert embedded.rows.shape == (10, 128)
    assert embedded.counts == (10,)
    assert embedded.rows.isfinite().all()
    assert torch.equal(embedded.rows, VGGishEncoder(net=net).embed(audio_batch(clip, rate_hz=RATE)).rows)
