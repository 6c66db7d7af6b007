"""SePPO and SPIN-Diffusion: reference values, whose side the self-sampled image is on, and the special cases."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.measure import Safeguard
from diffalign.methods.seppo import SePPO, flip_sign
from diffalign.methods.spin import SPINDiffusion
from tests.test_measure import PREDICTIONS, RNG, exact, planted
from tests.toys import pairs, toy

R_R = 0.118
"""The reference's error on its own image; the policy's is 0.002 higher in the reference values."""


def step(method, m_w, r_w, m_r=R_R + 0.002, r_r=R_R):
    """(output, gradient of the summed loss by the policy's errors [2B]) at planted errors."""
    batch = exact()
    policy = planted((m_w, m_r), batch.x_w, batch.x_l)
    out = method(policy, planted((r_w, r_r), batch.x_w, batch.x_l), batch, RNG)
    return out, torch.autograd.grad(out.loss.sum(), policy.errors)[0]


@pytest.mark.parametrize(
    ("r_w", "u", "loss", "slope"),
    [(0.101, 3.0, 0.048587351574, -47.425873), (0.099, -3.0, 3.048587351574, 952.574127)],
    ids=["policy ahead", "reference ahead"],
)
def test_seppo_matches_the_reference_values(r_w, u, loss, slope):
    out, grad = step(SePPO(beta=2000.0), 0.100, r_w)
    torch.testing.assert_close(out.loss, torch.full((4,), loss, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        out.metrics["rewards/margins"], torch.full((4,), u, dtype=torch.float64), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(grad[4:], torch.full((4,), slope, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("mode", "expected"), [("sign", [1.0, 1.0, -1.0]), ("indicator", [1.0, 1.0, 0.0]), ("off", [1.0, 1.0, 1.0])]
)
def test_only_a_reference_that_is_strictly_ahead_on_the_winner_flips(mode, expected):
    err_w, err_ref_w = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.2, 0.1, 0.05])
    assert flip_sign(err_w, err_ref_w, mode).tolist() == expected


def test_the_flip_carries_no_gradient():
    err_w = torch.tensor([0.1, 0.3], requires_grad=True)
    assert not flip_sign(err_w, torch.tensor([0.2, 0.2]), "sign").requires_grad


def test_a_winner_that_both_denoise_equally_well_leaves_the_self_sample_a_loser():
    _, grad = step(SePPO(), 0.100, 0.100, m_r=R_R)
    assert (grad[:4] > 0).all()
    assert (grad[4:] < 0).all()


def test_where_the_reference_is_ahead_winner_and_self_sample_are_both_pulled_in():
    out, grad = step(SePPO(), 0.100, 0.099)
    assert (grad > 0).all()
    assert out.metrics["flipped"].tolist() == [1.0] * 4


def test_the_indicator_leaves_the_self_sample_out_where_the_reference_is_ahead():
    out, grad = step(SePPO(flip="indicator"), 0.100, 0.099)
    assert (grad[:4] > 0).all()
    assert (grad[4:] == 0).all()
    assert out.metrics["flipped"].tolist() == [1.0] * 4
    ahead, _ = step(SePPO(flip="indicator"), 0.100, 0.101)
    torch.testing.assert_close(ahead.loss, step(SePPO(), 0.100, 0.101)[0].loss, atol=0, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_the_flip_and_with_the_losers_of_the_data_it_is_diffusion_dpo(prediction):
    batch, reference = pairs(), toy(prediction)
    policy, again = toy(prediction, seed=1), toy(prediction, seed=1)
    one = SePPO(beta=500.0, flip="off", replay="first")(policy, reference, batch, RNG)
    two = DiffusionDPO(beta=500.0)(again, reference, batch, RNG)
    torch.testing.assert_close(one.loss, two.loss, atol=0, rtol=0)
    one.loss.sum().backward()
    two.loss.sum().backward()
    for a, b in zip(policy.net.parameters(), again.net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0)


@pytest.mark.parametrize("method", [SePPO(), SPINDiffusion()], ids=["seppo", "spin"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_policy_that_is_its_own_reference_has_loss_ln_2_and_a_gradient(prediction, method):
    policy, reference = toy(prediction), toy(prediction)
    out = method(policy, reference, pairs(), RNG)
    assert out.metrics["rewards/margins"].abs().max() == 0
    assert out.metrics["flipped"].max() == 0
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)), atol=1e-7, rtol=0)
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


def test_spin_pushes_the_self_sample_away_even_where_the_reference_is_ahead():
    out, grad = step(SPINDiffusion(beta=2000.0), 0.100, 0.099)
    assert (grad[4:] < 0).all()
    torch.testing.assert_close(out.loss, torch.full((4,), math.log1p(math.exp(-1.0))).double(), atol=1e-9, rtol=0)


def test_winner_and_self_sample_share_noise_and_t():
    seen = []

    def spy(x_t, t, cond):
        seen.append((x_t, t))
        return policy(x_t, t, cond)

    policy, batch = toy(), pairs()
    twins = replace(batch, x_l=batch.x_w)

    class Spy:
        path, prediction = policy.path, policy.prediction
        __call__ = staticmethod(spy)

    SePPO()(Spy(), toy(seed=1), twins, RNG)
    (x_w, x_l), (t_w, t_l) = seen[0][0].chunk(2), seen[0][1].chunk(2)
    assert torch.equal(x_w, x_l)
    assert torch.equal(t_w, t_l)


def test_they_need_winners_alone_and_earlier_policies():
    for method, replay in ((SePPO(), "uniform"), (SePPO(replay="first"), "first"), (SPINDiffusion(), "last")):
        needs = method.needs
        assert (needs.data, needs.batches, needs.references, needs.replay) == ("images", "pairs", ("pool",), replay)


@pytest.mark.parametrize("cls", [SePPO, SPINDiffusion])
def test_a_beta_that_is_not_positive_is_an_error(cls):
    with pytest.raises(InputError, match=r"method\.beta must be positive, got 0"):
        cls(beta=0.0)


def test_a_safeguard_of_losers_excludes_making_winners_of_them():
    with pytest.raises(InputError, match=r"method\.safeguard must be left out with flip = 'sign'"):
        SePPO(safeguard=Safeguard(mu=0.9))
    SePPO(flip="off", safeguard=Safeguard(mu=0.9))
