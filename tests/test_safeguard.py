"""The safeguarded update (Diffusion-SDPO): its factor, what it changes and what not, and where it belongs."""

import dataclasses
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from diffalign import paths
from diffalign.config import parse
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.methods.cpo import CPO
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.dmpo import DMPO
from diffalign.methods.linear_dpo import LinearDPO
from diffalign.methods.mapo import MaPO
from diffalign.methods.measure import Safeguard, safeguard_factor, scale_gradient
from diffalign.rng import SampleRng
from diffalign.types import Cond, PairBatch
from tests.test_config import BASE
from tests.toys import ON_DATA, ddpm, pairs, toy

RNG = SampleRng(0, (0,))
GUARDED = {
    "cpo": CPO(beta=10.0),
    "diffusion_dpo": DiffusionDPO(beta=10.0),
    "dmpo": DMPO(beta=10.0),
    "linear_dpo": LinearDPO(beta=10.0),
    "mapo": MaPO(),
}


def factor(w, lo, *, mu: float, per_pair: bool = False) -> list[float]:
    rows = (torch.tensor(x, dtype=torch.float64) for x in (w, lo))
    return safeguard_factor(*rows, mu=mu, per_pair=per_pair).tolist()


@pytest.mark.parametrize(("mu", "expected"), [(0.9, 0.1125), (0.6, 0.45), (0.0, 1.0)])
def test_the_factor_has_its_reference_values(mu, expected):
    assert factor([[1.0, 2.0, 2.0]], [[2.0, 1.0, 2.0]], mu=mu) == pytest.approx([expected], abs=1e-9)


@pytest.mark.parametrize("lo", [[-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
def test_a_loser_that_does_not_pull_on_the_winner_is_left_alone(lo):
    assert factor([[1.0, 0.0]], [lo], mu=0.9) == [1.0]


def test_one_factor_is_of_the_whole_micro_batch_and_the_other_of_each_pair():
    w, lo = [[1.0, 2.0, 2.0], [1.0, 0.0, 0.0]], [[2.0, 1.0, 2.0], [-4.0, 0.0, 0.0]]
    joined = 0.1 * (9 + 1) / (8 - 4)
    assert factor(w, lo, mu=0.9) == pytest.approx([joined, joined], abs=1e-9)
    assert factor(w, lo, mu=0.9, per_pair=True) == pytest.approx([0.1125, 1.0], abs=1e-9)


def test_scaling_a_gradient_keeps_the_value():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scale_gradient(x.square(), torch.tensor([0.5, 0.0]))
    assert y.tolist() == [4.0, 9.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2.0, 0.0]


def test_every_pair_method_with_shared_noise_has_the_safeguard_and_no_other_has():
    has = {name for name, cls in METHODS.items() if "safeguard" in {f.name for f in dataclasses.fields(cls)}}
    shares_noise = {name for name in ON_DATA if METHODS[name]().needs.batches == "pairs"} - {"inpo", "smpo"}
    assert has == shares_noise | {"online_dpo"}  # the same loss on pairs of its own
    assert has >= GUARDED.keys()


@dataclass(frozen=True)
class Shifted:
    """Prediction = target + residual + theta: one Jacobian for winner and loser, as the guarantee supposes."""

    x_0: Tensor
    residual: Tensor
    theta: Tensor
    path = ddpm()
    prediction = "epsilon"

    def __call__(self, x_t, t, cond):
        alpha_t, sigma_t = (paths.broadcast(c, x_t) for c in self.path.coefficients(t))
        return (x_t - alpha_t * self.x_0) / sigma_t + self.residual + self.theta


def example(method, w=(1.0, 0.0, 0.0), lo=(2.0, 0.0, 0.0)):
    """(out, d loss / d theta, residual of the winner) on one pair of three elements, policy = reference."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 1, 1, generator=rng, dtype=torch.float64)
    batch = PairBatch(x_w=x[:1], x_l=x[1:], cond=Cond({"c": torch.zeros(1, 3)}), samples=(0,))
    residual = torch.tensor([w, lo], dtype=torch.float64).reshape(2, 3, 1, 1)
    theta = torch.zeros(3, 1, 1, dtype=torch.float64, requires_grad=True)
    policy = Shifted(x, residual, theta)
    reference = None if method.needs.references == ("none",) else Shifted(x, residual, theta.detach())
    out = method(policy, reference, batch, RNG)
    return out, torch.autograd.grad(out.loss.sum(), theta)[0].flatten(), residual[0].flatten()


@pytest.mark.parametrize(
    "method",
    [DiffusionDPO(beta=1.0), DMPO(beta=1.0), LinearDPO(beta=1.0), CPO(beta=1.0, sft_weight=0.0)],
    ids=lambda m: type(m).__name__,
)
def test_plain_steps_raise_the_winners_error_where_safeguarded_ones_lower_it(method):
    _, plain, winner = example(method)
    _, safe, _ = example(replace(method, safeguard=Safeguard(mu=0.9)))
    rate = -(winner @ plain), -(winner @ safe)  # of the winner's error along a step downhill, up to a factor > 0
    assert rate[0] > 0 > rate[1]
    assert (rate[1] / rate[0]).item() == pytest.approx(-0.9, abs=1e-6)  # -(1 - 0.1) against -(1 - 2)


@pytest.mark.parametrize("name", GUARDED)
def test_the_safeguard_changes_no_value(name):
    plain, _, _ = example(GUARDED[name])
    safe, _, _ = example(replace(GUARDED[name], safeguard=Safeguard(mu=0.9)))
    torch.testing.assert_close(safe.loss, plain.loss, atol=0, rtol=0)
    assert safe.metrics["lambda_safe"].item() == pytest.approx(0.05, abs=1e-6)
    assert "lambda_safe" not in plain.metrics


@pytest.mark.parametrize("name", GUARDED)
def test_the_safeguard_scales_the_losers_gradient_only(name):
    w, lo = (1.0, 0.0, 0.5), (0.6, 1.0, 0.0)
    _, plain, _ = example(GUARDED[name], w, lo)
    out, safe, _ = example(replace(GUARDED[name], safeguard=Safeguard(mu=0.9)), w, lo)
    scale = out.metrics["lambda_safe"].item()
    assert scale == pytest.approx(0.1 * 1.25 / 0.6, abs=1e-6)
    assert (safe[1] / plain[1]).item() == pytest.approx(scale, abs=1e-6)  # an element where only the loser has an error
    assert (safe[2] / plain[2]).item() == pytest.approx(1.0, abs=1e-6)  # and one where only the winner has


def test_a_network_gets_one_factor_a_pair_where_asked_for():
    policy, reference, batch, rng = toy(seed=1), toy(), pairs(), SampleRng(0, (0, 1, 2, 3))
    apart, joined = (
        DiffusionDPO(beta=10.0, safeguard=Safeguard(mu=0.9, per_pair=each))(policy, reference, batch, rng)
        for each in (True, False)
    )
    assert len(set(apart.metrics["lambda_safe"].tolist())) > 1
    assert len(set(joined.metrics["lambda_safe"].tolist())) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "sft", "safeguard": {"mu": 0.9}}, r"method\.safeguard must be left out with method 'sft': it has no"),
        (
            {"name": "diffusion_kto", "safeguard": {"mu": 0.9}},
            r"method\.safeguard must be left out with method 'diffusion_kto': it has no winner and loser",
        ),
        (
            {"name": "diffusion_dpo", "share_noise": False, "safeguard": {"mu": 0.9}},
            r"method\.safeguard must be left out with share_noise = false; it compares the residuals",
        ),
        ({"name": "dmpo", "safeguard": {"mu": 1.5}}, r"method\.safeguard\.mu must be in \[0, 1\], got 1\.5"),
        ({"name": "mapo", "safeguard": {}}, r"config\.method\.safeguard: missing key 'mu'"),
        ({"name": "mapo", "safeguard": {"nu": 1.0}}, r"config\.method\.safeguard: unknown key 'nu'"),
        ({"name": "cpo", "share_noise": False}, r"method\.share_noise must be left out with method 'cpo'"),
    ],
)
def test_a_safeguard_that_makes_no_sense_is_one_line_with_the_reason(method, message):
    with pytest.raises(InputError, match=message) as caught:
        parse({**BASE, "method": method})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GUARDED)
def test_a_config_switches_the_safeguard_on(name):
    found = parse({**BASE, "method": {"name": name, "safeguard": {"mu": 0.6, "per_pair": True}}})
    assert found.method.safeguard == Safeguard(mu=0.6, per_pair=True)
