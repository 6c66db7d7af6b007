"""SmPO: reference values of the weight, what the judge decides, and the ReNoise inversion beneath."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods import smpo
from diffalign.methods.inpo import InPO
from diffalign.methods.measure import PairErrors
from diffalign.methods.smpo import SmPO, smooth_weight
from diffalign.rng import SampleRng
from tests.toys import pairs, swapped, toy

RNG = SampleRng(0, (0, 1, 2, 3))
PREDICTIONS = ["epsilon", "v_prediction", "velocity"]
PICKSCORE = {"low": 0.115435265, "high": 0.282015711, "gamma": 10.0}


def weight(score_w: float, score_l: float) -> float:
    w, lo = (torch.tensor([s], dtype=torch.float64) for s in (score_w, score_l))
    return smooth_weight(w, lo, **PICKSCORE).item()


def test_the_weight_matches_the_reference_values():
    assert weight(0.22, 0.20) == pytest.approx(0.599590474, abs=1e-9)
    assert weight(PICKSCORE["high"], PICKSCORE["low"]) == pytest.approx(4.621171573, abs=1e-9)
    p = (weight(0.22, 0.20) / PICKSCORE["gamma"] + 1) / 2
    assert p == pytest.approx(0.529979524, abs=1e-9)


def test_defaults_are_the_published_ones():
    method = SmPO()
    assert (method.score_min, method.score_max, method.gamma) == tuple(PICKSCORE.values())
    assert (method.levels, method.beta, method.ladder.noise_scale, method.ladder.renoise) == (5, 2000.0, 0.0, True)
    assert method.needs.scores


def test_equal_scores_have_loss_log_2_and_no_gradient():
    policy, batch = toy(seed=1), pairs()
    out = SmPO(beta=50.0)(policy, toy(), replace(batch, score_l=batch.score_w), RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)))
    out.loss.mean().backward()
    assert all(p.grad.abs().max() == 0 for p in policy.net.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equal_policy_and_reference_have_loss_log_2_and_a_gradient(prediction):
    policy, reference = toy(prediction), toy(prediction)
    out = SmPO()(policy, reference, pairs(), RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)))
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_judge_decides_so_swapping_images_and_scores_changes_nothing(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    there = SmPO(beta=50.0)(policy, reference, batch, RNG)
    back = SmPO(beta=50.0)(policy, reference, swapped(batch), RNG)
    torch.testing.assert_close(there.loss, back.loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(there.metrics["smooth_weight"], -back.metrics["smooth_weight"])


def test_every_pair_has_the_weight_of_its_own_scores():
    batch = pairs()
    out = SmPO()(toy(), toy(), batch, RNG).metrics["smooth_weight"]
    assert out.tolist() == pytest.approx(
        [weight(w, lo) for w, lo in zip(batch.score_w.tolist(), batch.score_l.tolist(), strict=True)], rel=1e-5
    )
    assert len(set(out.tolist())) == 4


def planted(errors):
    """In place of the inversion: errors that the test knows, one pair."""
    names = ("err_w", "err_l", "err_ref_w", "err_ref_l")
    fields = dict(zip(names, (e.reshape(1) for e in errors), strict=True))
    return lambda *args: PairErrors(noise_level=torch.tensor([0.5]), **fields)


def scored(score_w: float, score_l: float):
    w, lo = (torch.tensor([s], dtype=torch.float64) for s in (score_w, score_l))
    return replace(pairs(1), score_w=w, score_l=lo)


def test_the_loss_is_the_softplus_of_the_weighted_change_of_errors(monkeypatch):
    errors = torch.tensor([0.100, 0.120, 0.101, 0.119], dtype=torch.float64)
    monkeypatch.setattr(smpo, "inverted_errors", planted(errors))
    loss = SmPO(beta=5000.0)(toy(), toy(), scored(0.22, 0.20), SampleRng(0, (0,))).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(0.599590474 * 2500 * -0.002)), abs=1e-8)
    sure = SmPO(beta=5000.0, gamma=1.0)(toy(), toy(), scored(20.0, 0.0), SampleRng(0, (0,))).loss.item()
    assert sure == pytest.approx(0.006715348489118, abs=1e-12)  # gamma 1 and p 1: Diffusion-DPO


def test_the_gradient_of_the_loss_is_right(monkeypatch):
    def loss(errors):
        monkeypatch.setattr(smpo, "inverted_errors", planted(errors))
        return SmPO(beta=50.0)(toy(), toy(), scored(0.24, 0.20), SampleRng(0, (0,))).loss

    errors = torch.tensor([0.10, 0.12, 0.11, 0.119], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, errors)
    grad = torch.autograd.grad(loss(errors).sum(), errors)[0]
    assert grad[0] > 0 > grad[1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_latents_are_those_of_inpo_with_two_calls_a_move(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    ours = SmPO(levels=5)(policy, reference, batch, RNG).metrics
    theirs = InPO(levels=5)(policy, reference, batch, RNG).metrics
    assert torch.equal(ours["forwards"], 2 * theirs["forwards"])
    assert not torch.allclose(ours["err_w"], theirs["err_w"])


def test_a_batch_without_scores_is_one_clear_error():
    with pytest.raises(InputError, match=r"data\.path must have score columns for this method"):
        SmPO()(toy(), toy(), replace(pairs(), score_w=None, score_l=None), RNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"method\.beta must be positive, got -1\.0"),
        ({"gamma": 0.0}, r"method\.gamma must be positive, got 0\.0"),
        ({"levels": 0}, r"method\.levels must be at least 1, got 0"),
        ({"score_min": 0.3}, r"method\.score_max must be greater than score_min, got 0\.282015711 and 0\.3"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        SmPO(**options)
