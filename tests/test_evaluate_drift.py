"""Drift: zero for equal arms, known for planted ones; images of two arms side by side; errors on real latents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.errors import InputError
from diffalign.evaluate import drift
from diffalign.evaluate.lazy import ImageFiles, PairedImages, paired_files
from diffalign.evaluate.score import write_image
from diffalign.evaluate.survey import survey
from diffalign.rewards.lpips import LPIPS
from diffalign.types import Cond
from tests import toys
from tests.test_evaluate_diversity import Corner


def pictures(seed: int, n: int = 4, size: int = 32) -> torch.Tensor:
    raw = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return (raw * 255).round() / 255


def pair(arm: torch.Tensor, base: torch.Tensor) -> PairedImages:
    return PairedImages(prompt_index=range(len(arm)), k=[0] * len(arm), arm=list(arm), base=list(base))


def test_equal_arms_have_no_drift():
    found = survey(pair(pictures(0), pictures(0)), encoder=Corner(), perceptual=LPIPS())
    assert found.pixel.tolist() == [0] * 4
    assert found.perceptual.tolist() == [0] * 4
    assert found.cosine == pytest.approx(np.ones(4))
    assert all((arm == base).all() for arm, base in found.low_level.values())


def test_drift_of_known_changes():
    base = torch.full((2, 3, 4, 4), 0.5)
    arm = base.clone()
    arm[0] += 0.25
    arm[1, 0] += 0.5
    torch.testing.assert_close(drift.pixel_distance(arm, base), torch.tensor([0.25, 1 / 6]))
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    cosines = drift.same_seed_cosine(rows, torch.tensor([[1.0, 0.0]]).repeat(3, 1))
    assert cosines.tolist() == pytest.approx([1, 0.6, -1])


def test_a_larger_change_is_a_larger_drift():
    base, other, lpips = pictures(1), pictures(2), LPIPS()
    near, far = (survey(pair(base.lerp(other, s), base), perceptual=lpips) for s in (0.1, 0.6))
    assert (near.pixel < far.pixel).all()
    assert (near.perceptual < far.perceptual).all()
    assert near.cosine is None


def test_a_survey_does_not_depend_on_the_size_of_batches():
    images, lpips = pair(pictures(3), pictures(4)), LPIPS()
    one, all_ = (survey(images, encoder=Corner(), perceptual=lpips, batch_size=size) for size in (1, 16))
    np.testing.assert_allclose(one.perceptual, all_.perceptual, rtol=1e-5)
    np.testing.assert_allclose(one.cosine, all_.cosine, rtol=1e-6)
    for name, sides in one.low_level.items():
        np.testing.assert_allclose(sides, all_.low_level[name], rtol=1e-4)


def test_numbers_by_prompt_and_seed_leave_holes_where_there_is_no_image():
    images = PairedImages(prompt_index=[7, 7, 3], k=[0, 1, 1], arm=list(pictures(0, 3)), base=list(pictures(1, 3)))
    found = survey(images).paired("contrast")
    assert found.arm.shape == (2, 2)
    assert np.isnan(found.arm).tolist() == [[True, False], [False, False]]
    assert found.invalid == 1
    assert found.differences()[1] == [0, 1]
    assert survey(images).per_prompt(np.array([1.0, 3.0, 7.0])).tolist() == [7, 2]  # prompts 3 and 7


def test_files_are_read_when_asked_for_and_matched_by_prompt_and_seed(tmp_path: Path):
    arm, base = {}, {}
    for number, place in enumerate([(1, 0), (0, 1), (0, 0)]):
        for name, files in (("arm", arm), ("base", base)):
            files[place] = tmp_path / f"{name}-{place[0]}-{place[1]}.png"
            write_image(pictures(number + (10 if name == "arm" else 0), 1)[0], files[place])
    images = paired_files(arm, base)
    assert list(zip(images.prompt_index, images.k, strict=True)) == [(0, 0), (0, 1), (1, 0)]
    assert isinstance(images.rows([2]).arm, ImageFiles)
    torch.testing.assert_close(images.rows([2]).arm[0], pictures(10, 1)[0])
    torch.testing.assert_close(images.base[:2][1], pictures(1, 1)[0])
    arm[0, 0].unlink()  # nothing was kept
    with pytest.raises(InputError, match="must be a readable image"):
        images.arm[0]
    del base[1, 0]
    with pytest.raises(InputError, match=r"none of the base for prompt and seed \(1, 0\)"):
        paired_files(arm, base)


def test_arms_that_do_not_fit_each_other_are_refused():
    mixed = [pictures(0)[0], pictures(0, 1, 16)[0]]
    images = PairedImages(prompt_index=[0, 1], k=[0, 0], arm=list(pictures(0, 2)), base=mixed)
    with pytest.raises(InputError, match=r"one size, got \(3, 32, 32\) against \(3, 16, 16\) for prompt 1, seed 0"):
        survey(images)
    with pytest.raises(InputError, match="one row each"):
        PairedImages(prompt_index=[0], k=[0, 1], arm=[], base=[])


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_errors_on_real_latents_are_those_that_were_planted(prediction):
    x_0 = toys.pairs(5).x_w
    planted = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    path = toys.flow(3.0) if prediction == "velocity" else toys.ddpm()
    denoiser = toys.Planted(x_0=x_0, errors=planted, path=path, prediction=prediction)
    errors = drift.denoising_errors(denoiser, x_0, Cond({"c": torch.zeros(5, 3)}))
    assert errors.shape == (5, 9)
    np.testing.assert_allclose(errors, planted.numpy()[:, None].repeat(9, 1), rtol=2e-2)  # small sigma at t = 0.1 T


def test_two_models_see_the_same_noise_and_another_seed_gives_other_noise():
    batch = toys.pairs(3)
    first, again, other = (
        drift.denoising_errors(toys.toy(), batch.x_w, batch.cond, levels=(0.2, 0.7), seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 0
    assert len(np.unique(first)) == 6
    twice = drift.denoising_errors(toys.toy(), batch.x_w, batch.cond, levels=(0.5, 0.5))
    assert np.abs(twice[:, 0] - twice[:, 1]).min() > 0  # each level has noise of its own
