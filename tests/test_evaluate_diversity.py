"""Diversity within prompts: closed forms of the Vendi score, what averages over what, how many images are needed."""

import numpy as np
import pytest
import torch

from diffalign.errors import InputError, RunError
from diffalign.evaluate import diversity
from diffalign.rewards.lpips import LPIPS
from diffalign.types import Embedded, RewardBatch

K = 4


class Corner:
    """Encodes an image by its upper left pixel, or by several rows."""

    version, modality = "corner", "image"

    def __init__(self, rows: int = 1) -> None:
        self.rows, self.seen = rows, []

    def embed(self, batch: RewardBatch) -> Embedded:
        self.seen.append(tuple(batch.images.shape))
        rows = batch.images[:, :, 0, 0].repeat_interleave(self.rows, 0)
        return Embedded(rows=rows, counts=(self.rows,) * len(batch.images))

    embed_with_graph = embed


def alike(prompts: int = 3) -> torch.Tensor:
    """K equal rows of each prompt; the prompts have nothing in common."""
    return torch.eye(prompts, 8).repeat_interleave(K, 0)


def apart(prompts: int = 3) -> torch.Tensor:
    """K orthogonal rows of each prompt, the same for all prompts."""
    return torch.eye(K, 8).repeat(prompts, 1)


INDEX = [5, 5, 5, 5, 2, 2, 2, 2, 9, 9, 9, 9]


def test_vendi_is_one_for_equal_images_and_k_for_unlike_ones_whatever_other_prompts_show():
    found = diversity.vendi_diversity(alike(), apart(), INDEX)
    assert found.arm == pytest.approx([1, 1, 1], abs=1e-6)
    assert found.base == pytest.approx([K, K, K], abs=1e-6)
    assert found.ratio == pytest.approx(1 / K)


def test_vendi_of_pairwise_cosines_of_one_half_has_its_golden_value():
    rows = torch.linalg.cholesky(torch.full((K, K), 0.5) + 0.5 * torch.eye(K)).repeat(3, 1)
    found = diversity.vendi_diversity(rows, rows, INDEX)
    assert found.arm == pytest.approx([2.925726559967] * 3, abs=1e-5)  # rewards.md section 13
    assert found.ratio == 1


def test_cosine_distance_is_the_mean_over_pairs():
    halves = torch.eye(2, 8).repeat_interleave(2, 0).repeat(3, 1)  # 2 of 6 pairs alike
    found = diversity.cosine_diversity(halves, apart(), INDEX)
    assert found.arm == pytest.approx([4 / 6] * 3)
    assert found.base == pytest.approx([1, 1, 1])


def test_the_order_of_rows_within_and_between_prompts_does_not_matter():
    rng = np.random.default_rng(0)
    rows = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    order = rng.permutation(12).tolist()
    for measure in (diversity.vendi_diversity, diversity.cosine_diversity):
        there = measure(rows, apart(), INDEX)
        back = measure(rows[order], apart()[order], [INDEX[i] for i in order])
        np.testing.assert_allclose(there.arm, back.arm)
        np.testing.assert_allclose(there.base, back.base)


@pytest.mark.parametrize("index", [[0, 0, 0], [0] * 8 + [1] * 3, []])
def test_fewer_than_four_images_of_a_prompt_are_not_measured_and_it_is_said_why(index):
    rows = torch.eye(8)[torch.arange(len(index)) % 8]
    found = diversity.vendi_diversity(rows, rows, index)
    assert found.arm is None
    assert found.ratio is None
    assert found.reason == f"diversity needs at least 4 samples of each prompt, got {min(3, len(index))}"


def test_a_base_without_any_variety_has_no_ratio():
    assert diversity.cosine_diversity(apart(), alike(), INDEX).ratio is None


def test_perceptual_distance_is_the_mean_over_pairs_of_a_prompt():
    lpips = LPIPS()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    index = [0, 0, 0, 0, 1, 1, 1, 1]
    found = diversity.perceptual_diversity(list(images), [images[0]] * 8, index, lpips)
    pairs = [lpips(images[i : i + 1], images[j : j + 1]).item() for i in range(4) for j in range(i)]
    assert found.arm[0] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert found.base == pytest.approx([0, 0])
    assert found.ratio is None


def test_the_interval_of_the_ratio_holds_it_and_is_tighter_with_more_prompts():
    rng = np.random.default_rng(0)
    widths = []
    for n in (30, 480):
        base = rng.uniform(2, 4, n)
        found = diversity.Diversity(arm=0.8 * base + rng.normal(size=n) * 0.3, base=base)
        low, high = found.interval(seed=0)
        assert low < 0.8 < high
        assert low < found.ratio < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)
    paired = diversity.Diversity(arm=0.8 * base, base=base)
    assert paired.interval(seed=0) == pytest.approx((0.8, 0.8))  # prompts are drawn in both arms together
    assert diversity.Diversity(reason="x").interval(seed=0) is None


def test_images_are_embedded_lazily_in_batches_of_one_size_as_unit_rows():
    encoder, read = Corner(), []
    pictures = [torch.full((3, size, size), 0.1 * (i + 1)) for i, size in enumerate((4, 4, 4, 6, 6))]

    def files():
        for i, picture in enumerate(pictures):
            read.append(i)
            yield picture

    rows = diversity.embed_images(files(), encoder, batch_size=2)
    assert encoder.seen == [(2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 6, 6)]
    torch.testing.assert_close(rows, torch.full((5, 3), 3**-0.5))
    torch.testing.assert_close(rows, diversity.embed_images(pictures, Corner(), batch_size=5))


def test_embeddings_without_direction_and_several_rows_an_image_are_refused():
    with pytest.raises(RunError, match="is 0"):
        diversity.embed_images([torch.zeros(3, 4, 4)], Corner())
    with pytest.raises(InputError, match="at least one image"):
        diversity.embed_images([], Corner())
    with pytest.raises(InputError, match="one row an image, got 2"):
        diversity.embed_images([torch.ones(3, 4, 4)], Corner(rows=2))
