"""Advantages: reference values, DDPO's tracker against a slow one, invariances, what is left out and counted."""

from collections import defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.advantages import (
    RELATIVE,
    Recipe,
    advantages,
    choose,
    combined,
    extremes,
    moving,
    pairs_within,
    win_rates,
)
from diffalign.errors import InputError
from diffalign.methods.selection import select_by_advantage
from diffalign.types import Scored

R = torch.tensor([1.0, -1.0, 2.0, 0.0])
ONE = torch.zeros(4, dtype=torch.long)
BOTH = {"a": torch.tensor([0.0, 1.0, 0.0, 1.0]), "b": torch.tensor([10.0, 20.0, 40.0, 30.0])}
EVEN = {"a": 1.0, "b": 1.0}
UNEVEN = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])


def some(*, seed: int = 0, size: int = 9) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# reference values


@pytest.mark.parametrize(
    ("scheme", "expected", "tolerance"),
    [
        ("group", [0.44717, -1.34152, 1.34152, -0.44717], 1e-5),
        ("global_std", [0.44717, -1.34152, 1.34152, -0.44717], 1e-5),
        ("max_std", [0.44717, -1.34152, 1.34152, -0.44717], 1e-5),
        ("unbiased", [0.38730, -1.16190, 1.16190, -0.38730], 1e-5),  # the document's has a guard of 1e-4
        ("unbiased", [0.38727, -1.16181, 1.16181, -0.38727], 1e-4),
        ("batch", [0.4472136, -1.3416408, 1.3416408, -0.4472136], 1e-7),
    ],
)
def test_four_images_of_one_prompt_have_the_reference_values(scheme, expected, tolerance):
    close(advantages(R, ONE, scheme), expected, tolerance)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("scores", [-1.3850, -0.4021, 1.2956, 0.4914]), ("advantages", [-2.3414, 0.5526, 0.3418, 1.4470])],
)
def test_two_rewards_have_the_reference_values(combine, expected):
    close(combined(BOTH, EVEN, ONE, Recipe(combine=combine)), expected, 6e-5)


def test_win_rates_have_the_reference_values():
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])  # a > b, a > c, b > c
    close(win_rates(pairs, torch.ones(3), 3), [1.0, 0.5, 0.0])
    close(win_rates(pairs.flip(1), torch.zeros(3), 3), [1.0, 0.5, 0.0])
    close(win_rates(pairs, torch.full((3,), 0.5), 3), [0.5, 0.5, 0.5])


def test_an_advantage_of_win_rates_depends_on_the_order_alone():
    scores = torch.tensor([7.0, 1.0, 3.0, 3.0, 9.0, 8.0, 0.0, 5.0, 6.0])
    found = advantages(scores, UNEVEN, "win_rate")
    close(found, advantages(scores.exp(), UNEVEN, "win_rate"))
    rates = torch.tensor([1, 0, 0.5, 0, 1, 1, 0, 1 / 3, 2 / 3])
    close(found, advantages(rates, UNEVEN, "group"), 1e-6)
    assert advantages(torch.tensor([1.0, 1.0, 0.0]), ONE[:3], "win_rate")[:2].tolist() == pytest.approx(
        [0.707, 0.707], abs=1e-3
    )


# definitions, by numpy on one group at a time


@pytest.mark.parametrize("scheme", ["group", "global_std", "unbiased", "max_std", "batch"])
def test_groups_of_different_sizes_are_each_measured_against_their_own(scheme):
    scores = some()
    parts = [scores[UNEVEN == g].double().numpy() for g in range(3)]
    whole = scores.double().numpy()
    spread = {
        "group": [p.std() + 1e-4 for p in parts],
        "global_std": [whole.std() + 1e-4] * 3,
        "unbiased": [p.std(ddof=1) + 1e-8 for p in parts],
        "max_std": [max(p.std() for p in parts) + 1e-4] * 3,
        "batch": [whole.std() + 1e-8] * 3,
    }[scheme]
    centre = [whole.mean()] * 3 if scheme == "batch" else [p.mean() for p in parts]
    close(
        advantages(scores, UNEVEN, scheme),
        np.concatenate([(p - c) / s for p, c, s in zip(parts, centre, spread, strict=True)]),
    )


def test_prompts_tracked_over_rounds_are_measured_as_by_the_authors_buffers():
    rng = np.random.default_rng(0)
    buffers, history = defaultdict(lambda: deque(maxlen=6)), defaultdict(list)
    used = set()
    for _ in range(8):
        group = np.sort(rng.integers(0, 4, size=7))
        scores = rng.normal(size=7) + group
        expected = np.empty(7)
        for g in np.unique(group):
            buffers[g].extend(scores[group == g])
            base = scores if len(buffers[g]) < 4 else np.array(buffers[g])
            used.add(len(base) == 7)
            expected[group == g] = (scores[group == g] - base.mean()) / (base.std() + 1e-6)
        found = advantages(
            torch.tensor(scores), torch.tensor(group), "per_prompt", past=dict(history), buffer_size=6, min_count=4
        )
        close(found, expected)
        for g, score in zip(group, scores, strict=True):
            history[int(g)].append(float(score))
    assert used == {True, False}  # both the round and the buffers were measured against


def test_a_prompt_met_for_the_first_time_is_measured_against_the_round():
    close(advantages(R, torch.arange(4), "per_prompt"), advantages(R, ONE, "batch"), 1e-5)


# invariances


@pytest.mark.parametrize("scheme", ["group", "unbiased", "max_std", "win_rate"])  # a round's std holds that of prompts
def test_what_all_images_of_a_prompt_gain_changes_nothing_within_it(scheme):
    bonus = torch.tensor([3.0, -2.0, 7.0])[UNEVEN]
    close(advantages(some() + bonus, UNEVEN, scheme), advantages(some(), UNEVEN, scheme), 1e-5)


@pytest.mark.parametrize("scheme", RELATIVE)
def test_the_mean_within_every_prompt_is_0(scheme):
    found = advantages(some(), UNEVEN, scheme)
    close(torch.stack([found[UNEVEN == g].mean() for g in range(3)]), [0.0] * 3)


@pytest.mark.parametrize("scheme", [*RELATIVE, "batch", "per_prompt"])
def test_the_order_of_images_and_the_numbers_of_groups_do_not_matter(scheme):
    order = torch.tensor([5, 6, 7, 8, 3, 4, 1, 0, 2])
    renamed = torch.tensor([40, 7, 12])
    close(advantages(some()[order], renamed[UNEVEN][order], scheme), advantages(some(), UNEVEN, scheme)[order])


def test_a_group_of_tiny_spread_is_inflated_by_its_own_std_and_not_by_the_rounds():
    scores = torch.tensor([0.5, 0.5 + 1e-2, 0.0, 1.0])
    group = torch.tensor([0, 0, 1, 1])
    assert advantages(scores, group, "group")[1] > 0.9
    for scheme in ("global_std", "max_std"):
        assert advantages(scores, group, scheme)[1] < 0.02


def test_the_scale_of_a_reward_matters_only_where_scores_are_added():
    wide = {**BOTH, "a": 100 * BOTH["a"]}
    recipe = Recipe(advantage="unbiased")
    close(combined(wide, EVEN, ONE, recipe), combined(BOTH, EVEN, ONE, recipe), 1e-6)
    added = replace(recipe, combine="scores")
    assert (combined(wide, EVEN, ONE, added) - combined(BOTH, EVEN, ONE, added)).abs().max() > 0.5


def test_a_weight_of_0_takes_a_reward_out():
    for combine in ("advantages", "scores"):
        found = combined(BOTH, {"a": 2.0, "b": 0.0}, ONE, Recipe(advantage="unbiased", combine=combine))
        scale = 2.0 if combine == "advantages" else 1.0
        close(found, scale * advantages(BOTH["a"], ONE, "unbiased"), 1e-6)


# what is left out


@pytest.mark.parametrize("scheme", [*RELATIVE, "batch", "per_prompt"])
@pytest.mark.parametrize("value", [0.1, -12345.678, 0.0])
def test_equal_scores_have_no_advantage_and_are_counted(scheme, value):
    for dtype in (torch.float32, torch.float64):
        scores = torch.full((33,), value, dtype=dtype)
        group = torch.arange(33) // 11  # of eleven, whose float mean is off by rounding
        assert advantages(scores, group, scheme).abs().max() < 1e-8
        chosen = choose({"r": scores}, {"r": 1.0}, group, Recipe(advantage=scheme))
        assert len(chosen.places) == len(chosen.advantage) == 0
        assert chosen.metrics["zero_std_ratio"] == 1
        assert chosen.metrics["trained_prompt_num"] == 0


def test_only_the_prompts_with_a_difference_are_trained_on():
    scores = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0])
    chosen = choose({"r": scores}, {"r": 1.0}, UNEVEN, Recipe())
    assert chosen.places.tolist() == [3, 4]
    close(chosen.advantage, [-1.0, 1.0], 1e-3)
    assert chosen.metrics["zero_std_ratio"] == pytest.approx(2 / 3)
    assert chosen.metrics["trained_prompt_num"] == 1
    assert chosen.metrics["group_size"] == 3
    assert chosen.metrics["reward_std_mean"] == pytest.approx(0.5 / 3)


def test_two_rewards_that_cancel_leave_nothing_to_learn():
    scores = {"a": R, "b": -R}
    assert len(choose(scores, EVEN, ONE, Recipe()).places) == 0
    assert moving(advantages(R, ONE, "group"), ONE).all()


def test_advantages_are_clipped_and_it_is_counted():
    scores = torch.cat([torch.zeros(99), torch.ones(1)])
    chosen = choose({"r": scores}, {"r": 1.0}, torch.zeros(100, dtype=torch.long), Recipe())
    assert chosen.advantage.max() == 5
    assert chosen.metrics["advantage_clipfrac"] == 0.01
    assert choose({"r": -scores}, {"r": 1.0}, torch.zeros(100, dtype=torch.long), Recipe()).advantage.min() == -5
    free = choose({"r": scores}, {"r": 1.0}, torch.zeros(100, dtype=torch.long), Recipe(clip_advantage=float("inf")))
    assert free.advantage.max() == pytest.approx(9.94, abs=0.01)


def test_only_the_best_and_the_worst_of_a_group_stay_if_asked():
    recipe = Recipe(advantage="unbiased", extremes=1)
    chosen = choose({"r": some()}, {"r": 1.0}, UNEVEN, recipe)
    whole = advantages(some(), UNEVEN, "unbiased")
    assert len(chosen.places) == 6
    for g in range(3):
        own = chosen.places[UNEVEN[chosen.places] == g]
        assert set(own.tolist()) == {
            int((UNEVEN == g).nonzero().flatten()[f(some()[UNEVEN == g])]) for f in (torch.argmax, torch.argmin)
        }
    close(chosen.advantage, whole[chosen.places])
    assert extremes(whole, UNEVEN, 3)[UNEVEN < 2].all()  # a small group stays whole


def test_an_image_whose_companions_could_not_be_scored_is_left_out_and_counted():
    group = torch.tensor([0, 1, 1])
    chosen = choose({"r": R[:3]}, {"r": 1.0}, group, Recipe())
    assert chosen.places.tolist() == [1, 2]
    assert chosen.metrics["lone_images"] == 1
    alone = choose({"r": R}, {"r": 1.0}, torch.arange(4), Recipe(advantage="batch"))
    assert alone.places.tolist() == [0, 1, 2, 3]
    assert alone.metrics["lone_images"] == 0


def test_what_is_selected_of_a_round_takes_the_past_by_prompt():
    past = {"cat": [0.0, 1.0], "dog": [5.0]}
    scored = Scored(
        scores={"r": torch.tensor([2.0, 0.0])},
        weights={"r": 3.0},
        group=torch.tensor([0, 1]),
        prompts=["dog", "cat"],
        past={"r": past},
    )
    for combine in ("advantages", "scores"):
        recipe = Recipe(advantage="per_prompt", min_count=2, combine=combine, clip_advantage=100.0)
        found = select_by_advantage(scored, recipe)
        assert found.places.tolist() == [[0], [1]]
        dog, cat = [5.0, 2.0], [0.0, 1.0, 0.0]
        expected = [(2 - np.mean(dog)) / np.std(dog), (0 - np.mean(cat)) / np.std(cat)]
        scale = 3.0 if combine == "advantages" else 1.0
        assert found.weight.tolist() == pytest.approx([scale * e for e in expected], rel=1e-5)
        assert found.weight.dtype == torch.float32


def test_no_images_make_no_rows():
    chosen = choose({"r": torch.zeros(0)}, {"r": 1.0}, torch.zeros(0, dtype=torch.long), Recipe())
    assert len(chosen.places) == 0


# bad input


@pytest.mark.parametrize("scheme", RELATIVE)
def test_one_image_a_prompt_has_nothing_to_be_measured_against(scheme):
    with pytest.raises(InputError, match=f"at least 2 images of every prompt with advantage = '{scheme}'"):
        advantages(R, torch.tensor([0, 0, 0, 1]), scheme)
    with pytest.raises(InputError, match="got 1 of 4 of 4 prompts"):
        choose({"r": R}, {"r": 1.0}, torch.arange(4), Recipe(advantage=scheme))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_advantage": 0.0}, "method.clip_advantage must be positive, got 0.0"),
        ({"extremes": 0}, "method.extremes must be at least 1, got 0"),
        ({"buffer_size": 16}, "method.buffer_size and .min_count must be left out with advantage = 'group'"),
        ({"advantage": "per_prompt", "buffer_size": 8}, r"method.min_count must be in \[1, buffer_size\], got 16 with"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Recipe(**options)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(InputError, match="advantage must be a known scheme, got 'grup'; did you mean 'group'"):
        advantages(R, ONE, "grup")


def test_scores_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"scores must be finite, got others for images \[1\] of 2"):
        advantages(torch.tensor([0.0, float("nan")]), ONE[:2], "batch")
    with pytest.raises(InputError, match=r"weights must have one of every reward, \['r'\], got \{\}"):
        combined({"r": R}, {}, ONE, Recipe())
    with pytest.raises(InputError, match=r"pairs must compare every image, got none with \[2\]"):
        win_rates(pairs_within(torch.tensor([0, 0, 1])), torch.ones(1), 3)
