"""Second-order moves without noise: against Diffusers' solver, by their order on an exact flow, and in a rollout."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffalign.errors import InputError
from diffalign.models.load import ModelSource
from diffalign.online.parts import make_walk
from diffalign.online.settings import KernelSettings, OnlineSettings
from diffalign.sampling.kernels import Kernel, kernel, ode
from diffalign.sampling.rollout import Keep, initial_noise, rollout
from diffalign.sampling.schedule import Schedule, flow_schedule, make_schedule, vp_schedule
from diffalign.sampling.solvers import Before, dpmpp_2m
from diffalign.types import Needs, Trajectory
from tests.test_rollout import conds
from tests.test_transitions import SD3_CONFIG, gaussian
from tests.toys import SHAPE, toy


def walked(schedule: Schedule, network, x: Tensor, order: int) -> Tensor:
    """The end of a walk by hand, without the sampling loop."""
    before = None
    for i in range(len(schedule)):
        step = schedule.step(torch.full((len(x),), i))
        pred = network(x, step)
        x_0 = step.implied(pred, x)[0]
        x = ode(pred, x, step).mean if order == 1 else dpmpp_2m(x_0, x, step, before)
        before = Before(x_0, step)
    return x


def theirs(scheduler: DPMSolverMultistepScheduler, network, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
"""Of the scheduler, which gives numpy a tensor."""

OPTIONS = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 10])
def test_on_a_ddpm_path_it_is_diffusers_multistep_solver(prediction, steps):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **OPTIONS
    )
    scheduler.set_timesteps(steps)
    bars = 1 / (1 + scheduler.sigmas.double().square())
    t = scheduler.timesteps
    schedule = vp_schedule(t, torch.cat([t[1:], t[:1] * 0]), bars[:-1], bars[1:], prediction)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 3

    def network(x, at):
        t = at if isinstance(at, Tensor) else at.t[:, None]
        return (x @ weight + t / 1000).tanh()

    found = walked(schedule, network, x, order=2)
    torch.testing.assert_close(found, theirs(scheduler, network, x), atol=2e-5, rtol=2e-5)
    assert (found - walked(schedule, network, x, order=1)).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [4, 10])
def test_on_a_flow_it_is_diffusers_multistep_solver(steps):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, **OPTIONS
    )
    scheduler.set_timesteps(steps)
    schedule = flow_schedule(scheduler.sigmas)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 3

    def network(x, at):
        sigma = scheduler.sigmas[scheduler.step_index or 0] if isinstance(at, Tensor) else at.sigma_t[:, None]
        return (x @ weight + sigma.to(x)).tanh()

    found = walked(schedule, network, x, order=2)
    torch.testing.assert_close(found, theirs(scheduler, network, x), atol=2e-5, rtol=2e-5)
    assert (found - walked(schedule, network, x, order=1)).abs().max() > 1e-3


def test_on_an_exact_flow_half_the_step_leaves_a_quarter_of_the_error():
    """The flow from N(1, 0.25) to N(0, 1) keeps how many standard deviations x is from the mean."""
    x = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)

    def spread(sigma: float) -> float:
        return math.hypot(0.5 * (1 - sigma), sigma)

    def error(steps: int, order: int) -> float:
        levels = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        exact = 0.9 + (x - 0.1) * spread(0.1) / spread(0.9)
        return (walked(flow_schedule(levels), gaussian, x, order) - exact).abs().max().item()

    assert [error(n, 1) / error(2 * n, 1) for n in (80, 160)] == [pytest.approx(2, rel=0.05)] * 2
    assert [error(n, 2) / error(2 * n, 2) for n in (80, 160)] == [pytest.approx(4, rel=0.05)] * 2
    assert error(10, 2) < error(10, 1) / 3


# in a rollout


def rolled(chosen: Kernel, **options) -> Trajectory:
    schedule = make_schedule("ode", SD3_CONFIG, 6)
    x_init = options.pop("x_init", initial_noise((0, 1), SHAPE))
    schedule = options.pop("schedule", schedule)
    return rollout(toy("velocity"), chosen, schedule, conds(2), (0, 1), x_init=x_init, **options)


def test_a_rollout_walks_by_it_where_it_is_asked_to():
    denoiser = toy("velocity")

    def network(x, step):
        return denoiser(x, step.t, conds(2)).detach()

    found, first = (rolled(kernel("ode", solver_order=order), keep=Keep(x_0_hat=True)) for order in (2, 1))
    expected = walked(make_schedule("ode", SD3_CONFIG, 6), network, initial_noise((0, 1), SHAPE), order=2)
    assert torch.equal(found.x_0, expected)
    assert (found.x_0 - first.x_0).abs().max() > 1e-3
    torch.testing.assert_close(found.x_0_hat[:, :2], first.x_0_hat[:, :2], atol=1e-6, rtol=1e-6)
    assert (found.x_0_hat[:, 4] - first.x_0_hat[:, 4]).abs().max() > 1e-4
    assert found.log_prob.shape == (2, 0)


def test_after_a_move_with_noise_it_begins_anew():
    made = rolled(kernel("flow_sde", solver_order=2), window=range(2, 4), keep=Keep(levels="all"))
    moves = make_schedule("ode", SD3_CONFIG, 6).moves
    rest = Schedule(moves=moves.rows(torch.tensor([4, 5])))
    again = rolled(kernel("ode", solver_order=2), schedule=rest, x_init=made.x[:, 4])
    assert torch.equal(made.x_0, again.x_0)
    assert made.steps == (2, 3)


@pytest.mark.parametrize("order", [0, 3])
def test_an_order_that_there_is_not_is_one_clear_error(order):
    with pytest.raises(InputError, match=f"kernel.solver_order must be 1 or 2, got {order!r}"):
        kernel("ode", solver_order=order)


def test_a_second_order_that_no_move_would_have_is_refused():
    with pytest.raises(
        InputError,
        match=r"kernel.solver_order must be 1 where fewer than 2 moves are without noise, got 2 with noise on 5 of 6",
    ):
        rolled(kernel("flow_sde", solver_order=2))
    settings = OnlineSettings(kernel=KernelSettings(name="flow_sde", solver_order=2), steps=6)
    with pytest.raises(InputError, match="take the kernel 'ode', or a window"):
        make_walk(settings, Needs(data="prompts", items="transitions"), ModelSource(path="tiny-sd3"))


def test_a_config_may_ask_for_it():
    settings = OnlineSettings(kernel=KernelSettings(name="ode", solver_order=2), steps=6)
    made = make_walk(settings, Needs(data="prompts", items="images"), ModelSource(path="tiny-sd3"))
    assert made.kernel.solver_order == 2
