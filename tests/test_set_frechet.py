"""Fréchet distance: goldens of methods/rewards.md 12, scipy and torchmetrics as oracles, N above and below D."""

import itertools
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from diffalign.errors import InputError, RunError
from diffalign.rewards.fad import fad_infinity
from diffalign.rewards.frechet import influence, leave_one_out, per_sample
from diffalign.rewards.gaussians import (
    Gaussian,
    expected_bias,
    frechet_distance,
    frechet_gradient,
    frechet_parts,
    nuclear_norm,
    transport_half,
)
from diffalign.rewards.statistics import Moments, gather_rows
from diffalign.types import Embedded
from tests.sets import draw, fixture

ROUTES = ("rows", "factor", "symmetric")


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(mean=torch.tensor(mean), covariance=torch.tensor(covariance))


def singles(rows: torch.Tensor) -> Embedded:
    return Embedded(rows=rows, counts=(1,) * len(rows))


def moments_of(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0).numpy(), np.cov(rows.numpy(), rowvar=False)


def by_sqrtm(x: torch.Tensor, y: torch.Tensor) -> float:
    """The textbook formula with scipy's matrix square root."""
    (a, s), (b, t) = moments_of(x), moments_of(y)
    return float((a - b) @ (a - b) + np.trace(s) + np.trace(t) - 2 * np.trace(scipy.linalg.sqrtm(s @ t)).real)


# --- goldens and closed forms


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize(
    ("sizes", "golden"),
    [
        ((5, 6, 8), (2.161998710676, 1.066502635680, 1.188901577009, 2.636538570529, 1.364972036271)),
        ((40, 50, 4), (0.513950685742, 0.458753353182, 1.826380242019, 1.955678854778, 1.863430882118)),
    ],
    ids=["N < D", "N > D"],
)
def test_the_sine_fixture_gives_its_golden_terms_by_every_route(route, sizes, golden):
    parts = frechet_parts(*fixture(*sizes), route=route)
    found = (parts.distance, parts.mean_term, parts.trace_x, parts.trace_y, parts.nuclear_norm)
    assert [v.item() for v in found] == pytest.approx(golden, abs=2e-12)


@pytest.mark.parametrize("sizes", [(5, 6, 8), (40, 50, 4)], ids=["N < D", "N > D"])
@pytest.mark.parametrize("streamed", [(True, True), (False, True), (True, False)])
def test_moments_give_the_distance_of_their_rows(sizes, streamed):
    sides = fixture(*sizes)
    seen = [Moments.of(side) if given else side for side, given in zip(sides, streamed, strict=True)]
    assert frechet_distance(*seen).item() == pytest.approx(frechet_distance(*sides, route="rows").item(), abs=1e-12)


def test_gaussians_have_their_closed_forms():
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[9.0]])).item() == pytest.approx(5, abs=1e-12)
    pair = gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]]), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 3.0]])
    assert frechet_distance(*pair).item() == pytest.approx(0.516685226452, abs=1e-12)
    assert frechet_distance(*pair[::-1]).item() == pytest.approx(8 - 2 * 14**0.5, abs=1e-12)
    a, b = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.0])
    diagonal = frechet_distance(
        Gaussian(mean=torch.zeros(3), covariance=a.diag()), Gaussian(mean=torch.ones(3), covariance=b.diag())
    )
    assert diagonal.item() == pytest.approx(3 + 1 + 4 + 0.25, abs=1e-7)


@pytest.mark.parametrize("route", ROUTES)
def test_two_squares_are_five_and_four_thirds_apart(route):
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    y = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 5.0], [3.0, 5.0]])
    assert frechet_distance(x, y, route=route).item() == pytest.approx(5 + 4 / 3, abs=1e-12)


# --- oracles


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 12), (300, 200, 24)])
def test_distance_is_scipys_where_its_square_root_exists(n, m, d):
    x, y = draw(n, d, 1), draw(m, d, 2, spread=1.3, shift=0.2)
    for route in ROUTES:
        assert frechet_distance(x, y, route=route).item() == pytest.approx(by_sqrtm(x, y), rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 80, 12), (6, 7, 32)], ids=["N > D", "N < D"])
def test_distance_is_that_of_torchmetrics(n, m, d):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
    features = torch.nn.Flatten()
    features.num_features = d
    x, y = draw(n, d, 1), draw(m, d, 2, spread=1.3, shift=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
        metric.update(y, real=True)
        metric.update(x, real=False)
    loose = 1e-10 if n > d else 1e-5  # eigenvalues of a singular product are off by the root of rounding
    assert frechet_distance(x, y).item() == pytest.approx(metric.compute().item(), rel=loose)


def test_fewer_rows_than_columns_agree_with_a_rotation_into_their_own_span():
    """In the span of both sets, which has few dimensions, the covariances are the same but for zeros."""
    x, y = draw(6, 32, 1), draw(7, 32, 2, shift=0.1)
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q
    expected = frechet_distance(x @ basis, y @ basis, route="rows").item()
    assert frechet_distance(x, y).item() == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(Moments.of(x), Moments.of(y)).item() == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(x, y, route="symmetric").item() == pytest.approx(expected, abs=1e-5)


# --- invariances


@pytest.mark.parametrize(("n", "m", "d"), [(30, 40, 5), (4, 6, 9)], ids=["N > D", "N < D"])
def test_distance_is_symmetric_and_knows_scale_shift_and_rotation(n, m, d):
    x, y = draw(n, d, 1), draw(m, d, 2, shift=0.3)
    own = frechet_distance(x, y).item()
    turn = torch.linalg.qr(draw(d, d, 3)).Q
    assert frechet_distance(y, x).item() == pytest.approx(own, rel=1e-11)
    assert frechet_distance(3 * x, 3 * y).item() == pytest.approx(9 * own, rel=1e-11)
    assert frechet_distance(x + 100, y + 100).item() == pytest.approx(own, rel=1e-9)
    assert frechet_distance(x @ turn, y @ turn).item() == pytest.approx(own, rel=1e-11)
    assert frechet_distance(x.flip(0), y).item() == pytest.approx(own, rel=1e-11)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "d"), [(30, 5), (4, 9)], ids=["N > D", "N < D"])
def test_a_set_is_no_distance_from_itself(n, d, route):
    x = draw(n, d, shift=2.0)
    assert frechet_distance(x, x, route=route).item() == 0


def test_a_scaled_covariance_is_its_scale_away():
    x = draw(50, 6)
    centred = x - x.mean(0)
    expected = (2.5 - 1) ** 2 * np.trace(moments_of(x)[1])
    assert frechet_distance(centred, 2.5 * centred).item() == pytest.approx(expected, rel=1e-12)


def test_rows_that_come_twice_change_the_covariance_alone():
    x, y = draw(20, 4, 1), draw(30, 4, 2, shift=0.5)
    one, two = frechet_parts(x, y), frechet_parts(torch.cat([x, x]), y)
    assert two.mean_term.item() == pytest.approx(one.mean_term.item(), rel=1e-12)
    assert two.trace_x.item() == pytest.approx(one.trace_x.item() * 19 * 2 / 39, rel=1e-12)


def test_its_root_keeps_the_triangle_inequality():
    sets = [draw(n, 6, n, spread=s, shift=0.1 * s) for n, s in ((9, 1.0), (40, 1.5), (5, 0.3), (20, 2.0))]
    for x, y, z in itertools.permutations(sets, 3):
        roots = [frechet_distance(a, b).item() ** 0.5 for a, b in ((x, z), (x, y), (y, z))]
        assert roots[0] <= roots[1] + roots[2] + 1e-9


def test_whatever_type_comes_in_statistics_are_float64():
    x, y = draw(40, 6, 1), draw(40, 6, 2)
    half = frechet_distance(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float64
    assert half.item() == pytest.approx(frechet_distance(x.bfloat16().double(), y.bfloat16().double()).item())
    assert frechet_distance(x.float() + 1e4, y.float() + 1e4).item() == pytest.approx(
        frechet_distance((x.float() + 1e4).double(), (y.float() + 1e4).double()).item(), rel=1e-12
    )


# --- gradients


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 5), (5, 30, 8), (5, 6, 12)])
def test_gradient_is_its_closed_form_and_the_slope(n, m, d, route):
    x, y = draw(n, d, 1).requires_grad_(), draw(m, d, 2, shift=0.4)
    if route == "symmetric" and n <= d:
        pytest.skip("the symmetric route is for sets of more rows than columns")
    frechet_distance(x, y, route=route).backward()
    torch.testing.assert_close(x.grad, frechet_gradient(x, y), atol=1e-11, rtol=1e-9)
    step = 1e-5 * draw(n, d, 3)
    with torch.no_grad():
        slope = (frechet_distance(x + step, y, route="rows") - frechet_distance(x - step, y, route="rows")) / 2
    assert (x.grad * step).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_gradient_goes_to_both_sets_and_through_moments():
    x, y = draw(12, 3, 1).requires_grad_(), draw(15, 3, 2, shift=0.3).requires_grad_()
    frechet_distance(x, y, route="rows").backward()
    by_rows = x.grad.clone(), y.grad.clone()
    x.grad = y.grad = None
    frechet_distance(Moments.of(x), Moments.of(y)).backward()
    torch.testing.assert_close((x.grad, y.grad), by_rows, atol=1e-12, rtol=1e-9)


def test_gradient_is_finite_where_rows_coincide_and_where_sets_do():
    x, y = draw(3, 5, 1), draw(9, 5, 2)
    x = torch.cat([x, x, x[:1]]).requires_grad_()
    frechet_distance(x, y).backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad[0], x.grad[3])  # equal rows are pulled alike
    z = y.clone().requires_grad_()
    frechet_distance(z, y).backward()
    torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-9, rtol=0)


def test_the_transport_map_carries_one_covariance_to_the_other():
    x, y = draw(40, 6, 1), draw(50, 6, 2, spread=1.7)
    half = transport_half(x, y)
    carried = half @ half.T @ Moments.of(x).covariance @ half @ half.T
    torch.testing.assert_close(carried, Moments.of(y).covariance)


def test_nuclear_norm_is_the_sum_of_singular_values():
    matrix = draw(4, 7)
    assert nuclear_norm(matrix).item() == pytest.approx(np.linalg.norm(matrix.numpy(), "nuc"), rel=1e-13)
    assert nuclear_norm(torch.zeros(3, 0, dtype=torch.float64)).item() == 0


# --- bias


@pytest.mark.parametrize(
    ("d", "n", "golden"), [(32, 1000, 0.296), (64, 2000, 0.552), (128, 500, 8.53), (128, 100, 43.0)]
)
def test_bias_of_the_standard_normal_is_its_golden_number(d, n, golden):
    found = expected_bias(torch.ones(d), n).item()
    assert found == pytest.approx(golden, rel=2e-3)
    assert found == pytest.approx(d / n + d * (d + 1) / (4 * (n - 1)), rel=1e-12)


@pytest.mark.parametrize(("d", "n", "golden"), [(32, 1000, 0.300), (128, 500, 8.83), (128, 100, 57.1)])
def test_small_sets_are_as_far_away_as_was_simulated_which_is_further_than_the_formula(d, n, golden):
    reference = Gaussian(mean=torch.zeros(d), covariance=torch.eye(d))
    rng = torch.Generator().manual_seed(7)
    found = torch.stack(
        [frechet_distance(torch.randn(n, d, generator=rng, dtype=torch.float64), reference) for _ in range(12)]
    )
    spread = found.std().item() / 12**0.5
    assert abs(found.mean().item() - golden) < 4 * spread + 0.006 * golden  # the goldens have three digits
    assert golden > expected_bias(torch.ones(d), n).item()


def test_differences_at_equal_size_are_free_of_the_bias_that_both_have():
    """Of two sets that differ by a shift alone the difference is the shift's, whatever their size."""
    reference = Gaussian(mean=torch.zeros(24), covariance=torch.eye(24))
    rng = torch.Generator().manual_seed(3)
    shift = torch.zeros(24, dtype=torch.float64)
    shift[0] = 1.5
    found = []
    for n in (30, 300):
        x = torch.randn(n, 24, generator=rng, dtype=torch.float64)
        x = x - x.mean(0)
        near, far = (frechet_distance(rows, reference).item() for rows in (x, x + shift))
        assert far - near == pytest.approx(2.25, abs=1e-9)
        found.append(near)
    assert found[0] > 5 * found[1]


def test_bias_is_what_samples_of_the_reference_are_away_from_it():
    spectrum = torch.tensor([9.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.1], dtype=torch.float64)
    reference = Gaussian(mean=torch.zeros(8), covariance=spectrum.diag())
    rng = torch.Generator().manual_seed(5)
    found = torch.stack(
        [
            frechet_distance(
                torch.randn(400, 8, generator=rng, dtype=torch.float64) * spectrum.sqrt(), reference, route="symmetric"
            )
            for _ in range(300)
        ]
    )
    assert expected_bias(spectrum, 400).item() == pytest.approx(0.1042, abs=1e-4)
    assert abs(found.mean().item() - expected_bias(spectrum, 400).item()) < 3 * found.std().item() / 300**0.5


def test_a_finite_reference_adds_its_own_bias():
    spectrum = torch.tensor([2.0, 1.0])
    both = expected_bias(spectrum, 100, 50).item()
    assert both == pytest.approx(expected_bias(spectrum, 100).item() + expected_bias(spectrum, 50).item())
    with pytest.raises(InputError, match="at least 2"):
        expected_bias(spectrum, 1)


# --- statistics


def test_streamed_moments_are_those_of_all_rows_whatever_the_pieces():
    rows = (draw(50, 5) + 1e6).float()
    moments = Moments.empty(5)
    for piece in rows.split([1, 0, 30, 7, 12]):
        moments = moments.add(piece)
    assert moments.n == 50
    torch.testing.assert_close(moments.mean, rows.double().mean(0), rtol=1e-14, atol=0)
    expected = torch.from_numpy(np.cov((rows.double() - 1e6).numpy(), rowvar=False))
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("out", [[3], [0, 4, 5], list(range(18))], ids=["one row", "a clip", "all but two"])
def test_taking_rows_out_undoes_adding_them(out):
    rows = draw(20, 4, shift=3.0)
    kept = [i for i in range(20) if i not in out]
    left = Moments.of(rows).without(rows[out])
    torch.testing.assert_close(left.mean, rows[kept].mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(left.covariance, Moments.of(rows[kept]).covariance, atol=1e-13, rtol=1e-12)
    back = left.add(rows[out])
    torch.testing.assert_close(back.covariance, Moments.of(rows).covariance, atol=1e-13, rtol=1e-12)


def test_taking_one_row_out_is_the_published_update():
    rows = draw(9, 3, shift=1.0)
    mean, covariance = rows.mean(0), Moments.of(rows).covariance
    d, n = rows[2] - mean, 9
    left = Moments.of(rows).without(rows[2:3])
    torch.testing.assert_close(left.mean, mean - d / (n - 1), rtol=1e-14, atol=0)
    expected = ((n - 1) * covariance - n / (n - 1) * torch.outer(d, d)) / (n - 2)
    torch.testing.assert_close(left.covariance, expected, rtol=1e-12, atol=1e-15)


def test_all_rows_can_be_taken_out_and_no_more():
    moments = Moments.of(draw(3, 2))
    assert moments.without(draw(3, 2)).n == 0
    with pytest.raises(InputError, match="must be of the set of 3, got 4"):
        moments.without(draw(4, 2))


def test_moments_of_processes_are_merged():
    rows = draw(30, 4, shift=2.0)
    shares = rows[:11], rows[11:11], rows[11:]
    packed = []
    for share in shares:
        moments = Moments.of(share) if len(share) else Moments.empty(4)
        moments.over_processes(lambda own: packed.append(own) or own)
    merged = Moments.of(shares[0]).over_processes(lambda own: torch.cat(packed))
    assert merged.n == 30
    torch.testing.assert_close(merged.covariance, Moments.of(rows).covariance, rtol=1e-12, atol=1e-15)
    assert gather_rows(rows) is rows


# --- credit


@pytest.mark.parametrize(("n", "d"), [(12, 5), (5, 16)], ids=["N > D", "N < D"])
def test_leaving_one_out_is_measuring_the_rest(n, d):
    x, y = draw(n, d, 1), Gaussian.of(draw(60, d, 2, shift=0.3))
    rest = [torch.cat([x[:i], x[i + 1 :]]) for i in range(n)]
    expected = torch.stack([frechet_distance(r, y) for r in rest]) - frechet_distance(x, y)
    torch.testing.assert_close(leave_one_out(singles(x), y), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("d", [3, 16])
def test_leaving_a_clip_out_takes_all_its_frames(d):
    counts = (3, 1, 4, 2)
    x, y = draw(10, d, 1), Gaussian.of(draw(60, d, 2, shift=0.3))
    parts = x.split(counts)
    rest = [torch.cat([p for j, p in enumerate(parts) if j != i]) for i in range(4)]
    expected = torch.stack([frechet_distance(r, y) for r in rest]) - frechet_distance(x, y)
    torch.testing.assert_close(leave_one_out(Embedded(rows=x, counts=counts), y), expected, atol=1e-11, rtol=0)


def test_influence_ranks_samples_as_leaving_them_out_does():
    x, y = singles(draw(200, 16, 1)), Gaussian.of(draw(4000, 16, 2, spread=1.5, shift=1.0))
    exact, first = leave_one_out(x, y), influence(x, y)
    assert torch.corrcoef(torch.stack([exact, first]))[0, 1] > 0.999


@pytest.mark.parametrize("counts", [(1,) * 24, (2,) * 12, (1, 3) * 6], ids=["rows", "clips", "uneven clips"])
def test_influence_is_leaving_out_to_first_order(counts):
    """With every row m times, one sample's change shrinks by m, and the error of its first order by m²."""
    rows, y = draw(24, 4, 1), Gaussian.of(draw(300, 4, 2, shift=0.2))
    errors = []
    for times in (1, 8):
        x = Embedded(rows=rows.repeat(times, 1), counts=counts * times)
        errors.append((leave_one_out(x, y) - influence(x, y)).abs().max().item())
    assert errors[1] < errors[0] / 40


def test_influence_is_the_published_form_of_the_exact_change():
    """2 (m_x - m_y)·dm + tr((I - T) dS), dm and dS those of the rows that are left."""
    counts, rows, y = (3, 1, 4, 2), draw(10, 4, 1), Gaussian.of(draw(60, 4, 2, shift=0.3))
    whole, half = Moments.of(rows), transport_half(rows, y)
    slope = torch.eye(4, dtype=torch.float64) - half @ half.T
    left = [whole.without(part) for part in rows.split(counts)]
    expected = [
        2 * (whole.mean - y.mean) @ (m.mean - whole.mean) + (slope @ (m.covariance - whole.covariance)).trace()
        for m in left
    ]
    found = influence(Embedded(rows=rows, counts=counts), y)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=1e-10)


def test_a_far_sample_has_the_lowest_credit():
    rows = draw(30, 6, 1)
    rows[7] += 20
    y = Gaussian.of(draw(500, 6, 2))
    for way in (leave_one_out, influence):
        assert way(singles(rows), y).argmin() == 7


@pytest.mark.parametrize("way", [leave_one_out, influence])
def test_two_rows_must_be_left_to_have_a_covariance(way):
    y = Gaussian.of(draw(20, 4, 2))
    assert way(singles(draw(3, 4, 1)), y).isfinite().all()
    with pytest.raises(InputError, match="at least 2 embeddings without any one sample, got 2 of 2"):
        way(singles(draw(2, 4, 1)), y)


def test_a_clip_is_measured_by_its_own_rows():
    x, y = draw(9, 12, 1), draw(60, 12, 2)
    assert per_sample(Embedded(rows=x[:4], counts=(2, 2)), Gaussian.of(y)).isfinite().all()
    found = per_sample(Embedded(rows=x, counts=(4, 5)), Gaussian.of(y))
    expected = [frechet_distance(part, y, route="rows").item() for part in x.split((4, 5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-11)
    with pytest.raises(InputError, match=r"at least 2 embeddings .* samples \[1\]"):
        per_sample(Embedded(rows=x, counts=(8, 1)), Gaussian.of(y))


# --- FAD-infinity


def test_extrapolation_takes_the_bias_of_small_sets_away():
    y = Gaussian(mean=torch.zeros(8), covariance=torch.eye(8))
    rng = torch.Generator().manual_seed(0)
    values, slopes, wholes, fits = [], [], [], []
    for _ in range(12):
        x = Embedded(rows=torch.randn(500, 8, generator=rng, dtype=torch.float64), counts=(2,) * 250)
        found = fad_infinity(x, y, shuffles=2)
        wholes.append(frechet_distance(x.rows, y).item())
        values.append(found.value)
        slopes.append(found.slope)
        assert found.distances[-1] == pytest.approx(wholes[-1], rel=1e-9)
        fits.append(found.r2)
    assert (found.sizes[0], found.sizes[-1], len(found.sizes)) == (100, 500, 15)
    assert abs(np.mean(values)) < np.mean(wholes) / 4
    assert np.mean(fits) > 0.9
    assert np.mean(slopes) == pytest.approx(500 * expected_bias(torch.ones(8), 500).item(), rel=0.25)
    assert found == fad_infinity(x, y, shuffles=2)
    assert found != fad_infinity(x, y, shuffles=2, seed=1)


def test_points_on_a_line_are_extrapolated_exactly(monkeypatch):
    monkeypatch.setattr("diffalign.rewards.fad.frechet_distance", lambda m, y: torch.tensor(0.25 + 7 / m.n))
    found = fad_infinity(singles(draw(60, 3)), draw(20, 3), points=4, shuffles=2)
    assert (found.value, found.slope, found.r2) == pytest.approx((0.25, 7, 1), abs=1e-5)
    assert found.sizes == (12, 28, 44, 60)


def test_extrapolation_needs_more_embeddings_than_dimensions():
    with pytest.raises(InputError, match=r"more than 8 embeddings, got 9 embeddings of 9 clips"):
        fad_infinity(singles(draw(9, 8)), draw(60, 8))
    with pytest.raises(InputError, match="of 1 clips"):
        fad_infinity(Embedded(rows=draw(90, 8), counts=(90,)), draw(60, 8))


# --- bad input


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 4), "x must have at least 2 rows, got 1"),
        (torch.zeros(0, 4), "x must have at least 2 rows, got 0"),
        (torch.zeros(5, 3), "one width, got 3 and 4"),
        (torch.full((5, 4), torch.nan), r"x must be finite, got NaN or infinity in rows \[0, 1, 2, 3, 4\] of 5"),
    ],
)
def test_what_is_no_set_is_refused(x, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(x, draw(9, 4))


def test_routes_and_covariances_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="must get rows of both sets"):
        frechet_distance(draw(9, 4), Moments.of(draw(9, 4)), route="rows")
    with pytest.raises(InputError, match="no negative eigenvalue"):
        frechet_distance(draw(9, 2), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, -1.0]]), route="factor")
    with pytest.raises(InputError, match="must have no gradient"):
        frechet_distance(draw(9, 2), Moments.of(draw(9, 2).requires_grad_()), route="factor")
    with pytest.raises(InputError, match=r"shape \(2, 2\)"):
        gaussian([0.0, 0.0], [[1.0]])
    with pytest.raises(InputError, match="at least 2 rows, got 1"):
        Moments.of(draw(1, 2)).covariance  # noqa: B018


def test_a_distance_below_zero_is_an_error_and_one_of_rounding_is_zero():
    no_covariance = gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, -3.0]])
    with pytest.raises(RunError, match=r"must be at least 0, got -2"):
        frechet_distance(no_covariance, gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), route="symmetric")
    x = draw(30, 4).requires_grad_()
    near = frechet_distance(x, x.detach() + 1e-6)
    near.backward()
    assert near.item() == 0
    torch.testing.assert_close(x.grad, frechet_gradient(x, x.detach() + 1e-6))
