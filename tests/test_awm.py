"""AWM: reference values of the weightings, the ratio on and off policy, both KLs, which levels are drawn."""

from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.awm import AWM, stratified, surrogate, weighted_error
from diffalign.types import Shared
from tests.forward import ADVANTAGE, RNG, apart, at_old, flat_gradient, own, scored
from tests.toys import toy


def number(value):
    return torch.tensor([value], dtype=torch.float64)


def test_ghuber_matches_the_reference_values():
    err = number(0.37).requires_grad_()
    value = weighted_error(err, number(0.6))
    assert value.item() == pytest.approx(1.8642201, abs=5e-8)
    assert torch.autograd.grad(value.sum(), err)[0].item() == pytest.approx(1.2647362, abs=5e-8)


@pytest.mark.parametrize(
    ("form", "expected"), [("uniform", 0.36), ("t", 0.216), ("t2", 0.1296), ("huber", 0.6 * (0.6 - 1e-5))]
)
def test_the_other_weightings_hold(form, expected):
    assert weighted_error(number(0.36), number(0.6), form).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("form", ["uniform", "t", "t2", "huber", "ghuber"])
def test_every_weighting_is_0_at_no_error_grows_with_it_and_has_a_finite_slope(form):
    err = torch.tensor([0.0, 1e-6, 0.1, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    value = weighted_error(err, torch.full_like(err, 0.5).detach(), form)
    assert value[0].item() == pytest.approx(0, abs=1e-12)
    assert (value.diff() > 0).all()
    grad = torch.autograd.grad(value.sum(), err)[0]
    assert torch.isfinite(grad).all()
    assert (grad > 0).all()


def test_ghuber_runs_from_t_to_twice_huber():
    err, t = torch.rand(8, dtype=torch.float64) + 0.01, torch.rand(8, dtype=torch.float64)
    torch.testing.assert_close(weighted_error(err, t, power=1.0), weighted_error(err, t, "t"))
    torch.testing.assert_close(weighted_error(err, t, power=0.5), 2 * weighted_error(err, t, "huber"))


def test_on_policy_the_ratio_is_1_wherever_the_policy_is():
    out, _ = apart(AWM(kl_weight=0.0, old_kl_weight=0.0))
    assert out.metrics["ratio"].tolist() == [1.0] * 4
    torch.testing.assert_close(out.loss, -ADVANTAGE / 5)


@pytest.mark.parametrize("weighting", ["uniform", "t2", "huber"])
def test_off_policy_the_ratio_is_of_the_old_policys_weighted_error(weighting):
    method = AWM(kl_weight=0.0, old_kl_weight=0.0, off_policy=True, weighting=weighting)
    out, _ = apart(method)
    gap = [weighted_error(out.metrics[name], own().t, weighting) for name in ("err_old", "err")]
    torch.testing.assert_close(out.metrics["ratio"], (gap[0] - gap[1]).exp(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.loss, -ADVANTAGE / 5 * out.metrics["ratio"], atol=1e-6, rtol=1e-5)
    assert method.old_samples(0)
    assert not AWM().old_samples(0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.05, 1.0, -1.05, -1.0),
        (1.3, 1.0, -1.1, 0.0),
        (0.7, 1.0, -0.7, -1.0),
        (1.3, -1.0, 1.3, 1.0),
        (0.7, -1.0, 0.9, 0.0),
    ],
)
def test_the_surrogate_stops_where_the_ratio_has_gone_far_enough(ratio, advantage, loss, slope):
    rho = number(ratio).requires_grad_()
    value = surrogate(rho, number(advantage), 0.1)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value.sum(), rho)[0].item() == pytest.approx(slope)


def test_the_old_policys_kl_is_weighed_apart():
    with_kl, _ = apart(AWM(kl_weight=0.0, old_kl_weight=2.0))
    without, _ = apart(AWM(kl_weight=0.0, old_kl_weight=0.0, off_policy=True))
    on, _ = apart(AWM(kl_weight=0.0, old_kl_weight=0.0))
    torch.testing.assert_close(with_kl.loss - on.loss, 2 * without.metrics["old_deviate"])


def test_the_gradient_follows_advantages_as_if_they_were_clipped_to_5():
    large, policy = at_old(AWM(), advantage=torch.tensor([50.0, 5.0, 5.0, -50.0]))
    five, again = at_old(AWM(), advantage=torch.tensor([5.0, 5.0, 5.0, -5.0]))
    grads = [flat_gradient(out.loss.sum(), p.net) for out, p in ((large, policy), (five, again))]
    assert torch.equal(*grads)


def test_the_old_policy_is_asked_only_where_it_enters():
    assert AWM().needs.old
    assert AWM(old_kl_weight=0.0, off_policy=True).needs.old
    alone = AWM(old_kl_weight=0.0)
    assert not alone.needs.old
    policy = toy("velocity", seed=1)
    assert "old_deviate" not in alone(policy, toy("velocity"), own(), RNG).metrics
    with pytest.raises(InputError, match=r"shared\.old must be the old policy for method 'awm'"):
        AWM()(policy, policy, own(), RNG)
    with pytest.raises(InputError, match=r"batch\.advantage must be given for method 'awm'"):
        AWM()(policy, policy, own(advantage=None), RNG, Shared(old=policy))


def test_levels_are_one_of_each_stretch_after_the_first_move():
    method = AWM()
    draws = torch.tensor([method.train_levels(14, torch.Generator().manual_seed(i)) for i in range(300)])
    assert method.passes(14) == 6
    assert draws.amin(0).tolist() == [1, 2, 4, 6, 8, 10]
    assert draws.amax(0).tolist() == [1, 3, 5, 7, 9, 11]
    with pytest.raises(InputError, match=r"method\.level_count must be at most 2, as many as there are moves after"):
        method.passes(4)


def test_stretches_of_one_are_all_of_them():
    assert stratified(1, 7, 6, torch.Generator()) == (1, 2, 3, 4, 5, 6)


def test_the_old_policy_follows_as_published():
    assert [AWM().old_decay(step) for step in (0, 100, 300, 5000)] == pytest.approx([0.0, 0.1, 0.3, 0.3])


def test_selection_leaves_out_prompts_without_spread():
    chosen = AWM().select(scored([2.0, 2.0, 1.0, 3.0], [0, 0, 1, 1]), torch.Generator())
    assert chosen.places.tolist() == [[2], [3]]
    assert chosen.weight[0] < 0 < chosen.weight[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -0.1}, r"method\.kl_weight must be at least 0, got -0\.1"),
        ({"old_kl_weight": -1.0}, r"method\.old_kl_weight must be at least 0, got -1\.0"),
        ({"power": 0.0}, r"method\.power must be in \(0, 1\], got 0\.0"),
        ({"power": 0.5, "weighting": "t"}, r"method\.power must be left out with weighting = 't', got 0\.5"),
        ({"clip": 0.0, "off_policy": True}, r"method\.clip must be positive, got 0\.0"),
        ({"clip": 1.0}, r"method\.clip must be left out without off_policy"),
        ({"level_fraction": 0.0}, r"method\.level_fraction must be in \(0, 1\], got 0\.0"),
        ({"level_count": 0}, r"method\.level_count must be at least 1, got 0"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AWM(**options)


def test_images_beyond_the_clip_are_counted():
    method = replace(AWM(), off_policy=True)
    gaps = (apart(method)[0].metrics["ratio"] - 1).abs()
    middle = gaps.sort().values[1:3].mean().item()
    out, _ = apart(replace(method, clip=middle))
    assert sorted(out.metrics["clipfrac"].tolist()) == [0.0, 0.0, 1.0, 1.0]
    assert out.metrics["clipfrac"].tolist() == (gaps > middle).float().tolist()


def test_the_weighting_is_ghuber_with_the_published_power():
    asked, _ = apart(AWM(weighting="ghuber", power=0.25, off_policy=True))
    left_out, _ = apart(AWM(off_policy=True))
    torch.testing.assert_close(left_out.loss, asked.loss)
