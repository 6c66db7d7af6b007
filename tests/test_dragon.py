"""DRAGON: the construction of D+ and D- against the fixture of online.md 10.1 and all sets there are; its losses."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from diffalign.errors import InputError, RunError
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.diffusion_kto import DiffusionKTO
from diffalign.methods.dragon import Dragon
from diffalign.methods.set_construction import Recount, build_sets, halves, swap
from diffalign.rewards.frechet import FrechetReward
from diffalign.rewards.vendi import VendiReward
from diffalign.types import Embedded, OnlineMethod, Scored, SetOutput, SetReward
from tests.sets import PixelEncoder, batches, pictures
from tests.test_measure import RNG
from tests.toys import images, pairs, toy

FIRST, SECOND = (0.0, 1.0, 3.0, 4.0), (-1.0, -2.0, 0.5, 1.5)
MEMBERS = torch.arange(8).view(4, 2)
"""Prompt i has image 2 i of the first set and 2 i + 1 of the second."""
POOL = [x for two in zip(FIRST, SECOND, strict=True) for x in two]


def distance(values: list[float]) -> float:
    """From N(0, 1), by moments over n: m² + (s - 1)²."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean() ** 2 + (found.std(correction=0) - 1) ** 2)


def fixture(members) -> Recount:
    return Recount(function=lambda chosen: -distance([POOL[i] for i in chosen]), members=tuple(members))


class Normal:
    """A reward of sets of numbers, without a tally."""

    name, version, modality, licence = "normal", "1", "image", "-"
    requires, needs_reference, range = frozenset({"images"}), False, (-math.inf, 0.0)

    def of_rows(self, embedded: Embedded) -> SetOutput:
        return SetOutput(score=-distance(embedded.rows[:, 0].tolist()), samples=len(embedded.counts))

    def embed(self, batch) -> Embedded:
        return Embedded(rows=batch.images.flatten(1)[:, :1], counts=(1,) * len(batch.images))

    def fit_reference(self, batches) -> None: ...
    def save_reference(self, file) -> None: ...
    def load_reference(self, file) -> None: ...
    def score_set(self, batches): ...
    def differentiable_score(self, batch): ...
    def credit(self, batch, mode="loo"): ...


def a_round(reward: SetReward | None, rows: torch.Tensor, group: list[int], **scores: list[float]) -> Scored:
    return Scored(
        scores={name: torch.tensor(values) for name, values in scores.items()},
        weights=dict.fromkeys(scores, 1.0),
        group=torch.tensor(group),
        prompts=[str(i) for i in range(max(group) + 1)],
        embedded=Embedded(rows=rows, counts=(1,) * len(rows)),
        set_reward=reward,
    )


def numbers(**scores: list[float]) -> Scored:
    return a_round(Normal(), torch.tensor(POOL)[:, None], [0, 0, 1, 1, 2, 2, 3, 3], **scores)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the fixture


def test_the_fixture_goes_as_it_is_worked_out():
    asked = []

    def recorded(chosen):
        asked.append(distance([POOL[i] for i in chosen]))
        return -asked[-1]

    found = build_sets(MEMBERS, lambda m: Recount(function=recorded, members=tuple(m)), [range(4)])
    expected = [4.337722, 0.182418, 0.075490, 0.756966, 1.112838, 1.739596]
    assert asked[:6] == pytest.approx(expected, abs=5e-7)
    assert [POOL[i] for i in found.places[:, 0]] == [0.0, -2.0, 0.5, 1.5]
    assert [POOL[i] for i in found.places[:, 1]] == [-1.0, 1.0, 3.0, 4.0]
    assert found.trail == pytest.approx((-0.182418, -0.075490), abs=5e-7)
    assert found.worse == pytest.approx(-distance([-1.0, 1.0, 3.0, 4.0]))


def test_the_fixtures_set_is_the_best_of_all():
    best = max(itertools.product((0, 1), repeat=4), key=lambda c: -distance([POOL[2 * i + s] for i, s in enumerate(c)]))
    assert best == (0, 1, 1, 1)


def test_a_reward_of_single_images_makes_a_worse_set():
    single = [-abs(x) for x in POOL]
    found = Dragon().select(replace(numbers(near=single), set_reward=None, embedded=None), seeded())
    assert [POOL[i] for i in found.places[:, 0]] == [0.0, 1.0, 0.5, 1.5]
    assert distance([POOL[i] for i in found.places[:, 0]]) == pytest.approx(0.756966, abs=5e-7)


@pytest.mark.parametrize("seed", range(6))
def test_a_method_builds_the_fixtures_sets_in_an_order_of_its_own(seed):
    found = Dragon(passes=4).select(numbers(), seeded(seed))
    order = [torch.randperm(4, generator=g).tolist() for g in [seeded(seed)] for _ in range(4)]
    expected = build_sets(MEMBERS, fixture, order)
    assert torch.equal(found.places, expected.places)
    assert found.metrics["set_plus"] == pytest.approx(expected.trail[-1])
    assert found.metrics["set_minus"] == pytest.approx(expected.worse)
    assert found.metrics["set_start"] == pytest.approx(-0.182418, abs=5e-7)
    assert found.metrics["swaps"] == len(expected.trail) - 1
    assert found.metrics["pairs"] == 4


# --- swaps, exhaustively


def table(seed: int) -> dict[tuple[int, ...], float]:
    """A random number for every set that four prompts can make."""
    values = torch.rand(16, generator=seeded(seed), dtype=torch.float64).tolist()
    return dict(zip(itertools.product((0, 1), repeat=4), values, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_swaps_never_lower_the_set_keep_each_prompts_images_and_end_where_none_helps(seed):
    values = table(seed)

    def of(chosen):
        return values[tuple(i % 2 for i in sorted(chosen))]

    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        found = swap(MEMBERS, Recount(function=of, members=(0, 2, 4, 6)), [order] * 16)
        assert list(found.trail) == sorted(set(found.trail))
        assert found.trail[0] == of((0, 2, 4, 6))
        assert [sorted(row) for row in found.places.tolist()] == MEMBERS.tolist()
        kept = found.places[:, 0].tolist()
        assert found.trail[-1] == of(kept)
        near = [of([*kept[:p], found.places[p, 1].item(), *kept[p + 1 :]]) for p in range(4)]
        assert max(near) <= found.trail[-1] <= max(values.values())


@pytest.mark.parametrize("seed", range(10))
def test_one_pass_finds_the_best_set_where_prompts_do_not_depend_on_each_other(seed):
    worth = torch.randn(8, generator=seeded(seed), dtype=torch.float64).tolist()
    found = swap(MEMBERS, Recount(function=lambda m: sum(worth[i] for i in m), members=(0, 2, 4, 6)), [[2, 0, 3, 1]])
    assert found.trail[-1] == pytest.approx(sum(max(worth[2 * p], worth[2 * p + 1]) for p in range(4)))


def test_passes_end_where_one_changes_nothing_and_rounding_is_no_gain():
    calls = []

    def level(chosen):
        calls.append(chosen)
        return 1.0 + 1e-14 * sum(chosen)

    found = swap(MEMBERS, Recount(function=level, members=(0, 2, 4, 6)), [range(4)] * 50)
    assert len(found.trail) == 1
    assert len(calls) == 5


def test_a_set_reward_that_is_not_a_number_ends_the_round():
    with pytest.raises(RunError, match="must give finite numbers, got nan"):
        build_sets(MEMBERS, lambda m: Recount(function=lambda c: math.nan, members=tuple(m)), [range(4)])


# --- real set rewards


def frechet(width: int = 6) -> FrechetReward:
    reward = FrechetReward(PixelEncoder(width))
    reward.fit_reference(batches(pictures(60, 1)))
    return reward


@pytest.mark.parametrize("kind", ["frechet", "vendi"])
@pytest.mark.parametrize("group", [2, 4, 5])
def test_what_is_reported_of_the_sets_is_what_they_are_worth(kind, group):
    reward = frechet() if kind == "frechet" else VendiReward(PixelEncoder(6))
    rows = pictures(12 * group, 2, shift=0.1).flatten(1)[:, :6]
    given = a_round(reward, rows, [i // group for i in range(12 * group)])
    found = Dragon(passes=3).select(given, seeded())
    plus, minus = (given.embedded.take(column) for column in found.places.T.tolist())
    assert found.metrics["set_plus"] == pytest.approx(reward.of_rows(plus).score, abs=1e-10)
    assert found.metrics["set_minus"] == pytest.approx(reward.of_rows(minus).score, abs=1e-10)
    assert found.metrics["set_plus"] > found.metrics["set_start"] > found.metrics["set_minus"]
    assert found.metrics["swaps"] > 0
    assert found.metrics["left_over"] == 12 * (group % 2)
    assert len(found.places) == 12 * (group // 2)
    prompts = given.group[found.places]
    assert torch.equal(prompts[:, 0], prompts[:, 1])
    assert len(found.places.unique()) == found.places.numel()


def test_a_set_rewards_choice_is_its_tallys_choice():
    """With the tally, and counted anew."""
    reward = frechet()

    class Slow(Normal):
        of_rows = staticmethod(reward.of_rows)

    rows = pictures(40, 2, shift=0.1).flatten(1)[:, :6]
    found = [Dragon(passes=2).select(a_round(r, rows, [i // 2 for i in range(40)]), seeded()) for r in (reward, Slow())]
    assert torch.equal(found[0].places, found[1].places)


def test_sets_of_each_prompt_are_built_apart():
    rows = pictures(32, 2).flatten(1)[:, :6]
    reward = VendiReward(PixelEncoder(6))
    given = a_round(reward, rows, [i // 8 for i in range(32)])
    found = Dragon(by_prompt=True, passes=4).select(given, seeded())
    of_prompts = [
        [reward.of_rows(given.embedded.take(side[given.group[side] == p].tolist())).score for p in range(4)]
        for side in found.places.T
    ]
    assert found.metrics["set_plus"] == pytest.approx(sum(of_prompts[0]) / 4)
    assert found.metrics["set_minus"] == pytest.approx(sum(of_prompts[1]) / 4)
    assert all(p > m for p, m in zip(*of_prompts, strict=True))
    assert Dragon(by_prompt=True).needs.group_at_least == 4


def test_scores_of_single_images_are_mixed_in_by_their_mean():
    tilt = [0.0, 10.0] * 4
    found = Dragon(passes=4).select(numbers(tilt=tilt), seeded())
    assert found.places[:, 0].tolist() == [1, 3, 5, 7]
    assert found.metrics["set_plus"] == pytest.approx(10 - 0.182418, abs=5e-7)
    heavy = replace(numbers(tilt=tilt), weights={"tilt": 0.0, "normal": 3.0})
    alone = Dragon(passes=4).select(numbers(), seeded())
    both = Dragon(passes=4).select(heavy, seeded())
    assert torch.equal(both.places, alone.places)
    assert both.metrics["set_plus"] == pytest.approx(3 * alone.metrics["set_plus"])


def test_sets_that_are_worth_the_same_teach_nothing():
    alike = replace(numbers(), embedded=Embedded(rows=torch.ones(8, 1), counts=(1,) * 8))
    for loss, shape in (("dpo", (0, 2)), ("kto", (0, 1))):
        found = Dragon(loss=loss).select(alike, seeded())
        assert found.places.shape == shape
        assert found.metrics["zero_std_ratio"] == 1
        assert found.weight is None or found.weight.shape == (0,)


def test_images_are_dealt_to_two_halves():
    assert halves(torch.arange(7)).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert halves(torch.tensor([4])).shape == (0, 2)


# --- the losses


def test_under_kto_images_of_the_sets_are_good_or_bad():
    paired = Dragon(passes=2).select(numbers(), seeded())
    single = Dragon(passes=2, loss="kto").select(numbers(), seeded())
    assert single.places.shape == (8, 1)
    assert sorted(single.places[single.weight > 0, 0].tolist()) == sorted(paired.places[:, 0].tolist())
    assert sorted(single.places[single.weight < 0, 0].tolist()) == sorted(paired.places[:, 1].tolist())


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_loss_is_that_of_its_name(prediction, loss):
    policy, reference = toy(prediction, seed=1), toy(prediction)
    batch, plain = (pairs(), DiffusionDPO) if loss == "dpo" else (images(), DiffusionKTO)
    method = Dragon(loss=loss, beta=3.0)
    found = method(policy, reference, batch, RNG)
    expected = plain(beta=3.0)(policy, reference, batch, RNG)
    torch.testing.assert_close(found.loss, expected.loss, atol=0, rtol=0)
    assert found.metrics.keys() == expected.metrics.keys()
    assert all(m.shape == (4,) and not m.requires_grad for m in found.metrics.values())
    found.loss.mean().backward()
    with torch.no_grad():
        for p in policy.net.parameters():
            p -= 1e-4 * p.grad
    assert method(policy, reference, batch, RNG).loss.mean() < found.loss.mean()


@pytest.mark.parametrize(("loss", "start"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_equal_policy_and_reference_have_the_loss_of_no_preference(loss, start):
    policy, reference = toy(), toy()
    out = Dragon(loss=loss)(policy, reference, pairs() if loss == "dpo" else images(), RNG)
    assert out.loss.tolist() == pytest.approx([start] * 4, abs=1e-7)


def test_what_it_asks_for_is_what_its_loss_takes():
    dpo, kto = Dragon().needs, Dragon(loss="kto").needs
    assert isinstance(Dragon(), OnlineMethod)
    assert (dpo.items, dpo.batch_statistics, dpo.group_at_least) == ("pairs", False, 2)
    assert (kto.items, kto.batch_statistics, kto.data) == ("labelled", True, "prompts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"method\.beta must be positive, got -1"),
        ({"passes": 0}, r"method\.passes must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Dragon(**options)


def test_a_group_of_one_is_refused():
    with pytest.raises(InputError, match="at least 2 images of a prompt, got 1 of each of 8 prompts"):
        Dragon().select(replace(numbers(), group=torch.arange(8)), seeded())
