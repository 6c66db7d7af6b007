"""What holds for every method that noises its own samples: gradients at the old policy, small steps, KL, metrics."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffalign import losses, paths
from diffalign.methods.awm import AWM
from diffalign.methods.crd import CRD
from diffalign.methods.dgpo import DGPO
from diffalign.methods.diffusion_nft import DiffusionNFT
from diffalign.sampling.schedule import flow_schedule, vp_schedule
from diffalign.types import FollowsOld, OnlineMethod, Shared, TrainsAtLevels
from tests.forward import ADVANTAGE, PREDICTIONS, RNG, Given, apart, at_old, drawn, flat_gradient, native_errors, own
from tests.toys import sd_alpha_bar, toy


def nft_factor(policy, batch, method):
    """Squared x_0 error by native error, over omega."""
    _, target, pred = drawn(policy, batch, method)
    factor = paths.error_factor(policy.path, policy.prediction, method.error_space, batch.t)
    return factor.sqrt() / (pred - target).abs().mean((1, 2, 3))


def awm_factor(policy, batch, method):
    """w phi' / 5 of ghuber, t e^(p - 1)."""
    return policy.path.coefficients(batch.t)[1] * native_errors(policy, batch, method) ** -0.75 / 5


FAMILY: dict[str, tuple[Any, Any]] = {
    "diffusion_nft": (DiffusionNFT(), nft_factor),
    "diffusion_nft native": (DiffusionNFT(error_space="native"), nft_factor),
    "awm": (AWM(), awm_factor),
    "awm off policy": (AWM(off_policy=True, clip=1.0), awm_factor),
    "dgpo": (DGPO(), lambda policy, batch, method: torch.full((4,), 0.5)),
    "crd": (CRD(), nft_factor),
}
"""Methods, and what A grad e is multiplied by at the old policy."""
METHODS = [method for method, _ in FAMILY.values()]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", FAMILY)
def test_at_the_old_policy_each_images_gradient_is_its_advantage_times_that_of_its_error(name, prediction):
    method, factor = FAMILY[name]
    out, policy = at_old(method, prediction)
    err = native_errors(policy, own(prediction), method)
    expected = factor(policy, own(prediction), method).detach()
    for i, advantage in enumerate(ADVANTAGE):
        got, grad = flat_gradient(out.loss[i], policy.net), flat_gradient(err[i], policy.net)
        assert torch.cosine_similarity(got, advantage.sign() * grad, dim=0) > 1 - 1e-5
        torch.testing.assert_close(got.norm(), (advantage.abs() * expected[i] * grad.norm()), atol=0, rtol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_a_small_step_lowers_the_errors_of_good_images_and_raises_those_of_bad_ones(method, prediction):
    batch, base = own(prediction), toy(prediction)
    _, target, pred = drawn(base, batch, method)
    free = pred.detach().clone().requires_grad_()
    policy = Given(pred=free, path=base.path, prediction=base.prediction)
    old = replace(policy, pred=pred.detach())
    loss = method(policy, old, batch, RNG, Shared(old=old)).loss.mean()
    (grad,) = torch.autograd.grad(loss, free)
    change = losses.squared_error(free - 1e-3 * grad, target) - losses.squared_error(pred, target)
    assert (change * ADVANTAGE < 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_a_step_of_the_whole_network_lowers_the_error_of_a_good_image_and_raises_that_of_a_bad_one(method, prediction):
    for sign in (1.0, -1.0):
        out, policy = at_old(method, prediction)
        row = 0 if sign > 0 else 3
        before = native_errors(policy, own(prediction), method)[row]
        grads = torch.autograd.grad(out.loss[row], list(policy.net.parameters()))
        with torch.no_grad():
            for p, g in zip(policy.net.parameters(), grads, strict=True):
                p -= 1e-3 * g
        after = native_errors(policy, own(prediction), method)[row]
        assert (after < before) == (sign > 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_losses_and_metrics_are_one_number_an_image_detached_and_finite(method, prediction):
    out, policy = apart(method, prediction)
    assert out.loss.shape == (4,)
    assert out.loss.requires_grad
    named = {"policy_loss", "kl_div", "old_kl_div", "old_deviate", "x0_norm", "norm_ratio", "err_pos", "err_old_neg"}
    assert named <= set(out.metrics)
    for name, value in out.metrics.items():
        assert value.shape == (4,), name
        assert not value.requires_grad, name
        assert torch.isfinite(value).all(), name
    assert torch.equal(out.noise_level, policy.path.noise_level(own(prediction).t).float())
    assert torch.isfinite(flat_gradient(out.loss.sum(), policy.net)).all()


@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_the_kl_adds_its_weight_times_the_squared_distance_from_the_reference(method):
    heavier, _ = apart(replace(method, kl_weight=method.kl_weight + 0.5))
    out, _ = apart(method)
    torch.testing.assert_close(heavier.loss - out.loss, 0.5 * out.metrics["kl_div"], atol=1e-5, rtol=1e-4)
    at_ref, _ = at_old(method)
    assert at_ref.metrics["kl_div"].abs().max() == 0


@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_reference_and_old_policy_are_not_trained(method):
    policy, reference, old = (toy("velocity", seed=seed) for seed in range(3))
    method(policy, reference, own(), RNG, Shared(old=old)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for model in (reference, old) for p in model.net.parameters())


@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_the_order_of_the_batch_does_not_matter(method):
    batch = own()
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(batch, x_0=batch.x_0[order], cond=batch.cond.rows(order), advantage=ADVANTAGE[order],
                    t=batch.t[order], samples=tuple(batch.samples[i] for i in order))  # fmt: skip
    policy, reference, old = (toy("velocity", seed=seed) for seed in range(3))
    one = method(policy, reference, batch, RNG, Shared(old=old)).loss
    two = method(policy, reference, moved, replace(RNG, samples=moved.samples), Shared(old=old)).loss
    torch.testing.assert_close(one[order], two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_it_keeps_the_contracts_of_online_methods(method):
    assert all(isinstance(method, face) for face in (OnlineMethod, FollowsOld, TrainsAtLevels))
    assert (method.needs.data, method.needs.items, method.needs.old) == ("prompts", "images", True)
    assert method.needs.group_at_least == 2
    assert all(0 <= method.old_decay(step) < 1 for step in (0, 1, 10, 10**6))


@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
@pytest.mark.parametrize("moves", [8, 10, 14, 40])
def test_levels_are_moves_of_the_walk_and_as_many_as_passes(method, moves):
    for seed in range(20):
        levels = method.train_levels(moves, torch.Generator().manual_seed(seed))
        assert len(levels) == method.passes(moves) == len(set(levels))
        assert all(0 <= level < moves - 1 for level in levels)
    again = method.train_levels(moves, torch.Generator().manual_seed(19))
    assert again == levels
    assert replace(method, levels="path").train_levels(moves, torch.Generator()) is None


def walk(prediction):
    """Ten moves of SD's DDIM, or of a flow with shift 3 from pure noise on."""
    if prediction == "velocity":
        u = 1 - torch.arange(11) / 10
        return flow_schedule(3 * u / (1 + 2 * u))
    t, alpha_bar = torch.arange(901, 0, -100), sd_alpha_bar()
    s = (t - 100).clamp(min=0)
    return vp_schedule(t, s, alpha_bar[t], alpha_bar[s], prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("method", METHODS, ids=list(FAMILY))
def test_every_level_of_a_walk_can_be_trained_pure_noise_included(method, prediction):
    schedule = walk(prediction)
    assert len(schedule) == 10
    for level in range(10):
        out, policy = apart(method, prediction, t=schedule.moves.t[level].repeat(4))
        assert torch.isfinite(out.loss).all()
        assert torch.isfinite(flat_gradient(out.loss.sum(), policy.net)).all()
