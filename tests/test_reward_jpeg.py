"""JPEG size: orderings, never bytes, which differ between encoders."""

import math

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import InputError
from diffalign.rewards.jpeg import JPEGReward
from diffalign.types import RewardBatch


@pytest.fixture(scope="module")
def ladder() -> torch.Tensor:
    """128x128, from simple to complex: grey, waves, waves with some noise, noise."""
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*[torch.arange(128) / 128] * 2, indexing="ij")
    waves = torch.stack([0.5 + 0.4 * torch.sin(12 * (x + k * y)) for k in (1, 2, 3)])
    noise = torch.rand(3, 128, 128, generator=rng)
    return torch.stack([torch.full_like(waves, 0.5), waves, 0.8 * waves + 0.2 * noise, noise])


def sizes(images: torch.Tensor, **options) -> torch.Tensor:
    return JPEGReward(**options).score(RewardBatch(images=images)).raw["size_kb"]


def test_the_more_there_is_to_see_the_larger_the_file(ladder):
    assert (sizes(ladder).diff() > 0).all()


def test_size_grows_with_quality_and_with_the_pixel_count(ladder):
    by_quality = torch.stack([sizes(ladder[1:], quality=q) for q in (10, 50, 80, 95)])
    assert (by_quality.diff(dim=0) > 0).all()
    assert (sizes(ladder[:, :, :64, :64]) < sizes(ladder)).all()


def test_size_is_that_of_the_file_on_disk_in_thousands_of_bytes(ladder, tmp_path):
    bytes_ = (ladder[2] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(bytes_).save(tmp_path / "picture.jpg", quality=95)
    assert sizes(ladder)[2].item() == pytest.approx((tmp_path / "picture.jpg").stat().st_size / 1000)
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert [(wide, high) for _, wide, high, _ in picture.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_directions_mirror_each_other_and_scales_differ_by_500(ladder):
    batch = RewardBatch(images=ladder)
    small, large = (JPEGReward(direction=d).score(batch) for d in ("compressibility", "incompressibility"))
    torch.testing.assert_close(small.scores, -large.scores)
    torch.testing.assert_close(large.scores, large.raw["size_kb"])
    torch.testing.assert_close(JPEGReward(scale="div500").score(batch).scores * 500, small.scores)
    assert small.scores.argmax() == 0
    for direction, out in (("compressibility", small), ("incompressibility", large)):
        low, high = JPEGReward(direction=direction).range
        assert low <= out.scores.min()
        assert out.scores.max() <= high


def test_images_are_rounded_to_8_bit_not_cut_off():
    rng = np.random.default_rng(0)
    levels = torch.from_numpy(rng.integers(1, 255, (1, 3, 64, 64))).float()
    off = torch.from_numpy(rng.uniform(-0.4, 0.4, levels.shape)).float()
    torch.testing.assert_close(sizes((levels + off) / 255), sizes(levels / 255), rtol=0, atol=0)


def test_scores_are_the_same_again_and_do_not_depend_on_neighbours(ladder):
    whole = sizes(ladder)
    torch.testing.assert_close(sizes(ladder), whole, rtol=0, atol=0)
    torch.testing.assert_close(sizes(ladder[[3, 1, 1]]), whole[[3, 1, 1]], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([sizes(image[None]) for image in ladder]), whole, rtol=0, atol=0)


def test_the_version_says_what_numbers_depend_on():
    version = rewards.load("diffalign.rewards.jpeg:JPEGReward", quality=90).version
    assert "quality 90" in version
    assert f"Pillow {PIL.__version__}" in version
    assert JPEGReward().range == (-math.inf, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"direction": "compressible"},
            "direction must be one of compressibility, incompressibility, got 'compressible'",
        ),
        ({"scale": "MB"}, "scale must be one of kB, div500"),
        ({"quality": 100}, "quality must be from 1 to 95"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        JPEGReward(**options)


@pytest.mark.parametrize("value", [-0.5, 128.0, float("nan")])
def test_images_outside_0_to_1_are_refused(value):
    with pytest.raises(InputError, match=r"RGB in \[0, 1\]"):
        JPEGReward().score(RewardBatch(images=torch.full((1, 3, 8, 8), value)))
