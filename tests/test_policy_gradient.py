"""Ratios, clips, masks and KLs of moves: reference values, and the policy gradient of whole chains in closed form."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffalign.advantages import advantages
from diffalign.methods.ddpo import DDPO
from diffalign.methods.policy_gradient import (
    clipped,
    evaluated,
    guarded_log_ratio,
    masked,
    reference_kl,
    slope,
)
from diffalign.paths import NoisePath, Prediction
from diffalign.rng import SampleRng
from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import noisy_steps
from diffalign.sampling.schedule import flow_schedule
from diffalign.sampling.transitions import kl_divergence, log_prob
from diffalign.sampling.walk import KernelWalk
from diffalign.types import Cond, Transition, TransitionBatch
from tests.moves import VP, moves, toy_for, walk_of
from tests.toys import ddpm, flow

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
"""Of the Euler-ancestral scheduler, which gives numpy a tensor."""

NOISY = [*VP, "flow_sde", "dance", "cps", "flow_ddim"]
EMPTY = Cond({})


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def straight(steps: int, name: str = "flow_sde", **options) -> KernelWalk:
    """A walk over evenly spaced levels of a flow."""
    schedule = flow_schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return KernelWalk(kernel=kernel(name, **options), schedule=schedule)


def analytic(**options) -> KernelWalk:
    """Ten moves, shift 3."""
    u = 1 - torch.arange(11, dtype=torch.float64) / 10
    return KernelWalk(kernel=kernel("flow_sde", **options), schedule=flow_schedule(3 * u / (1 + 2 * u)))


@dataclass(frozen=True)
class Linear:
    """A prediction linear in x_t, with one parameter to train; on flows the exact velocity of N(1, 0.25) and theta."""

    theta: Tensor
    path: NoisePath
    prediction: Prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.prediction != "velocity":
            return 0.3 * x_t + 0.1 + self.theta
        s = t.to(x_t).reshape(-1, 1, 1, 1)
        variance = 0.25 * (1 - s) ** 2 + s**2
        return (s - 0.25 * (1 - s)) / variance * (x_t - (1 - s)) - 1 + self.theta


def linear(name: str, theta: Tensor) -> Linear:
    return Linear(theta, *((ddpm(), "epsilon") if name in VP else (flow(), "velocity")))


# the clip and the mask


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [(1.0, 1.3, -1.2, 0.0), (1.0, 0.5, -0.5, -1.0), (-1.0, 0.5, 0.8, 0.0), (-1.0, 1.3, 1.3, 1.0)],
)
def test_the_clip_stops_moves_that_have_gone_far_enough_and_no_others(advantage, ratio, loss, gradient):
    log_ratio = wide(ratio).log().requires_grad_()
    found = clipped(log_ratio, wide(advantage), 0.2)
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    by_log = torch.autograd.grad(found.loss.sum(), log_ratio)[0].item()
    assert by_log / ratio == pytest.approx(gradient, abs=1e-12)
    assert found.ratio.item() == pytest.approx(ratio)
    assert found.outside.item()


def test_a_range_of_two_millionths_is_met_in_float32():
    log_ratio = torch.linspace(-4e-6, 4e-6, 81).requires_grad_()
    found = clipped(log_ratio, torch.ones(81), 2e-6)
    gradient = torch.autograd.grad(found.loss.sum(), log_ratio)[0]
    inside = log_ratio.detach().double() <= math.log1p(2e-6)
    assert torch.equal(gradient != 0, inside)
    assert torch.equal(found.outside, log_ratio.detach().double().expm1().abs() > 2e-6)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "kl_old", "on"),
    [(1.0, 0.1, 2e-5, False), (1.0, 0.1, 0.5e-5, True), (1.0, -0.1, 2e-5, True), (-1.0, -0.1, 1e-5, False),
     (-1.0, 0.1, 2e-5, True), (0.5, 0.0, 2e-5, True)],
)  # fmt: skip
def test_the_mask_drops_a_move_that_is_far_and_would_go_further(advantage, log_ratio, kl_old, on):
    x = wide(log_ratio).requires_grad_()
    found = masked(x, wide(advantage), wide(kl_old), 1e-5)
    expected = -advantage * math.exp(log_ratio) if on else 0.0
    assert found.loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(found.loss.sum(), x)[0].item() == pytest.approx(expected)
    assert found.outside.item() is not on


# one move in one dimension


def test_the_gradient_of_one_gaussian_move_has_the_reference_value():
    theta = wide(0.2).requires_grad_()
    x, scores = wide(0.7, -0.1, 0.4, 0.0)[:, None], wide(1, -1, 2, 0)
    now = log_prob(Transition(theta.expand(4, 1), wide(0.5).expand(4)), x)
    found = clipped(now - now.detach(), advantages(scores, torch.zeros(4, dtype=torch.long), "group"), 0.2)
    assert torch.autograd.grad(found.loss.mean(), theta)[0].item() == pytest.approx(-0.9837819180, abs=1e-9)


def test_a_ratio_is_biased_below_1_by_a_move_and_the_guard_takes_the_bias_out():
    noise = wide(1.0, -1.0)[:, None]  # of the moments of the normal that matter here
    old, new = (
        Transition(torch.zeros(2, 1).double(), wide(0.3, 0.3)),
        Transition(wide(0.05, 0.05)[:, None], wide(0.3, 0.3)),
    )
    x_s = old.sample(noise)
    log_ratio = log_prob(new, x_s) - log_prob(old, x_s)
    assert log_ratio.mean().item() == pytest.approx(-0.0138889, abs=1e-7)
    assert guarded_log_ratio(new, old.mean, x_s).mean().item() == pytest.approx(0, abs=1e-12)


def test_the_guarded_ratio_has_the_reference_values():
    x_s = wide(0.3, -0.15, 0.6)[None]
    old, new = (
        Transition(torch.zeros(1, 3).double(), wide(0.3)),
        Transition(torch.full((1, 3), 0.05, dtype=torch.float64), wide(0.3)),
    )
    gap = (log_prob(new, x_s) - log_prob(old, x_s)).item()
    found = guarded_log_ratio(new, old.mean, x_s).item()
    assert gap == pytest.approx(0.125, abs=1e-9)
    assert found == pytest.approx(0.0416667, abs=1e-7)
    assert math.exp(found) == pytest.approx(1.0425470, abs=1e-7)


def test_the_guarded_log_ratio_is_the_plain_one_without_bias_times_std_and_the_mean_of_noise_times_the_move():
    rng = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(5, 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(3))
    a.requires_grad_()
    old, new = Transition(b, wide(0.1, 0.3, 0.5, 0.7, 0.9)), Transition(b + 0.01 * a, wide(0.1, 0.3, 0.5, 0.7, 0.9))
    x_s = old.sample(noise)
    by_paper = (log_prob(new, x_s) - log_prob(old, x_s) + kl_divergence(new, old)) * old.std
    found = guarded_log_ratio(new, old.mean, x_s)
    torch.testing.assert_close(found, by_paper, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, (noise * 0.01 * a).flatten(1).mean(1), atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(v.sum(), a, retain_graph=True)[0] for v in (found, by_paper)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


# KL to a reference


def constant(v: float) -> Linear:
    """A velocity that is the same everywhere."""

    @dataclass(frozen=True)
    class Constant(Linear):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return torch.full_like(x_t, v)

    return Constant(wide(v), flow(), "velocity")


def test_the_three_forms_of_the_kl_have_the_reference_values():
    walk, step = analytic(), torch.tensor([5])
    x = torch.full((1, 1, 2, 2), 0.8, dtype=torch.float64)
    p, q = (walk.transition(constant(v), x, step, EMPTY) for v in (-0.4, -0.3))
    batch = TransitionBatch(
        x_t=x, x_s=x, step=step, log_prob_old=wide(0), advantage=wide(0), cond=EMPTY, walk=walk, samples=(0,)
    )
    exact, theirs, mse = (reference_kl(f, p, q, batch, constant(0)).item() for f in ("exact", "flow_grpo", "v_mse"))
    assert exact == pytest.approx(0.00043934949, rel=1e-6)
    assert theirs == pytest.approx(0.0000366124575, rel=1e-6)
    assert theirs / exact == pytest.approx(1 / 12, rel=1e-6)
    assert mse == pytest.approx(0.01, rel=1e-6)
    sigma, dt, g = 0.75, -1 / 12, 0.7 * math.sqrt(3)
    assert exact == pytest.approx(-dt / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2 * 0.1**2, rel=1e-6)


@pytest.mark.parametrize("name", NOISY)
def test_the_form_on_predictions_is_their_squared_difference_on_every_walk(name):
    policy, start = toy_for(name), toy_for(name, seed=1)
    walk = walk_of(name)
    batch = moves(policy, walk)
    p, q = (walk.transition(model, batch.x_t, batch.step, batch.cond) for model in (policy, start))
    move = walk.schedule.step(batch.step)
    seen = [model(move.seen(batch.x_t), move.t, batch.cond) for model in (policy, start)]
    expected = (seen[0] - seen[1]).square().flatten(1).mean(1)
    found = reference_kl("v_mse", p, q, batch, policy)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-3)  # small differences of float32 means


# the chain of moves


@pytest.mark.parametrize(
    ("steps", "whole", "without_last"), [(4, -0.7361973, -0.4249473), (10, -0.8167579, -0.6922579)]
)
def test_the_policy_gradient_of_a_flow_has_the_reference_values(steps, whole, without_last):
    walk = straight(steps, last="noise")
    assert chain_gradient(walk, range(steps)) == pytest.approx(whole, abs=1e-7)
    assert chain_gradient(walk, range(steps - 1)) == pytest.approx(without_last, abs=1e-7)


def test_moves_of_that_flow_have_the_reference_slopes_and_noise():
    walk = straight(4, last="noise")
    policy = linear("flow_sde", torch.zeros(()))
    found = slope(walk, torch.arange(4), policy)
    torch.testing.assert_close(found, torch.tensor([-0.25, -0.31125, -0.31125, -0.31125]), atol=1e-6, rtol=0)
    torch.testing.assert_close(walk.stds, torch.tensor([0.7, 0.606218, 0.35, 0.202073]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NOISY)
def test_the_loss_has_the_policy_gradient_of_the_expected_reward_on_every_walk(name):
    walk = walk_of(name, 6, **({"form": "normal"} if name == "cps" else {}))
    noisy = noisy_steps(walk.kernel, walk.schedule)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)  # a linear chain: the mean of its end is the end of its means
    for i in range(6):
        moved = linear(name, theta if i in noisy else theta.detach())
        x = walk.transition(moved, x, torch.tensor([i]), EMPTY).mean
    expected = torch.autograd.grad(x.sum(), theta)[0].item()
    assert chain_gradient(walk, noisy) == pytest.approx(expected, rel=1e-6)


def chain_gradient(walk: KernelWalk, trained: range | tuple[int, ...]) -> float:
    """Of the mean of x_0, as the loss on `trained` moves has it at the policy that made them.

    x_0 and the scores are linear in the noises, so any noise with the normal's first two moments gives the exact
    expectation: plus and minus sqrt(d) along each of d axes.
    """
    name = walk.kernel.name
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    policy = linear(name, theta)
    axes = len(walk.schedule) + 1
    points = math.sqrt(axes) * torch.cat([torch.eye(axes), -torch.eye(axes)]).double()
    x, kept, size = points[:, 0].reshape(-1, 1, 1, 1), [], len(points)
    cond = Cond({"c": torch.zeros(size, 1)})
    with torch.no_grad():
        for i in range(len(walk.schedule)):
            step = torch.full((size,), i)
            move = walk.transition(policy, x, step, cond)
            x_s = move.sample(points[:, i + 1].reshape(-1, 1, 1, 1))
            if i in trained:
                kept.append((x, x_s, step, walk.log_prob(move, x_s)))
            x = x_s
    x_t, x_s, step, old = (torch.cat(column) for column in zip(*kept, strict=True))
    reward = x.flatten()
    batch = TransitionBatch(
        x_t=x_t,
        x_s=x_s,
        step=step,
        log_prob_old=old,
        advantage=(reward - reward.mean()).repeat(len(kept)),
        cond=cond.repeat(len(kept)),
        walk=walk,
        samples=tuple(range(len(step))),
    )
    loss = DDPO()(policy, None, batch, SampleRng(0, batch.samples)).loss
    return -torch.autograd.grad(loss.sum() / size, theta)[0].item()


# the walk


@pytest.mark.parametrize("name", NOISY)
def test_a_rollouts_own_moves_have_ratio_1_exactly(name):
    policy, walk = toy_for(name), walk_of(name)
    for i in noisy_steps(walk.kernel, walk.schedule):
        batch = moves(policy, walk, [i])
        now = evaluated(policy, batch)
        assert torch.equal(now.log_prob, batch.log_prob_old)
        assert torch.equal(clipped(now.log_ratio, batch.advantage, 1e-4).ratio, torch.ones(4))
        assert torch.equal(guarded_log_ratio(now.transition, batch.mean_old, batch.x_s), torch.zeros(4))


def test_the_odds_of_a_level_are_finite_at_pure_noise():
    walk = analytic()
    sigma = walk.schedule.moves.sigma_t
    found = walk.odds(torch.arange(10)).double()
    torch.testing.assert_close(found[1:], sigma[1:] / (1 - sigma[1:]), atol=0, rtol=1e-6)
    assert found[0].item() == pytest.approx(1 / (1 - 0.9642857), rel=1e-5)
