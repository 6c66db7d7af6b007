"""CPO, MaPO, DMPO and Linear-DPO: reference values (offline.md 21), directions, what a common shift changes."""

from dataclasses import replace

import pytest
import torch

from diffalign import losses
from diffalign.errors import InputError
from diffalign.methods.cpo import CPO
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.dmpo import DMPO
from diffalign.methods.linear_dpo import LinearDPO, linear_weight
from diffalign.methods.mapo import MaPO, mapo_score
from diffalign.methods.measure import ScoreUse
from tests.test_measure import PREDICTIONS, RNG, exact, planted
from tests.toys import pairs, toy

METHODS = {
    "cpo": CPO(beta=100.0),
    "mapo": MaPO(),
    "dmpo": DMPO(beta=100.0),
    "linear_dpo": LinearDPO(),
}
REFERENCE_FREE = ("cpo", "mapo")


def step(method, policy, reference=(0.101, 0.119)):
    """(loss, d loss / d err_w, d loss / d err_l, metrics) of a pair with these errors."""
    batch = exact()
    trained = planted(policy, batch.x_w, batch.x_l)
    against = None if method.needs.references == ("none",) else planted(reference, batch.x_w, batch.x_l)
    out = method(trained, against, batch, RNG)
    grad = torch.autograd.grad(out.loss.sum(), trained.errors)[0]
    return out.loss[0].item(), grad[0].item(), grad[4].item(), {k: v[0].item() for k, v in out.metrics.items()}


@pytest.mark.parametrize(
    ("policy", "log_odds", "loss"),
    [((0.10, 0.12), 4.908342651752, 0.100735758372), ((0.100, 0.101), 0.245812852434, 0.157777480949)],
)
def test_mapo_has_its_reference_values(policy, log_odds, loss):
    value, _, _, metrics = step(MaPO(), policy)
    assert metrics["rewards/margins"] == pytest.approx(log_odds, abs=1e-9)
    assert value == pytest.approx(loss, abs=1e-9)


def test_mapo_has_the_value_of_the_loss_tables():
    value, _, _, metrics = step(MaPO(), (0.1198, 0.1403))
    assert metrics["rewards/margins"] == pytest.approx(5.01393, abs=5e-6)
    assert value == pytest.approx(0.120462, abs=5e-7)


def score(*errors: float, dtype=torch.float64) -> torch.Tensor:
    return mapo_score(torch.tensor(errors, dtype=dtype), snr_value=0.5)


def test_the_score_of_mapo_has_its_reference_values():
    expected = torch.tensor([0.975208324653294, 0.970299982001543, 1.0], dtype=torch.float64)
    torch.testing.assert_close(score(0.10, 0.12, 0.0), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_score_of_mapo_and_its_gradient_are_finite_from_zero_to_huge_errors(dtype):
    err = torch.tensor([0.0, 1e-12, 1e-5, 1e-3, 0.02, 1.0, 1e2, 1e4], dtype=dtype, requires_grad=True)
    value = mapo_score(err, snr_value=0.5)
    grad = torch.autograd.grad(value.sum(), err)[0]
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert grad[0].item() == pytest.approx(-0.25, abs=1e-9)
    assert (value.diff() <= 0).all()


def test_the_released_score_of_mapo_is_not_a_number_at_zero_and_ours_is_one():
    err = torch.zeros(1)
    released = 0.5 * err / (torch.exp(0.5 * err) - 1)
    assert released.isnan().all()
    assert score(0.0, dtype=torch.float32).item() == 1


def test_the_score_of_mapo_in_float32_loses_nothing_to_cancellation():
    errors = torch.logspace(-7, 1, 200, dtype=torch.float64)
    narrow = errors.float().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    for x in (narrow, wide):
        mapo_score(x, snr_value=0.5).sum().backward()
    oracle = 0.5 * wide / torch.expm1(0.5 * wide)
    torch.testing.assert_close(mapo_score(wide, snr_value=0.5), oracle, atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(mapo_score(narrow, snr_value=0.5).double(), oracle, atol=2e-7, rtol=0)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, atol=2e-5, rtol=0)  # float32 beside the series' end


def test_the_gradient_of_mapos_score_is_that_of_finite_differences():
    err = torch.tensor([0.004, 0.0195, 0.0205, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mapo_score(x, snr_value=0.5), err)


@pytest.mark.parametrize(
    ("u", "loss", "gradient", "digits"),
    [
        (0.0, 1.614463080361, -1.148779962534, 2e-9),
        (4.59511985, None, 0.0, 2e-9),
        (8.0, None, 0.001141440946, 5e-9),  # planted errors are square roots: some digits go
        (-10.0, None, -6.6256e-4, 5e-9),
    ],
)
def test_dmpo_has_its_reference_values(u, loss, gradient, digits):
    beta = 2000.0
    value, d_w, d_l, metrics = step(DMPO(beta=beta), (0.101 - u / beta, 0.119 + u / beta))
    assert metrics["rewards/margins"] == pytest.approx(u, abs=1e-8)
    assert d_w / (-beta / 2) == pytest.approx(gradient, abs=digits)
    assert d_w == pytest.approx(-d_l, abs=1e-6)
    if loss is not None:
        assert value == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("u", [-3.0, 0.0, 2.0, 6.0])
def test_dmpo_is_the_divergence_of_two_coins(u):
    coins = (
        torch.distributions.Bernoulli(torch.tensor(p, dtype=torch.float64))
        for p in (1 / (1 + 2.718281828459045**-u), 0.99)
    )
    value, *_ = step(DMPO(beta=2000.0), (0.101 - u / 2000, 0.119 + u / 2000))
    assert value == pytest.approx(torch.distributions.kl_divergence(*coins).item(), abs=1e-8)


@pytest.mark.parametrize(
    ("delta", "weight", "released"),
    [(-0.002, 0.3, 0.3), (0.0, 0.5, 0.5), (0.001, 0.6, 0.6), (-0.01, 0.01, 0.01), (0.01, 1.0, 0.99)],
)
def test_the_weight_of_linear_dpo_has_its_reference_values(delta, weight, released):
    margin = torch.tensor([-500 * delta], dtype=torch.float64)
    assert linear_weight(margin, eta=0.01).item() == pytest.approx(weight, abs=1e-12)
    assert linear_weight(margin, eta=0.01, clip_high=0.99).item() == pytest.approx(released, abs=1e-12)


def test_linear_dpo_has_its_reference_values():
    value, d_w, d_l, metrics = step(LinearDPO(beta=500.0), (0.100, 0.120))
    assert value == pytest.approx(-0.006, abs=1e-9)
    assert d_w == pytest.approx(0.3, abs=1e-7)  # sqrt in the planted errors costs digits
    assert d_l == pytest.approx(-0.3, abs=1e-7)
    assert metrics["weight"] == pytest.approx(0.3, abs=1e-9)


def test_the_reference_of_linear_dpo_enters_its_weight_only():
    batch = exact()
    trained = planted((0.1, 0.12), batch.x_w, batch.x_l)
    for reference in ((0.101, 0.119), (0.1, 0.12), (0.09, 0.13)):
        out = LinearDPO(beta=500.0)(trained, planted(reference, batch.x_w, batch.x_l), batch, RNG)
        grad = torch.autograd.grad(out.loss.sum(), trained.errors)[0]
        torch.testing.assert_close(grad[:4], out.metrics["weight"], atol=1e-6, rtol=0)
        torch.testing.assert_close(grad[4:], -out.metrics["weight"], atol=1e-6, rtol=0)


def test_cpo_is_the_logistic_loss_of_the_error_gap_and_the_winners_error():
    for weight in (0.0, 1.0, 3.0):
        value, d_w, d_l, metrics = step(CPO(beta=5000.0, sft_weight=weight), (0.1000, 0.1002))
        assert metrics["rewards/margins"] == pytest.approx(0.5, abs=1e-8)  # slope 2500
        logistic = torch.tensor(-0.5, dtype=torch.float64)
        assert value == pytest.approx(torch.nn.functional.softplus(logistic).item() + weight * 0.1, abs=1e-9)
        push = 2500 * torch.sigmoid(logistic).item()
        assert (d_w, d_l) == pytest.approx((push + weight, -push), rel=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_cpo_is_dpo_against_a_reference_without_errors(prediction):
    batch, policy = exact(), planted((0.10, 0.12), exact().x_w, exact().x_l, prediction=prediction)
    perfect = planted((0.0, 0.0), batch.x_w, batch.x_l, prediction=prediction)
    cpo = CPO(beta=50.0, sft_weight=0.0)(policy, None, batch, RNG)
    dpo = DiffusionDPO(beta=50.0)(policy, perfect, batch, RNG)
    torch.testing.assert_close(cpo.loss, dpo.loss, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("policy", [(0.100, 0.120), (0.101, 0.119), (0.115, 0.116), (0.119, 0.101)])
def test_no_method_raises_a_loser_or_lets_a_winner_fall(name, policy):
    _, d_w, d_l, _ = step(METHODS[name], policy)
    assert d_w >= 0 >= d_l
    assert d_w > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_common_shift_of_the_policys_errors_changes_only_what_is_free_of_a_reference(name):
    before, after = (step(METHODS[name], (0.10 + x, 0.12 + x))[0] for x in (0.0, 0.05))
    assert (abs(after - before) > 1e-3) == (name in REFERENCE_FREE)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in REFERENCE_FREE])
def test_a_common_shift_of_the_references_errors_changes_nothing(name):
    before, after = (step(METHODS[name], (0.10, 0.12), (0.101 + x, 0.119 + x))[0] for x in (0.0, 0.05))
    assert after == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", METHODS)
def test_the_policy_has_a_gradient_at_the_start_and_the_reference_none(name, prediction):
    method, policy, reference = METHODS[name], toy(prediction), toy(prediction)
    out = method(policy, None if name in REFERENCE_FREE else reference, pairs(), RNG)
    if name not in REFERENCE_FREE:
        assert out.metrics["rewards/margins"].abs().max() == 0
        assert out.metrics["rewards/accuracies"].tolist() == [0.5] * 4
    out.loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.net.parameters())
    assert all(p.grad is None for p in reference.net.parameters())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_small_step_widens_the_gap_or_lowers_the_winners_error(name, prediction):
    method, policy, batch = METHODS[name], toy(prediction, seed=1), pairs()
    reference = None if name in REFERENCE_FREE else toy(prediction)
    before = method(policy, reference, batch, RNG)
    before.loss.mean().backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-4 * p.grad
    after = method(policy, reference, batch, RNG)
    # the weight of Linear-DPO is a constant to its gradient, so its step lowers w (err_w - err_l) at the old w
    weight = before.metrics.get("weight")
    if weight is None:
        assert after.loss.mean() < before.loss.mean()
    else:
        gap = [(weight * (out.metrics["err_w"] - out.metrics["err_l"])).mean() for out in (before, after)]
        assert gap[1] < gap[0]


def test_neither_cpo_nor_mapo_logs_gains_or_runs_a_reference():
    for name in REFERENCE_FREE:
        *_, metrics = step(METHODS[name], (0.10, 0.12))
        assert not {"winner_gain", "displaced", "kl_w", "err_ref_w"} & metrics.keys()
        assert METHODS[name].needs.references == ("none",)


@pytest.mark.parametrize("name", [n for n, p in losses.PROPERTIES.items() if not p.margin_only])
def test_cpo_refuses_links_on_each_reward_alone(name):
    with pytest.raises(InputError, match=rf"link must be one of sigmoid, .* with method 'cpo', got '{name}', which"):
        CPO(link=losses.link(name))


@pytest.mark.parametrize("method", [CPO, DMPO])
def test_scores_are_used_or_asked_for(method):
    batch = replace(pairs(), score_w=torch.full((4,), 0.4), score_l=torch.zeros(4))
    chosen = method(beta=10.0, scores=ScoreUse(margin=1.0))
    assert chosen.needs.scores
    plain, shifted = (m(toy(seed=1), toy(), batch, RNG) for m in (method(beta=10.0), chosen))
    assert not torch.equal(plain.loss, shifted.loss)
    with pytest.raises(InputError, match="must have score columns"):
        chosen(toy(seed=1), toy(), replace(pairs(), score_w=None, score_l=None), RNG)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CPO(beta=0.0), r"method\.beta must be positive, got 0\.0"),
        (lambda: CPO(sft_weight=-1.0), r"method\.sft_weight must be at least 0, got -1\.0"),
        (lambda: MaPO(beta=-0.1), r"method\.beta must be positive, got -0\.1"),
        (lambda: MaPO(snr_value=0.0), r"method\.snr_value must be positive, got 0\.0"),
        (lambda: DMPO(beta=0.0), r"method\.beta must be positive, got 0\.0"),
        (lambda: DMPO(alpha=0.0), r"method\.alpha must be in \(0, 0\.5\), got 0\.0"),
        (lambda: DMPO(alpha=0.5), r"method\.alpha must be in \(0, 0\.5\), got 0\.5"),
        (lambda: LinearDPO(beta=0.0), r"method\.beta must be positive, got 0\.0"),
        (lambda: LinearDPO(eta=0.6), r"method\.eta must be in \[0, 0\.5\], got 0\.6"),
        (lambda: LinearDPO(clip_high=1.5), r"method\.clip_high must be in \[0\.5, 1\], got 1\.5"),
    ],
)
def test_a_hyperparameter_out_of_its_range_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
