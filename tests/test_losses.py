"""Links: reference values (offline.md 21, losses.md 12), identities, gradients, limits."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from diffalign import losses
from diffalign.errors import InputError

A, B = 0.7, -0.2
LINKS = {
    "sigmoid": losses.sigmoid,
    "hinge": losses.hinge,
    "ipo": losses.ipo,
    "cdpo": losses.link("cdpo", label_smoothing=0.1),
}


def pair(a: float, b: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (a, b))


@pytest.mark.parametrize(
    ("name", "value", "d_a", "d_b"),
    [
        ("sigmoid", 0.341154, -0.289050, 0.289050),
        ("hinge", 0.1, -1.0, 1.0),
        ("ipo", 0.16, 0.8, -0.8),
        ("cdpo", 0.431154, -0.189050, 0.189050),
    ],
)
def test_links_match_the_reference_table(name, value, d_a, d_b):
    w, lo = pair(A, B)
    loss = LINKS[name](w, lo)
    grad_w, grad_l = torch.autograd.grad(loss.sum(), (w, lo))
    for got, expected in ((loss, value), (grad_w, d_a), (grad_l, d_b)):
        torch.testing.assert_close(got.item(), expected, atol=5e-7, rtol=0)  # the table has six digits


@pytest.mark.parametrize(
    ("name", "value"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 0.25), ("cdpo", math.log(2))]
)
def test_links_have_their_known_value_at_margin_zero(name, value):
    w, lo = pair(0.3, 0.3)
    assert LINKS[name](w, lo).item() == pytest.approx(value, abs=1e-12)


def test_label_smoothing_matches_its_reference_value():
    w, lo = pair(2.5, -2.5)
    assert LINKS["cdpo"](w, lo).item() == pytest.approx(0.506715348489118, abs=1e-12)


def test_ipo_is_the_papers_form_times_beta_squared():
    slope, gap = 2500.0, 0.002
    w, lo = pair(slope * gap, 0.0)
    assert losses.ipo(w, lo).item() / slope**2 == pytest.approx(3.24e-6, abs=1e-15)


def test_hinge_stops_pushing_beyond_a_margin_of_one():
    w, lo = pair(2500 * 0.002, 0.0)
    loss = losses.hinge(w, lo)
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), w)[0].item() == 0


def test_swapping_the_pair_changes_the_sigmoid_loss_by_the_margin():
    w, lo = pair(1.3, -0.6)
    difference = losses.sigmoid(w, lo) - losses.sigmoid(lo, w)
    assert difference.item() == pytest.approx(-1.9, abs=1e-12)


@pytest.mark.parametrize("name", LINKS)
def test_a_common_shift_of_both_rewards_changes_nothing(name):
    w, lo = pair(A, B)
    torch.testing.assert_close(LINKS[name](w + 3.7, lo + 3.7), LINKS[name](w, lo), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", LINKS)
def test_gradients_are_those_of_finite_differences(name):
    assert torch.autograd.gradcheck(LINKS[name], pair(A, B))


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_links_stay_finite_far_from_zero_in_float32(name, margin):
    w = torch.tensor([margin], requires_grad=True)
    loss = LINKS[name](w, torch.zeros(1))
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), w)[0].isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_below_their_goal_links_push_the_winner_up_and_the_loser_down(name):
    w, lo = pair(0.1, 0.0)
    grad_w, grad_l = torch.autograd.grad(LINKS[name](w, lo).sum(), (w, lo))
    assert grad_w.item() < 0 < grad_l.item()


def test_cdpo_has_its_minimum_at_the_logit_of_the_trust_in_labels():
    w, lo = pair(math.log(0.9 / 0.1), 0.0)
    assert torch.autograd.grad(LINKS["cdpo"](w, lo).sum(), w)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_cdpo_rejects_a_smoothing_outside_its_range(smoothing):
    with pytest.raises(InputError, match=r"label_smoothing must be in \[0, 0.5\)"):
        losses.cdpo(*pair(A, B), label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoyd", {}, "did you mean 'sigmoid'"),
        ("sigmoid", {"label_smoothing": 0.1}, "does not take option 'label_smoothing'"),
        ("cdpo", {}, "needs option 'label_smoothing'"),
        ("cdpo", {"label_smothing": 0.1}, "did you mean 'label_smoothing'"),
    ],
)
def test_a_link_that_makes_no_sense_is_named(name, options, message):
    with pytest.raises(InputError, match=message):
        losses.link(name, **options)


def test_squared_error_is_averaged_in_float32_whatever_comes_in():
    pred, target = torch.randn(2, 4, 64, 64, dtype=torch.float64), torch.randn(2, 4, 64, 64, dtype=torch.float64)
    exact = losses.squared_error(pred, target)
    half = losses.squared_error(pred.half(), target.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, atol=2e-3, rtol=0)  # the inputs' own rounding
    rounded = losses.squared_error(pred.half().double(), target.half().double())
    torch.testing.assert_close(half.double(), rounded, atol=1e-6, rtol=0)  # nothing is lost after them


def test_squared_error_refuses_shapes_that_would_broadcast():
    with pytest.raises((ValueError, TypeCheckError)):  # the second where the checker is on, as in this suite
        losses.squared_error(torch.zeros(2, 3), torch.zeros(2, 1))
