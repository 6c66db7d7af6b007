"""Pairs of own images, and online Diffusion-DPO on them; with a winner's own error it is IPO."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.measure import Safeguard, pair_errors
from diffalign.methods.online_dpo import OnlineDPO
from diffalign.methods.pairing import all_pairs, best_and_worst
from diffalign.types import OnlineMethod, Scored, Shared
from tests.test_measure import PREDICTIONS, RNG, exact, planted
from tests.toys import pairs, toy

ANY = torch.Generator()


def scored(*scores: list[float], weights: tuple[float, ...] = (1.0,), group: list[int] | None = None) -> Scored:
    """A round of images judged by `len(scores)` rewards; two prompts unless groups are given."""
    size = len(scores[0])
    names = [f"reward{i}" for i in range(len(scores))]
    return Scored(
        scores=dict(zip(names, map(torch.tensor, scores), strict=True)),
        weights=dict(zip(names, weights, strict=True)),
        group=torch.tensor(group or [2 * i // size for i in range(size)]),
        prompts=["a", "b", "c"],
    )


# --- pairs


def test_the_best_image_of_a_prompt_meets_its_worst():
    found = OnlineDPO().select(scored([0.1, 0.9, 0.5, 3.0, 2.0, 7.0]), ANY)
    assert found.places.tolist() == [[1, 0], [5, 4]]
    assert found.weight is None
    assert found.metrics["pairs"] == 2
    assert found.metrics["pair_margin"] == pytest.approx((0.8 + 5) / 2)
    assert found.metrics["pair_margin_p50"] == pytest.approx((0.8 + 5) / 2)


def test_several_rewards_rank_by_their_weighted_sum():
    found = OnlineDPO().select(scored([0.0, 1.0], [1.0, 0.0], weights=(1.0, 3.0), group=[0, 0]), ANY)
    assert found.places.tolist() == [[0, 1]]
    assert found.metrics["pair_margin"] == pytest.approx(2)


def test_equal_scores_make_no_pair_and_are_counted():
    found = OnlineDPO().select(scored([0.5, 0.5, 0.5, 3.0, 2.0, 2.0]), ANY)
    assert found.places.tolist() == [[3, 4]]
    assert found.metrics["zero_std_ratio"] == found.metrics["tie_rate"] == 0.5
    both = OnlineDPO(pairs="all").select(scored([0.5, 0.5, 0.5, 3.0, 2.0, 2.0]), ANY)
    assert both.places.tolist() == [[3, 4], [3, 5]]
    assert both.metrics["tie_rate"] == pytest.approx(4 / 6)
    nothing = OnlineDPO().select(scored([1.0] * 4), ANY)
    assert nothing.places.shape == (0, 2)
    assert nothing.metrics["zero_std_ratio"] == 1


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.7, 5.0])
def test_all_pairs_are_those_above_the_margin_each_once_with_the_better_first(margin):
    total = torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 2, 2, 3, 3, 3])
    expected = {
        (i, j) for i in range(9) for j in range(9) if group[i] == group[j] and float(total[i] - total[j]) > margin
    }
    found = all_pairs(total, group, margin=margin)
    assert {tuple(p) for p in found.places.tolist()} == expected
    assert found.metrics["pairs"] == len(found.places) == len(expected)
    assert found.metrics["below_margin"] == pytest.approx(1 - len(expected) / 10)
    most = best_and_worst(total, group, margin=margin)
    assert {tuple(p) for p in most.places.tolist()} <= expected


def test_prompts_with_one_image_left_are_passed_over_and_a_round_of_them_is_refused():
    found = best_and_worst(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 1, 1]))
    assert found.places.tolist() == [[2, 1]]
    with pytest.raises(InputError, match="at least 2 images of a prompt, got 1 of each of 3 prompts"):
        OnlineDPO().select(scored([1.0, 2.0, 3.0], group=[0, 1, 2]), ANY)
    with pytest.raises(InputError, match=r"must be finite, got NaN or infinity for images \[1\] of 4"):
        OnlineDPO().select(scored([1.0, math.nan, 3.0, 4.0]), ANY)


def test_the_order_of_prompts_does_not_change_the_pairs():
    total, group = torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([5, 5, 1, 1])
    assert {tuple(p) for p in best_and_worst(total, group).places.tolist()} == {(0, 1), (3, 2)}


# --- the loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"link": losses.ipo},
        {"link": losses.bco_pair},
        {"safeguard": Safeguard(mu=0.5)},
        {"share_noise": False},
        {"error_space": "x0"},
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_the_loss_on_a_pair_is_that_of_diffusion_dpo(prediction, options):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    found = OnlineDPO(beta=300.0, **options)(policy, reference, batch, RNG, Shared())
    expected = DiffusionDPO(beta=300.0, **options)(policy, reference, batch, RNG, Shared())
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=0)
    assert found.metrics.keys() == expected.metrics.keys()
    assert (found.rewards is None) == (expected.rewards is None)
    grads = [torch.autograd.grad(o.loss.mean(), list(policy.net.parameters())) for o in (found, expected)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, atol=0, rtol=0)


def test_ipo_is_dpo_plus_the_winners_own_error():
    """online.md 10.2: L = L_DPO + lambda_1 e(w), so that e(w) has slope -beta / 2 * weight of the pair + lambda_1."""
    batch = exact()
    policy = planted((0.100, 0.120), batch.x_w, batch.x_l)
    reference = planted((0.101, 0.119), batch.x_w, batch.x_l)
    out = OnlineDPO(beta=5000.0, winner_weight=3.0)(policy, reference, batch, RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), 0.006715348489118 + 0.3).double(), atol=3e-8, rtol=0)
    slopes = torch.autograd.grad(out.loss.sum(), policy.errors)[0]
    signed = torch.tensor([16.732127310712 + 3.0] * 4 + [-16.732127310712] * 4).double()
    torch.testing.assert_close(slopes, signed, atol=0, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_equal_policy_and_reference_have_loss_log_2_and_the_winners_error(prediction):
    policy, reference, batch = toy(prediction), toy(prediction), pairs()
    out = OnlineDPO(winner_weight=0.5)(policy, reference, batch, RNG)
    torch.testing.assert_close(out.loss, math.log(2) + 0.5 * out.metrics["err_w"])
    assert out.metrics["rewards/margins"].abs().max() == 0
    assert all(m.shape == (4,) and not m.requires_grad for m in out.metrics.values())
    out.loss.mean().backward()
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_the_winners_error_falls_further_with_a_weight_of_its_own(prediction):
    moved = {}
    for weight in (0.0, 20.0):
        policy, reference, batch = toy(prediction), toy(prediction), pairs()
        method = OnlineDPO(beta=10.0, winner_weight=weight)
        before = method(policy, reference, batch, RNG)
        before.loss.mean().backward()
        with torch.no_grad():
            for p in policy.net.parameters():
                p -= 1e-3 * p.grad
        after = method(policy, reference, batch, RNG)
        assert after.loss.mean() < before.loss.mean()
        moved[weight] = pair_errors(policy, None, batch, RNG).err_w.mean().item()
    assert moved[20.0] < moved[0.0]


# --- contracts and bad input


def test_it_asks_for_pairs_of_groups_against_any_reference():
    method = OnlineDPO()
    assert isinstance(method, OnlineMethod)
    assert (method.needs.data, method.needs.items, method.needs.group_at_least) == ("prompts", "pairs", 2)
    assert method.needs.references == ("start", "pool", "ema")
    assert not method.needs.scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0"),
        ({"beta": math.inf}, r"method\.beta must be positive, got inf"),
        ({"margin": -0.1}, r"method\.margin must be at least 0, got -0\.1"),
        ({"winner_weight": -1.0}, r"method\.winner_weight must be at least 0, got -1"),
        ({"winner_weight": math.nan}, r"method\.winner_weight must be at least 0, got nan"),
        ({"safeguard": Safeguard(mu=0.5), "share_noise": False}, r"method\.safeguard must be left out"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        OnlineDPO(**options)


def test_pairs_are_pure():
    given = scored([0.1, 0.9, 0.5, 3.0, 2.0, 7.0])
    kept = replace(given, scores={k: v.clone() for k, v in given.scores.items()})
    first, second = (OnlineDPO(pairs="all").select(given, ANY) for _ in range(2))
    assert torch.equal(first.places, second.places)
    assert all(torch.equal(given.scores[k], kept.scores[k]) for k in kept.scores)
