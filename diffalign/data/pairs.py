"""Preference data, read untouched, by its column names: rows of (prompt, chosen image, rejected image).

Layouts: `pickapic` (caption, jpg_0, jpg_1, label_0), `trl` (prompt, chosen, rejected), `unpaired` (prompt, image,
label), each as parquet, as a `datasets` id, or as a folder with metadata.jsonl or metadata.csv whose image columns
hold file names; and `folders` (win/ and lose/ with equal file names and .txt captions). Pairs may have scores of both
images: score_0 and score_1, or score_chosen and score_rejected. Ties and unlabelled rows are dropped and counted.
"""

import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.data.sources import (
    FOLDERS,
    IMAGES,
    LAYOUTS,
    SCORES,
    Layout,
    PairSource,
    as_number,
    find_layout,
    open_source,
)
from diffalign.errors import InputError
from diffalign.shipped import DATASETS, resolve


@dataclass(frozen=True)
class Row:
    """One preference, or one labelled image (`chosen`, then `rejected` is None). Images are encoded bytes."""

    number: int
    """Place in the source, 0 first."""
    prompt: str
    chosen: bytes
    rejected: bytes | None
    score_w: float | None = None
    """Of the chosen image; None where the source has no finite one."""
    score_l: float | None = None
    good: bool = True
    """Label of a single image; True for pairs."""

    @property
    def scored(self) -> bool:
        return self.score_w is not None and self.score_l is not None


@dataclass(frozen=True)
class Dropped:
    """A row that trains nothing, and why."""

    number: int
    reason: Literal["tie", "unlabelled", "bad label", "broken", "unscored"]
    detail: str = ""


@dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """Where and why, for the first broken rows."""
    cropped: int = 0
    """Pairs whose loser's own bucket is another than its winner's, to whose shape it is cropped."""
    buckets: dict[str, int] = field(default_factory=dict)
    """Items to train on by bucket, where there are buckets."""

    def add(self, row: Row | Dropped) -> None:
        self.rows += 1
        if isinstance(row, Row):
            self.kept += 1
            return
        self.dropped[row.reason] = self.dropped.get(row.reason, 0) + 1
        if row.reason == "broken" and len(self.broken) < 20:
            self.broken.append(f"row {row.number}: {row.detail}")

    def drop_kept(self, reason: str, number: int) -> None:
        """Counts rows as dropped that had been counted as kept."""
        if number:
            self.kept -= number
            self.dropped[reason] = self.dropped.get(reason, 0) + number

    def check(self, where: str, *, final: bool) -> None:
        """Stops when more than 1 % of the rows are broken, or, at the end, when nothing is left.

        Raises:
            InputError: With the first broken row, or with what all rows were dropped for.
        """
        broken = self.dropped.get("broken", 0)
        if broken > 0.01 * self.rows and (final or self.rows >= 1000):
            raise InputError(
                f"{where} must have at most 1 % broken rows, got {broken} of {self.rows}; first: {self.broken[0]}"
            )
        if not final or self.kept:
            return
        if self.rows == 0:
            raise InputError(f"{where} must have rows, got none")
        why = ", ".join(f"{n} {'ties' if r == 'tie' else r}" for r, n in sorted(self.dropped.items()))
        raise InputError(f"{where} must have a row with a winner, got {self.rows} rows: {why}")


class PairReader:
    """An opened source: its layout, its columns, and its rows in order."""

    def __init__(self, source: PairSource, *, bad_images: bool = False) -> None:
        """Opens a source; `bad_images` keeps single images with a bad label, which are dropped otherwise."""
        self.source = source
        self.bad_images = bad_images
        self.path = resolve(source.path, DATASETS)
        self.table, columns, self.root = open_source(source, self.path)
        self.columns = tuple(columns)
        self.layout: Layout = (
            "folders" if self.root == FOLDERS else find_layout(self.path, self.columns, source.columns)
        )
        absent = [c for c in SCORES.get(self.layout, ()) if self._own(c) not in self.columns]
        self.scored = self.layout in SCORES and not absent
        """Whether the columns of both images' scores are there."""
        if renamed := [c for c in absent if c in source.columns]:
            raise InputError(
                f"data.columns must name columns that are there, got {renamed[0]} = {self._own(renamed[0])!r} with "
                f"{', '.join(self.columns)}"
            )

    def __len__(self) -> int:
        """Number of rows, where the source knows it.

        Raises:
            TypeError: A streamed source does not know.
        """
        length = len(self.table)
        return length if self.source.limit is None else min(length, self.source.limit)

    @property
    def paired(self) -> bool:
        return self.layout != "unpaired"

    def check_fits(
        self, kind: Literal["pairs", "images", "labelled"], *, scores: bool = False, swapped: bool = False
    ) -> None:
        """Checks the source against what a method takes.

        Args:
            scores: The method needs scores of both images.
            swapped: Winners and losers are to change places.

        Raises:
            InputError: Pairs, scores or losers are asked for and there are none here.
        """
        if kind == "pairs" and not self.paired:
            raise InputError("data.path must have pairs for this method, got unpaired images; method 'sft' takes those")
        if scores and not self.scored:
            names = " and ".join(SCORES.get(self.layout, SCORES["pickapic"]))
            raise InputError(
                f"data.path must have the columns {names} for this method, got {', '.join(self.columns) or 'none'}; "
                "`diffalign data score` writes them"
            )
        if swapped and kind == "images" and not self.paired:
            raise InputError(
                "data.swap_labels must be false for this method with unpaired data, of which it takes the good images "
                "alone, got true; change the labels in the data"
            )

    def records(self, start: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Raw records with their numbers, from `start` on; `row` makes rows of them."""
        stop = self.source.limit
        records: Any = iter(self.table[start:]) if isinstance(self.table, list) else self.table.skip(start)
        if stop is not None:
            records = itertools.islice(records, max(0, stop - start))
        return enumerate(records, start)

    def rows(self) -> Iterator[Row | Dropped]:
        """All rows in order; images are not decoded."""
        return (self.row(number, record) for number, record in self.records())

    def row(self, number: int, record: Mapping[str, Any]) -> Row | Dropped:
        """One record of the source as a row."""
        prompt = self.prompt(number, record)
        try:
            return self._labelled(number, prompt, self._cells(record))
        except (OSError, TypeError) as error:
            return Dropped(number, "broken", " ".join(str(error).split()))

    def prompt(self, number: int, record: Mapping[str, Any]) -> str:
        """The prompt of a record.

        Raises:
            InputError: It is not text.
        """
        prompt = record[self._own("caption" if self.layout == "pickapic" else "prompt")]
        if not isinstance(prompt, str):
            raise InputError(
                f"data.path must have text prompts, got {type(prompt).__name__} {repr(prompt)[:40]} in row {number}"
            )
        return prompt

    def images(self, record: Mapping[str, Any]) -> list[Any]:
        """The image cells of a record in the order of their columns; `image` makes bytes of them."""
        return [record.get(self._own(name)) for name in IMAGES[self.layout]]

    def label(self, record: Mapping[str, Any]) -> float | None:
        """1 where the first image of a pair wins, 0 where the second does, 0.5 for a tie, None without a label."""
        if self.layout != "pickapic":
            return 1.0
        label = record[self._own("label_0")]
        return float(label) if label in (0, 0.5, 1) else None

    def _cells(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a record has in the columns of its layout, under their standard names, scores included."""
        names = LAYOUTS["trl" if self.layout == "folders" else self.layout]
        scores = SCORES[self.layout] if self.scored else ()
        return {name: record[self._own(name)] for name in names} | {s: record.get(self._own(s)) for s in scores}

    def _own(self, name: str) -> str:
        """What the source calls a standard column."""
        return self.source.columns.get(name, name)

    def fingerprint(self) -> str:
        """Digest of what the source is: names and sizes of local files, or the hub id with its revision."""
        digest = hashlib.sha256(json.dumps([self.layout, sorted(self.source.columns.items())]).encode())
        path = Path(self.path)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        for file in files:
            digest.update(f"{file.relative_to(path) if file != path else file.name}:{file.stat().st_size};".encode())
            if file.suffix in (".jsonl", ".csv", ".parquet"):
                digest.update(_ends(file))
        if not files:
            digest.update(f"{self.path}@{self.source.revision}/{self.source.split}".encode())
        return digest.hexdigest()[:32]

    def _labelled(self, number: int, prompt: str, value: Mapping[str, Any]) -> Row | Dropped:
        if self.layout == "unpaired":
            if not isinstance(value["label"], (bool, int, float)) or value["label"] not in (0, 1):
                return Dropped(number, "unlabelled")
            if not value["label"] and not self.bad_images:
                return Dropped(number, "bad label")
            return Row(number, prompt, self.image(value["image"]), None, good=bool(value["label"]))
        if self.layout == "pickapic" and value["label_0"] == 0.5:
            return Dropped(number, "tie")
        if self.layout == "pickapic" and value["label_0"] not in (0, 1):
            return Dropped(number, "unlabelled")
        first, second = (self.image(value[name]) for name in IMAGES[self.layout])
        score_0, score_1 = (_score(value[name]) for name in SCORES[self.layout]) if self.scored else (None, None)
        if self.layout == "pickapic" and value["label_0"] == 0:
            return Row(number, prompt, second, first, score_1, score_0)
        return Row(number, prompt, first, second, score_0, score_1)

    def image(self, value: Any) -> bytes:
        """Encoded bytes of an image cell: bytes, a file name, a `datasets` image, or a PIL image.

        Raises:
            OSError, TypeError: There is no image.
        """
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return (Path(self.root) / value).read_bytes()
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            return Path(str(value["path"])).read_bytes()
        if value is None:
            raise TypeError("the image is missing")
        out = io.BytesIO()
        value.save(out, format="PNG")
        return out.getvalue()


def _score(value: Any) -> float | None:
    """A finite number, also as text, or None."""
    found = as_number(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)


def _ends(file: Path) -> bytes:
    """First and last 64 KiB of a file."""
    with file.open("rb") as handle:
        head = handle.read(1 << 16)
        handle.seek(max(0, file.stat().st_size - (1 << 16)))
        return head + handle.read()
