"""Statistics: goldens of methods/evaluation.md section 4, scipy as oracle, coverage and null behaviour simulated."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from diffalign.errors import RunError
from diffalign.evaluate import stats
from diffalign.evaluate.comparison import Judge, compare, matrix, measure


def column(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def scores(seed: int, n: int, k: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(arm, against): correlated normal scores."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1))
    return common + rng.normal(size=(n, k)) + shift, common + rng.normal(size=(n, k))


# --- outcomes and win rates


def test_ties_count_half_and_tau_widens_them():
    arm, against = column([1.0, 0.0, 0.5, 0.55]), column([0.0, 1.0, 0.5, 0.5])
    assert stats.outcomes(arm, against).ravel().tolist() == [1.0, 0.0, 0.5, 1.0]
    assert stats.outcomes(arm, against, tau=0.1).ravel().tolist() == [1.0, 0.0, 0.5, 0.5]
    assert stats.win_rate(stats.outcomes(arm, against)) == 0.625


def test_win_rates_of_the_two_directions_add_up_to_one():
    arm, against = scores(0, 40, 3)
    arm[::4] = against[::4]
    there, back = stats.outcomes(arm, against), stats.outcomes(against, arm)
    assert stats.win_rate(there) + stats.win_rate(back) == pytest.approx(1)


def test_win_rate_ignores_monotone_transforms_and_the_mean_difference_does_not():
    arm, against = scores(1, 60, 2, 0.3)
    straight, bent = measure(arm, against, seed=0), measure(np.exp(arm), np.exp(against), seed=0)
    assert bent.win_rate == straight.win_rate
    assert (bent.ci_low, bent.ci_high) == (straight.ci_low, straight.ci_high)
    assert bent.mean_difference != pytest.approx(straight.mean_difference, rel=0.05)


def test_a_prompt_weighs_the_same_however_many_seeds_it_has():
    arm = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, np.nan, np.nan, np.nan]])
    assert stats.win_rate(stats.outcomes(arm, np.full((2, 4), 0.5))) == 0.5


# --- intervals and tests


@pytest.mark.parametrize(
    ("rate", "n", "low", "high"),
    [
        (0.64, 500, 0.597007, 0.680859),
        (300 / 460, 460, 0.607552, 0.694276),
        (900 / 1632, 1632, 0.527248, 0.575451),
        (1.0, 5, 0.565518, 1.0),
    ],
)
def test_wilson_has_the_golden_values(rate, n, low, high):
    assert stats.wilson(rate, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(320, 180, 3.9397e-10), (300, 160, 6.5458e-11), (900, 732, 3.5145e-05), (5, 0, 0.0625)]
)
def test_sign_test_has_the_golden_values(wins, losses, p):
    assert stats.sign_test(wins, losses) == pytest.approx(p, rel=1e-4)
    assert stats.sign_test(losses, wins) == stats.sign_test(wins, losses)


def test_sign_test_of_nothing_but_ties_is_one():
    assert stats.sign_test(0, 0) == 1.0


@pytest.mark.parametrize(
    ("rate", "elo"), [(0.55, 34.860), (0.6, 70.437), (0.7, 147.191), (0.8, 240.824), (0.64, 99.951)]
)
def test_elo_has_the_golden_values_and_is_odd(rate, elo):
    assert stats.elo_difference(rate) == pytest.approx(elo, abs=1e-3)
    assert stats.elo_difference(1 - rate) == pytest.approx(-elo, abs=1e-3)


def test_elo_is_infinite_at_the_ends_and_zero_in_the_middle():
    assert [stats.elo_difference(r) for r in (0.0, 0.5, 1.0)] == [-math.inf, 0.0, math.inf]


def test_bootstrap_agrees_with_wilson_for_one_seed_without_ties():
    won = np.repeat([1.0, 0.0], [320, 180])
    low, high = stats.bootstrap_interval(won, seed=0)
    assert (low, high) == pytest.approx(stats.wilson(0.64, 500), abs=0.005)  # half a point, evaluation.md section 4


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        low, high = stats.bootstrap_interval(rng.normal(0.3, 1, 60), seed=trial, resamples=500)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 200 <= 0.99  # 95 % with the simulation's own error of 1.5 % twice


def test_seeds_that_repeat_each_other_add_no_certainty():
    arm, against = scores(4, 80, 1)
    once, again = measure(arm, against, seed=0), measure(np.repeat(arm, 4, 1), np.repeat(against, 4, 1), seed=0)
    assert (again.ci_low, again.ci_high) == (once.ci_low, once.ci_high)
    assert again.difference_se == pytest.approx(once.difference_se)


def test_fresh_seeds_do_add_certainty():
    one, many = measure(*scores(5, 200, 1), seed=0), measure(*scores(5, 200, 8), seed=0)
    assert many.ci_high - many.ci_low < 0.7 * (one.ci_high - one.ci_low)


def test_strata_that_explain_everything_leave_no_width():
    won, strata = np.repeat([1.0, 0.0], [30, 70]), ["easy"] * 30 + ["hard"] * 70
    assert stats.bootstrap_interval(won, seed=0, strata=strata) == pytest.approx((0.3, 0.3))
    low, high = stats.bootstrap_interval(won, seed=0)
    assert low < 0.25
    assert high > 0.35


def test_strata_keep_to_their_prompts_when_one_is_left_out():
    arm = column([np.nan, *[1.0] * 30, *[0.0] * 70])
    found = measure(arm, column([0.5] * 101), seed=0, strata=["hard", *["easy"] * 30, *["hard"] * 70])
    assert (found.ci_low, found.ci_high) == pytest.approx((0.3, 0.3))
    assert found.ci_method == "stratified bootstrap"


def test_bootstrap_is_the_same_for_a_seed_and_another_for_another():
    values = np.random.default_rng(0).normal(size=50)
    assert stats.bootstrap_interval(values, seed=1) == stats.bootstrap_interval(values, seed=1)
    assert stats.bootstrap_interval(values, seed=1) != stats.bootstrap_interval(values, seed=2)


def test_permutation_p_is_uniform_when_nothing_differs():
    rng = np.random.default_rng(6)
    found = [stats.permutation_test(rng.normal(size=30), seed=i, flips=400) for i in range(300)]
    assert scipy_stats.kstest(found, "uniform").pvalue > 0.01


def test_permutation_p_is_near_the_t_test_on_normal_differences():
    d = np.random.default_rng(7).normal(0.35, 1, 50)
    assert stats.permutation_test(d, seed=0) == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, abs=0.006)
    assert stats.permutation_test(d, seed=0) == stats.permutation_test(-d, seed=0)


def test_mean_difference_is_scipys_paired_t():
    arm, against = (s[:, 0] for s in scores(8, 40, 1, 0.4))
    mean, se, d_z = stats.mean_difference(arm - against)
    t = scipy_stats.ttest_rel(arm, against).statistic
    assert mean / se == pytest.approx(t)
    assert d_z == pytest.approx(t / math.sqrt(40))


def test_holm_multiplies_the_smallest_most_and_stays_monotone():
    assert stats.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([0.02]) == [0.02]


# --- a comparison


def test_identical_arms_are_all_ties():
    arm, _ = scores(9, 30, 1)
    same = measure(arm, arm.copy(), seed=0)
    assert (same.win_rate, same.tie_share, same.strict_win_share, same.mean_difference, same.p) == (
        0.5,
        1.0,
        0.0,
        0.0,
        1.0,
    )
    assert measure(np.repeat(arm, 3, 1), np.repeat(arm, 3, 1), seed=0).p == 1.0


def test_winning_every_prompt_has_wilsons_interval_not_a_width_of_zero():
    sure = measure(column([1.0] * 5), column([0.0] * 5), seed=0)
    assert (sure.ci_low, sure.ci_high) == pytest.approx((0.565518, 1.0), abs=1e-6)
    assert (sure.ci_method, sure.elo, sure.d_z) == ("wilson", None, None)


def test_a_nan_takes_the_pair_out_of_both_arms():
    arm, against = column([1.0, 5.0, 2.0]), column([0.0, np.nan, 3.0])
    left = measure(arm, against, seed=0)
    assert (left.n, left.excluded, left.mean_arm, left.mean_against) == (2, 1, 1.5, 1.5)


def table_of(arm: np.ndarray, against: np.ndarray, component: np.ndarray | None = None) -> dict[str, list]:
    n, k = arm.shape
    places = [(i, j) for i in range(n) for j in range(k)]
    table = {
        "arm": ["base"] * n * k + ["aligned"] * n * k,
        "prompt_index": [i for i, _ in places] * 2,
        "k": [j for _, j in places] * 2,
        "good": [float(v) for v in (*against.ravel(), *arm.ravel())],
    }
    return table if component is None else {**table, "good.part": [float(v) for v in component]}


JUDGES = [Judge(name="good", spec="good", version="1", role="labeller", role_declared=True)]


def test_the_table_may_come_in_any_order():
    arm, against = scores(10, 12, 2)
    table = table_of(arm, against)
    order = np.random.default_rng(0).permutation(48)
    mixed = {name: [values[i] for i in order] for name, values in table.items()}
    np.testing.assert_array_equal(matrix(mixed, "aligned", "good"), arm)
    assert compare(mixed, JUDGES, arm="aligned", against="base") == compare(
        table, JUDGES, arm="aligned", against="base"
    )


def test_swapping_the_arms_mirrors_the_comparison():
    table = table_of(*scores(11, 50, 2, 0.3))
    there = compare(table, JUDGES, arm="aligned", against="base").rewards["good"].total
    back = compare(table, JUDGES, arm="base", against="aligned").rewards["good"].total
    assert back.win_rate == pytest.approx(1 - there.win_rate)
    assert back.mean_difference == pytest.approx(-there.mean_difference)
    assert (back.ci_low, back.ci_high) == pytest.approx((1 - there.ci_high, 1 - there.ci_low))
    assert back.p == there.p


def test_components_and_labels_are_measured_like_the_total():
    arm, against = scores(12, 20, 1, 0.5)
    labels = {"Category": ["odd", "even"] * 10}
    found = compare(
        table_of(arm, against, np.concatenate([against.ravel(), arm.ravel()])),
        JUDGES,
        arm="aligned",
        against="base",
        labels=labels,
    ).rewards["good"]
    assert found.attributes["part"] == found.total
    groups = found.groups["Category"]
    assert {name: g.n for name, g in groups.items()} == {"even": 10, "odd": 10}
    weighted = sum(g.n * g.win_rate for g in groups.values()) / 20
    assert found.total.win_rate == pytest.approx(weighted)
    assert found.total.ci_method == "stratified bootstrap"


def test_p_is_corrected_for_the_rewards_of_the_same_role():
    table = table_of(*scores(14, 40, 1, 0.4))
    table |= dict.fromkeys(("twin", "other"), table["good"])
    alone = compare(table, JUDGES, arm="aligned", against="base").rewards["good"]
    family = [
        Judge(name=name, spec=name, version="1", role=role, role_declared=True)
        for name, role in (("good", "labeller"), ("twin", "labeller"), ("other", "held_out"))
    ]
    found = compare(table, family, arm="aligned", against="base").rewards
    assert alone.p_holm == alone.total.p < 0.5
    assert found["good"].p_holm == found["twin"].p_holm == 2 * alone.total.p
    assert found["other"].p_holm == alone.total.p


def test_more_than_one_percent_unjudged_pairs_end_the_comparison():
    arm, against = scores(13, 200, 1)
    arm[:2] = np.nan
    assert compare(table_of(arm, against), JUDGES, arm="aligned", against="base").rewards["good"].total.excluded == 2
    against[5] = np.nan
    with pytest.raises(
        RunError, match=r"'good' could not judge 3 of 200 images, more than 1%; first: prompt 0, seed 0"
    ):
        compare(table_of(arm, against), JUDGES, arm="aligned", against="base")
