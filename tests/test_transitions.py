"""Kernels: golden values, Diffusers' schedulers, marginals of exact velocities; log-probs and KL against torch."""

import math
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from diffalign.errors import InputError
from diffalign.paths import broadcast
from diffalign.sampling.kernels import (
    KERNELS,
    cps,
    dance,
    ddim,
    ddpm,
    euler_ancestral,
    flow_ddim,
    flow_sde,
    kernel,
    ode,
)
from diffalign.sampling.schedule import (
    Schedule,
    few_steps,
    flow_schedule,
    make_schedule,
    schedule_of,
    ve_schedule,
    vp_schedule,
)
from diffalign.sampling.transitions import kl_divergence, log_prob
from diffalign.types import Transition
from tests.toys import sd_alpha_bar

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CLIPPED = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
SD_CONFIG = {"_class_name": "PNDMScheduler", **SD, **CLIPPED}
SD3_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLOW_NOISE = {
    "flow_sde": partial(flow_sde, last="noise"),
    "dance": partial(dance, last="noise"),
    "cps": cps,
    "flow_ddim": flow_ddim,
}
ANALYTIC = [1, 0.964286, 0.923077, 0.875, 0.818182, 0.75, 0.666667, 0.5625, 0.428571, 0.25, 0]
DIFFUSERS = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
GOLDEN_FLOW = {  # (mean, total std) at x = 0.8, v = -0.4
    ("analytic", 0): [(0.618286, 0.7), (0.813, 0.056695), (0.281242, 0.917090), (0.042857, 0.964286)],
    ("analytic", 1): [(0.594368, 0.738371), (0.814973, 0.060900), (0.315331, 0.877898), (0.413553, 0.826898)],
    ("analytic", 5): [(0.776167, 0.35), (0.829833, 0.086603), (0.510875, 0.634038), (0.677778, 0.496904)],
    ("analytic", 8): [(0.827679, 0.256174), (0.860714, 0.126773), (0.772717, 0.237764), (0.792063, 0.223952)],
    ("analytic", 9): [(0.859167, 0.202073), (0.8775, 0.15), (0.9, 0), (0.9, 0)],
    ("diffusers", 0): [(0.619948, 0.7), (0.814513, 0.059903), (0.285202, 0.913137), (0.047845, 0.960129)],
    ("diffusers", 5): [(0.781963, 0.352795), (0.837483, 0.097270), (0.557908, 0.572680), (0.688421, 0.469377)],
    ("diffusers", 8): [(0.860959, 0.225361), (0.885382, 0.155630), (0.904494, 0.008492), (0.903190, 0.008927)],
    ("diffusers", 9): [(0.802681, 0.006278), (0.785411, 0.028348), (0.803572, 0), (0.803572, 0)],
}
VARIANCES = {  # of what is sampled from N(1, 0.25) with its exact velocity
    ("1", 10): [0.18557, 0.22996, 0.19497, 0.12375, 0.09516, 0.14935],
    ("1", 40): [0.23214, 0.24737, 0.23482, 0.14906, 0.11328, 0.21400],
    ("1", 1000): [0.24926, 0.25092, 0.24937, 0.16215, 0.12374, 0.24825],
    ("3", 10): [0.13667, 0.18008, 0.14836, 0.09896, 0.08008, 0.10898],
    ("3", 40): [0.21596, 0.22973, 0.21957, 0.13769, 0.10477, 0.18595],
    ("diffusers", 10): [0.12900, 0.17726, 0.14208, 0.09466, None, 0.10192],
}


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
"""Of the Euler-ancestral scheduler, which gives numpy a tensor."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifted(steps: int, shift: float = 1.0) -> Tensor:
    u = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    return shift * u / (1 + (shift - 1) * u)


def flow_table(name: str, steps: int = 10) -> Schedule:
    if name == "diffusers":
        return make_schedule("ode", SD3_CONFIG, steps, table="diffusers")
    return flow_schedule(shifted(steps, 3.0 if name == "analytic" else float(name)))


def sd_walk(**config) -> Schedule:
    scheduler = DDIMScheduler(**{**SD, **CLIPPED, **config})
    scheduler.set_timesteps(20)
    return schedule_of(scheduler)


def at(schedule: Schedule, i: int, size: int = 1):
    return schedule.step(torch.full((size,), i))


def some_walk(name: str) -> Schedule:
    """A walk that a kernel fits, in float64."""
    if name in ("ddim", "ddpm"):
        bars, t = sd_alpha_bar(), torch.arange(951, 0, -50)
        s = (t - 50).clamp(min=0)
        return vp_schedule(t, s, bars[t], bars[s], "epsilon")
    if name == "euler_ancestral":
        return ve_schedule(torch.tensor([999, 500, 100]), torch.tensor([14.6, 2.0, 1.0, 0.5]).double(), "epsilon", 14.6)
    return flow_table("analytic")


# golden values


@pytest.mark.parametrize(
    ("place", "t", "mean", "std"),
    [
        (0, 951, 0.8201265924, 0.6443910603),
        (9, 501, 0.6411316933, 0.4293212841),
        (18, 51, 0.5785539162, 0.0405967977),
        (19, 1, 0.5064279281, 0.0206483543),
    ],
)
def test_ddim_on_the_schedule_of_stable_diffusion_has_the_reference_values(place, t, mean, std):
    step = at(sd_walk(), place)
    assert step.t.item() == t
    found = ddim(torch.tensor([[-0.3]]), torch.tensor([[0.5]]), step)
    assert found.mean.item() == pytest.approx(mean, abs=1e-5)  # the scheduler's table is float32
    assert found.std.item() == pytest.approx(std, abs=1e-5)


def test_the_ddpm_posterior_has_the_reference_values():
    found = ddpm(torch.tensor([[-0.3]]), torch.tensor([[0.5]]), at(sd_walk(), 9))
    assert found.mean.item() == pytest.approx(0.6411316933, abs=1e-5)
    assert found.std.square().item() == pytest.approx(0.1843167650, abs=1e-5)


def test_the_ancestral_step_has_the_reference_values():
    walk = ve_schedule(torch.tensor([9, 5]), torch.tensor([2.0, 1.0, 0.0]), "sample", 2.0)
    found = euler_ancestral(torch.tensor([[0.5]]), torch.tensor([[1.5]]), at(walk, 0))
    assert found.mean.item() == pytest.approx(0.75, abs=1e-6)
    assert found.std.item() == pytest.approx(0.8660254, abs=1e-6)
    assert euler_ancestral(torch.tensor([[0.5]]), torch.tensor([[1.5]]), at(walk, 1)).std.item() == 0


@pytest.mark.parametrize(("table", "i"), GOLDEN_FLOW)
def test_flow_kernels_have_the_reference_values(table, i):
    x, v = torch.tensor([[0.8]]).double(), torch.tensor([[-0.4]]).double()
    walk = flow_schedule(torch.tensor(DIFFUSERS).double()) if table == "diffusers" else flow_table(table)
    for (name, move), (mean, std) in zip(FLOW_NOISE.items(), GOLDEN_FLOW[table, i], strict=True):
        found = move(v, x, at(walk, i))
        assert found.mean.item() == pytest.approx(mean, abs=1.1e-6), name
        assert found.std.item() == pytest.approx(std, abs=1.1e-6), name


def test_the_two_tables_of_a_shifted_flow_have_the_reference_values():
    for table, levels in (("analytic", ANALYTIC), ("diffusers", DIFFUSERS)):
        found = make_schedule("flow_sde", SD3_CONFIG, 10, table=table).levels
        torch.testing.assert_close(found, torch.tensor(levels, dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        ("analytic", [0.0695, 0.1126, 0.1602, 0.2189, 0.2964, 0.4059, 0.5740, 0.8679, 1.5403]),
        ("diffusers", [0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867, 1.7706]),
    ],
)
def test_late_steps_of_the_flow_sde_have_the_largest_gradients(table, sizes):
    v = torch.zeros(9, 1, dtype=torch.float64, requires_grad=True)
    found = flow_sde(v, torch.ones_like(v), flow_table(table).step(torch.arange(1, 10)), last="noise")
    (slope,) = torch.autograd.grad((found.mean[:, 0] / found.std).sum(), v)
    torch.testing.assert_close(-slope[:, 0], torch.tensor(sizes, dtype=torch.float64), atol=6e-5, rtol=0)


# Diffusers' schedulers


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_is_that_of_diffusers_at_every_step(eta, prediction, spacing):
    oracle = DDIMScheduler(**{**SD, **CLIPPED, "timestep_spacing": spacing, "prediction_type": prediction})
    oracle.set_timesteps(20)
    walk, x, pred, noise = schedule_of(oracle), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), randn(2, 4, 3, 3, seed=2)
    for i, t in enumerate(oracle.timesteps):
        theirs = oracle.step(pred, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        found = ddim(pred, x, at(walk, i, 2), eta=eta)
        torch.testing.assert_close(found.sample(noise), theirs, atol=1e-5, rtol=1e-5)
        assert (found.std > 0).all() == (eta > 0 and t > 0)  # from index 0 to index 0 nothing moves


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_that_of_diffusers(variance):
    oracle = DDPMScheduler(**SD, timestep_spacing="leading", clip_sample=False, variance_type=variance)
    oracle.set_timesteps(20)
    walk, x, pred = schedule_of(oracle), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for i, t in enumerate(oracle.timesteps[:-1]):
        rng = torch.Generator().manual_seed(i)
        theirs = oracle.step(pred, t, x, generator=rng).prev_sample
        found = ddpm(pred, x, at(walk, i, 2), variance=variance)
        torch.testing.assert_close(found.sample(randn(2, 4, 3, 3, seed=i)), theirs, atol=1e-5, rtol=1e-5)
    last = ddpm(pred, x, at(walk, 19, 2), variance=variance)
    assert last.std.tolist() == [0, 0]  # Diffusers adds noise here with fixed_large
    torch.testing.assert_close(last.mean, walk.step(torch.tensor([19, 19])).implied(pred, x)[0])


def test_ddim_with_eta_1_is_the_ddpm_posterior():
    walk, x, pred = some_walk("ddim"), randn(20, 4, 3, 3).double(), randn(20, 4, 3, 3, seed=1).double()
    a, b = ddim(pred, x, walk.moves), ddpm(pred, x, walk.moves)
    torch.testing.assert_close(a.mean, b.mean, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(a.std, b.std, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ancestral_step_is_that_of_diffusers(prediction, spacing):
    oracle = EulerAncestralDiscreteScheduler(**SD, timestep_spacing=spacing, prediction_type=prediction)
    oracle.set_timesteps(12)
    walk, x, pred = schedule_of(oracle), 5 * randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    assert walk.start_std == pytest.approx(float(oracle.init_noise_sigma))
    for i, t in enumerate(oracle.timesteps):
        given = oracle.scale_model_input(x, t)
        theirs = oracle.step(pred, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        step = at(walk, i, 2)
        found = euler_ancestral(pred, x, step)
        torch.testing.assert_close(step.seen(x), given, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.sample(randn(2, 4, 3, 3, seed=i)), theirs, atol=2e-5, rtol=1e-5)
        assert step.t[0].item() == pytest.approx(t.item())


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_moves_are_those_of_diffusers_euler_deterministic_and_stochastic(stochastic):
    oracle = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=stochastic)
    oracle.set_timesteps(10)
    walk, x, pred = schedule_of(oracle), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    for i, t in enumerate(oracle.timesteps):
        theirs = oracle.step(pred, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        found = (partial(cps, eta=1.0) if stochastic else ode)(pred, x, at(walk, i, 2))
        torch.testing.assert_close(found.sample(randn(2, 4, 3, 3, seed=i)), theirs, atol=1e-5, rtol=1e-5)


def test_flow_ddim_with_eta_1_is_the_first_order_sde_solver():
    walk, x, v = flow_table("analytic"), randn(9, 3).double(), randn(9, 3, seed=1).double()
    step = walk.step(torch.arange(1, 10))
    t, s = step.sigma_t[:-1, None], step.sigma_s[:-1, None]
    h = ((1 - s) / s).log() - ((1 - t) / t).log()
    mean = s / t * (-h).exp() * x[:-1] - (1 - s) * torch.expm1(-2 * h) * (x[:-1] - t * v[:-1])
    found = flow_ddim(v, x, step)
    torch.testing.assert_close(found.mean[:-1], mean, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.std[:-1, None], s * (-torch.expm1(-2 * h)).sqrt(), atol=1e-10, rtol=1e-10)
    first = flow_ddim(v[:1], x[:1], at(walk, 0))  # from sigma = 1, where h is infinite
    torch.testing.assert_close(first.mean, (x[:1] - v[:1]) * (1 - walk.moves.sigma_s[0]))


# the mathematics


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_the_prediction_type_does_not_matter(name):
    walk, x_0, eps = some_walk(name), randn(3, 5).double(), randn(3, 5, seed=1).double()
    step = walk.step(torch.tensor([0, 1, 2]))
    x_t = broadcast(step.alpha_t, x_0) * x_0 + broadcast(step.sigma_t, x_0) * eps
    norm = (step.alpha_t.square() + step.sigma_t.square()).sqrt()
    alpha, sigma = (broadcast(c / norm, x_0) for c in (step.alpha_t, step.sigma_t))
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}
    found = [KERNELS[name](out, x_t, type(step)(**{**vars(step), "prediction": p})) for p, out in outputs.items()]
    for other in found[1:]:
        torch.testing.assert_close(other.mean, found[0].mean, atol=1e-9, rtol=1e-9)
        assert torch.equal(other.std, found[0].std)


@pytest.mark.parametrize("name", ["ode", *FLOW_NOISE])
def test_a_flow_model_may_predict_clean_latents(name):
    walk, x_0, eps = flow_table("analytic"), randn(3, 5).double(), randn(3, 5, seed=1).double()
    step = walk.step(torch.tensor([1, 4, 9]))
    x_t = broadcast(step.alpha_t, x_0) * x_0 + broadcast(step.sigma_t, x_0) * eps
    told = KERNELS[name](eps - x_0, x_t, step)
    seen = KERNELS[name](x_0, x_t, type(step)(**{**vars(step), "prediction": "sample"}))
    torch.testing.assert_close(seen.mean, told.mean, atol=1e-9, rtol=1e-9)
    assert torch.equal(seen.std, told.std)


def gaussian(x: Tensor, step) -> Tensor:
    """The exact velocity of a flow from N(1, 0.25) to N(0, 1)."""
    a, s = (broadcast(c, x) for c in (step.alpha_t, step.sigma_t))
    gain = (s - 0.25 * a) / (0.25 * a**2 + s**2)
    return gain * (x - a) - 1


def moments(walk: Schedule, move) -> tuple[float, float]:
    """Mean and variance at the end of a walk from N(0, 1), in closed form: every move is affine in x."""
    mean, variance = 0.0, 1.0
    x = torch.stack([torch.zeros(len(walk)), torch.ones(len(walk))]).double()
    ends = [move(gaussian(row[:, None], walk.moves), row[:, None], walk.moves) for row in x]
    for offset, end, std in zip(*(e.mean[:, 0].tolist() for e in ends), ends[0].std.tolist(), strict=True):
        gain = end - offset
        mean, variance = gain * mean + offset, gain**2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize(("table", "steps"), VARIANCES)
def test_the_exact_velocity_of_a_gaussian_ends_at_the_reference_moments(table, steps):
    moves = [ode, FLOW_NOISE["flow_sde"], FLOW_NOISE["dance"], cps, partial(cps, eta=1.0), flow_ddim]
    for move, variance in zip(moves, VARIANCES[table, steps], strict=True):
        mean, found = moments(flow_table(table, steps), move)
        assert mean == pytest.approx(1, abs=1e-6)
        assert variance is None or found == pytest.approx(variance, abs=1.1e-5)


def test_all_flow_kernels_but_cps_keep_the_marginals_in_the_limit():
    walk = flow_table("1", 20_000)
    for name, move in {"ode": ode, **FLOW_NOISE, "clean flow_sde": flow_sde, "clean dance": dance}.items():
        _, variance = moments(walk, move)
        assert (abs(variance - 0.25) < 6e-4) == (name != "cps"), name


def test_the_last_move_of_every_flow_kernel_goes_to_the_implied_clean_latents():
    walk, x, v = flow_table("analytic"), randn(2, 3).double(), randn(2, 3, seed=1).double()
    step = at(walk, 9, 2)
    for name in ("ode", "flow_sde", "dance", "cps", "flow_ddim"):
        found = KERNELS[name](v, x, step)
        torch.testing.assert_close(found.mean, x - 0.25 * v, atol=1e-12, rtol=0)
        assert found.std.tolist() == [0, 0]


@pytest.mark.parametrize(("steps", "whole", "but_last"), [(4, -0.7361973, -0.4249473), (10, -0.8167579, -0.6922579)])
def test_the_gradient_of_a_chain_is_that_of_its_expected_end(steps, whole, but_last):
    walk = flow_table("1", steps)
    for wanted, trained in ((whole, steps), (but_last, steps - 1)):
        theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
        x = torch.zeros(1, 1, dtype=torch.float64)
        for i in range(steps):
            step = at(walk, i)
            x = FLOW_NOISE["flow_sde"](gaussian(x, step) + (theta if i < trained else 0), x, step).mean
        (slope,) = torch.autograd.grad(x.sum(), theta)
        assert slope.item() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_chain_cut_off_has_the_gradient_of_its_last_moves(last):
    """Without noise, of the end by a shift of the velocity: the sum of dt_i prod_{j > i} c_j over moves that are kept
    in the graph; of all of them it is the gradient through the whole chain."""
    walk, steps, dt = flow_table("1", 4), 4, -0.25
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.full((1, 1), 0.3, dtype=torch.float64)
    for i in range(steps):
        with torch.set_grad_enabled(i >= steps - last):
            x = ode(gaussian(x, at(walk, i)) + theta, x, at(walk, i)).mean
    (slope,) = torch.autograd.grad(x.sum(), theta)
    sigma = [1 - i / steps for i in range(steps)]
    c = [1 + dt * (s - 0.25 * (1 - s)) / (0.25 * (1 - s) ** 2 + s**2) for s in sigma]
    expected = sum(dt * math.prod(c[i + 1 :]) for i in range(steps - last, steps))
    assert slope.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "few"),
    [
        ({"_class_name": "LCMScheduler"}, True),
        ({"_class_name": "TCDScheduler"}, True),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, True),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, True),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}, False),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, False),
        (SD3_CONFIG, False),
        (SD_CONFIG, False),
    ],
    ids=str,
)
def test_models_that_were_distilled_to_a_few_steps_are_known_by_their_scheduler(config, few):
    assert few_steps(config) is few


def test_the_score_function_estimates_that_gradient():
    walk, rng = flow_table("1", 4), torch.Generator().manual_seed(0)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.randn(200_000, 1, generator=rng, dtype=torch.float64)
    score = torch.zeros(len(x), dtype=torch.float64)
    total = []
    for i in range(4):
        step = at(walk, i, len(x))
        move = FLOW_NOISE["flow_sde"](gaussian(x, step) + theta, x, step)
        x_s = move.sample(torch.randn(x.shape, generator=rng, dtype=torch.float64)).detach()
        total.append(log_prob(move, x_s))
        x = x_s
    score = torch.stack(total).sum(0)
    (slope,) = torch.autograd.grad((score * (x - x.mean())[:, 0]).mean(), theta)
    assert slope.item() == pytest.approx(-0.7362, abs=0.013)  # five standard errors of 0.0018 * sqrt(2)


def test_a_limit_bounds_the_noise_of_the_flow_sde_and_touches_nothing_below_it():
    walk, x, v = flow_table("analytic"), randn(10, 3).double(), randn(10, 3, seed=1).double()
    free, held = flow_sde(v, x, walk.moves, last="noise"), flow_sde(v, x, walk.moves, last="noise", limit=0.45)
    assert held.std.max().item() == pytest.approx(0.45, abs=1e-12)
    below = free.std <= 0.45
    assert 0 < below.sum() < 10
    assert torch.equal(held.mean[below], free.mean[below])
    torch.testing.assert_close(held.std[~below], torch.full_like(held.std[~below], 0.45))


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_in_half_precision_give_float32_and_the_gradient_reaches_the_prediction(name):
    walk = some_walk(name)
    pred = randn(2, 3).bfloat16().requires_grad_()
    found = KERNELS[name](pred, randn(2, 3).bfloat16(), walk.step(torch.tensor([1, 2])))
    assert (found.mean.dtype, found.std.dtype) == (torch.float32, torch.float32)
    found.mean.sum().backward()
    assert pred.grad.abs().min() > 0
    assert not found.std.requires_grad


@pytest.mark.parametrize("name", KERNELS)
def test_every_sample_of_a_batch_makes_a_move_of_its_own_number(name):
    walk, x, v = some_walk(name), randn(3, 4).double(), randn(3, 4, seed=1).double()
    index = torch.tensor([2, 0, 1])
    together = KERNELS[name](v, x, walk.step(index))
    for row, i in enumerate(index.tolist()):
        alone = KERNELS[name](v[row : row + 1], x[row : row + 1], at(walk, i))
        assert torch.equal(together.mean[row], alone.mean[0])
        assert torch.equal(together.std[row], alone.std[0])


# log-probs


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "ode"])
def test_the_log_prob_is_that_of_torch(name):
    walk, x, pred = some_walk(name), randn(3, 4, 2).double(), randn(3, 4, 2, seed=1).double()
    move = kernel(name, form="normal")(pred, x, walk.step(torch.tensor([0, 1, 1])))
    x_s = move.sample(randn(3, 4, 2, seed=2).double())
    theirs = Normal(move.mean, broadcast(move.std, x)).log_prob(x_s).flatten(1)
    torch.testing.assert_close(log_prob(move, x_s), theirs.mean(1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(log_prob(move, x_s, reduction="sum"), theirs.sum(1), atol=1e-10, rtol=1e-10)


def test_the_expected_log_prob_is_minus_the_entropy():
    move = Transition(torch.zeros(1, 400_000), torch.tensor([0.3]))
    found = log_prob(move, move.sample(randn(1, 400_000))).item()
    assert found == pytest.approx(-0.5 * (1 + math.log(2 * math.pi * 0.09)), abs=0.006)


def test_cps_drops_the_factor_and_the_constants_unless_asked_for_the_normal_density():
    walk, x, v = flow_table("analytic"), randn(2, 5).double(), randn(2, 5, seed=1).double()
    recipe, paper = kernel("cps"), kernel("cps", form="normal")
    move = recipe(v, x, at(walk, 5, 2))
    ends = [move.sample(randn(2, 5, seed=s).double()) for s in (2, 3)]
    gaps = [k.log_prob(move, ends[0]) - k.log_prob(move, ends[1]) for k in (recipe, paper)]
    torch.testing.assert_close(gaps[0] / gaps[1], 2 * move.std.square(), atol=1e-9, rtol=1e-9)
    assert recipe.log_prob(move, move.mean).tolist() == [0, 0]
    assert kernel("flow_sde").form == "normal"


def test_the_ratio_lies_below_1_by_the_square_of_the_shift():
    old = Transition(torch.zeros(1, 3).double(), torch.tensor([0.3]).double())
    new = Transition(torch.full((1, 3), 0.05).double(), old.std)
    gap = lambda xi: (log_prob(new, old.sample(xi)) - log_prob(old, old.sample(xi))).item()  # noqa: E731
    xi = randn(1, 3).double()
    assert (gap(xi) + gap(-xi)) / 2 == pytest.approx(-0.0138888889, abs=1e-8)
    guard = torch.tensor([[0.3, -0.15, 0.6]]).double() / 0.3
    assert gap(guard) == pytest.approx(0.125, abs=1e-8)
    assert (gap(guard) + 0.0138888889) * 0.3 == pytest.approx(0.0416667, abs=1e-7)


def test_the_kl_divergence_is_that_of_torch_and_has_the_reference_value():
    walk, x, v = flow_table("analytic"), randn(2, 4).double(), randn(2, 4, seed=1).double()
    p, q = (flow_sde(u, x, at(walk, 5, 2)) for u in (v, v + 0.1))
    theirs = torch_kl(*(Normal(m.mean, broadcast(m.std, x)) for m in (p, q)))
    torch.testing.assert_close(kl_divergence(p, q), theirs.mean(1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(kl_divergence(p, q, reduction="sum"), theirs.sum(1), atol=1e-12, rtol=1e-9)
    assert kl_divergence(p, q)[0].item() == pytest.approx(0.00043934949, rel=1e-7)
    step = at(walk, 5, 2)
    assert (kl_divergence(p, q) * step.length)[0].item() == pytest.approx(0.0000366124575, rel=1e-7)
    sigma, g = step.sigma_t, p.std / step.length.sqrt()
    velocity_form = step.length / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g).square() * 0.01
    torch.testing.assert_close(kl_divergence(p, q), velocity_form, atol=1e-12, rtol=1e-9)


def test_the_kl_of_different_steps_is_refused():
    walk, x = flow_table("analytic"), randn(1, 4)
    with pytest.raises(ValueError, match=r"q\.std must be that of p"):
        kl_divergence(*(flow_sde(x, x, at(walk, i)) for i in (3, 5)))


def test_no_gradient_reaches_the_state_that_was_stored():
    mean, x_s = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    log_prob(Transition(mean, torch.ones(1)), x_s).sum().backward()
    assert mean.grad.abs().min() > 0
    assert x_s.grad is None


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [
        ("ddim", {"eta": 0.0}, 3),
        ("euler_ancestral", {"eta": 0.0}, 0),
        ("flow_sde", {"eta": 0.0}, 3),
        ("dance", {"eta": 0}, 3),
        ("cps", {"eta": 0.0}, 3),
        ("flow_ddim", {"eta": 0.0}, 3),
        ("ode", {}, 3),
        ("flow_sde", {}, 9),
        ("cps", {}, 9),
    ],
)
def test_a_move_without_noise_has_no_log_prob_and_no_kl(name, options, place):
    chosen, x = kernel(name, **options), randn(2, 4).double()
    move = chosen(x, x, at(some_walk(name), place, 2))
    with pytest.raises(InputError, match=r"eta must be positive where a log-prob is asked for.*samples \[0, 1\] of 2"):
        chosen.log_prob(move, x)
    with pytest.raises(InputError, match="eta must be positive"):
        kl_divergence(move, move)


@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("ode", "ddpm")])
def test_without_eta_a_kernel_is_the_noise_free_one(name):
    walk, x, pred = some_walk(name), randn(3, 4).double(), randn(3, 4, seed=1).double()
    step = walk.step(torch.arange(3))
    torch.testing.assert_close(
        KERNELS[name](pred, x, step, eta=0.0).mean, ode(pred, x, step).mean, atol=1e-12, rtol=1e-12
    )


# walks


def test_a_ddim_walk_ends_at_index_0_whatever_the_scheduler_says_and_the_noise_free_one_where_it_says():
    bar_0 = DDIMScheduler(**SD).alphas_cumprod[0].double()
    for to_one in (False, True):
        config = {**SD_CONFIG, "set_alpha_to_one": to_one}
        trained, free = (make_schedule(name, config, 20) for name in ("ddim", "ode"))
        torch.testing.assert_close(trained.moves.alpha_s[-1].square(), bar_0)
        torch.testing.assert_close(free.moves.alpha_s[-1].square(), torch.ones_like(bar_0) if to_one else bar_0)
        assert trained.levels.tolist() == [*range(951, 0, -50), 0]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_noise_on_its_own_walk_and_a_table_of_it(name):
    config = SD_CONFIG if name in ("ddim", "ddpm", "euler_ancestral") else SD3_CONFIG
    chosen, walk = kernel(name), make_schedule(name, config, 10)
    stds = chosen.stds(walk)
    assert len(stds) == len(walk) == 10
    assert ((stds > 0).sum().item(), stds[-1].item() > 0) == {"ddim": (10, True), "ode": (0, False)}.get(
        name, (9, False)
    )


def test_a_number_outside_the_walk_is_refused():
    with pytest.raises(ValueError, match=r"index must be in \[0, 10\), got \[-1\]"):
        flow_table("analytic").step(torch.tensor([-1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PNDMScheduler(**SD), "scheduler must be one of DDIMScheduler.*got 'PNDMScheduler'"),
        (lambda: DDIMScheduler(**SD), "timesteps set, got none"),
        (lambda: EulerAncestralDiscreteScheduler(**SD), "timesteps set, got none"),
        (lambda: FlowMatchEulerDiscreteScheduler(), "timesteps set, got none"),
        (lambda: DDPMScheduler(variance_type="learned"), "variance_type must be fixed, got 'learned'"),
    ],
)
def test_a_scheduler_that_cannot_be_walked_is_one_clear_error(make, message):
    with pytest.raises(InputError, match=message):
        schedule_of(make())


@pytest.mark.parametrize(
    ("name", "config", "steps", "message"),
    [
        ("flow_sd", SD3_CONFIG, 10, "got 'flow_sd'; did you mean 'flow_sde'"),
        ("ddim", SD3_CONFIG, 10, "kernel must fit a flow model, got 'ddim'; choose from cps, dance"),
        ("dance", SD_CONFIG, 10, "kernel must fit a DDPM model, got 'dance'; choose from ddim"),
        ("ddim", SD_CONFIG, 0, r"steps must be in \[1, 1000\], got 0"),
        ("flow_sde", {**SD3_CONFIG, "use_dynamic_shifting": True}, 10, "use_dynamic_shifting must be false"),
    ],
)
def test_a_walk_that_cannot_be_is_one_clear_error(name, config, steps, message):
    with pytest.raises(InputError, match=message):
        make_schedule(name, config, steps)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dim", {}, "got 'dim'; did you mean 'ddim'"),
        ("ddim", {"eta": 1.5}, r"kernel\.eta must be in \[0, 1\] with 'ddim', got 1\.5"),
        ("cps", {"eta": 1.2}, r"kernel\.eta must be in \[0, 1\] with 'cps', got 1\.2"),
        ("flow_ddim", {"eta": 1.2}, r"kernel\.eta must be in \[0, 1\] with 'flow_ddim', got 1\.2"),
        ("flow_sde", {"eta": -0.1}, r"kernel\.eta must be at least 0 with 'flow_sde', got -0\.1"),
        ("ode", {"eta": 0.5}, "kernel 'ode' does not take option 'eta'; it belongs to cps"),
        ("cps", {"limit": 0.4}, "kernel 'cps' does not take option 'limit'; it belongs to flow_sde"),
        ("flow_sde", {"limit": 0.0}, r"kernel\.limit must be positive"),
        ("flow_sde", {"last": "no"}, r"kernel\.last must be 'clean' or 'noise', got 'no'"),
        ("dance", {"eta": "0.3"}, r"kernel\.eta must be a number, got '0\.3'"),
        ("ddpm", {"variance": "learned"}, r"kernel\.variance must be"),
        ("cps", {"form": "square"}, r"kernel\.form must be"),
    ],
)
def test_a_kernel_that_cannot_be_is_one_clear_error(name, options, message):
    with pytest.raises(InputError, match=message):
        kernel(name, **options)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddim", 1.0), ("euler_ancestral", 1.0), ("flow_sde", 0.7), ("dance", 0.3), ("cps", 0.8), ("flow_ddim", 1.0)],
)
def test_eta_left_out_is_as_published(name, eta):
    walk, x, pred = some_walk(name), randn(2, 3), randn(2, 3, seed=1)
    step = walk.step(torch.tensor([1, 2]))
    left_out, asked = kernel(name)(pred, x, step), kernel(name, eta=eta)(pred, x, step)
    assert torch.equal(left_out.std, asked.std)
    assert torch.equal(left_out.mean, asked.mean)


def test_a_kernel_on_the_wrong_kind_of_walk_is_one_clear_error():
    x = randn(1, 3)
    with pytest.raises(
        InputError, match="kernel must fit a flow schedule, got 'ddim'; choose from cps, dance, flow_ddim"
    ):
        ddim(x, x, at(flow_table("analytic"), 0))
