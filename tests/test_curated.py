"""Curated retraining: the numbers of online.md 10.3 by simulation, the choice by chi-square, and the plain loss."""

import math

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.curated import Curated, chosen
from diffalign.methods.sft import SFT
from diffalign.types import OnlineMethod, Scored
from tests.test_measure import RNG
from tests.toys import images, toy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scored(scores: torch.Tensor) -> Scored:
    """Prompts by row, their images by column."""
    group = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
    return Scored(
        scores={"r": scores.flatten()}, weights={"r": 1.0}, group=group, prompts=[str(i) for i in range(len(scores))]
    )


def picked(p: float, k: int, prompts: int, seed: int = 0) -> float:
    """How often the first of two atoms, which has r = ln 3 and the other 0, is kept of k images drawn with share p."""
    rng = seeded(seed)
    first = torch.rand(prompts, k, generator=rng, dtype=torch.float64) < p
    group = torch.arange(prompts).repeat_interleave(k)
    kept = chosen(first.flatten() * math.log(3), group, 1.0, rng)
    assert torch.equal(group[kept], torch.arange(prompts))
    return float(first.flatten()[kept].double().mean())


@pytest.mark.parametrize(("k", "share"), [(1, 0.5), (2, 0.625), (4, 0.69375), (8, 0.724231), (64, 0.747036)])
def test_the_share_that_is_kept_of_two_kinds_grows_with_the_choice(k, share):
    prompts = 100_000 if k < 10 else 20_000
    assert picked(0.5, k, prompts) == pytest.approx(share, abs=4 * 0.5 / prompts**0.5)


def test_round_by_round_the_better_kind_takes_over():
    p, found = 0.5, []
    for seed in range(6):
        p = picked(p, 4, 50_000, seed)
        found.append(p)
    assert found == pytest.approx([0.69375, 0.84274, 0.92884, 0.96994, 0.98770, 0.99503], abs=0.008)
    assert 1 + 2 * found[0] >= 2.25  # E[e^r] was 2, and grows by at least 3/4 Var(e^r) / 3


@pytest.mark.parametrize(("mix", "fixed"), [(0.5, 0.58953), (1.0, 0.66009), (4.0, 0.84330)])
def test_with_half_of_either_kind_mixed_in_there_is_a_share_that_stays(mix, fixed):
    after = (0.5 + mix * picked(fixed, 4, 100_000)) / (1 + mix)
    assert after == pytest.approx(fixed, abs=4 * 0.5 / 100_000**0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_choice_is_a_draw_from_the_softmax(temperature):
    """Chi-square over 1e5 draws, at the 0.1 % level with three degrees of freedom."""
    scores = torch.tensor([0.3, -0.4, 1.0, 0.0])
    found = Curated(temperature=temperature).select(scored(scores.repeat(100_000, 1)), seeded())
    counts = torch.bincount(found.places[:, 0] % 4, minlength=4).double()
    expected = 1e5 * torch.softmax(scores.double() / temperature, 0)
    assert ((counts - expected).square() / expected).sum() < 16.27
    wrong = 1e5 * torch.softmax(scores.double() / temperature * 1.05, 0)
    assert ((counts - wrong).square() / wrong).sum() > 16.27


def test_at_temperature_0_the_best_is_kept_and_one_of_equals():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 4.0]]).repeat(200, 1)
    found = Curated(temperature=0.0).select(scored(scores), seeded())
    kept = (found.places[:, 0] % 3).view(-1, 2)
    assert set(kept[:, 0].tolist()) == {1}
    assert set(kept[:, 1].tolist()) == {0, 2}
    assert 60 < (kept[:, 1] == 0).sum() < 140
    cold = Curated(temperature=1e-3).select(scored(scores[:1] * 1e6), seeded())
    assert cold.places.tolist() == [[1]]


def test_every_prompt_keeps_one_of_its_images_and_what_it_gained_is_counted():
    rng = seeded()
    scores = torch.rand(50, 4, generator=rng)
    found = Curated().select(scored(scores), rng)
    assert torch.equal(found.places[:, 0] // 4, torch.arange(50))
    assert found.weight is None
    assert found.metrics["kept"] == 50
    assert found.metrics["kept_score"] == pytest.approx(scores.flatten()[found.places[:, 0]].mean().item())
    assert found.metrics["kept_gain"] == pytest.approx(found.metrics["kept_score"] - scores.mean().item(), abs=1e-6)
    again = Curated().select(scored(scores), seeded())
    assert not torch.equal(again.places, found.places)  # another place in the stream


def test_prompts_of_equal_images_keep_one_too_but_a_round_of_them_is_empty():
    some = Curated().select(scored(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), seeded())
    assert len(some.places) == 2
    assert some.metrics["zero_std_ratio"] == 0.5
    none = Curated().select(scored(torch.ones(3, 4)), seeded())
    assert none.places.shape == (0, 1)
    assert none.metrics["zero_std_ratio"] == 1


def test_prompts_in_any_order_and_of_any_number_of_images_keep_one_each():
    group = torch.tensor([7, 7, 7, 2, 2, 9, 9, 9, 9])
    kept = chosen(torch.arange(9.0), group, 0.0, seeded())
    assert sorted(kept.tolist()) == [2, 4, 8]


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_the_loss_is_plain_training(prediction):
    policy, batch = toy(prediction), images()
    found = Curated()(policy, None, batch, RNG)
    expected = SFT()(policy, None, batch, RNG)
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=0)
    assert found.metrics.keys() == expected.metrics.keys()
    found.loss.mean().backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-2 * p.grad
    assert Curated()(policy, None, batch, RNG).loss.mean() < found.loss.mean()


def test_it_asks_for_images_of_groups_and_no_reference():
    needs = Curated().needs
    assert isinstance(Curated(), OnlineMethod)
    assert (needs.data, needs.items, needs.references, needs.group_at_least) == ("prompts", "images", ("none",), 2)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_what_is_out_of_range_is_refused(temperature):
    with pytest.raises(InputError, match=r"method\.temperature must be at least 0, got"):
        Curated(temperature=temperature)


def test_a_group_of_one_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="at least 2 images of a prompt"):
        Curated().select(scored(torch.rand(3, 1)), seeded())
    with pytest.raises(InputError, match="must be finite"):
        Curated().select(scored(torch.tensor([[1.0, math.nan]])), seeded())
