"""Which pairs D3PO makes of a round: Pareto preference, ties, groups of any size, best against worst."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from diffalign.errors import InputError
from diffalign.methods.d3po import D3PO
from diffalign.rng import generator
from diffalign.types import Scored

GENERATOR = generator(0, "select")


def scored(*rows, group, weights=None):
    """Scores by reward, in order `a`, `b`, ..."""
    scores = {name: torch.tensor(row, dtype=torch.float32) for name, row in zip("abc", rows, strict=False)}
    prompts = [f"prompt {i}" for i in range(max(group) + 1)]
    weights = dict(zip(scores, weights or [1.0] * len(scores), strict=True))
    return Scored(scores=scores, weights=weights, group=torch.tensor(group), prompts=prompts)


def chosen(found, **options):
    """(pairs as a sorted list, metrics)."""
    selection = D3PO(**options).select(found, GENERATOR)
    assert selection.weight is None
    return sorted(map(tuple, selection.places.tolist())), selection.metrics


def test_all_pairs_of_a_prompt_are_made_the_better_image_first():
    pairs, metrics = chosen(scored([0.2, 0.9, 0.5], group=[0, 0, 0]))
    assert pairs == [(1, 0), (1, 2), (2, 0)]
    assert (metrics["tie_rate"], metrics["zero_std_ratio"], metrics["trained_prompt_num"]) == (0, 0, 1)
    assert metrics["pairs"] == 3
    assert metrics["pair_margin"] == pytest.approx((0.7 + 0.4 + 0.3) / 3)


def test_with_several_rewards_a_winner_is_nowhere_worse_and_somewhere_better():
    pairs, metrics = chosen(scored([1, 2, 1, 2], [1, 1, 2, 2], group=[0, 0, 0, 0]))
    assert pairs == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert metrics["tie_rate"] == pytest.approx(1 / 6)
    assert metrics["pair_margin"] == pytest.approx((1 + 1 + 2 + 1 + 1) / 5)


def test_images_are_paired_with_those_of_their_own_prompt_in_groups_of_any_size():
    pairs, metrics = chosen(scored([3, 1, 9, 5, 5, 7, 2], group=[0, 0, 1, 2, 2, 2, 3]))
    assert pairs == [(0, 1), (5, 3), (5, 4)]
    assert metrics["tie_rate"] == pytest.approx(1 / 4)
    assert metrics["trained_prompt_num"] == 2


def test_seven_images_of_which_people_mark_one_make_six_pairs():
    found = replace(scored([0, 0, 1, 0, 0, 0, 0], group=[0] * 7), weights={"people": 1.0})
    pairs, metrics = chosen(replace(found, scores={"people": found.scores["a"]}))
    assert pairs == [(2, i) for i in (0, 1, 3, 4, 5, 6)]
    assert metrics["tie_rate"] == pytest.approx(15 / 21)
    distinct, _ = chosen(scored([4, 0, 6, 1, 3, 5, 2], group=[0] * 7))
    assert len(distinct) == 21


def test_ties_make_no_pair_and_are_counted():
    pairs, metrics = chosen(scored([1, 1, 1, 2], group=[0, 0, 1, 1]))
    assert pairs == [(3, 2)]
    assert (metrics["tie_rate"], metrics["zero_std_ratio"], metrics["trained_prompt_num"]) == (0.5, 0.5, 1)


@pytest.mark.parametrize("pairs", ["all", "best_worst"])
def test_a_round_of_ties_is_an_empty_selection(pairs):
    selection = D3PO(pairs=pairs).select(scored([1, 1, 2, 2], group=[0, 0, 1, 1]), GENERATOR)
    assert selection.places.shape == (0, 2)
    assert (selection.metrics["tie_rate"], selection.metrics["zero_std_ratio"]) == (1, 1)
    assert "pair_margin" not in selection.metrics


def test_a_negative_weight_turns_a_reward_round_and_a_weight_of_0_leaves_it_out():
    rows = [1, 2], [5, 3]
    assert chosen(scored(*rows, group=[0, 0]))[0] == []
    pairs, metrics = chosen(scored(*rows, group=[0, 0], weights=[1.0, -2.0]))
    assert (pairs, metrics["pair_margin"]) == ([(1, 0)], 5.0)
    assert chosen(scored(*rows, group=[0, 0], weights=[0.0, 2.0]))[0] == [(0, 1)]
    with pytest.raises(InputError, match=r"rewards must have one whose weight is not 0, got \{'a': 0\.0, 'b': 0\.0\}"):
        chosen(scored(*rows, group=[0, 0], weights=[0.0, 0.0]))


def test_best_and_worst_are_one_pair_a_prompt_and_all_there_is_of_two_images():
    scores = scored([0.2, 0.9, 0.5, 3, 1, 4], group=[0, 0, 0, 1, 2, 2])
    pairs, metrics = chosen(scores, pairs="best_worst")
    assert pairs == [(1, 0), (5, 4)]
    assert metrics["pair_margin"] == pytest.approx((0.7 + 3) / 2)
    assert metrics["tie_rate"] == chosen(scores)[1]["tie_rate"]
    two = scored([1, 2, 5, 3], group=[0, 0, 1, 1])
    assert chosen(two, pairs="best_worst")[0] == chosen(two)[0]


def test_with_several_rewards_best_and_worst_are_a_true_pair_although_the_extremes_of_the_sum_are_a_tie():
    scores = scored([9, 0, 1, 2], [0, 1, 4, 6], group=[0] * 4)  # the sum is greatest at 0 and least at 1: a tie
    assert chosen(scores, pairs="best_worst")[0] == [(3, 1)]


def test_selection_is_that_of_a_loop_over_pairs_and_does_not_depend_on_the_order_of_images():
    for seed in range(5):
        rows = torch.randint(0, 3, (3, 24), generator=generator(seed)).tolist()
        group = sorted(torch.randint(0, 5, (24,), generator=generator(seed, "group")).tolist())
        expected, ties = [], 0
        for i, j in combinations(range(24), 2):
            if group[i] == group[j]:
                gaps = [row[i] - row[j] for row in rows]
                if max(gaps) > 0 and min(gaps) >= 0:
                    expected.append((i, j))
                elif min(gaps) < 0 and max(gaps) <= 0:
                    expected.append((j, i))
                else:
                    ties += 1
        pairs, metrics = chosen(scored(*rows, group=group))
        assert pairs == sorted(expected)
        assert metrics["tie_rate"] == pytest.approx(ties / (ties + len(expected)))
        turned = scored(*[row[::-1] for row in rows], group=group[::-1])
        assert sorted((23 - w, 23 - lo) for w, lo in chosen(turned)[0]) == pairs


def test_nothing_to_compare_is_an_error_and_nothing_at_all_is_an_empty_selection():
    with pytest.raises(
        InputError, match=r"online\.group must give at least 2 images of a prompt to compare, got single"
    ):
        chosen(scored([1, 2], group=[0, 1]))
    empty = Scored(scores={"a": torch.zeros(0)}, weights={"a": 1.0}, group=torch.zeros(0, dtype=torch.long), prompts=[])
    assert D3PO().select(empty, GENERATOR).places.shape == (0, 2)


def test_a_score_that_is_no_number_is_no_tie():
    with pytest.raises(ValueError, match=r"scores of 'a' must be numbers, got NaN for images \[1\]"):
        chosen(scored([1.0, math.nan], group=[0, 0]))
