"""DGPO: reference values of the group's contrast, its gradient against the full loss, groups, clipping by the EMA."""

from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.dgpo import DGPO, beyond, group_contrast
from diffalign.types import Shared
from tests.forward import RNG, apart, flat_gradient, own
from tests.test_measure import planted
from tests.toys import toy

ADVANTAGE = torch.tensor([1.2, 0.1, -0.4, -0.9], dtype=torch.float64)
ERR = torch.tensor([0.49, 0.52, 0.49, 0.50], dtype=torch.float64)
ERR_REF = torch.tensor([0.50, 0.52, 0.48, 0.51], dtype=torch.float64)


def fixture(method, err=ERR, group=(0, 0, 0, 0), err_old=ERR):
    """(output, gradient of the summed loss by the policy's errors) at the errors of the worked example."""
    batch = own("epsilon", advantage=ADVANTAGE, group=group)
    batch = replace(batch, x_0=batch.x_0.double(), t=torch.tensor([901, 601, 301, 101]))
    policy, reference, old = (replace(planted((0.1,), batch.x_0), errors=e) for e in (err.clone().requires_grad_(),
                                                                                     ERR_REF, err_old))  # fmt: skip
    out = method(policy, reference, batch, RNG, Shared(old=old))
    return out, torch.autograd.grad(out.loss.sum(), policy.errors)[0]


def test_the_contrast_matches_the_reference_values():
    s = group_contrast(ADVANTAGE, ERR - ERR_REF, (5, 5, 5, 5), beta=100.0)
    torch.testing.assert_close(s, torch.full((4,), -0.175, dtype=torch.float64))
    assert s.sigmoid()[0].item() == pytest.approx(0.45636131, abs=5e-9)
    assert -torch.nn.functional.logsigmoid(-s)[0].item() == pytest.approx(0.60947043, abs=5e-9)


def test_the_loss_matches_the_reference_values():
    out, grad = fixture(DGPO(kl_weight=0.0))
    weight = 0.45636131
    close = {"atol": 1e-7, "rtol": 0}
    torch.testing.assert_close(out.loss, weight * ADVANTAGE * ERR, **close)
    torch.testing.assert_close(grad, weight * ADVANTAGE, **close)
    torch.testing.assert_close(out.metrics["group_weight"], torch.full_like(ERR, weight), **close)
    torch.testing.assert_close(out.metrics["group_loss"], torch.full_like(ERR, 0.60947043), **close)


def test_its_gradient_is_that_of_the_full_loss_divided_by_beta():
    err = ERR.clone().requires_grad_()
    s = group_contrast(ADVANTAGE, err - ERR_REF, (0, 0, 0, 0), beta=100.0)
    full = torch.autograd.grad(torch.nn.functional.softplus(s).mean(), err)[0]
    _, grad = fixture(DGPO(kl_weight=0.0, beta=100.0))
    torch.testing.assert_close(grad / 4, full / 100.0, atol=1e-9, rtol=1e-6)


def test_groups_do_not_see_each_other_and_may_differ_in_size():
    out, _ = fixture(DGPO(kl_weight=0.0), group=(9, 4, 9, 9))
    gap = ERR - ERR_REF
    nine = 100 * (ADVANTAGE * gap)[[0, 2, 3]].mean()
    four = 100 * ADVANTAGE[1] * gap[1]
    expected = torch.stack([nine, four, nine, nine]).sigmoid()
    torch.testing.assert_close(out.metrics["group_weight"], expected, atol=1e-9, rtol=0)


def test_a_well_ranked_group_is_left_alone():
    better, _ = fixture(DGPO(kl_weight=0.0, beta=1e4), err=ERR_REF - 0.1 * ADVANTAGE.sign())
    worse, _ = fixture(DGPO(kl_weight=0.0, beta=1e4), err=ERR_REF + 0.1 * ADVANTAGE.sign())
    assert better.metrics["group_weight"].max() < 1e-6
    assert worse.metrics["group_weight"].min() > 1 - 1e-6


def test_the_normaliser_of_a_group_cancels():
    """What is added to all errors of a group, as an unknown constant of its prompt would be, changes nothing."""
    one, _ = fixture(DGPO(kl_weight=0.0))
    two, _ = fixture(DGPO(kl_weight=0.0), err=ERR + 0.3)
    torch.testing.assert_close(one.metrics["group_weight"], two.metrics["group_weight"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("gain", "advantage", "stops"),
    [(0.02, 1.0, True), (0.005, 1.0, False), (-0.02, 1.0, False), (-0.02, -1.0, True), (0.02, -1.0, False),
     (0.5, 0.0, False), (0.0, 1.0, False)],
)  # fmt: skip
def test_the_gradient_stops_where_an_error_went_where_it_should_by_more_than_the_clip(gain, advantage, stops):
    assert beyond(torch.tensor([gain]), torch.tensor([advantage]), 0.01).item() == stops


def test_clipped_images_keep_their_value_and_lose_their_gradient():
    free, _ = fixture(DGPO(kl_weight=0.0, clip=None))
    out, grad = fixture(DGPO(kl_weight=0.0, clip=0.01), err_old=ERR + torch.tensor([0.02, 0.0, 0.02, -0.02]))
    torch.testing.assert_close(out.loss, free.loss)
    assert (grad == 0).tolist() == [True, False, False, True]
    assert out.metrics["clipfrac"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_the_kl_goes_on_beyond_the_clip_unless_it_is_stopped_too():
    far = ERR + torch.tensor([0.02, 0.0, 0.02, -0.02])
    _, without = fixture(DGPO(kl_weight=0.0), err_old=far)
    _, goes_on = fixture(DGPO(kl_weight=0.5), err_old=far)
    _, stopped = fixture(DGPO(kl_weight=0.5, clip_kl=True), err_old=far)
    assert (goes_on != without)[[0, 3]].all()
    assert (stopped == without)[[0, 3]].all()
    torch.testing.assert_close(stopped[1:3], goes_on[1:3])


def test_a_group_shares_its_noise():
    """Equal images of one prompt have equal errors then, and only then."""
    row = own()
    same = own(x_0=row.x_0[:1].repeat(4, 1, 1, 1), t=torch.full((4,), 0.5), group=(1, 1, 2, 2))
    same = replace(same, cond=row.cond.rows(torch.tensor([0, 0, 0, 0])))
    policy = toy("velocity")
    err = DGPO()(policy, policy, same, RNG, Shared(old=policy)).metrics["err"]
    assert err[0] == err[1]
    assert err[2] == err[3]
    assert err[0] != err[2]


def test_without_a_clip_no_old_policy_is_asked():
    method = DGPO(clip=None)
    assert not method.needs.old
    policy = toy("velocity", seed=1)
    out = method(policy, toy("velocity"), own(), RNG)
    assert torch.isfinite(flat_gradient(out.loss.sum(), policy.net)).all()
    assert "clipfrac" not in out.metrics


def test_the_old_policy_makes_the_images_once_it_is_told_to():
    method = DGPO(clip=None, old_samples_after=200)
    assert method.needs.old
    assert [method.old_samples(step) for step in (0, 199, 200)] == [False, False, True]
    assert not DGPO().old_samples(10**6)
    assert [method.old_decay(step) for step in (0, 100, 300, 5000)] == pytest.approx([0.0, 0.1, 0.3, 0.3])


def test_four_of_the_first_seven_levels_are_trained():
    method = DGPO()
    draws = [method.train_levels(10, torch.Generator().manual_seed(i)) for i in range(100)]
    assert {len(set(d)) for d in draws} == {4}
    assert {level for d in draws for level in d} == set(range(7))
    assert DGPO(level_count=2).passes(3) == 2
    with pytest.raises(InputError, match=r"method\.level_count must be at most 3, as many as there are moves that"):
        method.passes(3)


def test_it_needs_whole_groups_and_a_reference():
    assert DGPO().needs.whole_groups
    assert DGPO().needs.references == ("start", "ema")
    policy = toy("velocity")
    with pytest.raises(InputError, match=r"batch\.group must have 4 numbers, one an image, got None"):
        DGPO()(policy, policy, own(group=None), RNG, Shared(old=policy))


def test_losses_of_a_batch_of_two_groups_are_those_of_the_groups_alone():
    batch = own(group=(1, 1, 2, 2))
    together, _ = apart(DGPO(), group=(1, 1, 2, 2))
    models = [toy("velocity", seed=seed) for seed in range(3)]
    policy, reference, old = models[1], models[0], models[2]
    for first in (0, 2):
        rows = slice(first, first + 2)
        part = replace(batch, x_0=batch.x_0[rows], cond=batch.cond.rows(rows), advantage=batch.advantage[rows],
                       t=batch.t[rows], samples=batch.samples[rows], group=batch.group[rows])  # fmt: skip
        alone = DGPO()(policy, reference, part, replace(RNG, samples=part.samples), Shared(old=old))
        torch.testing.assert_close(alone.loss, together.loss[rows], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"clip": -0.1}, r"method\.clip must be positive, got -0\.1"),
        ({"clip": None, "clip_kl": True}, r"method\.clip_kl must be false without clip, got true"),
        ({"kl_weight": -1.0}, r"method\.kl_weight must be at least 0, got -1\.0"),
        ({"old_samples_after": -1}, r"method\.old_samples_after must be at least 0, got -1"),
        ({"level_first": 0}, r"method\.level_first must be at least 1, got 0"),
        ({"level_count": 0}, r"method\.level_count must be at least 1, got 0"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DGPO(**options)
