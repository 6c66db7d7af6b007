"""Noise-Conditioned Perception: the step, errors in the eyes of an encoder, three losses. Encoders: test_features."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffalign import losses, paths
from diffalign.config import parse
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.ncp_cpo import NCPCPO
from diffalign.methods.ncp_dpo import NCPDPO
from diffalign.methods.ncp_sft import NCPSFT
from diffalign.methods.perception import Perception, draw, perceptual_errors
from diffalign.paths import DDPMPath, FlowPath, TimestepSampling
from diffalign.rng import SampleRng
from diffalign.sampling.transitions import ddpm_posterior, ddpm_step
from tests.toys import Planted, ddpm, flow, images, pairs, sd_alpha_bar, toy

RNG = SampleRng(0, (0, 1, 2, 3))
PREDICTIONS = ["epsilon", "v_prediction", "sample", "velocity"]
C_T = {1: 0.0207, 100: 0.00426, 250: 0.00426, 500: 0.00567, 999: 0.0121}
"""How far two steps end apart, per difference of the noises they were told."""


def exact_path(**timesteps) -> DDPMPath:
    return DDPMPath(alpha_bar=sd_alpha_bar(), timesteps=TimestepSampling(distribution="uniform", **timesteps))


def at(t: int) -> DDPMPath:
    """A path on which only this t is drawn."""
    return exact_path(low=t / 1000, high=(t + 0.5) / 1000)


def c_t(t: Tensor) -> Tensor:
    bar, before = sd_alpha_bar()[t], sd_alpha_bar()[t - 1]
    alpha = bar / before
    return (1 - alpha) / (alpha.sqrt() * (1 - bar).sqrt())


@dataclass(frozen=True, kw_only=True)
class Bare(Planted):
    """A planted denoiser whose encoder sees the latents themselves."""

    def features(self, x_t, t, cond, *, mid=False, blocks=None):
        return [x_t]


def bare(errors, *x_0, path=None, prediction="epsilon") -> Bare:
    rows = torch.tensor(errors, dtype=torch.float64).repeat_interleave(len(x_0[0])).requires_grad_()
    return Bare(x_0=torch.cat(x_0), errors=rows, path=path or at(250), prediction=prediction)


def exact(size: int = 4):
    batch = pairs(size)
    return replace(batch, x_w=batch.x_w.double(), x_l=batch.x_l.double())


# the step


@pytest.mark.parametrize("t", C_T)
def test_two_steps_end_apart_by_minus_c_t_times_the_difference_of_their_noises(t):
    path, level = exact_path(), torch.tensor([t])
    x_t, eps, eps_hat, z = torch.randn(4, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = [ddpm_step(path, x_t, paths.to_x0_eps(path, "epsilon", e, x_t, level)[0], level, level - 1, z)
            for e in (eps_hat, eps)]  # fmt: skip
    torch.testing.assert_close(ends[0] - ends[1], -c_t(level) * (eps_hat - eps), atol=1e-12, rtol=1e-9)
    assert c_t(level).item() == pytest.approx(C_T[t], rel=2e-3)  # the table has three digits


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [1, 2, 250, 999])
def test_the_step_is_that_of_the_ddpm_scheduler(prediction, t):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
    )
    path, level = DDPMPath(alpha_bar=scheduler.alphas_cumprod), torch.tensor([t])
    x_t, pred = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(5))
    x_0, _ = paths.to_x0_eps(path, prediction, pred, x_t, level)
    theirs = scheduler.step(pred, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(ddpm_step(path, x_t, x_0, level, level - 1, z), theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (500, 499), (999, 300)])
def test_the_posterior_is_bayes_rule_of_two_gaussians(t, s):
    path, bars = exact_path(), sd_alpha_bar()
    x_t, x_0 = torch.randn(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = ddpm_posterior(path, x_t, x_0, torch.tensor([t]), torch.tensor([s]))
    alpha = bars[t] / bars[s]
    precision = alpha / (1 - alpha) + 1 / (1 - bars[s])  # of the likelihood x_t | x_s and of the prior x_s | x_0
    weighted = alpha.sqrt() / (1 - alpha) * x_t + bars[s].sqrt() / (1 - bars[s]) * x_0
    torch.testing.assert_close(std, precision.rsqrt().reshape(1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(mean, weighted / precision, atol=1e-12, rtol=1e-9)


def test_a_step_from_t_to_t_ends_where_it_started_whatever_is_predicted_so_t_is_never_0():
    path, zero = exact_path(), torch.tensor([0])
    x_t, x_0, z = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ddpm_step(path, x_t, x_0, zero, zero, z), x_t, atol=1e-9, rtol=0)
    drawn = draw(at(0), exact().x_w, RNG, Perception())
    assert drawn.t.tolist() == [1] * 4
    assert drawn.s.tolist() == [0] * 4


def test_a_uniform_s_is_every_level_but_t():
    path = DDPMPath(alpha_bar=sd_alpha_bar(5))
    rng = SampleRng(0, tuple(range(400)))
    drawn = draw(path, torch.zeros(400, 1, 1, 1), rng, Perception(at="uniform"))
    assert (drawn.s != drawn.t).all()
    assert {(t, s) for t, s in zip(drawn.t.tolist(), drawn.s.tolist(), strict=True)} == {
        (t, s) for t in range(1, 5) for s in range(5) if s != t
    }


@pytest.mark.parametrize("dt", [None, 0.02, 0.3])
def test_a_flow_steps_by_dt_and_jumps_by_no_less(dt):
    rng, step = SampleRng(0, tuple(range(400))), dt or 0.05
    path = FlowPath(timesteps=TimestepSampling(distribution="uniform"))
    near = draw(path, torch.zeros(400, 1, 1, 1), rng, Perception(dt=dt))
    torch.testing.assert_close(near.t - near.s, torch.full((400,), step))
    assert near.s.min() >= 0
    far = draw(path, torch.zeros(400, 1, 1, 1), rng, Perception(dt=dt, at="uniform"))
    assert (far.t - far.s).abs().min() >= step - 1e-6
    assert far.s.min() >= 0
    assert far.s.max() < 1


# perceptual errors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", C_T)
def test_with_the_identity_as_encoder_it_is_dpo_with_beta_times_c_t_squared(prediction, t):
    batch = exact()
    policy, reference = (
        bare(e, batch.x_w, batch.x_l, path=at(t), prediction=prediction) for e in ((0.1005, 0.118), (0.101, 0.119))
    )
    scale = c_t(torch.tensor(t)).item() ** 2
    ours = NCPDPO(beta=5000.0 / scale)(policy, reference, batch, RNG)
    theirs = DiffusionDPO(beta=5000.0, error_space="eps")(policy, reference, batch, RNG)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-8, rtol=1e-6)


def test_on_a_flow_with_the_identity_as_encoder_it_is_dpo_with_beta_times_dt_squared():
    batch = exact()
    path = FlowPath(timesteps=TimestepSampling(distribution="uniform"))
    policy, reference = (
        bare(e, batch.x_w, batch.x_l, path=path, prediction="velocity") for e in ((0.1005, 0.118), (0.101, 0.119))
    )
    ours = NCPDPO(beta=5000.0 / 0.1**2, perception=Perception(dt=0.1))(policy, reference, batch, RNG)
    theirs = DiffusionDPO(beta=5000.0)(policy, reference, batch, RNG)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)  # t is float32


@pytest.mark.parametrize("at_level", ["previous", "uniform"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_true_prediction_has_no_perceptual_error(prediction, at_level):
    batch = pairs()
    path = flow() if prediction == "velocity" else ddpm()
    zero = torch.zeros(8)
    true = Bare(x_0=torch.cat([batch.x_w, batch.x_l]), errors=zero, path=path, prediction=prediction)
    felt, _ = perceptual_errors(true, true, batch, RNG, perception=Perception(at=at_level))
    for err in (felt.err_w, felt.err_l, felt.err_ref_w, felt.err_ref_l):
        assert err.max() < 1e-10


def test_prediction_reference_target_winner_and_loser_share_all_noise():
    seen = []

    class Spy:
        path, prediction = ddpm(), "epsilon"

        def __call__(self, x_t, t, cond):
            return torch.zeros_like(x_t)

        def features(self, x_t, t, cond, *, mid=False, blocks=None):
            seen.append((x_t, t, cond["c"]))
            return [x_t]

    batch = replace(pairs(), x_l=pairs().x_w)  # equal images, so only noise and levels could differ
    perceptual_errors(Spy(), Spy(), batch, RNG, perception=Perception())
    (still, s, c), (moving, s_again, _) = seen
    target, of_reference = still.chunk(2)
    assert torch.equal(of_reference, moving)  # equal predictions end at one place: one variance noise
    assert torch.equal(target[:4], target[4:])
    assert torch.equal(moving[:4], moving[4:])
    assert torch.equal(s, s_again.repeat(2))
    assert torch.equal(c, batch.cond.repeat(4)["c"])


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 0.23), (torch.bfloat16, 1.4)])
def test_what_is_compared_is_lost_below_float32(dtype, expected):
    path, t = DDPMPath(alpha_bar=sd_alpha_bar()), torch.tensor([250])
    rng = torch.Generator().manual_seed(0)
    x_t, eps, off, z = torch.randn(4, 1, 4, 64, 64, generator=rng, dtype=torch.float64)
    a, b = (
        ddpm_step(path, x_t, paths.to_x0_eps(path, "epsilon", e, x_t, t)[0], t, t - 1, z)
        for e in (eps, eps + 0.3 * off)
    )

    def lost(kind: torch.dtype) -> float:
        return (((b.to(kind).double() - a.to(kind).double()) - (b - a)).norm() / (b - a).norm()).item()

    assert lost(dtype) == pytest.approx(expected, rel=0.2)
    assert lost(torch.float32) < 1e-4


# the losses


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("perception", [Perception(), Perception(at="uniform", multi_level=True, normalize=True)])
def test_equal_policy_and_reference_have_loss_ln_2_and_a_gradient(prediction, perception):
    policy, reference = toy(prediction), toy(prediction)
    reference.net.requires_grad_(False)
    out = NCPDPO(perception=perception)(policy, reference, pairs(), RNG)
    torch.testing.assert_close(out.loss, torch.full((4,), math.log(2)), atol=1e-6, rtol=0)
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("name", ["ncp_dpo", "ncp_cpo", "ncp_sft"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_small_step_lowers_the_loss(prediction, name):
    policy, reference = toy(prediction, seed=1), toy(prediction)
    method = METHODS[name](**({} if name == "ncp_sft" else {"beta": 1e4}))
    batch = images() if name == "ncp_sft" else pairs()
    before = method(policy, reference, batch, RNG).loss.mean()
    grads = torch.autograd.grad(before, list(policy.net.parameters()))
    size = 1e-4 / sum(g.square().sum() for g in grads).sqrt()
    with torch.no_grad():
        for p, g in zip(policy.net.parameters(), grads, strict=True):
            p -= size * g
    assert method(policy, reference, batch, RNG).loss.mean() < before


def test_gradients_raise_no_winner_error_and_lower_no_loser_error():
    batch = exact()
    for method in (NCPDPO(beta=1e6), NCPCPO(beta=1e6), NCPCPO(beta=1e6, link=losses.hinge)):
        policy, reference = (bare(e, batch.x_w, batch.x_l) for e in ((0.1005, 0.119), (0.101, 0.119)))
        grad = torch.autograd.grad(method(policy, reference, batch, RNG).loss.sum(), policy.errors)[0]
        assert (grad[:4] > 0).all()
        assert (grad[4:] < 0).all()


def test_cpo_is_a_contrast_of_the_policys_errors_plus_the_winners():
    batch = exact()
    policy = bare((0.10, 0.12), batch.x_w, batch.x_l)
    scale = c_t(torch.tensor(250)).item() ** 2
    contrast = math.log1p(math.exp(2500 * (0.10 - 0.12)))
    for weight in (0.0, 1.0, 3.0):
        out = NCPCPO(beta=5000 / scale, sft_weight=weight)(policy, policy, batch, RNG)
        expected = torch.full((4,), contrast + weight * scale * 0.10, dtype=torch.float64)
        torch.testing.assert_close(out.loss, expected, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("method", [NCPCPO(), NCPSFT()])
def test_without_a_reference_in_the_loss_the_reference_only_lends_its_encoder(method):
    class EncoderOnly:
        path, prediction = ddpm(), "epsilon"

        def __call__(self, x_t, t, cond):
            raise AssertionError("no prediction of the reference is needed")

        def features(self, x_t, t, cond, *, mid=False, blocks=None):
            return [x_t]

    batch = images() if method.needs.data == "images" else pairs()
    out = method(toy(), EncoderOnly(), batch, RNG)
    assert out.loss.shape == (4,)
    assert not any("ref" in name or "gain" in name for name in out.metrics)


def test_sft_is_the_perceptual_error_of_the_image_and_both_adds_the_denoising_error():
    x = images()
    x = replace(x, x_0=x.x_0.double())
    scale = c_t(torch.tensor(250)).item() ** 2
    policy = bare([0.07], x.x_0)
    for both, expected in ((None, 0.07 * scale), (1.0, 0.07 + 0.07 * scale), (300.0, 0.07 + 21 * scale)):
        loss = NCPSFT(both=both)(policy, policy, x, RNG).loss
        torch.testing.assert_close(loss, torch.full((4,), expected, dtype=torch.float64), atol=1e-10, rtol=1e-6)


def test_both_adds_the_perceptual_errors_to_all_four_denoising_errors():
    batch = exact()
    policy, reference = (bare(e, batch.x_w, batch.x_l) for e in ((0.1005, 0.118), (0.101, 0.119)))
    scale = c_t(torch.tensor(250)).item() ** 2
    ours = NCPDPO(beta=100.0, both=1e4)(policy, reference, batch, RNG)
    theirs = DiffusionDPO(beta=100.0 * (1 + 1e4 * scale))(policy, reference, batch, RNG)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-9, rtol=1e-6)


def test_denoising_errors_keep_their_names_and_perceptual_ones_have_their_own():
    batch = exact()
    policy, reference = (bare(e, batch.x_w, batch.x_l) for e in ((0.11, 0.15), (0.10, 0.12)))
    found = NCPDPO()(policy, reference, batch, RNG).metrics
    plain = DiffusionDPO()(policy, reference, batch, RNG).metrics
    for name in ("err_w", "err_l", "err_ref_w", "winner_gain", "loser_gain", "saturation", "kl_w", "displaced"):
        torch.testing.assert_close(found[name], plain[name], atol=1e-9, rtol=0)
    scale = c_t(torch.tensor(250)) ** 2
    torch.testing.assert_close(found["perceptual/err_w"], scale * found["err_w"], atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(found["perceptual/loser_gain"], scale * found["loser_gain"], atol=1e-12, rtol=1e-6)


# what is wrong is said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perception(dt=0.01), r"method\.perception\.dt must be in \[0\.02, 0\.5\), got 0\.01; .* not resolved"),
        (lambda: Perception(blocks=0), r"method\.perception\.blocks must be at least 1, got 0"),
        (lambda: Perception(normalize=True), r"method\.perception\.normalize must be false without multi_level"),
        (lambda: NCPDPO(beta=0.0), r"method\.beta must be positive, got 0\.0"),
        (lambda: NCPCPO(beta=-1.0), r"method\.beta must be positive, got -1\.0"),
        (lambda: NCPCPO(sft_weight=-1.0), r"method\.sft_weight must be at least 0, got -1\.0"),
        (lambda: NCPSFT(both=0.0), r"method\.both must be positive, got 0\.0"),
        (lambda: NCPCPO(link=losses.link("nca_pair")), r"method\.link must be one on the margin alone .*'nca_pair'"),
    ],
)
def test_options_out_of_range_are_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_step_length_is_for_flows_only():
    with pytest.raises(
        InputError, match=r"method\.perception\.dt must be left out unless the model is a flow, got 0.1"
    ):
        NCPDPO(perception=Perception(dt=0.1))(toy(), toy(), pairs(), RNG)


@pytest.mark.parametrize("name", ["ncp_dpo", "ncp_cpo", "ncp_sft"])
def test_bf16_is_refused_and_perception_is_read_from_a_table(name):
    table = {
        "output": "runs/x",
        "model": {"path": "tiny-sd"},
        "data": {"path": "tiny-sd-pairs"},
        "method": {"name": name, "perception": {"multi_level": True, "normalize": True, "at": "uniform"}},
        "train": {"steps": 5},
        "optimizer": {"lr": 1e-4},
    }
    assert parse(table).method.perception == Perception(multi_level=True, normalize=True, at="uniform")
    table["train"]["precision"] = "bf16"
    with pytest.raises(InputError, match=r"config\.train\.precision must be 'no' or 'fp16' with method .*got 'bf16'"):
        parse(table)
