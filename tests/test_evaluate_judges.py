"""Accuracy of judges under each rule for ties, agreement of voters by published examples, correlation of rewards."""

import numpy as np
import pytest
from scipy.special import expit

from diffalign.errors import InputError
from diffalign.evaluate import judges

FIRST = np.array([2.0, 1.0, 3.0, 0.0, 1.0])
SECOND = np.array([1.0, 2.0, 3.0, 1.0, 0.0])
LABELS = np.array([1.0, 1.0, 0.0, 0.5, 1.0])
"""Right, wrong, the judge's tie, a person's tie, right."""


def test_ties_of_people_are_dropped_or_get_half_credit():
    assert judges.accuracy(FIRST, SECOND, LABELS, ties="drop") == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert judges.accuracy(FIRST, SECOND, LABELS, ties="half") == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)


def test_turning_the_pairs_round_changes_no_accuracy():
    for ties in ("drop", "half"):
        there = judges.accuracy(FIRST, SECOND, LABELS, ties=ties)
        assert judges.accuracy(SECOND, FIRST, 1 - LABELS, ties=ties) == pytest.approx(there)
        assert judges.accuracy(SECOND, FIRST, LABELS, ties=ties) + there == pytest.approx(1)


def test_three_way_credit_by_hand():
    # differences of probability: 0.462, -0.462, 0, -0.462, 0.462
    assert judges.three_way_accuracy(FIRST, SECOND, LABELS, threshold=0.4) == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    assert judges.three_way_accuracy(FIRST, SECOND, LABELS, threshold=0.0) == pytest.approx((1 + 0 + 0.5 + 0.5 + 1) / 5)
    assert judges.three_way_accuracy(FIRST, SECOND, LABELS, threshold=0.5) == pytest.approx((4 * 0.5 + 1) / 5)
    assert judges.three_way_accuracy(FIRST, SECOND, LABELS, threshold=1.0) == pytest.approx((4 * 0.5 + 1) / 5)


def test_the_gap_of_probability_is_that_of_a_softmax_over_the_pair():
    gap = expit(0.7) - expit(-0.7)
    pair = np.array([0.7]), np.array([0.0]), np.array([0.5])
    assert judges.three_way_accuracy(*pair, threshold=gap + 1e-9) == 1.0
    assert judges.three_way_accuracy(*pair, threshold=gap - 1e-9) == 0.5


def test_the_threshold_is_the_least_of_the_best():
    labels = np.array([0.5, 0.5, 1.0])
    scores = np.array([0.5, -0.5, 3.0]), np.zeros(3)  # gaps 0.245, 0.245, 0.905
    assert judges.choose_threshold(*scores, labels) == 0.3
    assert judges.three_way_accuracy(*scores, labels, threshold=0.3) == 1.0


def test_wrong_labels_are_refused():
    with pytest.raises(InputError, match=r"labels must be .* got 1\.5"):
        judges.accuracy(FIRST, SECOND, LABELS + 1, ties="drop")


def test_a_set_of_nothing_but_ties_has_no_accuracy():
    assert np.isnan(judges.accuracy(FIRST, SECOND, np.full(5, 0.5), ties="drop"))
    assert judges.accuracy(FIRST, SECOND, np.full(5, 0.5), ties="half") == 0.5


def columns(*voters: str) -> list[list[str | None]]:
    return [[None if v == "." else v for v in votes] for votes in zip(*voters, strict=True)]


# Krippendorff (2011), examples A to C
BINARY = columns("0100000000", "1110010010")
NOMINAL = columns("aabbdcccedda", "babbbccceddd")
MISSING = columns("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


@pytest.mark.parametrize(("votes", "alpha"), [(BINARY, 0.095), (NOMINAL, 0.692), (MISSING, 0.743)])
def test_alpha_of_published_examples(votes, alpha):
    assert judges.krippendorff_alpha(votes) == pytest.approx(alpha, abs=5e-4)


def test_alpha_is_one_for_full_agreement_and_near_zero_for_chance():
    assert judges.krippendorff_alpha(columns("abab", "abab", "abab")) == 1.0
    rng = np.random.default_rng(0)
    assert judges.krippendorff_alpha(rng.integers(0, 3, (4000, 3)).tolist()) == pytest.approx(0, abs=0.03)
    assert np.isnan(judges.krippendorff_alpha(columns("aaa", "aaa")))
    assert np.isnan(judges.krippendorff_alpha([["a"], ["b", None]]))


def test_agreement_is_the_share_of_pairs_of_voters():
    assert judges.pairwise_agreement([["a", "a", "b"]]) == pytest.approx(1 / 3)
    assert judges.pairwise_agreement([["a", "a"], ["a", "b"], ["c", None]]) == pytest.approx(0.5)
    assert np.isnan(judges.pairwise_agreement([["a"]]))


def test_correlations_of_rewards_use_the_prompts_that_both_judged():
    rng = np.random.default_rng(1)
    one = rng.normal(size=50)
    other = 0.5 * one + rng.normal(size=50)
    holes = other.copy()
    holes[:7] = np.nan
    names, matrix = judges.reward_correlations(
        {"one": one, "negative": -2 * one + 1, "holes": holes, "flat": np.zeros(50)}
    )
    assert names == ("one", "negative", "holes", "flat")
    assert matrix[0, :2].tolist() == pytest.approx([1, -1])
    assert matrix[0, 2] == pytest.approx(np.corrcoef(one[7:], other[7:])[0, 1])
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.isnan(matrix[3]).all()


def test_swapping_the_images_and_the_labels_changes_no_three_way_accuracy():
    rng = np.random.default_rng(0)
    first, second, labels = rng.normal(size=200), rng.normal(size=200), rng.integers(0, 3, 200) / 2
    for threshold in judges.THRESHOLDS:
        swapped = judges.three_way_accuracy(second, first, 1 - labels, threshold=threshold)
        assert judges.three_way_accuracy(first, second, labels, threshold=threshold) == pytest.approx(swapped)
