"""CRD: a finite goal, centring by weights and over processes, and the two losses."""

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.crd import CRD, centres, match
from diffalign.types import Shared
from tests.forward import ADVANTAGE, RNG, apart, at_old, flat_gradient, own
from tests.toys import toy


def test_at_the_old_policy_the_loss_is_the_squared_centred_reward():
    out, _ = at_old(CRD(beta=2.0))
    torch.testing.assert_close(out.loss, 5 / 2 * (ADVANTAGE / 10).square())
    shifted, _ = at_old(CRD(beta=2.0), advantage=ADVANTAGE + 1)
    torch.testing.assert_close(shifted.loss, out.loss)


def test_a_constant_of_the_prompt_is_taken_away_from_implicit_rewards():
    implicit, value = torch.tensor([0.3, -0.1, 0.2]), torch.tensor([0.9, 0.5, 0.1])
    centre, centre_value = centres(implicit, value, 0.0)
    moved, _ = centres(implicit + 7, value, 0.0)
    torch.testing.assert_close(implicit - centre, implicit + 7 - moved)
    assert centre_value.item() == pytest.approx(0.5)


@pytest.mark.parametrize("slope", [0.0, 2.0, -2.0, 100.0, -100.0])
def test_centres_are_means_by_softmax(slope):
    implicit, value = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    p = torch.softmax(slope * value, dim=0)
    centre, centre_value = centres(implicit, value, slope)
    torch.testing.assert_close(centre, p @ implicit)
    torch.testing.assert_close(centre_value, p @ value)


def test_centres_are_those_of_all_processes():
    implicit, value = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    sums = []
    for rows in (slice(0, 2), slice(2, 6)):
        centres(implicit[rows], value[rows], 3.0, reduce=lambda x: (sums.append(x), x)[1])
    together = centres(implicit[:2], value[:2], 3.0, reduce=lambda _: sums[0] + sums[1])
    torch.testing.assert_close(together, centres(implicit, value, 3.0))


def test_two_temperatures_pull_from_both_sides():
    plain, _ = at_old(CRD())
    sided, policy = at_old(CRD(temperature=0.5))
    assert (sided.loss > plain.loss).sum() >= 2
    assert torch.isfinite(flat_gradient(sided.loss.sum(), policy.net)).all()
    warm, _ = at_old(CRD(temperature=1e4))
    torch.testing.assert_close(warm.loss, plain.loss, atol=1e-5, rtol=1e-3)


def test_a_temperature_is_the_mean_of_pulling_toward_good_images_and_away_from_bad_ones():
    out, _ = apart(CRD(temperature=0.3, beta=2.0, kl_weight=0.0))
    implicit, value = out.metrics["implicit"].double(), 0.5 + ADVANTAGE.double() / 10
    expected = torch.zeros(4, dtype=torch.float64)
    for weight in (torch.softmax(value / 0.3, 0), torch.softmax(-value / 0.3, 0)):
        expected += 0.5 * (2 * (implicit - weight @ implicit) - (value - weight @ value)).square()
    torch.testing.assert_close(out.loss.double(), 5 / 2 * expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_least_where_implicit_rewards_are_the_rewards():
    value = torch.tensor([0.4, -0.1, -0.3], dtype=torch.float64)
    assert match(value, value, "mse").tolist() == [0.0] * 3
    implicit = value.sigmoid().logit().requires_grad_()
    grad = torch.autograd.grad(match(implicit, value, "bce").sum(), implicit)[0]
    assert grad.abs().max() < 1e-12
    assert (match(implicit + 0.1, value, "bce") > match(implicit, value, "bce")).all()


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_both_losses_pull_good_images_in(loss):
    out, policy = at_old(CRD(loss=loss, kl_weight=0.0))
    assert torch.isfinite(flat_gradient(out.loss.sum(), policy.net)).all()
    assert torch.equal(out.metrics["implicit"], torch.zeros(4))


def test_without_omega_implicit_rewards_are_plain_differences_of_errors():
    out, _ = apart(CRD(adaptive=False))
    torch.testing.assert_close(out.metrics["implicit"], out.metrics["err_old"] - out.metrics["err"])


def test_the_old_policy_follows_as_published():
    method = CRD()
    assert [method.old_decay(step) for step in (0, 10, 1000)] == pytest.approx([0.25, 0.3, 0.999])
    assert not method.old_samples(0)
    assert method.needs.batch_statistics
    assert method.passes(10) == 9


def test_it_asks_for_the_old_policy():
    policy = toy("velocity")
    with pytest.raises(InputError, match=r"shared\.old must be the old policy for method 'crd'"):
        CRD()(policy, policy, own(), RNG)
    with pytest.raises(InputError, match=r"batch\.advantage must be given for method 'crd'"):
        CRD()(policy, policy, own(advantage=None), RNG, Shared(old=policy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"temperature": 0.0}, r"method\.temperature must be at least 0\.01, got 0\.0"),
        ({"kl_weight": -1.0}, r"method\.kl_weight must be at least 0, got -1\.0"),
        ({"level_fraction": 2.0}, r"method\.level_fraction must be in \(0, 1\], got 2\.0"),
        ({"level_count": 0}, r"method\.level_count must be at least 1, got 0"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CRD(**options)
