"""The four errors of a pair and Diffusion-DPO on them: reference values, identities, what is shared and what is not."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign import losses
from diffalign.methods import METHODS
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.measure import pair_errors
from diffalign.methods.sft import SFT
from diffalign.paths import DDPMPath
from diffalign.rng import SampleRng
from tests.toys import ON_DATA, Planted, ddpm, flow, images, pairs, sd_alpha_bar, swapped, toy

RNG = SampleRng(0, (0, 1, 2, 3))
PREDICTIONS = ["epsilon", "v_prediction", "sample", "velocity"]


def exact(size: int = 4):
    """A batch in float64, in which planted errors come back to the last digits."""
    batch = pairs(size)
    return replace(batch, x_w=batch.x_w.double(), x_l=batch.x_l.double())


def planted(errors, *x_0, prediction="epsilon") -> Planted:
    """A denoiser with these errors on the images of each tensor of clean latents."""
    rows = torch.tensor(errors, dtype=torch.float64).repeat_interleave(len(x_0[0])).requires_grad_()
    path = flow() if prediction == "velocity" else DDPMPath(alpha_bar=sd_alpha_bar())
    return Planted(x_0=torch.cat(x_0), errors=rows, path=path, prediction=prediction)


@pytest.mark.parametrize(
    ("policy", "reference", "loss", "weight"),
    [
        ((0.100, 0.120), (0.101, 0.119), 0.006715348489118, 16.732127310712),
        ((0.1005, 0.1180), (0.101, 0.119), 1.501929081345, None),
        ((0.101, 0.119), (0.101, 0.119), 0.6931471805599453, 1250.0),
    ],
)
def test_diffusion_dpo_matches_the_reference_values(policy, reference, loss, weight):
    batch = exact()
    trained = planted(policy, batch.x_w, batch.x_l)
    out = DiffusionDPO(beta=5000.0)(trained, planted(reference, batch.x_w, batch.x_l), batch, RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), loss, dtype=torch.float64), atol=1e-9, rtol=0)
    if weight is not None:
        grad = torch.autograd.grad(out.loss.sum(), trained.errors)[0]
        signed = torch.tensor([weight] * 4 + [-weight] * 4).double()
        torch.testing.assert_close(grad, signed, atol=0, rtol=1e-7)  # the reference has twelve digits, sqrt costs some


def test_the_diffusion_vector_of_the_loss_tables_holds():
    w, lo = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.1198, 0.1403))
    loss = losses.sigmoid(-2500 * (w - 0.12), -2500 * (lo - 0.1402))
    grad_w, grad_l = torch.autograd.grad(loss.sum(), (w, lo))
    assert loss.item() == pytest.approx(0.386871, abs=5e-7)
    assert grad_w.item() == pytest.approx(802.0533, abs=5e-4)
    assert grad_l.item() == pytest.approx(-802.0533, abs=5e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo"])
def test_equal_policy_and_reference_have_margin_zero_and_a_gradient(prediction, link):
    policy, reference = toy(prediction), toy(prediction)
    out = DiffusionDPO(link=losses.link(link))(policy, reference, pairs(), RNG)
    assert out.metrics["rewards/margins"].abs().max() == 0
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4
    assert out.loss[0].item() == pytest.approx({"sigmoid": math.log(2), "hinge": 1.0, "ipo": 0.25}[link], abs=1e-7)
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_swapping_the_pair_flips_the_margin(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    method = DiffusionDPO()
    there = method(policy, reference, batch, RNG).metrics
    back = method(policy, reference, swapped(batch), RNG).metrics
    torch.testing.assert_close(there["rewards/margins"], -back["rewards/margins"], atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(there["rewards/chosen"], back["rewards/rejected"], atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_small_step_on_a_pair_lowers_its_loss(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    method = DiffusionDPO(beta=10.0)
    before = method(policy, reference, batch, RNG).loss.mean()
    before.backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-3 * p.grad
    assert method(policy, reference, batch, RNG).loss.mean() < before


def test_a_pair_shares_its_noise_and_its_t():
    seen = []

    class Spy:
        path, prediction = ddpm(), "epsilon"

        def __call__(self, x_t, t, cond):
            seen.append((x_t, t, cond["c"]))
            return x_t

    batch = replace(pairs(), x_l=pairs().x_w)  # equal images, so only noise and t could differ
    pair_errors(Spy(), Spy(), batch, RNG)
    (x_t, t, c), again = seen[0], seen[1]
    assert torch.equal(x_t[:4], x_t[4:])
    assert torch.equal(t[:4], t[4:])
    assert torch.equal(c[:4], c[4:])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))  # the reference sees the very same
    seen.clear()
    pair_errors(Spy(), Spy(), batch, RNG, share_noise=False)
    assert not torch.equal(seen[0][0][:4], seen[0][0][4:])


def test_three_published_beta_conventions_are_one():
    batch, elements = exact(), 64
    policy, reference = (planted(e, batch.x_w, batch.x_l) for e in ((0.10, 0.12), (0.101, 0.119)))
    e = pair_errors(policy, reference, batch, RNG)
    delta = (e.err_w - e.err_ref_w) - (e.err_l - e.err_ref_l)
    ours = DiffusionDPO(beta=5000.0)(policy, reference, batch, RNG).metrics["rewards/margins"]
    diffusers_sd15 = -2500 * delta  # no factor 1/2
    summed = -0.5 * (5000 / elements) * (elements * delta)  # errors summed over elements
    torch.testing.assert_close(ours, diffusers_sd15.detach(), atol=1e-9, rtol=0)
    torch.testing.assert_close(ours, summed.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shift_of", ["policy", "reference"])
def test_adding_a_constant_to_both_errors_of_a_model_leaves_dpo_unchanged(shift_of):
    batch = exact()
    base = {"policy": [0.10, 0.12], "reference": [0.101, 0.119]}
    moved = {name: [x + 0.05 * (name == shift_of) for x in errors] for name, errors in base.items()}
    method = DiffusionDPO(beta=500.0)
    a, b = (
        method(
            planted(c["policy"], batch.x_w, batch.x_l), planted(c["reference"], batch.x_w, batch.x_l), batch, RNG
        ).loss
        for c in (base, moved)
    )
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_adding_a_constant_to_the_winners_error_changes_sft_by_it():
    x = images()
    a, b = (SFT()(planted([e], x.x_0), None, x, RNG).loss for e in (0.10, 0.15))
    torch.testing.assert_close(b - a, torch.full((4,), 0.05, dtype=torch.float64), atol=1e-6, rtol=0)


def test_constant_beta_on_a_flow_weighs_all_noise_levels_alike_and_eps_space_does_not():
    batch = exact()
    policy, reference = (
        planted(e, batch.x_w, batch.x_l, prediction="velocity") for e in ((0.10, 0.12), (0.101, 0.119))
    )
    native = DiffusionDPO(beta=500.0)(policy, reference, batch, RNG)
    torch.testing.assert_close(
        native.metrics["rewards/margins"], torch.full((4,), 0.5, dtype=torch.float64), atol=1e-5, rtol=0
    )
    eps = DiffusionDPO(beta=500.0, error_space="eps")(policy, reference, batch, RNG)
    t = flow().sample_t(RNG)
    torch.testing.assert_close(eps.metrics["rewards/margins"], (0.5 * (1 - t) ** 2).double(), atol=1e-5, rtol=0)


def test_gradients_of_the_loss_raise_no_winner_error_and_lower_no_loser_error():
    batch = exact()
    for link in ("sigmoid", "hinge", "ipo"):
        policy, reference = (planted(e, batch.x_w, batch.x_l) for e in ((0.1005, 0.119), (0.101, 0.119)))
        out = DiffusionDPO(beta=100.0, link=losses.link(link))(policy, reference, batch, RNG)
        grad = torch.autograd.grad(out.loss.sum(), policy.errors)[0]
        assert (grad[:4] >= 0).all()
        assert (grad[4:] <= 0).all()


def test_displaced_pairs_are_those_that_win_while_their_winner_gets_worse():
    batch = exact()
    policy, reference = (planted(e, batch.x_w, batch.x_l) for e in ((0.11, 0.15), (0.10, 0.12)))
    out = DiffusionDPO()(policy, reference, batch, RNG)
    assert out.metrics["displaced"].tolist() == [1.0] * 4
    assert (out.metrics["winner_gain"] < 0).all()
    assert (out.metrics["rewards/accuracies"] == 1).all()


@pytest.mark.parametrize("name", ON_DATA)
def test_losses_are_per_sample_and_metrics_carry_no_gradient(name):
    method = METHODS[name]()
    batch = pairs() if method.needs.batches == "pairs" else images()
    policy = toy()
    out = method(policy, toy(seed=1) if method.needs.references != ("none",) else None, batch, RNG)
    assert out.loss.shape == (4,)
    assert not any(m.requires_grad for m in out.metrics.values())
    if method.needs.batch_statistics:
        return  # the batch is part of the loss
    singles = [method(policy, toy(seed=1), _row(batch, i), SampleRng(0, (i,))).loss for i in range(4)]
    torch.testing.assert_close(out.loss, torch.cat(singles), atol=1e-4, rtol=1e-4)


def _row(batch, i):
    wanted = ("x_", "score_", "label")
    fields = {k: v for k, v in vars(batch).items() if k.startswith(wanted) and v is not None}
    rows = {k: v[i : i + 1] for k, v in fields.items()}
    return replace(batch, **rows, cond=batch.cond.rows(slice(i, i + 1)), samples=(i,))


def test_sft_is_the_denoising_error_of_the_image():
    x = images()
    out = SFT()(planted([0.07], x.x_0), None, x, RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), 0.07, dtype=torch.float64), atol=1e-6, rtol=0)
