"""InPO: Diffusion-DPO at inverted latents, and what is and is not the released code's."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign import paths
from diffalign.errors import InputError
from diffalign.methods import inpo
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.inpo import InPO, inverted_errors
from diffalign.paths import TimestepSampling
from diffalign.rng import SampleRng
from diffalign.sampling.inversion import Inversion, Ladder
from tests.toys import pairs, swapped, toy

RNG = SampleRng(0, (0, 1, 2, 3))
PREDICTIONS = ["epsilon", "v_prediction", "velocity"]


def noised(model, x_0, t, cond, ladder, *, noise):
    """In place of an inversion: the shared noise of Diffusion-DPO."""
    eps = noise(x_0, "noise").chunk(2)[0].repeat(2, 1, 1, 1)
    return Inversion(x_t=paths.add_noise(model.path, x_0, eps, t), eps=eps, forwards=torch.zeros(len(x_0)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_noised_latents_in_place_of_inverted_ones_it_is_diffusion_dpo_bit_for_bit(prediction, monkeypatch):
    plain = SampleRng.normal
    monkeypatch.setattr(SampleRng, "normal", lambda self, like, purpose: plain(self, like, purpose.removesuffix("_w")))
    monkeypatch.setattr(inpo, "invert", noised)
    high = TimestepSampling(distribution="uniform", low=0.2)
    policy, reference = toy(prediction, seed=1), toy(prediction)
    policy = replace(policy, path=replace(policy.path, timesteps=high))
    ours = InPO(beta=50.0)(policy, reference, pairs(), RNG)
    theirs = DiffusionDPO(beta=50.0)(policy, reference, pairs(), RNG)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(ours.metrics[name], value) for name, value in theirs.metrics.items())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("inverter", ["policy", "reference"])
def test_equal_policy_and_reference_have_loss_log_2_and_a_gradient(prediction, inverter):
    policy, reference = toy(prediction), toy(prediction)
    out = InPO(inverter=inverter)(policy, reference, pairs(), RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)))
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_swapping_the_pair_flips_the_margin(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    there = InPO(beta=50.0)(policy, reference, batch, RNG).metrics
    back = InPO(beta=50.0)(policy, reference, swapped(batch), RNG).metrics
    torch.testing.assert_close(there["rewards/margins"], -back["rewards/margins"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_winner_and_loser_share_t_but_not_their_noise(prediction, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append((args, inpo_invert(*args, **kwargs)))
        return seen[-1][1]

    inpo_invert = inpo.invert
    monkeypatch.setattr(inpo, "invert", spy)
    InPO()(toy(prediction), toy(prediction), pairs(), RNG)
    (_, _, t, *_), found = seen[0]
    assert torch.equal(t[:4], t[4:])
    assert len(set(t[:4].tolist())) > 1
    assert (found.eps[:4] - found.eps[4:]).flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_one_level_an_epsilon_models_error_is_its_change_from_the_clean_image(prediction):
    model, batch = toy(prediction), pairs()
    e = inverted_errors(model, toy(prediction), batch, RNG, Ladder(levels=1), "policy")
    t = torch.maximum(model.path.sample_t(RNG), model.path.rungs(10)[1].to(model.path.sample_t(RNG)))
    with torch.no_grad():
        clean = model(batch.x_w, torch.zeros_like(t), batch.cond)
        tau = batch.x_w + clean if prediction == "velocity" else clean
        x_t = paths.add_noise(model.path, batch.x_w, tau, t)
        target = paths.target(model.path, prediction, batch.x_w, tau, t)
        expected = (model(x_t, t, batch.cond) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(e.err_w, expected, atol=1e-5, rtol=1e-4)


def test_the_inverter_may_be_the_policy_or_the_reference():
    policy, reference, batch = toy(seed=1), toy(), pairs()
    by_policy, by_reference = (
        InPO(inverter=name)(policy, reference, batch, RNG).metrics["err_ref_w"] for name in ("policy", "reference")
    )
    assert not torch.allclose(by_policy, by_reference)
    moved = InPO(inverter="reference")(toy(seed=2), reference, batch, RNG).metrics["err_ref_w"]
    assert torch.equal(by_reference, moved)  # latents of a frozen inverter do not know the policy


def test_forwards_of_the_inversion_are_counted_per_image():
    policy, batch = toy(), pairs()
    t = policy.path.sample_t(RNG).clamp(min=100)
    expected = [float(-(-x // 100)) for x in t.tolist()]
    assert InPO()(policy, toy(), batch, RNG).metrics["forwards"].tolist() == expected
    released = [float(1 + -(-(x - 1) // 100)) for x in policy.path.sample_t(RNG).tolist()]
    found = InPO(mode="release")(policy, toy(), batch, RNG).metrics["forwards"].tolist()
    assert found == [min(x, 10.0) for x in released]


def test_release_noise_is_apart_for_winner_and_loser_and_only_there():
    policy, batch = toy(), replace(pairs(), x_l=pairs().x_w)
    exact = inverted_errors(policy, toy(seed=1), batch, RNG, Ladder(), "policy")
    assert torch.equal(exact.err_w, exact.err_l)
    noisy = inverted_errors(policy, toy(seed=1), batch, RNG, Ladder(mode="release"), "policy")
    assert not torch.isclose(noisy.err_w, noisy.err_l).any()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_small_step_on_a_pair_lowers_its_loss(prediction):
    policy, reference, batch = toy(prediction, seed=1), toy(prediction), pairs()
    method = InPO(beta=10.0, inverter="reference")  # with the policy's own latents the ground would move too
    before = method(policy, reference, batch, RNG).loss.mean()
    before.backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-3 * p.grad
    assert method(policy, reference, batch, RNG).loss.mean() < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"levels": 0}, r"method\.levels must be at least 1, got 0"),
        ({"eta": 0.1}, r"method\.eta must be left out in mode 'exact'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message):
        InPO(**options)


def test_release_mode_has_the_published_noise_unless_told_otherwise():
    assert InPO().ladder.noise_scale == 0.0
    assert InPO(mode="release").ladder.noise_scale == 0.1
    assert InPO(mode="release", eta=0.0).ladder.noise_scale == 0.0
