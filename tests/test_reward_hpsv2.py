"""HPS v2: the cosine of its open_clip model, its letterbox, its two versions, its checkpoint and its benchmark."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file

from benchmarks.true_size import filled
from diffalign.errors import InputError
from diffalign.rewards import hpsv2
from diffalign.rewards.frontend import CLIP_MEAN, CLIP_STD, FrontEnd
from diffalign.rewards.hpsv2 import HPSv2Reward, benchmark, build
from diffalign.rewards.openclip import OpenCLIPEncoder, OpenCLIPParts
from diffalign.types import DifferentiableReward, RewardBatch
from tests.pointwise import PROMPTS, batch_of, check_full_size, check_gradient, check_independence, waves
from tests.tiny_openclip import CONFIG, tiny_net, tiny_openclip

FRONT = FrontEnd(32, "longest", resized_as="floats")


@pytest.fixture(scope="module")
def parts() -> OpenCLIPParts:
    return tiny_openclip(FRONT)


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """A checkpoint in the published form, of a tiny architecture in place of ViT-H-14."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    monkeypatch.setattr(hpsv2, "ARCHITECTURE", "tiny")
    monkeypatch.setattr(hpsv2, "FRONT", FRONT)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": tiny_net().state_dict()}, file)
    return file


def test_what_every_pointwise_reward_holds(parts):
    check_independence(lambda size: HPSv2Reward(encoder=OpenCLIPEncoder(parts=parts, batch_size=size)))
    check_gradient(HPSv2Reward(encoder=OpenCLIPEncoder(parts=parts)), 100)
    assert isinstance(HPSv2Reward(), DifferentiableReward)


def test_score_is_the_cosine_of_the_models_own_features(checkpoint):
    batch = batch_of([0, 1, 2, 3], 64, 32)
    net = tiny_net()
    image, text, _ = net(FRONT.reference(batch.images), open_clip.get_tokenizer("tiny")(PROMPTS))
    cos = (image @ text.T).diagonal()
    out = HPSv2Reward(str(checkpoint)).score(batch)
    torch.testing.assert_close(out.scores, 100 * cos)
    torch.testing.assert_close(out.raw["cos"], cos)
    torch.testing.assert_close(HPSv2Reward(str(checkpoint), scale="cos").score(batch).scores, cos)
    with pytest.raises(InputError, match="must be one of x100, cos, got 'logit'"):
        HPSv2Reward(scale="logit")


def test_the_front_end_is_a_letterbox_that_crops_nothing():
    assert hpsv2.FRONT == FrontEnd(224, "longest", resized_as="floats", mean=CLIP_MEAN, std=CLIP_STD)
    images = torch.zeros(1, 3, 128, 256)
    images[:, :, :, :8] = images[:, :, :, -8:] = 1  # white at both ends of the longer side
    pixels = hpsv2.FRONT.reference(images)
    black = (0 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert pixels.shape == (1, 3, 224, 224)
    for rows in (pixels[0, :, :56], pixels[0, :, -56:]):
        torch.testing.assert_close(rows, black.view(3, 1, 1).expand_as(rows))
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    for column in (0, -1):
        torch.testing.assert_close(pixels[0, :, 112, column], white, atol=0.05, rtol=0)


def test_the_content_that_a_crop_would_lose_counts(parts):
    reward = HPSv2Reward(encoder=OpenCLIPEncoder(parts=parts))
    images = waves(32, 64)
    changed = images.clone()
    changed[..., :8] = 0.9
    scores = [reward.score(RewardBatch(images=i, prompts=["fog"])).scores for i in (images, changed)]
    assert (scores[0] - scores[1]).abs() > 0.01


# --- versions


def test_the_version_says_which_hps_it_is():
    assert HPSv2Reward().version == "HPS v2.1: xswu/HPSv2/HPS_v2.1_compressed.pt, x100"
    assert HPSv2Reward(hps_version="v2.0").version == "HPS v2.0: xswu/HPSv2/HPS_v2_compressed.pt, x100"
    assert "@abc" in HPSv2Reward(revision="abc").version
    assert HPSv2Reward("own.pt", hps_version="v2.0", dtype="float16").version == "HPS v2.0: own.pt in float16, x100"


def test_another_version_or_the_other_versions_file_is_refused():
    with pytest.raises(InputError, match=r"one of v2\.0, v2\.1, got 'v2'"):
        HPSv2Reward(hps_version="v2")
    with pytest.raises(InputError, match=r"hps_version must be 'v2\.0' for"):
        HPSv2Reward("folder/HPS_v2_compressed.pt")


def test_the_published_file_of_the_version_is_asked_for(checkpoint, monkeypatch):
    asked = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for version in ("v2.0", "v2.1"):
        HPSv2Reward(hps_version=version, revision="abc").score(batch_of([0]))
    assert asked == [
        ("xswu/HPSv2", "HPS_v2_compressed.pt", "abc"),
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", "abc"),
    ]


# --- checkpoints


def test_weights_are_read_once_and_not_before_the_first_score(checkpoint, monkeypatch):
    reads = []
    original = hpsv2._read
    monkeypatch.setattr(hpsv2, "_read", lambda file: reads.append(file) or original(file))
    reward = HPSv2Reward(str(checkpoint))
    assert reads == []
    for _ in range(3):
        reward.score(batch_of([0, 1]))
        reward.differentiable_score(batch_of([0, 1]))
    assert reads == [checkpoint]


def test_halves_and_safetensors_are_read_too(checkpoint, tmp_path):
    batch = batch_of([0, 1, 2, 3])
    expected = HPSv2Reward(str(checkpoint)).score(batch).scores
    save_file(tiny_net().state_dict(), tmp_path / "own.safetensors")
    torch.testing.assert_close(HPSv2Reward(str(tmp_path / "own.safetensors")).score(batch).scores, expected)
    torch.save({"state_dict": tiny_net().half().state_dict()}, tmp_path / "half.pt")
    half = HPSv2Reward(str(tmp_path / "half.pt"))
    scores = half.score(batch).scores
    assert half.encoder.parts.net.visual.proj.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.5, rtol=0)  # of 100, after rounding every weight to a half


def test_missing_unexpected_and_misshapen_weights_are_errors(checkpoint, tmp_path):
    whole = tiny_net().state_dict()
    missing = {k: v for k, v in whole.items() if k != "visual.proj"}
    wrong = [missing, {**whole, "extra": torch.zeros(1)}, {**whole, "visual.proj": torch.zeros(16, 8)}]
    for state, named in zip(wrong, ("visual.proj", "extra", "visual.proj"), strict=True):
        torch.save({"state_dict": state}, tmp_path / "own.pt")
        with pytest.raises(InputError, match=rf"open_clip tiny, got .*{named}") as caught:
            HPSv2Reward(str(tmp_path / "own.pt")).score(batch_of([0]))
        assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused_and_runs_no_code(checkpoint, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(checkpoint.read_bytes()[:500])
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    torch.save({"state_dict": Path("x")}, tmp_path / "code.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    for name in ("damaged.pt", "damaged.safetensors", "code.pt", "absent.pt"):
        with pytest.raises(InputError, match="checkpoint must be readable"):
            HPSv2Reward(str(tmp_path / name)).score(batch_of([0]))
    with pytest.raises(InputError, match="with 'state_dict'"):
        HPSv2Reward(str(tmp_path / "other.pt")).score(batch_of([0]))


# --- the benchmark


def test_the_benchmark_is_the_mean_and_spread_of_ten_block_means():
    scores = torch.arange(800) / 80  # a line: block means are 0.49375 + 0, 1, ..., 9
    found = benchmark(scores)
    assert found.mean == pytest.approx(0.49375 + 4.5)
    assert found.std == pytest.approx((99 / 12) ** 0.5)  # of ten equal steps, not corrected
    rows = np.random.default_rng(0).normal(27, 3, 800)
    slow = [np.mean(rows[i : i + 80]) for i in range(0, 800, 80)]
    found = benchmark(torch.tensor(rows, dtype=torch.float32))
    assert (found.mean, found.std) == (pytest.approx(np.mean(slow)), pytest.approx(np.std(slow), rel=1e-4))
    with pytest.raises(InputError, match="must be the 800"):
        benchmark(scores[:-1])


# --- full size


@pytest.mark.slow
def test_hpsv2_at_full_size(tmp_path):
    net = filled(lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))
    state = {name: value.half() for name, value in net.state_dict().items()}
    assert len(state) == 12 * (32 + 24) + 8 + 6  # layers, the rest of the image tower, the rest of the text tower
    assert state["visual.proj"].shape == (1280, 1024)
    assert state["text_projection"].shape == (1024, 1024)
    assert state["visual.positional_embedding"].shape == (257, 1280)
    del net
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, file)
    del state
    reward = HPSv2Reward(str(file))
    check_full_size(reward, 100, 512, 384)
    file.unlink()


def test_building_takes_the_tensors_over_and_leaves_nothing_empty(monkeypatch):
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    state = tiny_net().state_dict()
    net = build("tiny", state)
    assert net.visual.proj.data_ptr() == state["visual.proj"].data_ptr()
    assert not any(v.is_meta for v in (*net.parameters(), *net.buffers()))
