"""Statistics of several arms and of large tables: ratings, correlations, BCa, macro means, coverage and speed."""

import math
import time

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from diffalign.evaluate import stats
from diffalign.evaluate.comparison import Judge, compare, correlations, measure, ratings

JUDGE = Judge(name="good", spec="good", version="1", role="held_out", role_declared=True)


def table_of(scores: dict[str, np.ndarray], column: str = "good") -> dict[str, list]:
    """A table of [n, K] scores by arm."""
    [(n, k)] = {s.shape for s in scores.values()}
    places = [(i, j) for i in range(n) for j in range(k)]
    return {
        "arm": [arm for arm in scores for _ in places],
        "prompt_index": [i for i, _ in places] * len(scores),
        "k": [j for _, j in places] * len(scores),
        column: [float(v) for s in scores.values() for v in s.ravel()],
    }


def arms(seed: int = 0, n: int = 80, k: int = 2, **shifts: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1))
    return {arm: common + rng.normal(size=(n, k)) + shift for arm, shift in shifts.items()}


# --- Bradley-Terry


@pytest.mark.parametrize("rate", [0.55, 0.6, 0.7, 0.8, 0.64])
def test_two_arms_have_the_elo_difference_of_their_win_rate(rate):
    found = stats.bradley_terry(np.array([[0.0, 1 - rate], [rate, 0.0]]))
    assert found[0] == 1000
    assert found[1] - found[0] == pytest.approx(stats.elo_difference(rate), abs=1e-9)


def test_ratings_are_the_maximum_of_the_likelihood():
    won = np.random.default_rng(0).uniform(1, 20, (4, 4))

    def loss(free: np.ndarray) -> float:
        r = np.concatenate([[0.0], free])
        terms = [won[i, j] * -np.logaddexp(0, r[j] - r[i]) for i in range(4) for j in range(4) if i != j]
        return -float(np.sum(terms))

    best = optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    expected = 1000 + 400 / math.log(10) * np.concatenate([[0.0], best.x])
    assert stats.bradley_terry(won) == pytest.approx(expected, abs=1e-3)


def test_exact_bradley_terry_shares_give_back_their_ratings():
    truth = np.array([1000.0, 1100.0, 940.0, 1310.0])
    shares = 1 / (1 + 10 ** ((truth[None, :] - truth[:, None]) / 400))
    assert stats.bradley_terry(shares) == pytest.approx(truth, abs=1e-6)
    assert stats.bradley_terry(np.stack([shares, shares.T]))[1] == pytest.approx(2000 - truth, abs=1e-6)


def test_an_arm_that_never_wins_has_no_rating():
    assert np.isnan(stats.bradley_terry(np.array([[0.0, 3.0], [0.0, 0.0]]))).all()
    two_camps = np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    assert np.isnan(stats.bradley_terry(two_camps)).all()


def test_ratings_of_a_table_order_the_arms_and_hold_the_point():
    table = table_of(arms(base=0.0, better=0.6, worse=-0.6))
    found = {r.arm: r for r in ratings(table, ["base", "better", "worse"], ["good"])}
    assert found["base"].rating == found["base"].low == found["base"].high == 1000
    assert found["worse"].rating < 1000 < found["better"].rating
    for rating in found.values():
        assert rating.low <= rating.rating <= rating.high


def test_equal_arms_all_have_the_anchors_rating():
    same = arms(base=0.0)["base"]
    found = ratings(
        table_of({"base": same, "twin": same.copy(), "third": same.copy()}), ["base", "twin", "third"], ["good"]
    )
    assert [r.rating for r in found] == pytest.approx([1000.0] * 3)


# --- independent noise, correlation, macro means


def test_cross_seed_win_rate_is_the_share_of_all_pairs_of_seeds():
    both = arms(3, n=7, k=3, base=0.0, arm=0.3)
    by_hand = np.mean(
        [[a > b for a in both["arm"][i] for b in both["base"][i]] for i in range(7)]
    )  # [7, 9], no ties here
    assert stats.cross_seed_win_rate(both["arm"], both["base"]) == pytest.approx(by_hand)


def test_noise_that_both_arms_share_makes_the_paired_rate_the_sharper_one():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(100, 4))
    found = measure(base + 0.1, base, seed=0)
    assert found.win_rate == 1.0
    assert 0.5 < found.cross_seed_win_rate < 0.7
    assert measure(base[:, :1] + 0.1, base[:, :1], seed=0).cross_seed_win_rate is None


def test_wins_ties_and_losses_count_all_pairs_of_images():
    arm, against = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, np.nan]])
    found = measure(arm, against, seed=0)
    assert (found.wins, found.ties, found.losses, found.excluded) == (1, 1, 1, 1)


def test_the_interval_of_the_mean_difference_is_near_students():
    both = arms(5, n=400, k=1, base=0.0, arm=0.2)
    found = measure(both["arm"], both["base"], seed=0)
    t = scipy_stats.ttest_rel(both["arm"][:, 0], both["base"][:, 0]).confidence_interval()
    assert (found.difference_low, found.difference_high) == pytest.approx((t.low, t.high), abs=0.01)


def test_correlations_are_those_of_the_differences_per_prompt():
    rng = np.random.default_rng(0)
    table = table_of({"base": np.zeros((50, 2)), "arm": rng.normal(size=(50, 2))}, "a")
    table["b"] = [-2 * v for v in table["a"]]
    table["c"] = [1.0] * 200
    found = correlations(table, ["a", "b", "c"], arm="arm", against="base")
    assert found.matrix[0][0] == pytest.approx(1)
    assert found.matrix[0][1] == found.matrix[1][0] == pytest.approx(-1)
    assert found.matrix[2] == (None, None, None)
    assert compare(table, [JUDGE_A], arm="arm", against="base").correlations is None


JUDGE_A = Judge(name="a", spec="a", version="1", role="held_out", role_declared=True)


def test_a_macro_mean_weighs_tasks_not_images():
    sizes = (80, 99, 80, 94, 100, 100)  # GenEval's, evaluation.md 1.2
    right = (80, 50, 40, 70, 4, 6)
    tasks = [t for t, n in enumerate(sizes) for _ in range(n)]
    values = np.array([float(i < r) for n, r in zip(sizes, right, strict=True) for i in range(n)])
    assert stats.macro_mean(values, tasks) == pytest.approx(sum(r / n for r, n in zip(right, sizes, strict=True)) / 6)
    assert abs(stats.macro_mean(values, tasks) - values.mean()) > 0.005


# --- intervals


def test_bca_agrees_with_scipy_on_skewed_values():
    values = np.random.default_rng(0).exponential(size=60)
    ours = stats.bootstrap_interval(values, seed=0, method="bca")
    theirs = scipy_stats.bootstrap((values,), np.mean, method="BCa", n_resamples=10_000, rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.012)  # both are simulated
    plain = stats.bootstrap_interval(values, seed=0)
    assert ours[0] > plain[0]
    assert ours[1] > plain[1]  # skew to the right moves both ends


def test_bca_of_symmetric_values_is_the_percentile_interval_and_of_equal_ones_a_point():
    half = np.random.default_rng(1).normal(size=200)
    values = np.concatenate([half, -half])
    assert stats.bootstrap_interval(values, seed=0, method="bca") == pytest.approx(
        stats.bootstrap_interval(values, seed=0), abs=0.005
    )
    assert stats.bootstrap_interval(np.full(9, 0.3), seed=0, method="bca") == pytest.approx((0.3, 0.3))


def test_rows_resampled_together_are_what_each_would_be_alone():
    values = np.random.default_rng(0).normal(size=(3, 40))
    strata = ["a"] * 10 + ["b"] * 30
    together = stats.bootstrap_means(values, seed=7, strata=strata, resamples=300)
    for row, alone in zip(values, together, strict=True):
        np.testing.assert_array_equal(stats.bootstrap_means(row[None], seed=7, strata=strata, resamples=300)[0], alone)


def test_the_half_width_at_one_half_is_the_published_one():
    for n, points in ((40, 15.5), (214, 6.7), (500, 4.4), (1632, 2.4)):  # evaluation.md section 4
        low, high = stats.bootstrap_interval(np.repeat([0.0, 1.0], n // 2), seed=0)
        assert 50 * (high - low) == pytest.approx(points, abs=50 / n + 0.1)  # steps of one prompt


def test_seeds_that_repeat_each_other_leave_the_width_of_a_stratified_interval():
    both = arms(4, n=90, k=1, base=0.0, arm=0.2)
    strata = ["x", "y", "z"] * 30
    once = measure(both["arm"], both["base"], seed=0, strata=strata)
    again = measure(np.repeat(both["arm"], 4, 1), np.repeat(both["base"], 4, 1), seed=0, strata=strata)
    assert (once.ci_low, once.ci_high) == (again.ci_low, again.ci_high)
    assert (once.difference_low, once.difference_high) == pytest.approx((again.difference_low, again.difference_high))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_cover_the_truth_in_93_to_97_percent_of_2000_repetitions(method):
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(2000):
        prompt = rng.normal(size=(200, 1))
        difference = (0.2 + prompt + rng.normal(size=(200, 4))).mean(1)  # four seeds of 200 prompts
        low, high = stats.bootstrap_interval(difference, seed=trial, resamples=1000, method=method)
        hits += low <= 0.2 <= high
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.slow
def test_win_rates_cover_the_truth_in_93_to_97_percent_of_2000_repetitions():
    rng = np.random.default_rng(12)
    truth = scipy_stats.norm.cdf(0.3 / math.sqrt(2))
    hits = 0
    for trial in range(2000):
        arm, against = rng.normal(0.3, 1, (300, 1)), rng.normal(0, 1, (300, 1))
        won = stats.per_prompt(stats.outcomes(arm, against))[0]
        low, high = stats.bootstrap_interval(won, seed=trial, resamples=1000)
        hits += low <= truth <= high
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.slow
def test_a_hundred_thousand_paired_scores_are_measured_in_seconds():
    rng = np.random.default_rng(0)
    arm, against = rng.normal(0.1, 1, (100_000, 1)), rng.normal(0, 1, (100_000, 1))
    before = time.process_time()
    found = measure(arm, against, seed=0)
    assert time.process_time() - before < 10  # of this process alone, whatever else runs
    assert found.ci_low < found.win_rate < found.ci_high
