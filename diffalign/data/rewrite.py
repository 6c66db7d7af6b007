"""Preference data in, better preference data out: filtered, scored, relabelled or unpaired, as a parquet file.

The source stays as it is, and `PairReader` reads the result.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.data.images import to_tensor
from diffalign.data.output import Output, check_out, fresh_parquet, image_bytes
from diffalign.data.pairs import PairReader
from diffalign.data.sources import IMAGES, SCORES, Layout
from diffalign.data.tools import Agreement, Comparison, absolute_winners, agreement, image_groups, image_label, label_by
from diffalign.errors import InputError, RunError
from diffalign.progress import bar
from diffalign.types import Reward, RewardBatch

ROWS_AT_A_TIME = 256
MOST_INVALID = 0.01
"""Share of images that a reward may leave unjudged before the work stops."""

_UIDS = ("image_0_uid", "image_1_uid")


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What a filter left."""

    rows: int
    compared: int
    """Rows with a label, ties included."""
    kept: int
    winners: int
    """Distinct winning images in what is kept."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What scoring found."""

    rows: int
    images: int
    """Distinct pairs of image and prompt."""
    invalid: int
    """Of these, those that could not be read or judged."""
    mean_gap: float
    """Mean of |score of the first image - score of the second|; NaN where no row has both."""
    labels: Agreement
    """Labels of the source against those by the scores."""


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """What became of the images of pairs."""

    rows: int
    groups: dict[str, int]
    """Distinct images by group; `tied` ones neither won nor lost."""
    good: int
    bad: int
    broken: int


def filter_absolute_winners(reader: PairReader, out: str | Path, *, all_losers: bool = False) -> Filtered:
    """Writes the rows that `tools.absolute_winners` keeps.

    Raises:
        InputError: Unpaired data, a file that exists, or nothing to keep.
    """
    file = check_out(out)
    rows, found = _compare(reader)
    compared = list(found.values())
    places = list(found)
    kept = {places[i] for i in absolute_winners(compared, all_losers=all_losers)}
    if not kept:
        raise InputError(f"data.path must have a winner that never lost or tied, got none in {rows} rows")
    output = Output(reader)
    with fresh_parquet(file, output.schema()) as write:
        for stretch in _stretches(reader):
            write([output.row(record) for number, record in stretch if number in kept])
    winners = {(found[number].prompt, found[number].winner) for number in kept}
    return Filtered(rows=rows, compared=len(found), kept=len(kept), winners=len(winners))


def score_pairs(
    reader: PairReader, reward: Reward, out: str | Path, *, relabel: bool = False, batch_size: int = 16
) -> Scored:
    """Writes all rows with the scores of both images by a reward; scores that were there are replaced.

    Args:
        relabel: Write new labels too, by the scores, and keep the old ones as `label_0_before`. The result is in
            Pick-a-Pic's columns, since others have no place for a tie.
        batch_size: Images of equal size that are scored at a time.

    Raises:
        InputError: Unpaired data, or a file that exists.
        RunError: More than 1 % of the images could not be read or judged.
    """
    file = check_out(out)
    check_paired(reader)
    output = Output(reader, pickapic=relabel)
    layout: Layout = "pickapic" if relabel or reader.layout == "pickapic" else "trl"
    images, scores = IMAGES[layout], SCORES[layout]
    extra = [*scores, *(("label_0", "label_0_before") if relabel else ())]
    scorer = Scorer(reward, batch_size)
    before: list[float | None] = []
    after: list[float | None] = []
    gaps: list[float] = []
    with (
        fresh_parquet(file, output.schema(extra)) as write,
        bar("scoring rows", None if reader.source.streaming else len(reader)) as shown,
    ):
        for stretch in _stretches(reader):
            rows = [output.row(record) for _, record in stretch]
            prompts = [reader.prompt(number, record) for number, record in stretch]
            asked = [(p, row[name]) for p, row in zip(prompts, rows, strict=True) for name in images]
            values = iter(scorer(asked))
            for (_, record), row in zip(stretch, rows, strict=True):
                row.update({name: next(values) for name in scores})
                first, second = (row[name] for name in scores)
                before.append(reader.label(record))
                after.append(label_by(first, second))
                if after[-1] is not None:
                    gaps.append(abs(first - second))
                if relabel:
                    row.update(_new_label(row, before[-1], after[-1]))
            write(rows)
            shown.advance(len(rows))
        scorer.check()
    return Scored(
        rows=len(before),
        images=len(scorer.known),
        invalid=scorer.invalid,
        mean_gap=sum(gaps) / len(gaps) if gaps else float("nan"),
        labels=agreement(before, after),
    )


def unpair(reader: PairReader, out: str | Path, *, mixed: Literal["good", "bad", "drop"] = "good") -> Unpaired:
    """Writes the distinct images of pairs with one label each: prompt, image, label and the group it comes from.

    Args:
        mixed: What an image that won some and lost some is.

    Raises:
        InputError: Unpaired data, or a file that exists.
    """
    import pyarrow as pa

    file = check_out(out)
    rows, found = _compare(reader)
    groups = image_groups(list(found.values()))
    images = {(c.prompt, name) for c in found.values() for name in (c.winner, c.loser)}
    counts = Counter(str(group) for group in groups.values()) + Counter(tied=len(images) - len(groups))
    labels: Counter[bool] = Counter()
    done: set[tuple[str, str]] = set()
    broken = 0
    fields = {"prompt": pa.string(), "image": pa.binary(), "label": pa.bool_(), "group": pa.string()}
    with fresh_parquet(file, pa.schema(fields)) as write:
        for stretch in _stretches(reader):
            made = []
            for number, record in stretch:
                if number not in found:
                    continue
                for name, cell in zip(_names(reader, record), reader.images(record), strict=True):
                    image = (found[number].prompt, name)
                    label = image_label(groups[image], mixed) if image in groups and image not in done else None
                    if label is None:
                        continue
                    done.add(image)
                    data = image_bytes(reader, cell)
                    if data is None:
                        broken += 1
                        continue
                    labels[label] += 1
                    made.append({"prompt": image[0], "image": data, "label": label, "group": groups[image]})
            write(made)
    return Unpaired(rows=rows, groups=dict(counts), good=labels[True], bad=labels[False], broken=broken)


@dataclass
class Scorer:
    """Scores of images with their prompts; each is asked for once, however often it comes."""

    reward: Reward
    batch_size: int
    known: dict[bytes, float | None] = field(default_factory=dict)

    @property
    def invalid(self) -> int:
        return sum(score is None for score in self.known.values())

    def __call__(self, asked: Sequence[tuple[str, bytes | None]]) -> list[float | None]:
        """A score each, None where the image cannot be read or judged."""
        keys = [hashlib.sha256(prompt.encode() + b"\0" + (data or b"")).digest()[:16] for prompt, data in asked]
        fresh = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in self.known}
        sizes: dict[Any, list[tuple[bytes, str, Tensor]]] = {}
        for key, (prompt, data) in fresh.items():
            try:
                image = to_tensor(data or b"")
            except OSError:
                self.known[key] = None
                continue
            sizes.setdefault(image.shape, []).append((key, prompt, image))
        for some in sizes.values():
            for start in range(0, len(some), self.batch_size):
                self._score(some[start : start + self.batch_size])
        if len(self.known) >= 1000:
            self.check()
        return [self.known[key] for key in keys]

    def check(self) -> None:
        """Raises RunError if more than 1 % of the images could not be judged."""
        if self.invalid > MOST_INVALID * len(self.known):
            raise RunError(
                f"reward {self.reward.name!r} could not judge {self.invalid} of {len(self.known)} images, more than "
                f"{MOST_INVALID:.0%}; nothing was written"
            )

    def _score(self, some: Sequence[tuple[bytes, str, Tensor]]) -> None:
        batch = RewardBatch(images=torch.stack([image for _, _, image in some]), prompts=[text for _, text, _ in some])
        out = self.reward.score(batch)
        judged = out.scores.isfinite() if out.valid is None else out.scores.isfinite() & out.valid
        for (key, _, _), score, good in zip(some, out.scores.tolist(), judged.tolist(), strict=True):
            self.known[key] = score if good else None


def check_paired(reader: PairReader) -> None:
    """Raises InputError for single images."""
    if not reader.paired:
        raise InputError("data.path must have pairs, got unpaired images")


def _compare(reader: PairReader) -> tuple[int, dict[int, Comparison]]:
    """(number of rows, comparisons of the labelled ones by their place); rows without images are left out."""
    check_paired(reader)
    rows, found = 0, {}
    with bar("reading rows", None if reader.source.streaming else len(reader)) as shown:
        for number, record in reader.records():
            rows += 1
            shown.advance()
            label = reader.label(record)
            if label is None:
                continue
            try:
                first, second = _names(reader, record)
            except (OSError, TypeError):
                continue
            winner, loser = (second, first) if label == 0 else (first, second)
            found[number] = Comparison(reader.prompt(number, record), winner, loser, label == 0.5)
    return rows, found


def _names(reader: PairReader, record: Mapping[str, Any]) -> list[str]:
    """Names of the two images: Pick-a-Pic's own, or else hashes of their bytes."""
    if all(isinstance(record.get(uid), str) and record[uid] for uid in _UIDS):
        return [record[uid] for uid in _UIDS]
    return [hashlib.sha256(reader.image(cell)).hexdigest()[:32] for cell in reader.images(record)]


def _stretches(reader: PairReader) -> Iterator[list[tuple[int, Mapping[str, Any]]]]:
    records = reader.records()
    while stretch := list(itertools.islice(records, ROWS_AT_A_TIME)):
        yield stretch


def _new_label(row: Mapping[str, Any], before: float | None, after: float | None) -> dict[str, Any]:
    """Pick-a-Pic's columns that say who won, where the row has them, and the label that was."""
    new: dict[str, Any] = {"label_0": after, "label_0_before": before}
    if "label_1" in row:
        new["label_1"] = None if after is None else 1 - after
    if "has_label" in row:
        new["has_label"] = after is not None
    if "best_image_uid" in row and all(uid in row for uid in _UIDS):
        uid = {0.0: row[_UIDS[1]], 0.5: "tie", 1.0: row[_UIDS[0]]}
        new["best_image_uid"] = None if after is None else uid[after]
    return new
