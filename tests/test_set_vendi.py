"""Vendi score: goldens of methods/rewards.md 13, primal against dual, gradients against slopes."""

import math

import pytest
import torch

from diffalign.errors import InputError
from diffalign.rewards.mmd import unit
from diffalign.rewards.vendi import VendiTally, influence, leave_one_out, per_sample, vendi
from diffalign.types import Embedded
from tests.sets import draw, fixture

ORDERS = [0.0, 0.5, 1.0, 2.0, 3.0, math.inf]


def alike(n: int, cos: float) -> torch.Tensor:
    """Unit rows with one cosine between any two."""
    similar = torch.full((n, n), cos, dtype=torch.float64).fill_diagonal_(1)
    return torch.linalg.cholesky(similar)


def singles(rows: torch.Tensor) -> Embedded:
    return Embedded(rows=rows, counts=(1,) * len(rows))


@pytest.mark.parametrize("q", ORDERS)
def test_equal_rows_count_once_and_orthogonal_ones_each(q):
    assert vendi(torch.tensor([[1.0, 2.0]]).repeat(6, 1), q).item() == pytest.approx(1, abs=1e-9)
    assert vendi(2.5 * torch.eye(5), q).item() == pytest.approx(5, abs=1e-9)
    assert vendi(torch.ones(1, 3), q).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "cos", "q", "golden"),
    [
        (2, 0.5, 1.0, 1.754765350603),
        (2, 0.5, 2.0, 1.6),
        (2, 0.9, 1.0, 1.219590617914),
        (4, 0.5, 1.0, 2.925726559967),
        (4, 0.5, 2.0, 2.285714285714),
        (4, 0.5, math.inf, 1.6),
    ],
)
def test_rows_of_one_cosine_have_their_golden_scores(n, cos, q, golden):
    assert vendi(alike(n, cos), q).item() == pytest.approx(golden, abs=1e-12)


def test_the_sine_fixture_has_its_golden_scores():
    for sizes, golden in (
        ((5, 6, 8), (1.701661662166, 2.297989710958)),
        ((40, 50, 4), (3.741960095695, 3.715111298155)),
    ):
        assert [vendi(rows).item() for rows in fixture(*sizes)] == pytest.approx(golden, abs=2e-12)


@pytest.mark.parametrize("q", ORDERS)
def test_few_and_many_columns_give_one_score(q):
    """Columns of zeros make the small matrix the other one, and change no similarity."""
    rows = draw(12, 5)
    wide = torch.cat([rows, torch.zeros(12, 20)], dim=1)
    assert vendi(wide, q).item() == pytest.approx(vendi(rows, q).item(), rel=1e-11)


def test_order_2_needs_no_eigenvalues():
    rows = draw(9, 4)
    similar = unit(rows) @ unit(rows).T
    by_spectrum = 1 / (torch.linalg.eigvalsh(similar) / 9).square().sum()
    assert vendi(rows, 2).item() == pytest.approx(by_spectrum.item(), rel=1e-12)
    assert vendi(rows, 2 + 1e-9).item() == pytest.approx(by_spectrum.item(), rel=1e-6)


def test_orders_meet_in_their_limits_and_fall():
    rows = draw(9, 20)
    assert vendi(rows, 1 + 1e-7).item() == pytest.approx(vendi(rows, 1).item(), rel=1e-5)
    assert vendi(rows, 400).item() == pytest.approx(vendi(rows, math.inf).item(), rel=1e-2)
    scores = [vendi(rows, q).item() for q in ORDERS]
    assert scores == sorted(scores, reverse=True)
    assert all(1 <= score <= 9 + 1e-9 for score in scores)


def test_scale_order_copies_and_type_of_rows_do_not_matter():
    rows = draw(7, 4)
    own = vendi(rows).item()
    scales = torch.linspace(0.1, 9, 7, dtype=torch.float64)[:, None]
    assert vendi(scales * rows.flip(0)).item() == pytest.approx(own, rel=1e-11)
    assert vendi(torch.cat([rows, rows])).item() == pytest.approx(own, rel=1e-11)
    assert vendi(rows.float()).item() == pytest.approx(own, rel=1e-6)
    assert vendi(rows.float()).dtype == torch.float64


@pytest.mark.parametrize("q", ORDERS[1:])
@pytest.mark.parametrize("shape", [(5, 9), (9, 4)], ids=["primal", "dual"])
def test_gradient_is_the_slope(q, shape):
    assert torch.autograd.gradcheck(lambda rows: vendi(rows, q), (draw(*shape).requires_grad_(),), atol=1e-7)


@pytest.mark.parametrize("q", ORDERS[1:-1])
def test_gradient_is_the_slope_where_eigenvalues_are_equal(q):
    rows = alike(4, 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: vendi(r, q), (rows,), atol=1e-6)
    scattered = torch.cat([torch.eye(3), torch.eye(3)]).double() + 0
    assert torch.autograd.gradcheck(lambda r: vendi(r, q), (scattered.requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize("q", ORDERS)
def test_gradient_is_finite_everywhere_and_along_the_sphere(q):
    for rows in (torch.ones(4, 3), torch.eye(4), draw(5, 9), torch.cat([draw(3, 9), draw(3, 9)])):
        rows = rows.double().clone().requires_grad_()
        vendi(rows, q).backward()
        assert rows.grad.isfinite().all()
        torch.testing.assert_close(
            (rows.grad * rows).sum(1), torch.zeros(len(rows), dtype=rows.dtype), atol=1e-9, rtol=0
        )


def test_gradient_of_order_1_is_that_of_the_entropy():
    """exp(H) with dH/dX = -(2/N)(log rho + I) X on the support, projected onto each row's tangent."""
    rows = unit(draw(5, 9)).requires_grad_()
    score = vendi(rows)
    score.backward()
    x = rows.detach()
    values, vectors = torch.linalg.eigh(x @ x.T / 5)
    log_rho = vectors * values.log() @ vectors.T
    free = -(2 / 5) * (log_rho + torch.eye(5, dtype=torch.float64)) @ x
    tangent = free - (free * x).sum(1, keepdim=True) * x
    torch.testing.assert_close(rows.grad, score.detach() * tangent, atol=1e-12, rtol=0)


# --- credit


@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("counts", [(1,) * 8, (3, 1, 4)], ids=["rows", "clips"])
def test_leaving_one_out_is_measuring_the_rest(q, counts):
    rows = draw(8, 5)
    parts = rows.split(counts)
    rest = [torch.cat([p for j, p in enumerate(parts) if j != i]) for i in range(len(counts))]
    expected = vendi(rows, q) - torch.stack([vendi(r, q) for r in rest])
    torch.testing.assert_close(leave_one_out(Embedded(rows=rows, counts=counts), q), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("columns", [4, 40], ids=["dual", "primal"])
def test_influence_is_leaving_out_to_first_order(q, columns):
    rows = torch.cat([draw(6, 4), torch.zeros(6, columns - 4)], dim=1)
    errors = []
    for times in (1, 5):
        x = Embedded(rows=rows.repeat(times, 1), counts=(1, 2, 1, 2) * times)
        errors.append((leave_one_out(x, q) - influence(x, q)).abs().max().item())
    assert errors[1] < errors[0] / 12


def test_influence_is_the_slope_of_the_score_towards_the_set_without_a_sample():
    """Of order 2, 1 / tr(rho^2), in closed form: 2 tr(rho (rho_without - rho)) / tr(rho^2)^2."""
    rows, counts = unit(draw(6, 4)), (1, 3, 2)

    def density(some: torch.Tensor) -> torch.Tensor:
        return some.T @ some / len(some)

    rho, parts = density(rows), rows.split(counts)
    rest = [density(torch.cat([p for j, p in enumerate(parts) if j != i])) for i in range(3)]
    expected = [2 * float((rho * (without - rho)).sum()) / float(rho.square().sum()) ** 2 for without in rest]
    assert influence(Embedded(rows=rows, counts=counts), 2.0).tolist() == pytest.approx(expected, rel=1e-11)


def test_at_infinite_order_kinds_that_are_most_common_alike_share_the_slope():
    """Two kinds of two and one alone: the score is 5 / 2. Without the last its slope is 0.625 less; without one of the
    first kind, half of whose weight in the slope the second kind holds, 0.15625 more."""
    rows = torch.eye(3)[[0, 0, 1, 1, 2]]
    found = influence(singles(rows), math.inf)
    assert vendi(rows, math.inf).item() == pytest.approx(2.5)
    assert found.tolist() == pytest.approx([-0.15625] * 4 + [0.625])


def test_two_samples_are_enough_to_leave_one_out_and_two_rows_to_be_a_set():
    assert leave_one_out(singles(torch.eye(2))).tolist() == pytest.approx([1, 1])
    assert influence(singles(torch.eye(2))).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert per_sample(Embedded(rows=torch.eye(4), counts=(2, 2))).tolist() == pytest.approx([2, 2])


def test_the_order_is_1_where_nobody_chose():
    x = singles(draw(6, 4))
    for way in (leave_one_out, influence):
        assert torch.equal(way(x), way(x, 1.0))
    whole = VendiTally.of(x, range(6))
    assert whole.score == pytest.approx(vendi(x.rows, 1.0).item(), rel=1e-12)


def test_a_copy_adds_nothing_and_a_stranger_most():
    rows = torch.cat([draw(6, 8)[:1].repeat(5, 1), draw(1, 8, 5)])
    for way in (leave_one_out, influence):
        assert way(singles(rows)).argmax() == 5
    assert leave_one_out(singles(rows))[0] < 0


def test_a_sample_by_itself_is_scored_by_its_own_rows():
    rows = draw(7, 5)
    found = per_sample(Embedded(rows=rows, counts=(3, 4)))
    assert found.tolist() == pytest.approx([vendi(rows[:3]).item(), vendi(rows[3:]).item()])
    with pytest.raises(InputError, match="at least 2 embeddings"):
        per_sample(singles(rows))


# --- bad input


def test_what_has_no_score_is_refused():
    with pytest.raises(InputError, match="at least 1 embedding, got 0"):
        vendi(torch.zeros(0, 3))
    with pytest.raises(InputError, match=r"zeros in rows \[1\]"):
        vendi(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InputError, match="must be finite"):
        vendi(torch.full((2, 2), torch.nan))
    for q in (-1.0, math.nan):
        with pytest.raises(InputError, match="q must be at least 0"):
            vendi(torch.eye(2), q)
