"""Preference data: the layouts, what is dropped, the cache, and which sample is whose."""

import csv
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from diffalign.data import cache as disk
from diffalign.data.batches import CachedRows, Collator, LatentScale, stream
from diffalign.data.cache import CacheReader, Share
from diffalign.data.check import check
from diffalign.data.images import Placement, Preprocessing, decode, place, to_size
from diffalign.data.orders import Order
from diffalign.data.pairs import Counts, Dropped, PairReader, PairSource, Row
from diffalign.data.prepare import CacheJob, Encoders, cached
from diffalign.errors import InputError
from diffalign.types import Cond
from tests import worlds

PREP = Preprocessing(resolution=worlds.SIDE)


def reader(path, **options) -> PairReader:
    return PairReader(PairSource(path=str(path), **options))


def kept(path, **options) -> list[Row]:
    return [row for row in reader(path, **options).rows() if isinstance(row, Row)]


def image_folder(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(worlds.png(i))


def test_pickapic_rows_say_their_winner_by_label_0(tmp_path):
    rows = worlds.preference_rows(4, ties=1)
    found = list(reader(worlds.parquet(tmp_path / "p.parquet", rows)).rows())
    assert found[0] == Row(0, rows[0]["caption"], rows[0]["jpg_1"], rows[0]["jpg_0"])
    assert found[1] == Row(1, rows[1]["caption"], rows[1]["jpg_0"], rows[1]["jpg_1"])
    assert found[3] == Dropped(3, "tie")


def test_a_row_without_a_label_is_dropped_and_counted(tmp_path):
    rows = worlds.preference_rows(3)
    rows[1]["label_0"] = None
    counts = Counts()
    for row in reader(worlds.parquet(tmp_path / "p.parquet", rows)).rows():
        counts.add(row)
    assert (counts.kept, counts.dropped) == (2, {"unlabelled": 1})


def test_trl_pairs_may_hold_images_of_datasets(tmp_path):
    rows = [
        {
            "prompt": "a",
            "chosen": {"bytes": worlds.png(0), "path": None},
            "rejected": {"bytes": worlds.png(1), "path": "x"},
        }
    ]
    assert kept(worlds.parquet(tmp_path / "p.parquet", rows)) == [Row(0, "a", worlds.png(0), worlds.png(1))]


def test_unpaired_rows_give_their_good_images(tmp_path):
    rows = [
        {"prompt": "a", "image": worlds.png(0), "label": True},
        {"prompt": "b", "image": worlds.png(1), "label": False},
    ]
    source = reader(worlds.parquet(tmp_path / "p.parquet", rows))
    assert not source.paired
    assert list(source.rows()) == [Row(0, "a", worlds.png(0), None), Dropped(1, "bad label")]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata_names_its_images(tmp_path, kind):
    image_folder(tmp_path, ["x/0.png", "1.png", "2.png", "3.png"])
    records = [
        {"caption": "a", "jpg_0_file_name": "x/0.png", "jpg_1_file_name": "1.png", "label_0": 1.0},
        {"caption": "b", "jpg_0_file_name": "2.png", "jpg_1_file_name": "3.png", "label_0": 0.5},
    ]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    else:
        with (tmp_path / "metadata.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, records[0])
            writer.writeheader()
            writer.writerows(records)
    assert list(reader(tmp_path).rows()) == [Row(0, "a", worlds.png(0), worlds.png(1)), Dropped(1, "tie")]


def test_the_image_folder_of_datasets_is_read_as_unpaired(tmp_path):
    image_folder(tmp_path, ["0.png"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "prompt": "a", "label": True}))
    assert list(reader(tmp_path).rows()) == [Row(0, "a", worlds.png(0), None)]


def test_win_and_lose_folders_pair_by_file_name(tmp_path):
    image_folder(tmp_path, ["win/a.png", "lose/a.png", "win/b.png", "lose/b.png"])
    (tmp_path / "win" / "a.txt").write_text("first\n")
    (tmp_path / "b.txt").write_text("second")
    assert kept(tmp_path) == [
        Row(0, "first", worlds.png(0), worlds.png(1)),
        Row(1, "second", worlds.png(2), worlds.png(3)),
    ]


def test_own_column_names_are_mapped(tmp_path):
    rows = [{"text": "a", "good": worlds.png(0), "bad": worlds.png(1)}]
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    assert len(kept(file, columns={"prompt": "text", "chosen": "good", "rejected": "bad"})) == 1


def test_a_missing_column_is_named_with_those_found(tmp_path):
    rows = [{"caption": "a", "jpg_0": b"", "jpg_1": b"", "label": 1}]
    with pytest.raises(
        InputError, match="got caption, jpg_0, jpg_1, label; nearest is 'pickapic', which misses label_0"
    ):
        reader(worlds.parquet(tmp_path / "p.parquet", rows))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing.parquet", "data.path must exist"),
        (lambda p: p, "must be a parquet file, a folder of them"),
        (lambda p: worlds.parquet(p / "x.parquet", [{"a": 1}]), "columns of a known layout"),
        (lambda p: _write(p / "x.parquet", b"not parquet"), "must be readable parquet"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        reader(make(tmp_path))


def _write(file, content):
    file.write_bytes(content)
    return file


def test_win_without_lose_and_without_caption_are_named(tmp_path):
    image_folder(tmp_path, ["win/a.png", "lose/b.png"])
    with pytest.raises(InputError, match=r"win/a\.png without lose/a\.png"):
        reader(tmp_path)
    image_folder(tmp_path, ["win/a.png", "lose/a.png"])
    with pytest.raises(InputError, match=r"win/a\.png without a\.txt"):
        reader(tmp_path)


def test_a_prompt_that_is_not_text_is_named_with_its_row(tmp_path):
    rows = [{"prompt": 3, "chosen": worlds.png(0), "rejected": worlds.png(1)}]
    with pytest.raises(InputError, match=r"must have text prompts, got int 3 in row 0"):
        list(reader(worlds.parquet(tmp_path / "p.parquet", rows)).rows())


def test_reading_from_the_middle_gives_the_rest(tmp_path):
    rows = worlds.preference_rows(20)
    source = reader(worlds.parquet(tmp_path / "p.parquet", rows), limit=15)
    assert [n for n, _ in source.records(12)] == [12, 13, 14]
    assert source.table[17]["jpg_0"] == rows[17]["jpg_0"]
    assert len(source) == 15


def test_preprocessing_keeps_the_shorter_side_and_the_centre():
    from PIL import Image

    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))
    x = to_size(wide, (16, 16), Placement())
    assert x.shape == (3, 16, 16)
    assert x[2, :, 1:-1].min() == 1  # the blue middle fills the square, its edges are blended
    assert to_size(wide, (16, 16), Placement(x=0.0))[0].max() == 1  # the red edge is seen from the left


def test_both_members_of_a_pair_are_placed_alike_and_variants_differ():
    prep = Preprocessing(resolution=16, crop="random", flip=True, variants=4)
    placements = {place(prep, 0, 7, variant) for variant in range(4)}
    assert len(placements) == 4
    assert place(prep, 0, 7, 1) == place(prep, 0, 7, 1)
    assert place(PREP, 0, 7, 1) == Placement()


def test_an_unreadable_image_is_an_os_error():
    with pytest.raises(OSError, match=r"cannot identify|unreadable"):
        decode(b"no image")


# --- the cache -----------------------------------------------------------------------------------------------------


class Spy(Encoders):
    """Encoders that count what they are asked for, and can die in the middle."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.images_seen = 0
        self.texts: list[str] = []
        self.dies_after = dies_after

    def images(self, pixels):
        if self.dies_after is not None and self.images_seen >= self.dies_after:
            raise KeyboardInterrupt
        self.images_seen += len(pixels)
        mean = pixels.mean((1, 2, 3)).reshape(-1, 1, 1, 1).expand(-1, 2, 3, 3).clone()
        return mean, torch.zeros_like(mean)

    def prompts(self, texts):
        self.texts += texts
        return Cond({"c": torch.tensor([[float(len(t))] for t in texts])})

    def free(self):
        pass


def build(folder, path, spy, *, share=None, prep=PREP, key="k"):
    job = CacheJob(
        folder=folder,
        key={"name": key},
        dtype=torch.float32,
        batch_size=8,
        seed=0,
        share=share or Share(),
        wait=lambda: None,
    )
    return cached(reader(path), prep, spy, job)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(disk, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(disk, "PROMPTS_PER_SHARD", 4)


@pytest.fixture
def pairs(tmp_path):
    return worlds.parquet(tmp_path / "p.parquet", worlds.preference_rows(40, ties=4))


def test_the_cache_gives_back_what_was_encoded(tmp_path, pairs, small_shards):
    table = build(tmp_path / "cache", pairs, Spy())
    content = CacheReader(tmp_path / "cache")
    rows = kept(pairs)
    assert len(table) == len(rows) == 36
    for i, row in enumerate(rows):
        for data, where in ((row.chosen, table.chosen[i]), (row.rejected, table.rejected[i])):
            mean, _ = content.moments(where[:1])
            torch.testing.assert_close(mean.mean(), to_size(decode(data), (16, 16), Placement()).mean())
        assert table.prompts[table.prompt[i]] == row.prompt
        assert content.cond(table.prompt[i : i + 1])["c"].item() == len(row.prompt)
    assert table.counts.dropped == {"tie": 4}


def test_every_image_and_every_prompt_is_encoded_once(tmp_path, small_shards):
    rows = worlds.preference_rows(20)
    for row in rows:
        row["jpg_0"] = rows[0]["jpg_0"]
    spy = Spy()
    build(tmp_path / "cache", worlds.parquet(tmp_path / "p.parquet", rows), spy)
    assert spy.images_seen == 21
    assert Counter(spy.texts).most_common(1)[0][1] == 1
    assert spy.texts[0] == ""


def test_a_build_that_died_goes_on_where_it_stopped(tmp_path, pairs, small_shards):
    whole = build(tmp_path / "whole", pairs, Spy())
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", pairs, Spy(dies_after=40))
    (tmp_path / "cache" / ".rows-00003.safetensors.tmp").write_bytes(b"half")
    spy = Spy()
    table = build(tmp_path / "cache", pairs, spy)
    assert 0 < spy.images_seen < 72
    assert torch.equal(table.chosen, whole.chosen)
    for name in ("rows-00000", "rows-00004", "text-00001"):
        a, b = (load_file(tmp_path / f / f"{name}.safetensors") for f in ("whole", "cache"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k].nan_to_num(7), b[k].nan_to_num(7)) for k in a)


def test_a_finished_cache_encodes_nothing(tmp_path, pairs, small_shards):
    build(tmp_path / "cache", pairs, Spy())
    spy = Spy()
    build(tmp_path / "cache", pairs, spy)
    assert spy.images_seen == 0
    assert spy.texts == []


def test_the_cache_of_something_else_is_an_error_that_says_what_differs(tmp_path, pairs):
    build(tmp_path / "cache", pairs, Spy())
    with pytest.raises(InputError, match="differs in name: 'k' there, 'other' here"):
        build(tmp_path / "cache", pairs, Spy(), key="other")


def test_two_processes_share_the_shards(tmp_path, pairs, small_shards):
    for mine in (1, 0):
        shards = disk.write_images(
            tmp_path / "cache", reader(pairs), PREP, Spy().images, seed=0, dtype=torch.float32, batch_size=8,
            share=Share(mine, 2),
        ) if (tmp_path / "cache").mkdir(exist_ok=True) is None else ()  # fmt: skip
        assert sum(shards) == 40
    table = disk.read_table(tmp_path / "cache")
    whole = build(tmp_path / "whole", pairs, Spy())
    assert torch.equal(table.number, whole.number)
    a, b = (CacheReader(tmp_path / f).moments(t.chosen[:, 0]) for f, t in (("cache", table), ("whole", whole)))
    assert torch.equal(a[0], b[0])


def test_variants_are_cached_each(tmp_path):
    rows = worlds.preference_rows(2)
    for row in rows:
        row["jpg_0"], row["jpg_1"] = worlds.png(1, side=40), worlds.png(2, side=40)
    prep = Preprocessing(resolution=16, crop="random", flip=True, variants=3)
    spy = Spy()
    table = build(tmp_path / "cache", worlds.parquet(tmp_path / "p.parquet", rows), spy, prep=prep)
    assert table.chosen.shape == (2, 3, 2)
    assert spy.images_seen == 12


def test_a_broken_image_among_many_is_counted_and_named(tmp_path):
    rows = worlds.preference_rows(120)
    rows[17]["jpg_0"] = b"broken"
    table = build(tmp_path / "cache", worlds.parquet(tmp_path / "p.parquet", rows), Spy())
    assert len(table) == 119
    assert table.counts.broken[0].startswith("row 17: ")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[1].update(jpg_1=b"broken"), "at most 1 % broken rows, got 1 of 40; first: row 1: "),
        (lambda rows: [r.update(label_0=0.5) for r in rows], "must have a row with a winner, got 40 rows: 40 ties"),
        (lambda rows: rows.clear(), "must have rows, got none"),
    ],
)
def test_data_that_cannot_train_is_an_error_and_leaves_nothing_behind(tmp_path, spoil, message):
    rows = worlds.preference_rows(40)
    columns = {name: type(value) for name, value in rows[0].items()}
    spoil(rows)
    file = worlds.parquet(tmp_path / "p.parquet", rows) if rows else _empty(tmp_path / "p.parquet", columns)
    with pytest.raises(InputError, match=message):
        build(tmp_path / "deep" / "cache", file, Spy())
    assert not (tmp_path / "deep").exists()


def _empty(file, columns):
    import pyarrow
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), bytes: pyarrow.binary(), float: pyarrow.float64(), int: pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    pyarrow.parquet.write_table(schema.empty_table(), file)
    return file


# --- the stream of samples -----------------------------------------------------------------------------------------


def collator(tmp_path, pairs, **options) -> Collator:
    table = build(tmp_path / "cache", pairs, Spy())
    rows = CachedRows(CacheReader(tmp_path / "cache"), table, torch.arange(len(table)), seed=0)
    return Collator(rows=rows, kind="pairs", scale=LatentScale(scale=2.0, shift=0.5), seed=0, **options)


def samples(collator, steps, **layout):
    batches = stream(collator, **layout)
    return [next(batches) for _ in range(steps)]


def test_every_row_comes_once_an_epoch():
    order = Order(10, seed=3)
    epochs = [[order.item(10 * e + i) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes"), [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)]
)
def test_an_optimizer_step_sees_the_same_samples_however_it_is_cut(tmp_path, pairs, batch_size, accumulate, processes):
    source = collator(tmp_path, pairs, prompt_dropout=0.3)
    whole = samples(source, 2, batch_size=8, accumulate=1, share=Share())
    parts = [
        samples(source, 2 * accumulate, batch_size=batch_size, accumulate=accumulate, share=Share(p, processes))
        for p in range(processes)
    ]
    for step in range(2):
        micro = [b for part in parts for b in part[step * accumulate : (step + 1) * accumulate]]
        order = torch.tensor([s for b in micro for s in b.samples]).argsort()
        assert torch.equal(torch.cat([b.x_w for b in micro])[order], whole[step].x_w)
        assert torch.equal(torch.cat([b.cond["c"] for b in micro])[order], whole[step].cond["c"])


def test_a_stream_that_starts_later_goes_on_as_the_one_before(tmp_path, pairs):
    source = collator(tmp_path, pairs)
    whole = samples(source, 6, batch_size=4, accumulate=2, share=Share())
    rest = samples(source, 2, batch_size=4, accumulate=2, share=Share(), start_step=2)
    assert all(torch.equal(a.x_w, b.x_w) for a, b in zip(whole[4:], rest, strict=True))


def test_prompt_dropout_falls_on_both_members_at_its_rate(tmp_path, pairs):
    source = collator(tmp_path, pairs, prompt_dropout=0.25)
    batches = samples(source, 40, batch_size=36, accumulate=1, share=Share())
    dropped = torch.cat([b.cond["c"][:, 0] == 0 for b in batches]).float().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.035)  # three standard errors of 1440 draws
    assert len(batches[0].cond["c"]) == len(batches[0].x_w)  # one condition a pair: the members cannot differ


def test_latents_are_shifted_and_scaled_as_the_denoiser_takes_them(tmp_path, pairs):
    source = collator(tmp_path, pairs)
    mean, _ = source.rows.latents([0], [0], "w")
    batch = source.batch([0], [0])
    torch.testing.assert_close(batch.x_w, (mean - 0.5) * 2.0)


def test_the_posterior_is_drawn_afresh_at_every_sample():
    class Wide:
        marks = None

        def __len__(self):
            return 1

        def latents(self, rows, samples, member):
            return torch.zeros(len(rows), 2, 3, 3), torch.full((len(rows), 2, 3, 3), 3.0)

        def cond(self, rows, dropped):
            return Cond({"c": torch.zeros(len(rows), 1)})

        def prompt(self, row):
            return ""

    source = Collator(rows=Wide(), kind="pairs", scale=LatentScale(scale=1.0), seed=0)
    first, again, later = (source.batch([0], [s]) for s in (0, 0, 1))
    assert torch.equal(first.x_w, again.x_w)
    assert not torch.equal(first.x_w, later.x_w)
    assert not torch.equal(first.x_w, first.x_l)
    many = source.batch([0] * 500, list(range(500)))
    assert many.x_w.std().item() == pytest.approx(3.0, abs=0.1)


def test_unpaired_data_is_refused_by_a_method_on_pairs(tmp_path):
    source = reader(worlds.parquet(tmp_path / "p.parquet", [{"prompt": "a", "image": worlds.png(0), "label": True}]))
    source.check_fits("images")
    with pytest.raises(InputError, match="must have pairs for this method, got unpaired images; method 'sft'"):
        source.check_fits("pairs")


def test_check_counts_what_is_in_a_source(tmp_path):
    rows = worlds.preference_rows(8, ties=1)
    rows[2]["jpg_0"] = rows[2]["jpg_1"]
    rows[4] = dict(rows[3])
    rows[5]["jpg_0"] = b"broken"
    found = check(reader(worlds.parquet(tmp_path / "p.parquet", rows)))
    assert (found.counts.rows, found.counts.kept) == (8, 6)
    assert found.counts.dropped == {"tie": 1, "broken": 1}
    assert (found.repeated_pairs, found.equal_pairs) == (1, 1)
    assert (found.first_wins, found.labelled) == (4, 7)
    assert found.sizes[(16, 16)] == 12
