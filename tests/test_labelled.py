"""Labelled images, scores and swapped labels on their way from a source to a batch."""

from dataclasses import dataclass

import pytest
import torch

from diffalign.config import parse
from diffalign.data.batches import CachedRows, Collator, LatentScale, stream
from diffalign.data.cache import CacheReader, Share, read_table
from diffalign.data.images import Preprocessing
from diffalign.data.orders import Drawn
from diffalign.data.pairs import Dropped, PairReader, PairSource, Row
from diffalign.data.prepare import CacheJob, cached, split_cached, split_live
from diffalign.errors import InputError
from diffalign.methods import METHODS
from diffalign.methods.measure import image_errors
from diffalign.train import run
from diffalign.types import ALONE, Needs, StepLoss
from tests import worlds
from tests.test_data import Spy
from tests.test_train import config, metrics

PREP = Preprocessing(resolution=worlds.SIDE)


def scored_rows(count: int, **options) -> list[dict]:
    """Pick-a-Pic rows whose scores say which row and which image they belong to."""
    rows = worlds.preference_rows(count, **options)
    return [{**row, "score_0": 10.0 * i, "score_1": 10.0 * i + 1} for i, row in enumerate(rows)]


def labelled_rows(count: int) -> list[dict]:
    return [{"prompt": f"p{i % 5}", "image": worlds.png(i), "label": i % 3 == 0} for i in range(count)]


def reader(tmp_path, rows, *, bad_images=False, **options) -> PairReader:
    file = worlds.parquet(tmp_path / "data.parquet", rows)
    return PairReader(PairSource(path=str(file), **options), bad_images=bad_images)


def cache_of(tmp_path, source: PairReader):
    job = CacheJob(
        folder=tmp_path / "cache",
        key={},
        dtype=torch.float32,
        batch_size=8,
        seed=0,
        share=Share(),
        wait=lambda: None,
    )
    return cached(source, PREP, Spy(), job)


def collator(tmp_path, source: PairReader, kind="pairs", **options) -> Collator:
    table = cache_of(tmp_path, source)
    rows = CachedRows(CacheReader(tmp_path / "cache"), table, torch.arange(len(table)), seed=0)
    return Collator(rows=rows, kind=kind, scale=LatentScale(scale=1.0), seed=0, **options)


def live(tmp_path, source: PairReader, kind="pairs", **options) -> Collator:
    rows, _, _ = split_live(source, PREP, Spy(), 0.0, 0, 0, 8)
    return Collator(rows=rows, kind=kind, scale=LatentScale(scale=1.0), seed=0, **options)


BOTH_WAYS = pytest.mark.parametrize("make", [collator, live])


# --- scores --------------------------------------------------------------------------------------------------------


def test_scores_follow_the_label(tmp_path):
    rows = list(reader(tmp_path, scored_rows(4, ties=1)).rows())
    assert [(r.score_w, r.score_l) for r in rows[:3]] == [(1.0, 0.0), (10.0, 11.0), (21.0, 20.0)]
    assert rows[3] == Dropped(3, "tie")


def test_scores_of_trl_pairs_are_those_of_chosen_and_rejected(tmp_path):
    row = {"prompt": "a", "chosen": worlds.png(0), "rejected": worlds.png(1), "good": 0.25, "score_rejected": "0.5"}
    [found] = reader(tmp_path, [row], columns={"score_chosen": "good"}).rows()
    assert (found.score_w, found.score_l) == (0.25, 0.5)


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_a_score_that_is_no_number_leaves_the_row_unscored(tmp_path, missing):
    rows = scored_rows(2)
    rows[1]["score_0"] = missing
    first, second = reader(tmp_path, rows).rows()
    assert first.scored
    assert isinstance(second, Row)
    assert not second.scored


@BOTH_WAYS
def test_a_batch_has_the_scores_of_its_rows(tmp_path, make):
    batch = make(tmp_path, reader(tmp_path, scored_rows(4))).batch([2, 1], [0, 1])
    assert batch.score_w.tolist() == [21.0, 10.0]
    assert batch.score_l.tolist() == [20.0, 11.0]


@BOTH_WAYS
def test_a_batch_without_all_scores_has_none(tmp_path, make):
    rows = scored_rows(4)
    rows[3]["score_1"] = None
    source = make(tmp_path, reader(tmp_path, rows))
    assert source.batch([2, 3], [0, 1]).score_w is None
    assert source.batch([2, 1], [0, 1]).score_w is not None


def test_unscored_rows_are_left_out_and_counted_for_a_method_that_needs_scores(tmp_path):
    rows = scored_rows(8, ties=1)
    rows[3]["score_1"] = None
    source = reader(tmp_path, rows)
    table = cache_of(tmp_path, source)
    whole, _ = split_cached(tmp_path / "cache", table, 0.0, 0, 0)
    assert len(whole) == 7
    some, _ = split_cached(tmp_path / "cache", table, 0.0, 0, 0, scored=True)
    lively, _, counts = split_live(source, PREP, Spy(), 0.0, 0, 0, 8, scored=True)
    assert len(some) == len(lively) == 6
    for found in (table.counts, counts):
        assert (found.rows, found.kept, found.dropped) == (8, 6, {"tie": 1, "unscored": 1})


def test_a_method_that_needs_scores_is_told_how_to_get_them(tmp_path):
    source = reader(tmp_path, worlds.preference_rows(4))
    source.check_fits("pairs")
    with pytest.raises(InputError, match=r"must have the columns score_0 and score_1 .*; `diffalign data score`"):
        source.check_fits("pairs", scores=True)


def test_a_score_column_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data\.columns must name columns that are there, got score_0 = 'pick'"):
        reader(tmp_path, worlds.preference_rows(4), columns={"score_0": "pick"})


def test_a_cache_keeps_scores_and_labels(tmp_path):
    cache_of(tmp_path, reader(tmp_path, scored_rows(4)))
    table = read_table(tmp_path / "cache")
    assert table.score.tolist() == [[1, 0], [10, 11], [21, 20], [30, 31]]
    assert table.good.all()


# --- labelled images -----------------------------------------------------------------------------------------------


def test_bad_images_are_kept_only_where_asked_for(tmp_path):
    rows = labelled_rows(4)
    assert [r.good for r in reader(tmp_path, rows, bad_images=True).rows()] == [True, False, False, True]
    plain = list(reader(tmp_path, rows).rows())
    assert plain[1:3] == [Dropped(1, "bad label"), Dropped(2, "bad label")]


@BOTH_WAYS
def test_unpaired_images_come_with_their_labels(tmp_path, make):
    batch = make(tmp_path, reader(tmp_path, labelled_rows(6), bad_images=True), "labelled").batch([0, 1, 3], [0, 1, 2])
    assert batch.label.tolist() == [1, -1, 1]


@BOTH_WAYS
def test_each_pair_gives_a_good_and_a_bad_image(tmp_path, make):
    source = reader(tmp_path, worlds.preference_rows(6))
    pairs, single = make(tmp_path, source), make(tmp_path, source, "labelled")
    assert len(single) == 12
    whole = pairs.batch([4, 1], [0, 1])
    batch = single.batch([9, 2, 8, 3], [0, 1, 2, 3])  # loser of row 4, winner of 1, winner of 4, loser of 1
    assert batch.label.tolist() == [-1, 1, 1, -1]
    expected = torch.stack([whole.x_l[0], whole.x_w[1], whole.x_w[0], whole.x_l[1]])
    assert torch.equal(batch.x_0, expected)
    assert torch.equal(batch.cond["c"], whole.cond["c"][[0, 1, 0, 1]])


def test_without_a_ratio_every_image_comes_once_an_epoch(tmp_path):
    order = collator(tmp_path, reader(tmp_path, worlds.preference_rows(6)), "labelled").order
    assert sorted(order.item(s) for s in range(12)) == list(range(12))


def test_a_ratio_draws_good_images_at_its_rate_and_each_alike():
    good = torch.arange(10) < 3
    drawn = Drawn(good, 0.8, seed=0)
    counts = torch.bincount(torch.tensor([drawn.item(s) for s in range(4000)]), minlength=10) / 4000
    assert counts[:3].sum().item() == pytest.approx(0.8, abs=0.02)  # three standard errors
    torch.testing.assert_close(counts[:3], torch.full((3,), 0.8 / 3), atol=0.025, rtol=0)
    torch.testing.assert_close(counts[3:], torch.full((7,), 0.2 / 7), atol=0.01, rtol=0)


@pytest.mark.parametrize(("batch_size", "processes"), [(2, 1), (1, 1), (2, 2), (4, 2)])
def test_drawn_samples_do_not_depend_on_batch_size_or_processes(tmp_path, batch_size, processes):
    source = collator(
        tmp_path, reader(tmp_path, worlds.preference_rows(6)), "labelled", positive_ratio=0.8, prompt_dropout=0.3
    )
    whole = next(stream(source, batch_size=8, accumulate=1, share=Share()))
    accumulate = 8 // (batch_size * processes)
    parts = []
    for p in range(processes):
        batches = stream(source, batch_size=batch_size, accumulate=accumulate, share=Share(p, processes))
        parts += [next(batches) for _ in range(accumulate)]
    order = torch.tensor([s for b in parts for b_s in [b.samples] for s in b_s]).argsort()
    assert torch.equal(torch.cat([b.x_0 for b in parts])[order], whole.x_0)
    assert torch.equal(torch.cat([b.label for b in parts])[order], whole.label)
    assert torch.equal(torch.cat([b.cond["c"] for b in parts])[order], whole.cond["c"])


# --- swapped labels ------------------------------------------------------------------------------------------------


def test_swapped_pairs_are_the_same_pairs_the_other_way_round(tmp_path):
    source = reader(tmp_path, scored_rows(4))
    straight, swapped = collator(tmp_path, source), collator(tmp_path, source, swap=True)
    a, b = straight.batch([0, 2], [5, 6]), swapped.batch([0, 2], [5, 6])
    assert torch.equal(a.x_w, b.x_l)
    assert torch.equal(a.x_l, b.x_w)
    assert torch.equal(a.score_w, b.score_l)
    assert torch.equal(a.score_l, b.score_w)
    assert torch.equal(a.cond["c"], b.cond["c"])


def test_labels_swapped_in_the_data_and_again_in_the_run_are_as_before(tmp_path):
    rows = scored_rows(6, ties=1)
    once = tmp_path / "once"
    once.mkdir()
    flipped = [{**row, "label_0": 1 - row["label_0"]} for row in rows]
    a = collator(tmp_path, reader(tmp_path, rows)).batch([0, 1, 4], [0, 1, 2])
    b = collator(once, reader(once, flipped), swap=True).batch([0, 1, 4], [0, 1, 2])
    for name in ("x_w", "x_l", "score_w", "score_l"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_swapped_good_images_of_pairs_are_the_rejected_ones(tmp_path):
    source = reader(tmp_path, worlds.preference_rows(4))
    pairs = collator(tmp_path, source).batch([1], [0])
    assert torch.equal(collator(tmp_path, source, "images", swap=True).batch([1], [0]).x_0, pairs.x_l)


def test_swapped_labels_turn_good_into_bad_and_the_ratio_is_that_of_the_new_ones(tmp_path):
    source = reader(tmp_path, labelled_rows(6), bad_images=True)
    swapped = collator(tmp_path, source, "labelled", swap=True, positive_ratio=0.9)
    assert swapped.batch([0, 1], [0, 1]).label.tolist() == [-1, 1]
    items = [swapped.order.item(s) for s in range(200)]
    assert (swapped.batch(items, range(200)).label == 1).float().mean().item() == pytest.approx(0.9, abs=0.07)


def test_swapping_is_refused_where_bad_images_were_dropped(tmp_path):
    with pytest.raises(InputError, match=r"data\.swap_labels must be false for this method with unpaired data"):
        reader(tmp_path, labelled_rows(4)).check_fits("images", swapped=True)


# --- whole runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Signed:
    """The error of good images, minus that of bad ones."""

    @property
    def needs(self) -> Needs:
        return Needs(data="labelled", references=("none",))

    def __call__(self, policy, reference, batch, rng, shared=ALONE) -> StepLoss:
        e = image_errors(policy, None, batch, rng)
        return StepLoss(loss=batch.label * e.err, metrics={"good": batch.label}, noise_level=e.noise_level)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "signed", Signed)
    worlds.sd(tmp_path / "sd")
    worlds.parquet(tmp_path / "pairs.parquet", worlds.preference_rows(16, ties=2))
    worlds.parquet(tmp_path / "scored.parquet", scored_rows(16))
    worlds.parquet(tmp_path / "labelled.parquet", labelled_rows(16))
    good = [row for row in labelled_rows(16) if row["label"]]
    worlds.parquet(tmp_path / "good.parquet", good)
    return tmp_path


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("data", "held_rows"), [("pairs.parquet", 3), ("labelled.parquet", 4)])
def test_a_method_on_labelled_images_trains_on_pairs_and_on_single_images(world, data, held_rows, cache):
    cfg = parse(
        config(
            world,
            world / "run",
            method={"name": "signed"},
            data={"path": str(world / data), "cache": cache, "positive_ratio": 0.999},
            train={"steps": 1, "batch_size": 8},
        )
        | {"method": {"name": "signed"}, "validation": {"every": 1, "fraction": 0.3, "pairs": held_rows}}
    )
    run(cfg)
    step, held = metrics(world / "run")[1], metrics(world / "run")[0]["validation"]
    assert step["good"] == 1
    assert -1 < held["good"] < 1
    if data == "pairs.parquet":
        assert held["good"] == 0  # a pair has one of each


def test_a_single_class_cannot_train_a_method_on_labelled_images(world):
    table = config(world, world / "run", data={"path": str(world / "good.parquet"), "cache": False})
    with pytest.raises(InputError, match="must have good and bad images for this method, got 6 good and 0 bad"):
        run(parse(table | {"method": {"name": "signed"}}))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 2.0])
def test_a_ratio_lies_between_0_and_1(world, ratio):
    table = config(world, world / "run", data={"positive_ratio": ratio})
    with pytest.raises(InputError, match=r"config\.data\.positive_ratio must be in \(0, 1\), got"):
        parse(table | {"method": {"name": "signed"}})


@pytest.mark.parametrize(("method", "reason"), [("diffusion_dpo", "takes pairs"), ("sft", "takes good images alone")])
def test_a_ratio_of_good_images_needs_labelled_images(world, method, reason):
    table = config(world, world / "run", data={"positive_ratio": 0.8})
    with pytest.raises(InputError, match=rf"config\.data\.positive_ratio must be left out with .*{reason}"):
        parse(table | {"method": {"name": method}})


def test_scores_reach_the_method_that_asks_for_them(world):
    method = {"name": "diffusion_dpo", "beta": 100.0, "scores": {"soft": 1.0}}
    table = config(world, world / "run", data={"path": str(world / "scored.parquet"), "cache": False})
    run(parse(table | {"method": method}))
    without = config(world, world / "other", data={"cache": False})
    with pytest.raises(InputError, match=r"must have the columns score_0 and score_1 for this method"):
        run(parse(without | {"method": method}))


def test_swapped_labels_are_kept_out_of_the_cache(world):
    table = config(world, world / "run", train={"steps": 1})
    run(parse(table))
    before = {p: p.read_bytes() for p in (world / "cache-sd").iterdir()}
    run(parse(config(world, world / "swapped", train={"steps": 1}, data={"swap_labels": True})))
    assert {p: p.read_bytes() for p in (world / "cache-sd").iterdir()} == before
    straight, swapped = (metrics(world / name)[0] for name in ("run", "swapped"))
    assert swapped["err_w"] == pytest.approx(straight["err_l"], rel=1e-5)


def test_a_tie_never_reaches_a_batch(tmp_path):
    rows = scored_rows(9, ties=5)
    source = collator(tmp_path, reader(tmp_path, rows))
    assert len(source) == 4
    batches = stream(source, batch_size=4, accumulate=1, share=Share())
    seen = {score for _ in range(5) for score in next(batches).score_w.tolist()}
    assert seen == {1.0, 10.0, 21.0, 30.0}  # winners of rows 0 to 3


def test_prompts_are_dropped_by_sample_whatever_is_drawn(tmp_path):
    """The stream of dropped prompts is that of pairs and images: same seed, same sample, same drop."""
    source = reader(tmp_path, worlds.preference_rows(6))
    kinds = [("pairs", {}), ("images", {}), ("labelled", {}), ("labelled", {"positive_ratio": 0.5})]
    dropped = []
    for kind, options in kinds:
        batches = stream(
            collator(tmp_path, source, kind, prompt_dropout=0.4, **options), batch_size=50, accumulate=1, share=Share()
        )
        dropped.append((next(batches).cond["c"][:, 0] == 0).tolist())
    assert all(some == dropped[0] for some in dropped)
    assert any(dropped[0])
