"""Tallies: after any exchanges a set is worth what its rows are counted anew; scores of what is embedded already."""

import pytest
import torch

from diffalign.errors import InputError
from diffalign.rewards.fad import FADReward
from diffalign.rewards.frechet import FrechetReward, FrechetTally
from diffalign.rewards.gaussians import Gaussian, frechet_distance
from diffalign.rewards.kernels import CMMDReward, KADReward, KIDReward
from diffalign.rewards.mmd import kid
from diffalign.rewards.vendi import VendiReward, VendiTally
from diffalign.types import Embedded, RewardBatch, SetReward, SetTally, TalliedReward
from tests.sets import PixelEncoder, SampleEncoder, batches, draw, pictures

KINDS = {
    "frechet": FrechetReward,
    "kid": KIDReward,
    "cmmd": CMMDReward,
    "kad": KADReward,
    "vendi": VendiReward,
    "vendi 2": lambda encoder: VendiReward(encoder, q=2),
}
CLIPS = (3, 1, 2, 2, 1, 4, 2, 1, 3, 1, 2, 2)


def fitted(kind: str, width: int, reference: int = 60) -> SetReward:
    """A reward on rows of a width, with a reference of so many."""
    reward = KINDS[kind](PixelEncoder(width))
    if reward.needs_reference:
        reward.fit_reference(batches(pictures(reference, 1)))
    return reward


def anew(reward: SetReward, kind: str, pool: Embedded, members: list[int], reference: int = 60) -> float:
    chosen = pool.take(members)
    if kind == "kid":  # its published number is of random subsets, its tally of all rows
        width = chosen.rows.shape[1]
        return -kid(chosen.rows, pictures(reference, 1).flatten(1)[:, :width]).item()
    return reward.of_rows(chosen).score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts", "width", "reference"),
    [((1,) * 24, 6, 60), ((1,) * 24, 20, 60), ((1,) * 24, 20, 5), (CLIPS, 6, 60), (CLIPS, 10, 60)],
    ids=["N > D", "N < D", "small reference", "clips", "clips, N about D"],
)
def test_a_tally_is_the_set_counted_anew(kind, counts, width, reference):
    reward = fitted(kind, width, reference)
    pool = Embedded(rows=draw(sum(counts), width, 3, spread=0.3, shift=0.3), counts=counts)
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(counts), generator=rng).tolist()
    inside, outside = order[: len(order) // 2], order[len(order) // 2 :]
    tally = reward.tally(pool, inside)
    assert isinstance(reward, TalliedReward)
    assert isinstance(tally, SetTally)
    gaps = [abs(tally.score - anew(reward, kind, pool, inside, reference))]
    for _ in range(30):
        out, into = (int(torch.randint(len(side), (), generator=rng)) for side in (inside, outside))
        tally = tally.exchange(inside[out], outside[into])
        inside[out], outside[into] = outside[into], inside[out]
        gaps.append(abs(tally.score - anew(reward, kind, pool, inside, reference)))
    assert max(gaps) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchange_leaves_the_tally_as_it_was_and_back_again_is_the_same(kind):
    reward = fitted(kind, 6)
    pool = Embedded(rows=draw(20, 6), counts=(1,) * 20)
    tally = reward.tally(pool, range(10))
    there = tally.exchange(3, 17)
    assert there.score != tally.score == reward.tally(pool, range(10)).score
    assert there.exchange(17, 3).score == pytest.approx(tally.score, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_worth_what_its_embeddings_are(kind):
    reward, images = fitted(kind, 6), pictures(40, 2, shift=0.1)
    embedded = reward.embed(RewardBatch(images=images))
    assert reward.of_rows(embedded) == reward.score_set([RewardBatch(images=images)])
    assert reward.of_rows(embedded.take(range(5))).samples == 5


def test_fad_keeps_its_tally_and_its_number_of_embedded_clips():
    rng = torch.Generator().manual_seed(0)
    clips = RewardBatch(
        audio=[torch.rand(1, 6 * frames, generator=rng) - 0.5 for frames in CLIPS * 2], sample_rate=16000
    )
    reward = FADReward(SampleEncoder())
    reward.fit_reference([clips])
    pool = reward.embed(clips)
    tally = reward.tally(pool, range(0, 24, 2)).exchange(0, 7)
    assert tally.score == pytest.approx(reward.of_rows(pool.take([7, *range(2, 24, 2)])).score, abs=1e-10)
    assert reward.of_rows(pool) == reward.score_set([clips])


# --- golden numbers


@pytest.mark.parametrize(
    ("rows", "mean", "covariance", "distance"),
    [
        ([[-(0.5**0.5)], [0.5**0.5]], [3.0], [[4.0]], 10.0),
        ([[1.5**0.5, 0], [-(1.5**0.5), 0], [0, 6**0.5], [0, -(6**0.5)]], [1.0, 2.0], [[4.0, 0], [0, 1.0]], 7.0),
        (
            [[1.5, 1.5], [-1.5, -1.5], [0.75**0.5, -(0.75**0.5)], [-(0.75**0.5), 0.75**0.5]],
            [0.0, 0.0],
            [[1.0, 0], [0, 1.0]],
            0.5358983849,
        ),
    ],
)
def test_exchanges_end_at_the_golden_distances(rows, mean, covariance, distance):
    """Rows of the golden covariances, of which two are in the set only after an exchange."""
    found = torch.tensor(rows, dtype=torch.float64)
    pool = Embedded(rows=torch.cat([found, found[:2] + 5]), counts=(1,) * (len(rows) + 2))
    given = Gaussian(mean=torch.tensor(mean), covariance=torch.tensor(covariance))
    start = [len(rows), len(rows) + 1, *range(2, len(rows))]
    tally = FrechetTally.of(pool, start, given)
    assert abs(-tally.score - distance) > 1
    tally = tally.exchange(len(rows), 0).exchange(len(rows) + 1, 1)
    assert -tally.score == pytest.approx(distance, abs=1e-9)
    assert frechet_distance(found, given).item() == pytest.approx(distance, abs=1e-9)


def test_a_small_set_of_the_reference_itself_is_away_from_it_by_its_bias():
    """online.md K14: N(0, I_16) against itself, mean of 20 draws."""
    rng = torch.Generator().manual_seed(1)
    given = Gaussian(mean=torch.zeros(16), covariance=torch.eye(16))
    for n, bias in ((32, 2.80), (64, 1.38), (128, 0.65), (256, 0.33), (512, 0.17), (1024, 0.083)):
        pools = [Embedded(rows=torch.randn(n, 16, generator=rng), counts=(1,) * n) for _ in range(20)]
        found = [-FrechetTally.of(pool, range(n), given).score for pool in pools]
        assert sum(found) / 20 == pytest.approx(bias, rel=0.1)


def test_exchanges_end_at_the_golden_diversities():
    pool = Embedded(rows=torch.eye(5).repeat(4, 1), counts=(1,) * 20)  # sample i is of kind i modulo 5
    three_of_two = VendiTally.of(pool, [0, 5, 10, 1, 6, 2]).exchange(2, 11)
    assert three_of_two.score == pytest.approx(2, abs=1e-9)
    assert VendiTally.of(pool, [0, 5, 10, 1, 2]).exchange(1, 15).score == pytest.approx(1.6493848885, abs=1e-9)
    assert VendiTally.of(pool, [0, 5, 10]).score == pytest.approx(1, abs=1e-9)
    assert VendiTally.of(pool, [0, 1, 2, 3, 5]).exchange(5, 19 - 5 * 3).score == pytest.approx(5, abs=1e-9)


# --- bad input


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_no_set(kind):
    reward = fitted(kind, 6)
    pool = Embedded(rows=draw(4, 6), counts=(1,) * 4)
    for ask in (lambda: reward.of_rows(pool.take([0])), lambda: reward.tally(pool, [0])):
        with pytest.raises(InputError, match="must get a set of at least 2 embeddings, got 1 of 1 samples"):
            ask()


@pytest.mark.parametrize("kind", ["frechet", "kid"])
def test_there_must_be_a_reference_of_the_same_width(kind):
    pool = Embedded(rows=draw(4, 5), counts=(1,) * 4)
    bare, other = KINDS[kind](PixelEncoder(5)), fitted(kind, 6)
    for reward, message in ((bare, "must get a reference set first"), (other, "width 5, got 6")):
        for ask in (reward.of_rows, lambda p, r=reward: r.tally(p, [0, 1])):
            with pytest.raises(InputError, match=message):
                ask(pool)


@pytest.mark.parametrize("kind", ["frechet", "kid", "vendi"])
def test_only_a_member_can_leave_and_only_another_can_enter(kind):
    tally = fitted(kind, 6).tally(Embedded(rows=draw(6, 6), counts=(1,) * 6), [0, 1, 2])
    for out, into in ((3, 4), (0, 2)):
        with pytest.raises(ValueError, match="out must be in the set and into must not"):
            tally.exchange(out, into)
