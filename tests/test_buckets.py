"""Aspect buckets: the table, which image belongs where, steps of one shape, and a run from end to end."""

import json
import logging
import random
from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import diffalign
from diffalign import cli
from diffalign.checks import buckets_of
from diffalign.config import parse
from diffalign.data import cache as disk
from diffalign.data.batches import Collator, LatentScale, stream
from diffalign.data.buckets import BucketOrder, bucket_table, check_filled, name_of, nearest
from diffalign.data.cache import Share
from diffalign.data.check import check
from diffalign.data.images import Placement, Preprocessing, decode, to_size
from diffalign.data.orders import Order
from diffalign.data.pairs import PairReader, PairSource
from diffalign.data.prepare import CacheJob, Encoders, cached, split_cached, split_live
from diffalign.denoisers import FAMILIES
from diffalign.errors import InputError
from diffalign.types import Cond
from diffalign.validation import _mine
from tests import worlds

TALL_SDXL = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024"
).split()
"""The upright half of the table in the paper of SDXL, arXiv 2307.01952, appendix I."""


def turned(name: str) -> str:
    return "x".join(reversed(name.split("x")))


def names(*args, **options) -> list[str]:
    return [name_of(size) for size in bucket_table(*args, **options)]


# --- the table


def test_the_buckets_of_1024_are_those_of_sdxl_but_for_four_that_could_be_larger():
    found = names(1024)
    paper = {*TALL_SDXL, "1024x1024", *map(turned, TALL_SDXL)}
    smaller = {"704x1344", "832x1152", "896x1088", "960x1024"}  # each has a taller bucket of its width in the table
    assert set(found) == paper - smaller - set(map(turned, smaller))
    assert {"1024x1024", "1152x896", "896x1152", "1216x832", "1344x768", "1536x640", "2048x512"} <= set(found)


def test_the_buckets_of_512_are_kohyas_between_256_and_1024():
    tall = "256x1024 256x960 256x896 256x832 320x768 320x704 384x640 448x576".split()
    assert names(512) == [*tall, "512x512", *map(turned, reversed(tall))]


@pytest.mark.parametrize(
    ("resolution", "step", "low", "high"),
    [(1024, 64, None, None), (64, 8, None, None), (768, 64, 512, 1024), (64, 64, 64, 64)],
)  # fmt: skip
def test_buckets_are_whole_steps_that_no_step_could_enlarge_and_go_from_tall_to_wide(resolution, step, low, high):
    table = bucket_table(resolution, step=step, low=low, high=high)
    least, most = low or resolution // 2, high or 2 * resolution
    for width, height in table:
        assert width % step == height % step == 0
        assert least <= min(width, height) <= max(width, height) <= most
        assert width * height <= resolution**2
        assert (height, width) in table
        long, short = max(width, height), min(width, height)
        assert long * (short + step) > resolution**2 or short + step > long or long == most
    aspects = [width / height for width, height in table]
    assert aspects == sorted(set(aspects))
    assert (resolution, resolution) in table


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4000, 3000), "1152x896"), ((3000, 4000), "896x1152"), ((1920, 1080), "1344x768"), ((500, 500), "1024x1024"),
     ((1500, 1000), "1216x832"), ((9000, 1000), "2048x512"), ((1024, 1023), "1024x1024")],
)  # fmt: skip
def test_an_image_goes_to_the_nearest_aspect_ratio(size, expected):
    table = bucket_table(1024)
    assert name_of(table[nearest(size, table)]) == expected


def test_no_image_is_enlarged_more_in_its_own_bucket_than_in_the_square():
    draw = random.Random(0)
    for resolution, step in ((1024, 64), (64, 16)):
        table = bucket_table(resolution, step=step)
        for _ in range(300):
            size = draw.randint(20, 3000), draw.randint(20, 3000)
            width, height = table[nearest(size, table)]
            assert max(width / size[0], height / size[1]) <= resolution / min(size) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 1000}, "resolution must be a multiple of data.bucket_step, 64, with data.buckets; got 1000"),
        ({"low": 500}, "data.bucket_min must be a multiple of data.bucket_step, 64, with data.buckets; got 500"),
        ({"high": 1100}, "data.bucket_max must be a multiple of data.bucket_step, 64, with data.buckets; got 1100"),
        ({"step": 0}, "data.bucket_step must be at least 1, got 0"),
        ({"low": 1088}, "must be on either side of data.resolution, 1024, got 1088 and 2048"),
        ({"names": ["wide"]}, "data.buckets must be true, false or sizes such as '1152x896', got 'wide'"),
        ({"names": ["1024x1088"]}, "areas of at most 1024x1024, got '1024x1088'"),
        ({"names": ["1000x512"]}, "sides that are multiples of 64 from 512 to 2048 and areas of .* got '1000x512'"),
        ({"names": ["256x512"]}, "from 512 to 2048 and areas of .* got '256x512'"),
        ({"names": []}, "data.buckets must name at least one size, got none; false is what trains on squares"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_is_one_clear_error(options, message):
    with pytest.raises(InputError, match=message) as error:
        bucket_table(**{"resolution": 1024, **options})
    assert "\n" not in str(error.value)


def test_named_buckets_are_taken_as_they_are():
    assert names(1024, ["1216x832", "512x512", "832x1216"]) == ["832x1216", "512x512", "1216x832"]


# --- the order

BUCKETS = torch.tensor([0] * 7 + [3] * 12 + [1] * 5)[torch.randperm(24, generator=torch.Generator().manual_seed(1))]


def items(order, start: int, stop: int) -> list[int]:
    return [order.item(sample) for sample in range(start, stop)]


def test_a_step_has_one_bucket_and_a_bucket_takes_each_of_its_items_once_before_any_twice():
    group, epochs = 4, 6
    order = BucketOrder(BUCKETS, group, seed=3)
    steps = sum(-(-epochs * n // group) for n in (7, 12, 5))
    seen: dict[int, list[int]] = defaultdict(list)
    for step in range(steps):
        found = items(order, step * group, (step + 1) * group)
        assert len({int(BUCKETS[item]) for item in found}) == 1
        seen[int(BUCKETS[found[0]])] += found
    for bucket, count in ((0, 7), (3, 12), (1, 5)):
        own = set((BUCKETS == bucket).nonzero().flatten().tolist())
        stream_of_bucket = seen[bucket]
        assert len(stream_of_bucket) == -(-epochs * count // group) * group
        for epoch in range(epochs):
            assert set(stream_of_bucket[epoch * count : (epoch + 1) * count]) == own
        assert stream_of_bucket[:count] != stream_of_bucket[count : 2 * count]


def test_after_every_epoch_no_bucket_is_ahead_by_more_than_a_step():
    order, group = BucketOrder(BUCKETS, 4, seed=3), 4
    for epochs in (1, 2, 5):
        steps = sum(-(-epochs * n // group) for n in (7, 12, 5))
        visits = Counter(items(order, 0, steps * group))
        assert set(visits) == set(range(24))
        assert set(visits.values()) <= {epochs, epochs + 1}


def test_the_steps_of_an_epoch_are_shuffled_among_the_buckets():
    order = BucketOrder(BUCKETS, 2, seed=3)
    found = [int(BUCKETS[order.item(2 * step)]) for step in range(26)]
    assert found[:13] != sorted(found[:13])
    assert found[:13] != found[13:]


def test_an_order_may_be_entered_anywhere():
    whole = items(BucketOrder(BUCKETS, 4, seed=3), 0, 200)
    for start in (1, 28, 97, 150):
        assert items(BucketOrder(BUCKETS, 4, seed=3), start, 200) == whole[start:]
    backwards = BucketOrder(BUCKETS, 4, seed=3)
    assert [backwards.item(sample) for sample in reversed(range(200))] == whole[::-1]
    assert items(BucketOrder(BUCKETS, 4, seed=4), 0, 200) != whole


def test_one_bucket_has_the_order_of_none():
    for bucket in (0, 2):
        order = BucketOrder(torch.full((10,), bucket), 4, seed=3)
        assert items(order, 0, 95) == items(Order(10, 3), 0, 95)


def test_a_bucket_with_fewer_rows_than_a_step_is_named_with_a_remedy():
    table = ((48, 80), (64, 64), (80, 48))
    assert check_filled(table, torch.tensor([1, 1, 2, 2]), 2) == {"64x64": 2, "80x48": 2}
    with pytest.raises(InputError, match="at least the 3 images or pairs") as error:
        check_filled(table, torch.tensor([0, 1, 1, 1, 2, 2, 2, 2]), 3)
    assert str(error.value).endswith('got 48x80 (1); set data.buckets = ["64x64", "80x48"], or make the steps smaller')


# --- rows of several shapes

PREP = Preprocessing(resolution=16, buckets=bucket_table(16, step=4))
SQUARE, WIDE, TALL = (20, 20), (40, 24), (24, 40)
SIZES = [(SQUARE, SQUARE)] * 16 + [(WIDE, WIDE)] * 9 + [(WIDE, TALL)] * 3 + [(TALL, TALL)] * 8


class Halves(Encoders):
    """Latents are pixels at half the size; a prompt is its length."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.left = dies_after

    def images(self, pixels):
        if self.left is not None:
            self.left -= len(pixels)
            if self.left < 0:
                raise KeyboardInterrupt
        mean = F.avg_pool2d(pixels, 2)
        return mean, torch.zeros_like(mean)

    def prompts(self, texts):
        return Cond({"c": torch.tensor([[float(len(t))] for t in texts])})

    def free(self):
        pass


def written(file, sizes):
    rows = [
        {"prompt": "p" * i, "chosen": worlds.noise(2 * i, *winner), "rejected": worlds.noise(2 * i + 1, *loser)}
        for i, (winner, loser) in enumerate(random.Random(0).sample(sizes, len(sizes)))
    ]
    return worlds.parquet(file, rows)


@pytest.fixture
def mixed(tmp_path):
    return written(tmp_path / "pairs.parquet", SIZES)


def rows_of(folder, file, prep=PREP, *, live=False, encoders=None):
    """Rows and their counts, out of a cache or encoded when asked for."""
    reader = PairReader(PairSource(path=str(file)))
    encoders = encoders or Halves()
    if live:
        rows, _, counts = split_live(reader, prep, encoders, 0.0, 0, 0, 8)
        return rows, counts
    job = CacheJob(
        folder=folder, key={"name": "k"}, dtype=torch.float32, batch_size=8, seed=0, share=Share(), wait=lambda: None
    )
    table = cached(reader, prep, encoders, job)
    return split_cached(folder, table, 0.0, 0, 0)[0], table.counts


def collator(rows, **options) -> Collator:
    return Collator(rows=rows, kind="pairs", scale=LatentScale(scale=2.0), seed=0, **options)


def taken(source, count, **layout):
    batches = stream(source, **layout)
    return [next(batches) for _ in range(count)]


def test_a_pair_has_its_winners_shape_and_a_batch_one_shape_cached_or_live(tmp_path, mixed, monkeypatch):
    monkeypatch.setattr(disk, "ROWS_PER_SHARD", 8)
    batches = []
    for live in (False, True):
        rows, counts = rows_of(tmp_path / "cache", mixed, live=live)
        assert counts.cropped == 3
        batches.append(taken(collator(rows, group=4), 18, batch_size=4, accumulate=1, share=Share()))
    for stored, live in zip(*batches, strict=True):
        assert stored.x_w.shape == stored.x_l.shape
        assert torch.equal(stored.x_w, live.x_w)
        assert torch.equal(stored.x_l, live.x_l)
        assert torch.equal(stored.cond["c"], live.cond["c"])
    shapes = Counter(tuple(batch.x_w.shape[1:]) for batch in batches[0])
    assert shapes == {(3, 8, 8): 8, (3, 6, 10): 6, (3, 10, 6): 4}
    reader = PairReader(PairSource(path=str(mixed)))
    for n, row in enumerate(reader.rows()):
        size = PREP.buckets[nearest(decode(row.chosen).size, PREP.buckets)]
        batch = collator(rows).batch([n], [0])
        for x, data in ((batch.x_w, row.chosen), (batch.x_l, row.rejected)):
            expected = F.avg_pool2d(to_size(decode(data), size, Placement())[None], 2)
            torch.testing.assert_close(x, expected * 2)


@pytest.mark.parametrize(("batch_size", "accumulate", "processes"), [(1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, mixed, batch_size, accumulate, processes):
    source = collator(rows_of(tmp_path / "cache", mixed)[0], group=4)
    whole = taken(source, 12, batch_size=4, accumulate=1, share=Share())
    parts = [
        taken(source, 12 * accumulate, batch_size=batch_size, accumulate=accumulate, share=Share(p, processes))
        for p in range(processes)
    ]
    for step in range(12):
        micro = [b for part in parts for b in part[step * accumulate : (step + 1) * accumulate]]
        order = torch.tensor([s for b in micro for s in b.samples]).argsort()
        for name in ("x_w", "x_l"):
            assert torch.equal(torch.cat([getattr(b, name) for b in micro])[order], getattr(whole[step], name))


def test_a_stream_that_starts_later_goes_on_as_the_one_before(tmp_path, mixed):
    source = collator(rows_of(tmp_path / "cache", mixed)[0], group=4)
    whole = taken(source, 20, batch_size=4, accumulate=1, share=Share())
    for start in (1, 8, 13):
        rest = taken(source, 20 - start, batch_size=4, accumulate=1, share=Share(), start_step=start)
        assert all(torch.equal(a.x_w, b.x_w) for a, b in zip(whole[start:], rest, strict=True))


def test_squares_make_the_batches_that_they_make_without_buckets(tmp_path):
    file = written(tmp_path / "squares.parquet", [(SQUARE, SQUARE)] * 11)
    plain = Preprocessing(resolution=16)
    for live in (False, True):
        off, on = (
            collator(rows_of(tmp_path / f"{bool(p.buckets)}", file, p, live=live)[0], group=4) for p in (plain, PREP)
        )
        both = [taken(source, 12, batch_size=2, accumulate=2, share=Share()) for source in (off, on)]
        for a, b in zip(*both, strict=True):
            assert torch.equal(a.x_w, b.x_w)
            assert torch.equal(a.x_l, b.x_l)
            assert torch.equal(a.cond["c"], b.cond["c"])
            assert a.samples == b.samples


def test_a_cache_of_buckets_that_died_goes_on_where_it_stopped(tmp_path, mixed, monkeypatch):
    monkeypatch.setattr(disk, "ROWS_PER_SHARD", 6)
    whole, _ = rows_of(tmp_path / "whole", mixed)
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path / "cache", mixed, encoders=Halves(dies_after=40))
    assert list((tmp_path / "cache").glob("rows-*"))
    again, counts = rows_of(tmp_path / "cache", mixed)
    assert counts.cropped == 3
    for row in range(len(whole)):
        for member in ("w", "l"):
            assert torch.equal(whole.latents([row], [0], member)[0], again.latents([row], [0], member)[0])


def test_one_image_in_two_buckets_is_kept_in_both(tmp_path):
    shared = worlds.noise(7, *SQUARE)
    rows = [
        {"prompt": "a", "chosen": worlds.noise(i, *size), "rejected": shared} for i, size in enumerate((WIDE, TALL))
    ]
    made, counts = rows_of(tmp_path / "cache", worlds.parquet(tmp_path / "p.parquet", rows))
    assert [tuple(made.latents([r], [0], "l")[0].shape[2:]) for r in (0, 1)] == [(6, 10), (10, 6)]
    assert counts.cropped == 2


@pytest.mark.parametrize("live", [False, True])
def test_the_crop_is_told_as_it_is_in_the_bucket(tmp_path, live):
    file = written(tmp_path / "p.parquet", [((44, 24), SQUARE)] * 2)
    prep = Preprocessing(resolution=16, buckets=PREP.buckets, sizes=True)
    rows, _ = rows_of(tmp_path / "cache", file, prep, live=live)
    batch = collator(rows, group=2, sizes=True).batch([0, 1], [0, 1])
    assert batch.x_w.shape[2:] == (6, 10)
    assert batch.cond["origin"].tolist() == [[24, 44, 0, 1]] * 2  # 22 x 12 after resizing, of which 20 x 12 are left


def test_a_batch_of_two_buckets_is_refused(tmp_path, mixed):
    rows, _ = rows_of(tmp_path / "cache", mixed)
    bucket = rows.marks.bucket
    other = int((bucket != bucket[0]).nonzero()[0])
    with pytest.raises(ValueError, match="rows of a batch must have one bucket, got 2"):
        rows.latents([0, other], [0, 1], "w")


def test_images_of_pairs_taken_alone_keep_the_bucket_of_their_pair(tmp_path, mixed):
    rows, _ = rows_of(tmp_path / "cache", mixed)
    source = Collator(rows=rows, kind="labelled", scale=LatentScale(scale=1.0), seed=0, group=6)
    batches = taken(source, 26, batch_size=3, accumulate=2, share=Share())
    assert len({b.x_0.shape for b in batches}) == 3
    for a, b in zip(batches[::2], batches[1::2], strict=True):
        assert a.x_0.shape == b.x_0.shape


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_batches_have_one_bucket_and_every_pair_once(tmp_path, mixed, processes):
    source = collator(rows_of(tmp_path / "cache", mixed)[0])
    found = [rows for p in range(processes) for rows in _mine(source, 3, Share(p, processes))]
    assert sorted(row for rows in found for row in rows) == list(range(36))
    assert all(len({int(source.bucket[row]) for row in rows}) == 1 and len(rows) <= 3 for rows in found)


def test_an_image_without_a_size_is_a_broken_row(tmp_path):
    rows = [{"prompt": "a", "chosen": worlds.png(0), "rejected": worlds.png(i)} for i in range(120)]
    rows[5]["rejected"] = b"broken"
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    for live in (False, True):
        made, counts = rows_of(tmp_path / "cache", file, live=live)
        assert (len(made), counts.dropped) == (119, {"broken": 1})


def test_data_check_shows_the_buckets(tmp_path, mixed):
    found = check(PairReader(PairSource(path=str(mixed))), PREP.buckets)
    filled = {name_of(found.buckets[i]): n for i, n in found.filled.items()}
    assert filled == {"16x16": 16, "20x12": 12, "12x20": 8}
    assert found.cropped == 3
    command = ["data", "check", str(mixed), "--resolution", "16", "--bucket-step", "4"]
    shown = CliRunner().invoke(cli.app, command).output
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    assert {"bucket 16x16 16", "bucket 20x12 12", "bucket 12x20 8", "losers cropped to another bucket 3"} <= set(lines)


# --- a run


def table_of(file, output, **data) -> dict:
    return {
        "output": str(output),
        "model": {"path": "tiny-sd"},
        "data": {"path": str(file), "buckets": True, "bucket_step": 16, **data},
        "method": {"name": "diffusion_dpo", "beta": 100.0},
        "train": {"steps": 2, "batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1},
        "lora": {"rank": 2},
    }


def test_a_run_on_mixed_shapes_trains_resumes_and_exports(tmp_path, caplog):
    from safetensors.torch import load_file

    from diffalign.models.load import ModelSource, load_pipeline

    file = written(
        tmp_path / "p.parquet", [((64, 64), (64, 64))] * 2 + [((80, 48), (64, 64))] * 2 + [((50, 80),) * 2] * 2
    )
    shared = str(tmp_path / "cache")
    with caplog.at_level(logging.INFO, logger="diffalign.train"):
        whole = diffalign.train(table_of(file, tmp_path / "whole", cache=shared))
    said = "buckets: 48x80 2, 64x64 2, 80x48 2; 2 losers of another shape are cropped to their winner's"
    assert said in caplog.messages
    about = json.loads((whole.folder / "environment.json").read_text())
    assert about["buckets"] == {"48x80": 2, "64x64": 2, "80x48": 2}
    assert "2 losers were cropped to the shape of their winner." in (whole.export / "README.md").read_text()

    first = table_of(file, tmp_path / "parts", cache=shared)
    first["train"]["steps"] = 1
    diffalign.train(first)
    again = diffalign.train({**table_of(file, tmp_path / "parts", cache=shared), "resume": "latest"})
    a, b = (load_file(r.folder / "checkpoints" / "step-2" / "weights.safetensors") for r in (whole, again))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    load_pipeline(ModelSource(path="tiny-sd", lora=str(whole.export)))

    with pytest.raises(InputError, match="differs in buckets"):
        diffalign.train(table_of(file, tmp_path / "other", cache=shared, bucket_max=112))
    many = table_of(file, tmp_path / "many", cache=shared)
    many["train"]["accumulate"] = 2
    with pytest.raises(
        InputError, match=r"at least the 4 images or pairs .* got 48x80 \(2\), 64x64 \(2\), 80x48 \(2\)"
    ):
        diffalign.train(many)


def test_the_plan_is_of_the_largest_bucket(tmp_path):
    from diffalign.bare import encoding
    from diffalign.models.load import pipeline_index

    for named, latent in ((True, (8, 8)), (["32x64", "80x48"], (6, 10))):
        cfg = parse(table_of("none.parquet", tmp_path / "run", buckets=named))
        found = encoding(cfg, FAMILIES["sd"], pipeline_index(cfg.model, weights=False))
        assert found.latent[1:] == latent


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"compile": True}, "config.data.buckets must be false with train.compile, which would compile"),
        ("train", {"fixed_draws": 2}, "config.data.buckets must be false with train.fixed_draws, whose errors"),
        ("rounds", {"count": 1}, r"config.data.buckets must be false with \[rounds\], whose images are sampled"),
        ("data", {"positive_ratio": 0.5}, "config.data.buckets must be false with data.positive_ratio, which draws"),
        ("data", {"buckets": False}, "config.data.bucket_step must be left out without data.buckets, got 16"),
        ("data", {"buckets": 3}, "config.data.buckets must be true or false or a list of strings, got 3"),
    ],
)
def test_what_buckets_do_not_go_with_is_one_clear_error(tmp_path, section, values, message):
    table = table_of("none.parquet", tmp_path / "run")
    table[section] = {**table.get(section, {}), **values}
    if section == "rounds":
        table["method"] = {"name": "seppo", "beta": 100.0}
    if "positive_ratio" in values:
        table["method"] = {"name": "diffusion_kto"}
    with pytest.raises(InputError, match=message) as error:
        parse(table)
    assert "\n" not in str(error.value)


def test_a_step_must_fit_the_vae_and_the_network_must_take_shapes(tmp_path):
    from dataclasses import replace

    family = FAMILIES["sd"]
    cfg = parse(table_of("none.parquet", tmp_path / "run", bucket_step=4))
    with pytest.raises(InputError, match=r"config\.data\.bucket_step must be a multiple of 8 with this model, got 4"):
        buckets_of(cfg, family)
    with pytest.raises(InputError, match="must be a multiple of 16 with this model, got 4"):
        buckets_of(cfg, replace(family, patch=2))
    with pytest.raises(InputError, match=r"data\.resolution must be a multiple of data.bucket_step, 16, .* got 72"):
        buckets_of(parse(table_of("none.parquet", tmp_path / "run", resolution=72)), family)
    with pytest.raises(InputError, match="must be false with the family 'sd', whose network takes squares alone"):
        buckets_of(parse(table_of("none.parquet", tmp_path / "run")), replace(family, square=True))
    assert [name for name, one in FAMILIES.items() if one.square] == ["dit"]
    assert buckets_of(parse(table_of("x", tmp_path, buckets=False, bucket_step=64)), replace(family, square=True)) == ()
