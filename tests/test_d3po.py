"""D3PO: reference values of online.md 8.1, clips and bounds, moves of real walks."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.distributions import Normal

from diffalign.denoisers.guided import Guided
from diffalign.errors import InputError
from diffalign.methods.d3po import D3PO
from diffalign.paths import NoisePath
from diffalign.rng import SampleRng, generator
from diffalign.sampling.kernels import kernel
from diffalign.sampling.rollout import initial_noise, rollout
from diffalign.sampling.walk import KernelWalk
from diffalign.types import Cond, OnlineMethod, Transition, TransitionPairs
from tests.test_rollout import conds, model, walk
from tests.toys import SHAPE, ddpm, toy

RNG = SampleRng(0, (0, 1, 2, 3))
KERNELS = ["ddim", "flow_sde"]
BOUNDS = {0.1: (0.6831639808, 0.7032310504), 10.0: (0.1261309, 2.1328378)}


# moves whose log-probs the test says


@dataclass(frozen=True, kw_only=True)
class Level:
    """A denoiser that says a number, or one for each row."""

    theta: torch.Tensor
    path: NoisePath
    prediction: str = "epsilon"

    def __call__(self, x_t, t, cond):
        return self.theta.reshape(-1, 1, 1, 1).expand_as(x_t)


@dataclass(frozen=True)
class Normals:
    """Every move is N(what the denoiser says, std^2); densities are those of torch.distributions."""

    std: float = 0.5

    def transition(self, denoiser, x_t, step, cond):
        return Transition(denoiser(x_t, step, cond), torch.full((len(x_t),), self.std).to(x_t))

    def log_prob(self, transition, x_s):
        return Normal(transition.mean, self.std).log_prob(x_s).flatten(1).mean(1)

    def length(self, step):
        return torch.ones(len(step))

    def odds(self, step):
        return torch.ones(len(step))

    @property
    def stds(self):
        return torch.full((1,), self.std)

    def noise_level(self, step):
        return torch.linspace(0, 1, len(step))


class Told(Normals):
    """What the denoiser says is the log-prob itself."""

    def log_prob(self, transition, x_s):
        return transition.mean.flatten(1).mean(1)


def numbers(x_w, x_l, moves=Normals()):
    """Pairs of moves from 0 to these numbers."""
    x_w, x_l = (torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1, 1) for x in (x_w, x_l))
    return TransitionPairs(
        x_t_w=torch.zeros_like(x_w), x_s_w=x_w, x_t_l=torch.zeros_like(x_l), x_s_l=x_l,
        step=torch.zeros(len(x_w), dtype=torch.long), cond=Cond({"c": torch.zeros(len(x_w), 3)}), walk=moves,
        samples=tuple(range(len(x_w))),
    )  # fmt: skip


def level(*theta):
    return Level(theta=torch.tensor(theta, dtype=torch.float64, requires_grad=True), path=ddpm())


def told(method, log_ratio_w, log_ratio_l):
    """(output, gradients of the summed loss by the log-ratios of winners and of losers)."""
    size = len(log_ratio_w)
    policy, reference = level(*log_ratio_w, *log_ratio_l), level(*[0.0] * 2 * size)
    out = method(policy, reference, numbers([0.0] * size, [0.0] * size, Told()), RNG)
    (grad,) = torch.autograd.grad(out.loss.sum(), policy.theta)
    return out, grad[:size].tolist(), grad[size:].tolist()


def test_the_gradient_of_the_one_dimensional_toy_is_its_reference_value():
    policy = level(0.3)
    out = D3PO()(policy, level(0.3), numbers([1.2], [-0.4]), RNG)
    assert torch.autograd.grad(out.loss.sum(), policy.theta)[0].item() == pytest.approx(-0.32, abs=1e-12)
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_a_policy_that_is_its_reference_has_loss_ln_2_whatever_the_moves():
    x_w, x_l = 30 * torch.randn(2, 50, dtype=torch.float64, generator=generator(0))
    out = D3PO()(level(0.3), level(0.3), numbers(x_w, x_l), RNG)
    assert out.loss.tolist() == [math.log(2)] * 50
    assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 50


@pytest.mark.parametrize("beta", [0.1, 10.0], ids=["D3PO", "SPO"])
def test_the_loss_stays_within_the_bounds_of_the_clip_and_reaches_them(beta):
    least, most = BOUNDS[beta]
    out, *_ = told(D3PO(beta=beta), [9.0, -9.0], [-9.0, 9.0])
    assert out.loss.tolist() == pytest.approx([least, most], abs=1e-7 if beta == 10 else 1e-10)
    log_ratio = 0.3 * torch.randn(2, 200, dtype=torch.float64, generator=generator(1))
    loss = told(D3PO(beta=beta), *log_ratio.tolist())[0].loss
    assert ((loss >= least - 1e-7) & (loss <= most + 1e-7)).all()


@pytest.mark.parametrize(
    ("log_ratio", "clipped", "inside"),
    [(-0.1054, -0.1053605, False), (-0.1053, -0.1053, True), (0.0953, 0.0953, True), (0.0954, 0.0953102, False),
     (0.1, 0.0953102, False), (-0.1, -0.1, True)],
)  # fmt: skip
def test_the_clip_is_wider_down_than_up_in_log_space_and_stops_the_gradient_on_both_sides(log_ratio, clipped, inside):
    out, of_w, of_l = told(D3PO(), [log_ratio, 0.0], [0.0, log_ratio])
    assert out.metrics["delta_w"][0].item() == pytest.approx(clipped, abs=1e-7)
    assert out.metrics["delta_l"][1].item() == pytest.approx(clipped, abs=1e-7)
    assert (of_w[0] < 0, of_l[1] > 0) == (inside, inside)
    assert of_w[0] == of_l[1] == 0 or inside
    assert of_w[1] < 0 < of_l[0]
    assert out.metrics["clipfrac"].tolist() == [0.5 * (not inside)] * 2


def test_the_loss_is_that_of_the_published_code_where_it_does_not_overflow_and_its_ties_have_no_gradient():
    """exp, clamp, log, sigmoid, log, with h = (1, -1), (-1, 1) and (0, 0) for a tie."""
    first, second = (0.1 * torch.randn(60, dtype=torch.float64, generator=generator(i)) for i in (2, 3))
    h = (torch.arange(60) % 3 - 1).double()
    leaves = [x.clone().requires_grad_() for x in (first, second)]
    delta = [torch.log(torch.clamp(torch.exp(x), 0.9, 1.1)) for x in leaves]
    theirs = -torch.log(torch.sigmoid(0.1 * h * delta[0] - 0.1 * h * delta[1]))
    by_first, by_second = torch.autograd.grad(theirs.sum(), leaves)
    assert theirs[h == 0].tolist() == pytest.approx([math.log(2)] * 20, abs=1e-15)
    assert by_first[h == 0].abs().max() == by_second[h == 0].abs().max() == 0
    for sign, w, lo, of_w, of_l in ((1, first, second, by_first, by_second), (-1, second, first, by_second, by_first)):
        out, grad_w, grad_l = told(D3PO(), w[h == sign].tolist(), lo[h == sign].tolist())
        assert out.loss.tolist() == pytest.approx(theirs[h == sign].tolist(), abs=1e-12)
        assert grad_w == pytest.approx(of_w[h == sign].tolist(), abs=1e-12)
        assert grad_l == pytest.approx(of_l[h == sign].tolist(), abs=1e-12)


def test_log_ratios_beyond_any_exponential_leave_loss_and_gradient_finite():
    out, of_w, of_l = told(D3PO(beta=10.0), [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4])
    assert all(v.isfinite().all() for v in [out.loss, *out.metrics.values()])
    assert of_w[:2] == of_l[:2] == [0.0, 0.0]
    assert of_w[2] < 0 == of_l[2]


def test_a_winner_pulls_and_a_loser_pushes():
    _, of_w, of_l = told(D3PO(), [0.05, -0.05], [-0.05, 0.05])
    assert max(of_w) < 0 < min(of_l)


def test_metrics_are_detached_and_say_what_their_names_do():
    out, *_ = told(D3PO(), [0.05, 0.3], [-0.02, 0.01])
    found = {name: value.tolist() for name, value in out.metrics.items()}
    assert not any(v.requires_grad for v in out.metrics.values())
    assert all(v.shape == (2,) for v in out.metrics.values())
    assert found["log_ratio_w"] == pytest.approx([0.05, 0.3])
    assert found["log_ratio_l"] == pytest.approx([-0.02, 0.01])
    assert found["delta_w"] == pytest.approx([0.05, math.log(1.1)])
    assert found["ratio_win"] == pytest.approx([math.exp(0.05), 1.1])
    assert found["ratio_lose"] == pytest.approx([math.exp(-0.02), math.exp(0.01)])
    assert found["rewards/margins"] == pytest.approx([0.007, 0.1 * (math.log(1.1) - 0.01)])
    assert found["rewards/accuracies"] == [1.0, 1.0]
    assert found["clipfrac"] == [0.0, 0.5]
    assert out.noise_level.tolist() == [0.0, 1.0]


# moves of real walks


def moves(name, order=(0, 1, 2, 3), guidance=1.0):
    """Pairs of moves of two walks from one x_init; `order` has the number of each pair's move."""
    size = len(order)
    schedule, chosen = walk(name, 5), kernel(name)
    x_init = initial_noise(range(size), SHAPE)
    ways = [
        rollout(guided(model(name), guidance), chosen, schedule, conds(size), seeds, x_init=x_init)
        for seeds in (range(size), range(100, 100 + size))
    ]
    w, lo = ([[x[b] for x in way.states(i)] for b, i in enumerate(order)] for way in ways)
    return TransitionPairs(
        x_t_w=torch.stack([x for x, _ in w]), x_s_w=torch.stack([x for _, x in w]),
        x_t_l=torch.stack([x for x, _ in lo]), x_s_l=torch.stack([x for _, x in lo]),
        step=torch.tensor(order), cond=conds(size), walk=KernelWalk(kernel=chosen, schedule=schedule),
        samples=tuple(range(size)),
    )  # fmt: skip


def guided(denoiser, guidance):
    return denoiser if guidance == 1 else Guided(
        denoiser=denoiser, uncond=Cond({"c": torch.zeros(1, 3)}), guidance=guidance
    )  # fmt: skip


def nudged(name, size=1e-3):
    """The model that walked, a little changed."""
    found = model(name)
    with torch.no_grad():
        for i, parameter in enumerate(found.net.parameters()):
            parameter += size * torch.randn(parameter.shape, generator=generator(i, "nudge"))
    return found


def swapped(batch):
    return replace(batch, x_t_w=batch.x_t_l, x_s_w=batch.x_s_l, x_t_l=batch.x_t_w, x_s_l=batch.x_s_w)


def named(metrics, name):
    return metrics[f"{name}_w"], metrics[f"{name}_l"]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", KERNELS)
def test_at_the_reference_the_gradient_is_minus_half_beta_times_the_difference_of_log_prob_gradients(name, guidance):
    batch, policy, reference = moves(name, guidance=guidance), model(name), model(name)
    out = D3PO()(guided(policy, guidance), guided(reference, guidance), batch, RNG)
    assert out.loss.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)
    assert out.metrics["log_ratio_w"].abs().max() == 0
    out.loss.sum().backward()
    assert all(p.grad is None for p in reference.net.parameters())
    again = model(name)
    total = torch.zeros(())
    for sign, x_t, x_s in ((1, batch.x_t_w, batch.x_s_w), (-1, batch.x_t_l, batch.x_s_l)):
        move = batch.walk.transition(guided(again, guidance), x_t, batch.step, batch.cond)
        total = total + sign * Normal(move.mean, move.std[:, None, None, None]).log_prob(x_s).flatten(1).mean(1).sum()
    (-0.1 / 2 * total).backward()
    for found, expected in zip(policy.net.parameters(), again.net.parameters(), strict=True):
        assert found.grad.abs().max() > 0
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5 * expected.grad.abs().max().item())


@pytest.mark.parametrize("name", KERNELS)
def test_swapping_the_pair_flips_the_margin(name):
    batch = moves(name)
    there, back = (D3PO()(nudged(name), model(name), x, RNG).metrics for x in (batch, swapped(batch)))
    assert there["rewards/margins"].abs().max() > 1e-5
    torch.testing.assert_close(there["rewards/margins"], -back["rewards/margins"], atol=1e-7, rtol=0)
    torch.testing.assert_close(named(there, "log_ratio"), named(back, "log_ratio")[::-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_moves_of_different_numbers_in_one_batch_are_what_each_is_by_itself(name):
    method, policy, reference = D3PO(clip=0.9), nudged(name, 1e-2), model(name)
    alone = [named(method(policy, reference, moves(name, [i] * 4), RNG).metrics, "log_ratio") for i in range(4)]
    for order in ((2, 0, 3, 1), (1, 1, 0, 2)):
        out = method(policy, reference, moves(name, order), RNG)
        assert out.metrics["clipfrac"].max() == 0
        for found, which in zip(named(out.metrics, "log_ratio"), (0, 1), strict=True):
            expected = torch.stack([alone[i][which][b] for b, i in enumerate(order)])
            torch.testing.assert_close(found, expected, atol=0, rtol=0)  # of one batch shape
        wrong = replace(moves(name, order), step=torch.tensor(order).roll(1))
        apart = named(method(policy, reference, wrong, RNG).metrics, "log_ratio")[0] - found
        assert apart.abs().max() > 1e-3
        assert out.noise_level.tolist() == [(len(walk(name, 5)) - 1 - i) / (len(walk(name, 5)) - 1) for i in order]


@pytest.mark.parametrize("name", KERNELS)
def test_a_small_step_lowers_the_loss_and_moves_winner_and_loser_apart(name):
    batch, policy, reference = moves(name), model(name), model(name)
    optimizer = torch.optim.SGD(policy.net.parameters(), lr=1e-2)
    before = D3PO()(policy, reference, batch, RNG)
    before.loss.mean().backward()
    optimizer.step()
    after = D3PO()(policy, reference, batch, RNG)
    assert after.loss.mean() < before.loss.mean()
    assert (after.metrics["log_ratio_w"] - after.metrics["log_ratio_l"]).mean() > 0


def test_moves_from_one_state_are_a_pair_too():
    batch = moves("ddim", (2, 2, 2, 2))
    out = D3PO(beta=10.0)(nudged("ddim"), toy(), replace(batch, x_t_l=batch.x_t_w), RNG)
    assert out.loss.isfinite().all()


# the method


def test_it_needs_pairs_of_moves_of_two_images_and_a_reference():
    method = D3PO()
    assert isinstance(method, OnlineMethod)
    needs = method.needs
    assert (needs.data, needs.items, needs.references) == ("prompts", "transition_pairs", ("start", "pool"))
    assert (needs.group_at_least, needs.old, method.beta, method.clip) == (2, False, 0.1, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"method\.beta must be positive, got 0\.0"),
        ({"beta": math.nan}, r"method\.beta must be positive, got nan"),
        ({"clip": 0.0}, r"method\.clip must be in \(0, 1\), got 0\.0"),
        ({"clip": 1.0}, r"method\.clip must be in \(0, 1\), got 1\.0"),
    ],
)
def test_a_hyperparameter_out_of_its_range_is_an_error(options, message):
    with pytest.raises(InputError, match=message):
        D3PO(**options)
