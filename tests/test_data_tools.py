"""Filters, scores, new labels and single images out of pairs; what is written, `PairReader` reads back."""

import hashlib
import itertools
import json
import math
import random

import pytest
import torch

from diffalign import cli
from diffalign.data.check import check
from diffalign.data.pairs import Dropped, PairReader, PairSource, Row
from diffalign.data.rewrite import Scorer, filter_absolute_winners, score_pairs, unpair
from diffalign.data.tools import (
    Comparison,
    absolute_winners,
    agreement,
    image_groups,
    image_label,
    label_by,
    relabel,
)
from diffalign.errors import InputError, RunError
from diffalign.types import FunctionReward, RewardOutput
from tests import worlds

BY_HAND = [
    Comparison("p", "a", "b"),
    Comparison("p", "a", "c"),
    Comparison("p", "b", "c"),
    Comparison("p", "d", "c"),
    Comparison("p", "d", "e", tie=True),
    Comparison("q", "b", "a"),
]
"""a wins twice and never loses in p; b and d win, but b loses to a, and d ties; in q they are other images."""


def brightness(images, prompts) -> torch.Tensor:
    return images.mean((1, 2, 3))


BRIGHTNESS = FunctionReward(name="brightness", function=brightness)


def reader(path, **options) -> PairReader:
    return PairReader(PairSource(path=str(path), **options))


def pairs(tmp_path, count=12, **options):
    return worlds.parquet(tmp_path / "p.parquet", worlds.preference_rows(count, **options))


def read(path) -> list[dict]:
    return [dict(record) for _, record in reader(path).records()]


# --- absolute winners ----------------------------------------------------------------------------------------------


def test_an_absolute_winner_wins_and_never_loses_or_ties():
    assert absolute_winners(BY_HAND, all_losers=True) == [0, 1, 5]


def test_only_the_latest_pair_of_an_absolute_winner_is_kept():
    assert absolute_winners(BY_HAND) == [1, 5]


def test_a_tie_excludes_whichever_side_it_is_written_on():
    for tie in (Comparison("p", "a", "b", tie=True), Comparison("p", "b", "a", tie=True)):
        assert absolute_winners([Comparison("p", "a", "c"), tie]) == []


def test_an_image_that_beats_itself_is_no_absolute_winner():
    assert absolute_winners([Comparison("p", "a", "a")]) == []


def test_who_wins_absolutely_does_not_depend_on_the_order():
    rng = random.Random(0)
    names = "abcdef"
    some = [Comparison("p", *rng.sample(names, 2), tie=rng.random() < 0.2) for _ in range(8)]
    expected = {some[i] for i in absolute_winners(some, all_losers=True)}
    winners = {c.winner for c in expected}
    for _ in range(20):
        rng.shuffle(some)
        assert {some[i] for i in absolute_winners(some, all_losers=True)} == expected
        assert {some[i].winner for i in absolute_winners(some)} == winners
        assert len(absolute_winners(some)) == len(winners)


def test_the_filter_writes_the_rows_it_keeps_untouched(tmp_path):
    rows = worlds.preference_rows(4)
    for row in rows:
        row.update(caption="p", label_0=1.0)
    rows[1]["jpg_0"] = rows[0]["jpg_0"]  # one image wins twice
    rows[2]["jpg_0"] = rows[0]["jpg_1"]  # a loser wins
    rows[3].update(jpg_1=rows[2]["jpg_1"], label_0=0.5)
    found = filter_absolute_winners(reader(worlds.parquet(tmp_path / "p.parquet", rows)), tmp_path / "out.parquet")
    assert read(tmp_path / "out.parquet") == [rows[1]]
    assert (found.rows, found.compared, found.kept, found.winners) == (4, 4, 1, 1)


def test_the_filter_takes_the_names_of_images_where_there_are_any(tmp_path):
    rows = worlds.preference_rows(2)
    for i, row in enumerate(rows):
        row.update(caption="p", label_0=1.0, image_0_uid="same", image_1_uid=f"other {i}")
    found = filter_absolute_winners(reader(worlds.parquet(tmp_path / "p.parquet", rows)), tmp_path / "out.parquet")
    assert found.kept == 1


def test_a_filter_that_keeps_nothing_is_an_error_and_writes_nothing(tmp_path):
    file = pairs(tmp_path, 4, ties=4)
    with pytest.raises(InputError, match="must have a winner that never lost or tied, got none in 4 rows"):
        filter_absolute_winners(reader(file), tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


# --- labels by scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        (2.0, 1.0, 1.0),
        (1.0, 2.0, 0.0),
        (1.0, 1.0, 0.5),
        (None, 1.0, None),
        (1.0, math.nan, None),
        (math.inf, 1.0, None),
    ],
)
def test_the_higher_score_wins_and_equal_scores_tie(first, second, label):
    assert label_by(first, second) == label


def test_relabelling_by_the_labels_themselves_changes_nothing():
    labels = [0.0, 0.5, 1.0, 1.0]
    again = relabel([(label, 1 - label) for label in labels])
    assert again == labels
    assert agreement(labels, again).changed == 0


def test_any_rising_function_of_the_scores_gives_the_same_labels():
    scores = [(math.sin(i), math.cos(3 * i)) for i in range(50)]
    assert relabel(scores) == relabel([(math.exp(a), math.exp(b)) for a, b in scores])


def test_agreement_is_over_pairs_with_a_winner_by_both():
    found = agreement([1.0, 0.0, 1.0, 0.5, None, 1.0], [1.0, 1.0, 0.5, 0.5, 1.0, None])
    assert (found.changed, found.decided, found.agree, found.share) == (4, 2, 1, 0.5)


def test_scores_are_written_beside_the_rows_and_read_back_by_label(tmp_path):
    file = pairs(tmp_path, 300, ties=3)
    found = score_pairs(reader(file), BRIGHTNESS, tmp_path / "out.parquet", batch_size=7)
    assert (found.rows, found.images, found.invalid) == (300, 600, 0)
    before, after = read(file), read(tmp_path / "out.parquet")
    assert [{k: v for k, v in row.items() if not k.startswith("score_")} for row in after] == before
    from diffalign.data.images import to_tensor

    for row in after[::50]:
        for name in "01":
            assert row[f"score_{name}"] == pytest.approx(to_tensor(row[f"jpg_{name}"]).mean().item(), abs=1e-6)
    kept = [row for row in reader(tmp_path / "out.parquet").rows() if isinstance(row, Row)]
    assert len(kept) == 297
    assert all(row.scored for row in kept)
    assert reader(tmp_path / "out.parquet").row(0, after[0]).score_w == after[0]["score_1"]  # label_0 is 0
    gaps = [abs(row["score_0"] - row["score_1"]) for row in after]
    assert found.mean_gap == pytest.approx(sum(gaps) / len(gaps))


def test_each_image_is_scored_once_a_prompt():
    asked = []

    def counting(images, prompts):
        asked.extend(prompts)
        return images.mean((1, 2, 3))

    scorer = Scorer(FunctionReward(name="counting", function=counting), 4)
    a, b, large = worlds.png(0), worlds.png(1), worlds.png(2, side=24)
    first = scorer([("p", a), ("p", b), ("p", a), ("q", a), ("p", large)])
    assert len(asked) == 4
    assert first[0] == first[2] == first[3]
    assert scorer([("p", large)]) == first[4:]
    assert len(asked) == 4


def test_scores_do_not_depend_on_the_batch_size(tmp_path):
    file = pairs(tmp_path, 9)
    for size in (1, 4, 64):
        score_pairs(reader(file), BRIGHTNESS, tmp_path / f"{size}.parquet", batch_size=size)
    one, four, many = ([row["score_0"] for row in read(tmp_path / f"{n}.parquet")] for n in (1, 4, 64))
    assert one == pytest.approx(four, abs=1e-6)
    assert one == pytest.approx(many, abs=1e-6)


def test_relabelled_rows_have_the_brighter_image_in_front_and_keep_the_old_label(tmp_path):
    rows = worlds.preference_rows(10, ties=2)
    rows[2]["jpg_0"] = rows[2]["jpg_1"]
    for i, row in enumerate(rows):
        row.update(image_0_uid=f"{i}a", image_1_uid=f"{i}b", best_image_uid="x", has_label=True)
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    found = score_pairs(reader(file), BRIGHTNESS, tmp_path / "out.parquet", relabel=True)
    after = read(tmp_path / "out.parquet")
    assert [row["label_0_before"] for row in after] == [row["label_0"] for row in rows]
    assert found.labels.changed == sum(row["label_0"] != row["label_0_before"] for row in after) > 0
    assert all(row["label_0"] + row["label_1"] == 1 for row in after)
    assert after[2]["label_0"] == 0.5
    assert after[2]["best_image_uid"] == "tie"
    for i, row in enumerate(reader(tmp_path / "out.parquet").rows()):
        if isinstance(row, Row):
            assert row.score_w > row.score_l
            assert after[i]["best_image_uid"] == (f"{i}a" if row.chosen == rows[i]["jpg_0"] else f"{i}b")
        else:
            assert row == Dropped(2, "tie")


def test_relabelling_twice_is_relabelling_once(tmp_path):
    score_pairs(reader(pairs(tmp_path)), BRIGHTNESS, tmp_path / "one.parquet", relabel=True)
    found = score_pairs(reader(tmp_path / "one.parquet"), BRIGHTNESS, tmp_path / "two.parquet", relabel=True)
    assert found.labels.changed == 0
    assert found.labels.share == 1
    one, two = ([row["label_0"] for row in read(tmp_path / f"{n}.parquet")] for n in ("one", "two"))
    assert one == two


def trl(tmp_path, count=6):
    rows = worlds.preference_rows(count)
    made = [
        {"prompt": r["caption"], "chosen": r["jpg_0"], "rejected": r["jpg_1"], "more": i} for i, r in enumerate(rows)
    ]
    return worlds.parquet(tmp_path / "trl.parquet", made)


def test_scored_trl_pairs_stay_trl_pairs(tmp_path):
    score_pairs(reader(trl(tmp_path)), BRIGHTNESS, tmp_path / "out.parquet")
    source = reader(tmp_path / "out.parquet")
    assert source.layout == "trl"
    source.check_fits("pairs", scores=True)
    assert [record["more"] for _, record in source.records()] == list(range(6))


def test_relabelled_trl_pairs_are_in_pickapic_columns(tmp_path):
    score_pairs(reader(trl(tmp_path)), BRIGHTNESS, tmp_path / "scored.parquet")
    score_pairs(reader(tmp_path / "scored.parquet"), BRIGHTNESS, tmp_path / "out.parquet", relabel=True)
    source = reader(tmp_path / "out.parquet")
    assert source.layout == "pickapic"
    assert source.columns == ("caption", "jpg_0", "jpg_1", "more", "score_0", "score_1", "label_0", "label_0_before")
    assert all(row["label_0_before"] == 1 for row in read(tmp_path / "out.parquet"))
    assert all(row.score_w > row.score_l for row in source.rows())


def test_own_column_names_become_the_standard_ones(tmp_path):
    rows = [{"text": "a", "good": worlds.png(0), "bad": worlds.png(1)}]
    columns = {"prompt": "text", "chosen": "good", "rejected": "bad"}
    source = reader(worlds.parquet(tmp_path / "p.parquet", rows), columns=columns)
    score_pairs(source, BRIGHTNESS, tmp_path / "out.parquet")
    assert reader(tmp_path / "out.parquet").columns == (
        "prompt",
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
    )
    both = worlds.parquet(tmp_path / "q.parquet", [{**rows[0], "prompt": "b"}])
    with pytest.raises(InputError, match="must have one column for 'prompt', got text, good, bad, prompt"):
        score_pairs(reader(both, columns=columns), BRIGHTNESS, tmp_path / "q-out.parquet")


def test_folders_become_parquet_with_their_images_inside(tmp_path):
    source = tmp_path / "folder"
    for i, name in enumerate(["win/a.png", "lose/a.png"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(worlds.png(i))
    (source / "a.txt").write_text("a prompt")
    listed = tmp_path / "listed"
    listed.mkdir()
    for i in range(2):
        (listed / f"{i}.png").write_bytes(worlds.png(i))
    record = {"caption": "a prompt", "jpg_0_file_name": "1.png", "jpg_1_file_name": "0.png", "label_0": 0}
    (listed / "metadata.jsonl").write_text(json.dumps(record))
    for name in (source, listed):
        out = tmp_path / f"{name.name}.parquet"
        score_pairs(reader(name), BRIGHTNESS, out)
        [row] = reader(out).rows()
        assert (row.prompt, row.chosen, row.rejected) == ("a prompt", worlds.png(0), worlds.png(1))
        assert row.scored


class Choosy:
    """Cannot judge every n-th image."""

    name, version, requires, range = "choosy", "1", frozenset({"images"}), (0.0, 1.0)
    modality, differentiable, licence = "image", False, "-"

    def __init__(self, every: int) -> None:
        self.count = itertools.count(1)
        self.every = every

    def score(self, batch):
        scores = batch.images.mean((1, 2, 3))
        for i in range(len(scores)):
            if next(self.count) % self.every == 0:
                scores[i] = torch.nan
        return RewardOutput(scores=scores)


def test_an_image_that_cannot_be_judged_leaves_its_row_unscored(tmp_path):
    found = score_pairs(reader(pairs(tmp_path, 60)), Choosy(101), tmp_path / "out.parquet")
    assert (found.images, found.invalid) == (120, 1)
    assert [row.scored for row in reader(tmp_path / "out.parquet").rows()].count(False) == 1


def test_a_reward_that_fails_too_often_stops_the_work_and_writes_nothing(tmp_path):
    file = pairs(tmp_path, 60)
    with pytest.raises(RunError, match="'choosy' could not judge 2 of 120 images, more than 1%; nothing was written"):
        score_pairs(reader(file), Choosy(60), tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


def test_an_unreadable_image_counts_as_not_judged(tmp_path):
    rows = worlds.preference_rows(60)
    rows[3]["jpg_0"] = b"broken"
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    found = score_pairs(reader(file), BRIGHTNESS, tmp_path / "out.parquet", relabel=True)
    assert found.invalid == 1
    assert read(tmp_path / "out.parquet")[3]["label_0"] is None
    assert list(reader(tmp_path / "out.parquet").rows())[3] == Dropped(3, "unlabelled")


# --- single images -------------------------------------------------------------------------------------------------


def test_images_are_grouped_by_what_they_won_and_lost():
    groups = image_groups([*BY_HAND, Comparison("p", "f", "g", tie=True)])
    assert groups == {
        ("p", "a"): "exclusive_win",
        ("p", "b"): "mixed",
        ("p", "c"): "exclusive_lose",
        ("p", "d"): "exclusive_win",  # its tie says nothing
        ("q", "b"): "exclusive_win",
        ("q", "a"): "exclusive_lose",
    }


@pytest.mark.parametrize(("mixed", "label"), [("good", True), ("bad", False), ("drop", None)])
def test_mixed_images_are_what_is_asked_for(mixed, label):
    assert image_label("mixed", mixed) is label
    assert image_label("exclusive_win", mixed) is True
    assert image_label("exclusive_lose", mixed) is False


def test_unpaired_images_are_written_once_each_and_train_a_method_on_labels(tmp_path):
    rows = worlds.preference_rows(4)
    for row in rows:
        row.update(caption="p", label_0=1.0)
    rows[1]["jpg_1"] = rows[0]["jpg_0"]  # wins, then loses: mixed
    rows[2]["jpg_1"] = rows[0]["jpg_1"]  # loses twice
    rows[3]["label_0"] = 0.5
    file = worlds.parquet(tmp_path / "p.parquet", rows)
    found = unpair(reader(file), tmp_path / "out.parquet")
    assert found.groups == {"exclusive_win": 2, "exclusive_lose": 1, "mixed": 1, "tied": 2}
    assert (found.good, found.bad, found.broken) == (3, 1, 0)
    source = PairReader(PairSource(path=str(tmp_path / "out.parquet")), bad_images=True)
    source.check_fits("labelled")
    labels = {row.chosen: row.good for row in source.rows()}
    assert labels == {rows[0]["jpg_0"]: True, rows[0]["jpg_1"]: False, rows[1]["jpg_0"]: True, rows[2]["jpg_0"]: True}
    dropped = unpair(reader(file), tmp_path / "drop.parquet", mixed="drop")
    assert (dropped.good, dropped.bad) == (2, 1)


@pytest.mark.parametrize("tool", [filter_absolute_winners, unpair, lambda r, out: score_pairs(r, BRIGHTNESS, out)])
def test_tools_for_pairs_refuse_single_images_and_files_that_exist(tmp_path, tool):
    single = worlds.parquet(tmp_path / "s.parquet", [{"prompt": "a", "image": worlds.png(0), "label": True}])
    with pytest.raises(InputError, match="must have pairs, got unpaired images"):
        tool(reader(single), tmp_path / "out.parquet")
    digest = hashlib.sha256(single.read_bytes()).digest()
    with pytest.raises(InputError, match="out must be a new file"):
        tool(reader(single), single)
    with pytest.raises(InputError, match=r"out must be a \.parquet file"):
        tool(reader(single), tmp_path / "out.csv")
    assert hashlib.sha256(single.read_bytes()).digest() == digest
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


# --- looking, and the command line ---------------------------------------------------------------------------------


def test_check_measures_how_scores_and_labels_agree(tmp_path):
    rows = [{**row, "score_0": 1.0, "score_1": 3.0} for row in worlds.preference_rows(4, ties=1)]
    rows[0]["score_1"] = None
    found = check(reader(worlds.parquet(tmp_path / "p.parquet", rows)))
    assert found.gaps == [-2.0, 2.0]  # label_0 is 1, then 0; the first row has one score, the last is a tie


def test_the_commands_write_what_the_functions_do(tmp_path, capsys):
    file = pairs(tmp_path, 8, ties=1)
    reward = ["--reward", "tests.test_data_tools:brightness", "--device", "cpu"]
    for name, *options in (
        ("score", *reward),
        ("relabel", *reward),
        ("filter", "--absolute-winners"),
        ("unpair", "--mixed", "drop"),
    ):
        out = tmp_path / f"{name}.parquet"
        cli.app(["data", name, str(file), "--out", str(out), *options], standalone_mode=False)
        assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert reader(tmp_path / "score.parquet").scored
    assert "label_0_before" in reader(tmp_path / "relabel.parquet").columns
    assert len(reader(tmp_path / "filter.parquet")) == 7
    assert len(reader(tmp_path / "unpair.parquet")) == 14
    cli.app(["data", "check", str(tmp_path / "relabel.parquet")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "scores agree with labels" in shown
    assert "8 of 8 (100.0 %)" in shown
