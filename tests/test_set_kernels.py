"""KID, CMMD and KAD: goldens of methods/rewards.md 13, slow double loops and torchmetrics as oracles."""

import inspect
import math
import warnings

import pytest
import torch

from diffalign.errors import InputError
from diffalign.rewards import mmd
from diffalign.rewards.kernels import cmmd, kad, kid
from diffalign.rewards.mmd import KernelSums, gaussian, kid_subsets, median_distance, mmd2, polynomial, unit
from diffalign.types import Embedded
from tests.sets import draw, fixture

FIXTURES = [(5, 6, 8), (40, 50, 4)]


def by_loops(x, y, k, unbiased):
    """MMD² from the definition, one kernel at a time."""
    n, m = len(x), len(y)

    def mean(a, b, same):
        cells = [k(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and unbiased and i == j)]
        return math.fsum(cells) / len(cells)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False) + 0 * (n + m)


@pytest.mark.parametrize(
    ("sizes", "golden", "own"),
    [
        (FIXTURES[0], 0.046025926437, -0.349805985886),
        (FIXTURES[1], 0.304007004726, -0.108571523779),
    ],
)
def test_kid_of_the_sine_fixture_is_its_golden_number(sizes, golden, own):
    x, y = fixture(*sizes)
    assert kid(x, y).item() == pytest.approx(golden, abs=1e-12)
    assert kid(x, x).item() == pytest.approx(own, abs=1e-12)


def test_kid_of_two_pairs_of_points_is_its_golden_number():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    assert kid(x, y).item() == -3.125


@pytest.mark.parametrize(
    ("sizes", "golden", "linear"),
    [(FIXTURES[0], 4.137179865715, 4.158822920534), (FIXTURES[1], 1.715077750939, 1.728265355144)],
)
def test_cmmd_of_the_sine_fixture_is_its_golden_number_and_nearly_linear(sizes, golden, linear):
    x, y = fixture(*sizes)
    assert cmmd(x, y).item() == pytest.approx(golden, abs=1e-11)
    between_means = 10 * (unit(x).mean(0) - unit(y).mean(0)).square().sum().item()
    assert between_means == pytest.approx(linear, abs=1e-11)
    assert cmmd(x, y).item() == pytest.approx(linear, rel=1e-2)
    assert cmmd(x, x).item() == 0
    assert cmmd(3 * x, 0.1 * y).item() == pytest.approx(golden, abs=1e-10)


def test_cmmd_of_single_directions():
    x = torch.tensor([[1.0, 0.0]])
    assert cmmd(x, torch.tensor([[0.0, 5.0]])).item() == pytest.approx(19.900332501664, abs=1e-11)
    assert cmmd(x, -x).item() == pytest.approx(39.602653386489, abs=1e-11)
    assert cmmd(x, -x).item() == pytest.approx(2000 * (1 - math.exp(-0.02)), abs=1e-11)


def test_kid_and_kad_are_their_definitions_one_pair_at_a_time():
    x, y = draw(7, 3, 1), draw(8, 3, 2, shift=0.5)
    expected = by_loops(x, y, lambda a, b: (float(a @ b) / 3 + 1) ** 3, unbiased=True)
    assert kid(x, y).item() == pytest.approx(expected, rel=1e-12)
    distances = sorted(float((y[i] - y[j]).norm()) for i in range(8) for j in range(i))
    width = (distances[13] + distances[14]) / 2
    assert median_distance(y) == pytest.approx(width, rel=1e-12)
    expected = by_loops(x, y, lambda a, b: math.exp(-float((a - b).square().sum()) / (2 * width**2)), unbiased=True)
    assert kad(x, y).item() == pytest.approx(100 * expected, rel=1e-10)
    assert kad(x, y, bandwidth=2.0).item() != kad(x, y).item()


def test_kid_is_that_of_torchmetrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.kid import KernelInceptionDistance

        for n, m, d in ((40, 40, 8), (9, 9, 32)):
            features = torch.nn.Flatten()
            features.num_features = d
            x, y = draw(n, d, 1), draw(m, d, 2, spread=1.3, shift=0.2)
            metric = KernelInceptionDistance(feature=features, subsets=3, subset_size=n).set_dtype(torch.float64)
            metric.update(y, real=True)
            metric.update(x, real=False)
            assert kid(x, y).item() == pytest.approx(metric.compute()[0].item(), rel=1e-10)


@pytest.mark.parametrize("distance", [kid, cmmd, kad])
def test_blocks_of_rows_change_nothing(distance, monkeypatch):
    x, y = draw(23, 5, 1), draw(31, 5, 2, shift=0.3)
    whole = distance(x, y).item()
    monkeypatch.setattr(mmd, "_CELLS", 64)
    assert distance(x, y).item() == pytest.approx(whole, rel=1e-11)
    assert cmmd(x, x).item() == 0


@pytest.mark.parametrize("n", [2, 3, 20, 21])
def test_the_median_found_in_bins_is_that_of_all_distances(n, monkeypatch):
    for rows in (draw(n, 4, 1), draw(n, 4, 2).round(), draw(n, 4, 3) + 1e3):
        expected = torch.pdist(rows).quantile(0.5).item()
        assert median_distance(rows) == pytest.approx(expected, rel=1e-9)
        with monkeypatch.context() as patched:
            patched.setattr(mmd, "_CELLS", 4)
            patched.setattr(mmd, "_BINS", 8)
            assert median_distance(rows) == pytest.approx(expected, rel=1e-9)


def test_the_median_of_equal_distances_ends():
    rows = torch.eye(12)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mmd, "_CELLS", 4)
        assert median_distance(rows) == pytest.approx(2**0.5, rel=1e-9)


@pytest.mark.parametrize("distance", [kid, cmmd, kad])
def test_distances_do_not_depend_on_the_order_of_rows(distance):
    x, y = draw(12, 5, 1), draw(15, 5, 2, shift=0.3)
    assert distance(x.flip(0), y.flip(0)).item() == pytest.approx(distance(x, y).item(), rel=1e-11)


def test_kid_and_cmmd_are_symmetric_and_kad_is_not():
    x, y = draw(12, 5, 1), draw(15, 5, 2, spread=2.0)
    for distance in (kid, cmmd):
        assert distance(x, y).item() == pytest.approx(distance(y, x).item(), rel=1e-11)
    assert abs(kad(x, y).item() - kad(y, x).item()) > 0.1


def test_unbiased_distances_of_one_distribution_are_zero_on_average():
    rng = torch.Generator().manual_seed(0)
    for distance in (kid, kad):
        found = torch.stack([distance(*torch.randn(2, 12, 4, generator=rng)) for _ in range(150)])
        assert abs(found.mean().item()) < 3 * found.std().item() / 150**0.5


# --- subsets


def test_subsets_as_large_as_the_sets_are_the_whole():
    x, y = draw(20, 4, 1), draw(20, 4, 2, shift=0.2)
    mean, std = kid_subsets(x, y, subsets=5)
    assert mean.item() == pytest.approx(kid(x, y).item(), rel=1e-11)
    assert std.item() == pytest.approx(0, abs=1e-12)


def test_subsets_average_to_the_whole_and_follow_their_seed_not_the_order():
    x, y = draw(200, 4, 1), draw(150, 4, 2, shift=0.5)
    mean, std = kid_subsets(x, y, subsets=200, size=50)
    assert mean.item() == pytest.approx(kid(x, y).item(), abs=5 * std.item() / 200**0.5)
    again, _ = kid_subsets(x.flip(0), y.roll(7, 0), subsets=200, size=50)
    assert again.item() == pytest.approx(mean.item(), rel=1e-11)
    other, _ = kid_subsets(x, y, subsets=200, size=50, seed=1)
    assert other.item() != mean.item()
    with pytest.raises(InputError, match="at least 1 of size 2"):
        kid_subsets(x, y, size=1)


# --- gradients


@pytest.mark.parametrize("distance", [kid, cmmd, kad])
def test_gradients_are_slopes(distance):
    x, y = draw(6, 3, 1).requires_grad_(), draw(7, 3, 2, shift=0.5)
    assert torch.autograd.gradcheck(lambda rows: distance(rows, y), (x,))


# --- credit


def sums_of(rows, y, counts, kernel, unbiased):
    return KernelSums.of(Embedded(rows=rows, counts=counts), y, kernel, unbiased=unbiased)


KERNELS = {"polynomial": (polynomial(4), True), "gaussian": (gaussian(1.5), False), "unbiased": (gaussian(2.0), True)}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("counts", [(1,) * 12, (3, 1, 4, 2, 2)], ids=["rows", "clips"])
def test_leaving_one_out_is_measuring_the_rest(kind, counts):
    kernel, unbiased = KERNELS[kind]
    x, y = draw(12, 4, 1), draw(20, 4, 2, shift=0.4)
    whole = mmd2(x, y, kernel, unbiased=unbiased)
    parts = x.split(counts)
    rest = [torch.cat([p for j, p in enumerate(parts) if j != i]) for i in range(len(counts))]
    expected = torch.stack([mmd2(r, y, kernel, unbiased=unbiased) for r in rest]) - whole
    sums = sums_of(x, y, counts, kernel, unbiased)
    torch.testing.assert_close(sums.value(), whole)
    torch.testing.assert_close(sums.leave_one_out(), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("counts", [(1,) * 12, (3, 1, 4, 2, 2)], ids=["rows", "clips"])
def test_influence_is_leaving_out_to_first_order(kind, counts):
    kernel, unbiased = KERNELS[kind]
    rows, y = draw(12, 4, 1), draw(20, 4, 2, shift=0.4)
    errors = []
    for times in (4, 32):
        sums = sums_of(rows.repeat(times, 1), y, counts * times, kernel, unbiased)
        errors.append((sums.leave_one_out() - sums.influence()).abs().max().item())
    assert errors[1] < errors[0] / 40


def test_influence_is_the_slope_of_the_biased_distance_towards_the_set_without_a_sample():
    """MMD^2 is quadratic in the weights w of the rows: its slope along d is 2 w^T K d - 2 k_y^T d."""
    kernel, counts = gaussian(1.5), (3, 1, 4, 2, 2)
    x, y = draw(12, 4, 1), draw(20, 4, 2, shift=0.4)
    w, start, expected = torch.full((12,), 1 / 12, dtype=torch.float64), 0, []
    for count in counts:
        without = torch.full((12,), 1 / (12 - count), dtype=torch.float64)
        without[start : start + count] = 0
        d, start = without - w, start + count
        expected.append(float(2 * w @ kernel(x, x) @ d - 2 * kernel(x, y).mean(1) @ d))
    found = sums_of(x, y, counts, kernel, False).influence()
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_influence_on_the_unbiased_distance_leaves_a_row_out_of_its_own_mean():
    x, y, kernel = draw(2, 4, 1), draw(20, 4, 2, shift=0.4), gaussian(2.0)
    witness = [float(kernel(x, x)[0, 1] - kernel(x[i : i + 1], y).mean()) for i in range(2)]
    found = sums_of(x, y, (1, 1), kernel, True).influence()
    assert found.tolist() == pytest.approx([witness[1] - witness[0], witness[0] - witness[1]], rel=1e-10)


@pytest.mark.parametrize(("unbiased", "least"), [(True, 2), (False, 1)])
def test_as_many_rows_must_be_left_as_the_distance_takes(unbiased, least):
    def alone(rows: int) -> KernelSums:
        return sums_of(draw(rows, 4, 1), draw(20, 4, 2), (1,) * rows, gaussian(2.0), unbiased)

    assert alone(least + 1).leave_one_out().isfinite().all()
    with pytest.raises(InputError, match=f"at least {least} embeddings without any one sample, got {least} of {least}"):
        alone(least).leave_one_out()


def test_subsets_of_published_numbers_are_100_of_1000_rows():
    known = inspect.signature(kid_subsets).parameters
    assert (known["subsets"].default, known["size"].default) == (100, 1000)
    assert kid_subsets(draw(2, 3, 1), draw(9, 3, 2), subsets=1)[0].isfinite()


def test_influences_ranks_like_leaving_out_and_a_far_sample_is_last():
    rows, y = draw(60, 4, 1, shift=0.5), draw(200, 4, 2)
    sums = sums_of(rows, y, (1,) * 60, gaussian(2.0), True)
    assert torch.corrcoef(torch.stack([sums.leave_one_out(), sums.influence()]))[0, 1] > 0.999
    rows[7] += 5
    sums = sums_of(rows, y, (1,) * 60, polynomial(4), True)
    assert sums.leave_one_out().argmin() == sums.influence().argmin() == 7


@pytest.mark.parametrize("kind", KERNELS)
def test_a_sample_by_itself_is_measured_by_its_own_rows(kind):
    kernel, unbiased = KERNELS[kind]
    x, y = draw(9, 4, 1), draw(20, 4, 2, shift=0.4)
    expected = torch.stack([mmd2(part, y, kernel, unbiased=unbiased) for part in x.split((2, 3, 4))])
    torch.testing.assert_close(sums_of(x, y, (2, 3, 4), kernel, unbiased).each(), expected)


# --- bad input


@pytest.mark.parametrize("distance", [kid, kad])
def test_one_row_is_no_set(distance):
    with pytest.raises(InputError, match="x must have at least 2 rows, got 1"):
        distance(draw(1, 4), draw(9, 4))


def test_what_has_no_kernel_is_refused():
    with pytest.raises(InputError, match="at least 1 row, got 0"):
        cmmd(draw(0, 4), draw(9, 4))
    with pytest.raises(InputError, match="one width, got 3 and 4"):
        kid(draw(5, 3), draw(9, 4))
    with pytest.raises(InputError, match=r"zeros in rows \[1\]"):
        cmmd(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), draw(9, 2))
    with pytest.raises(InputError, match="must be finite"):
        kid(torch.full((3, 2), torch.inf), draw(9, 2))
    with pytest.raises(InputError, match="most of its rows are equal"):
        kad(draw(5, 2), torch.ones(6, 2))
    with pytest.raises(InputError, match="at least 2 embeddings without any one sample"):
        sums_of(draw(4, 2), draw(9, 2), (1, 3), polynomial(2), True).leave_one_out()
