"""A reward of sets as one of single samples: numbers, specs, what it refuses."""

import pytest
import torch

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.fad import FADReward
from diffalign.rewards.kernels import CMMDReward
from diffalign.rewards.mmd import cmmd
from diffalign.rewards.per_sample import PerSampleReward
from diffalign.types import Reward, RewardBatch
from tests.sets import PixelEncoder, SampleEncoder, batches, pictures

PLACE = "diffalign.rewards.per_sample:PerSampleReward"
REFERENCE, IMAGES = pictures(30, 1), pictures(5, 2, shift=0.2)


def pixels() -> CMMDReward:
    """Found by its path."""
    return CMMDReward(PixelEncoder())


@pytest.fixture
def style(tmp_path):
    reward = pixels()
    reward.fit_reference(batches(REFERENCE))
    reward.save_reference(tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_each_image_is_measured_by_itself(style):
    reward = rewards.load(PLACE, model=f"tests.test_reward_per_sample:pixels@{style}")
    scores = reward.score(RewardBatch(images=IMAGES)).scores
    rows = IMAGES.flatten(1)[:, :6]
    expected = [-cmmd(row[None], REFERENCE.flatten(1)[:, :6]).item() for row in rows]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.dtype == torch.float32
    assert reward.score(RewardBatch(images=IMAGES[2:3])).scores.item() == pytest.approx(expected[2], rel=1e-5)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.modality, reward.requires) == ("per_sample", "image", {"images"})
    assert reward.range == CMMDReward.range


def test_numbers_of_another_reference_have_another_version(style, tmp_path):
    other = pixels()
    other.fit_reference(batches(IMAGES))
    other.save_reference(tmp_path / "other.safetensors")
    found = {
        rewards.load(PLACE, model=f"tests.test_reward_per_sample:pixels@{file}").version
        for file in (style, tmp_path / "other.safetensors")
    }
    assert len(found) == 2
    assert all(version.startswith("cmmd of each sample, pixels, 1") for version in found)


def test_a_clip_is_a_set_of_its_frames():
    rng = torch.Generator().manual_seed(0)
    clips = RewardBatch(audio=[torch.rand(1, 6 * n, generator=rng) - 0.5 for n in (8, 9, 10)], sample_rate=16000)
    fad = FADReward(SampleEncoder())
    fad.fit_reference([clips])
    scores = PerSampleReward(fad).score(clips).scores
    torch.testing.assert_close(scores, -fad.per_clip(clips))


def test_what_has_no_reference_or_too_few_embeddings_is_refused(style):
    with pytest.raises(
        InputError, match="must get the reference of set reward 'cmmd', got none; name its file as cmmd@"
    ):
        rewards.load(PLACE, model="cmmd")
    with pytest.raises(InputError, match="readable safetensors"):
        rewards.load(PLACE, model="tests.test_reward_per_sample:pixels@nowhere.safetensors")
    with pytest.raises(InputError, match="must be a known name"):
        rewards.load(PLACE, model="cmd")
    clip = RewardBatch(audio=[torch.zeros(1, 7)], sample_rate=16000)
    fad = FADReward(SampleEncoder())
    fad.fit_reference([RewardBatch(audio=[torch.rand(1, 60) - 0.5], sample_rate=16000)])
    with pytest.raises(InputError, match="at least 2 embeddings to be a set of its own"):
        PerSampleReward(fad).score(clip)
    with pytest.raises(InputError, match="must get images, got none"):
        rewards.load(PLACE, model=f"tests.test_reward_per_sample:pixels@{style}").score(RewardBatch(prompts=["a"]))
