"""DiffusionNFT: reference values, the gradient at the old policy, its minimiser, how the old policy follows."""

from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.diffusion_nft import DiffusionNFT, changed, nft_loss, optimality
from diffalign.types import Shared
from tests.forward import ADVANTAGE, PREDICTIONS, RNG, Fixed, Given, apart, at_old, flat_gradient, own, scored
from tests.toys import flow, toy

X_0, EPS, V_OLD = [0.1, 0.4, -0.3], [0.5, -1.0, 0.2], [0.3, -0.2, 0.5]


def image(values):
    return torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1)


def fixture(r, **options):
    """(output, gradient by the policy's velocity) of the worked example, where policy and old policy agree."""
    advantage = torch.tensor([10 * r - 5], dtype=torch.float64)
    row = own(x_0=image(X_0), t=torch.tensor([0.6], dtype=torch.float64), advantage=advantage, group=(0,))
    batch = replace(row, cond=row.cond.rows(slice(1)), samples=(0,))
    pred = image(V_OLD).requires_grad_()
    rng = Fixed(0, (0,), noise=image(EPS))
    old = Given(pred=image(V_OLD), path=flow())
    out = DiffusionNFT(**options)(Given(pred=pred, path=flow()), old, batch, rng, Shared(old=old))
    return out, torch.autograd.grad(out.loss.sum(), pred)[0].flatten()


@pytest.mark.parametrize("r", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_worked_example_holds_for_every_r_and_its_gradient_for_every_beta(r, beta):
    out, grad = fixture(r, beta=beta)
    assert out.metrics["unweighted_policy_loss"].item() * beta == pytest.approx(0.6692307692, abs=1e-10)
    assert out.loss.item() == pytest.approx(5 * 0.6692307692 / beta, abs=1e-8)
    slope = torch.tensor([0.0553846154, -0.6646153846, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grad, 5 * (1 - 2 * r) / 0.6 * slope, atol=1e-8, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("r", [0.0, 0.2, 0.7, 1.0])
def test_without_omega_the_optimum_is_where_the_paper_says(r, beta):
    target, old = image([0.4, -1.4, 0.5]), image(V_OLD)
    best = (old + (2 * r - 1) / beta * (target - old)).requires_grad_()
    loss = nft_loss(best - target, old - target, torch.tensor([r], dtype=torch.float64), beta=beta, adaptive=False)
    grad = torch.autograd.grad(loss.sum(), best)[0]
    assert grad.abs().max() < 1e-12
    elsewhere = nft_loss(best - target + 0.1, old - target, torch.tensor([r], dtype=torch.float64), beta=beta,
                         adaptive=False)  # fmt: skip
    assert elsewhere.item() > loss.item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_the_old_policy_the_value_does_not_see_the_advantage_but_the_gradient_does(prediction):
    good, policy = at_old(DiffusionNFT(), prediction)
    none, _ = at_old(DiffusionNFT(), prediction, advantage=torch.zeros(4))
    torch.testing.assert_close(good.loss, none.loss, atol=0, rtol=1e-6)
    assert flat_gradient(good.loss.sum(), policy.net).abs().max() > 1e-3
    assert good.metrics["kl_div"].abs().max() == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_the_old_policy_the_gradient_does_not_depend_on_beta(prediction):
    one, policy = at_old(DiffusionNFT(beta=1.0), prediction)
    tenth, again = at_old(DiffusionNFT(beta=0.1), prediction)
    grads = [flat_gradient(out.loss.sum(), p.net) for out, p in ((one, policy), (tenth, again))]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4 * grads[0].abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
def test_away_from_the_old_policy_it_is_the_papers_equation_in_x0(prediction):
    """A slow float64 loop over images, written from the paper's clean-image form."""
    method = DiffusionNFT(beta=0.5)
    out, policy = apart(method, prediction)
    batch, reference, old = own(prediction), toy(prediction, seed=0), toy(prediction, seed=2)
    eps = RNG.normal(batch.x_0, "noise")
    alpha_t, sigma_t = (c.double() for c in policy.path.coefficients(batch.t))
    for i, advantage in enumerate(ADVANTAGE.tolist()):
        rows = slice(i, i + 1)
        a, s, x_0 = alpha_t[i], sigma_t[i], batch.x_0[rows].double()
        x_t = a * x_0 + s * eps[rows].double()
        preds = [m(x_t.float(), batch.t[rows], batch.cond.rows(rows)).double() for m in (policy, old, reference)]
        clean = [(x_t - s * p) / a if prediction == "epsilon" else x_t - s * p for p in preds]
        r = 0.5 + advantage / 10
        total = 0.0
        for share, mixed in ((r, 0.5 * clean[1] + 0.5 * clean[0]), (1 - r, 1.5 * clean[1] - 0.5 * clean[0])):
            total += share * ((mixed - x_0).square().mean() / (mixed - x_0).abs().mean()) / 0.5
        expected = 5 * total + 1e-4 * (preds[0] - preds[2]).square().mean()
        assert out.loss[i].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [2.0, 0.3, 0.0, -1.0]),
        ("positive_only", [2.0, 0.3, 0.0, 0.0]),
        ("negative_only", [0.0, 0.0, 0.0, -1.0]),
        ("one_only", [1.0, 1.0, 0.0, 0.0]),
        ("binary", [1.0, 1.0, 0.0, -1.0]),
    ],
)
def test_advantages_are_changed_as_the_mode_says(mode, expected):
    torch.testing.assert_close(changed(torch.tensor([2.0, 0.3, 0.0, -1.0]), mode), torch.tensor(expected))


def test_selection_takes_the_mode_and_leaves_out_prompts_without_spread():
    chosen = DiffusionNFT(adv_mode="binary").select(scored([1.0, 3.0, 2.0, 2.0], [0, 0, 1, 1]), torch.Generator())
    assert chosen.places.tolist() == [[0], [1]]
    assert chosen.weight.tolist() == [-1.0, 1.0]
    assert chosen.metrics["zero_std_ratio"] == 0.5


def test_r_is_a_probability():
    torch.testing.assert_close(optimality(torch.tensor([-9.0, -5.0, 0.0, 2.0, 5.0])), torch.tensor([0, 0, 0.5, 0.7, 1]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (0, {0: 0.0, 1000: 0.0}),
        (1, {0: 0.0, 100: 0.1, 500: 0.5, 9999: 0.5}),
        (2, {0: 0.0, 75: 0.0, 77: 0.015, 9999: 0.999}),
    ],
)
def test_the_old_policy_follows_as_published(kind, expected):
    method = DiffusionNFT(decay_type=kind)
    assert {step: method.old_decay(step) for step in expected} == pytest.approx(expected)
    assert method.old_samples(0)


def test_nine_of_ten_levels_are_trained_each_once():
    method = DiffusionNFT()
    assert method.passes(10) == 9
    assert sorted(method.train_levels(10, torch.Generator().manual_seed(0))) == list(range(9))
    assert method.passes(1) == 1
    few = DiffusionNFT(level_count=3)
    assert few.passes(10) == 3
    assert len(few.train_levels(10, torch.Generator().manual_seed(0))) == 3
    assert DiffusionNFT(levels="path").train_levels(10, torch.Generator()) is None
    with pytest.raises(InputError, match=r"method\.level_count must be at most 4, .* got 9"):
        DiffusionNFT(level_count=9).passes(5)


def test_a_reference_is_needed_as_long_as_its_kl_weighs_something():
    assert DiffusionNFT().needs.references == ("start", "ema")
    assert DiffusionNFT(kl_weight=0.0).needs.references[0] == "none"


def test_without_a_kl_no_reference_is_asked():
    policy, old = toy("velocity", seed=1), toy("velocity")
    out = DiffusionNFT(kl_weight=0.0)(policy, None, own(), RNG, Shared(old=old))
    assert torch.isfinite(out.loss).all()
    assert "kl_div" not in out.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"beta": float("nan")}, r"method\.beta must be positive, got nan"),
        ({"kl_weight": -1.0}, r"method\.kl_weight must be at least 0, got -1\.0"),
        ({"level_fraction": 1.5}, r"method\.level_fraction must be in \(0, 1\], got 1\.5"),
        ({"level_count": 0}, r"method\.level_count must be at least 1, got 0"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DiffusionNFT(**options)


def test_a_call_without_what_it_needs_says_what():
    policy = toy("velocity")
    with pytest.raises(InputError, match=r"batch\.advantage must be given for method 'diffusion_nft'"):
        DiffusionNFT()(policy, policy, own(advantage=None), RNG, Shared(old=policy))
    with pytest.raises(InputError, match=r"shared\.old must be the old policy for method 'diffusion_nft'"):
        DiffusionNFT()(policy, policy, own(), RNG)
