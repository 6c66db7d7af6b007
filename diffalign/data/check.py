"""What is in a preference data set, before training on it: counts, ties, broken images, duplicates, balance."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.data.buckets import Size, nearest
from diffalign.data.images import decode
from diffalign.data.pairs import Counts, Dropped, PairReader, Row
from diffalign.progress import bar


@dataclass
class Check:
    """Findings about a source."""

    layout: str
    columns: tuple[str, ...]
    counts: Counts = field(default_factory=Counts)
    prompts: int = 0
    """Distinct prompts."""
    images: int = 0
    """Distinct images."""
    repeated_pairs: int = 0
    """Rows whose prompt and two images were seen before."""
    equal_pairs: int = 0
    """Rows whose two images are the same file."""
    first_wins: int = 0
    """Rows in which the first image column won, where the layout has a label."""
    labelled: int = 0
    bytes: int = 0
    """Of all encoded images."""
    gaps: list[float] = field(default_factory=list)
    """Score of the winner minus score of the loser, of every row that has both."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Number of images by (width, height)."""
    buckets: tuple[Size, ...] = ()
    """Those that were asked for."""
    filled: Counter[int] = field(default_factory=Counter)
    """Number of rows by the place of their bucket."""
    cropped: int = 0
    """Pairs whose loser's own bucket is another, so that it is cropped to its winner's."""


def check(reader: PairReader, buckets: tuple[Size, ...] = ()) -> Check:
    """Reads and decodes every row, and says which of the `buckets` it is in."""
    found = Check(layout=reader.layout, columns=reader.columns, buckets=buckets)
    prompts: set[str] = set()
    images: set[bytes] = set()
    pairs: set[bytes] = set()
    with bar("reading rows", None if reader.source.streaming else len(reader)) as shown:
        for number, record in reader.records():
            row = _decoded(reader.row(number, record), found)
            found.counts.add(row)
            _balance(reader, record, found)
            if isinstance(row, Row):
                parts = [row.chosen] if row.rejected is None else [row.chosen, row.rejected]
                digests = sorted(hashlib.sha256(p).digest() for p in parts)
                key = hashlib.sha256(row.prompt.encode() + b"".join(digests)).digest()
                found.repeated_pairs += key in pairs
                found.equal_pairs += len(digests) == 2 and digests[0] == digests[1]
                found.bytes += sum(len(p) for p in parts)
                prompts.add(row.prompt)
                images.update(digests)
                pairs.add(key)
                if row.score_w is not None and row.score_l is not None:
                    found.gaps.append(row.score_w - row.score_l)
            shown.advance()
    found.prompts, found.images = len(prompts), len(images)
    return found


def hub_size(path: str, split: str) -> tuple[int | None, int | None]:
    """(bytes to download, rows of the split) of a `datasets` id as its card says, without downloading it."""
    import datasets

    info = datasets.load_dataset_builder(path).info
    rows = info.splits[split].num_examples if info.splits and split in info.splits else None
    return info.download_size, rows


def _decoded(row: Row | Dropped, found: Check) -> Row | Dropped:
    if isinstance(row, Dropped):
        return row
    sizes: list[Size] = []
    try:
        for data in (row.chosen, row.rejected):
            if data is not None:
                sizes.append(decode(data).size)
                found.sizes[sizes[-1]] += 1
    except OSError as error:
        return Dropped(row.number, "broken", " ".join(str(error).split()))
    if found.buckets:
        own = [nearest(size, found.buckets) for size in sizes]
        found.filled[own[0]] += 1
        found.cropped += own[-1] != own[0]
    return row


def _balance(reader: PairReader, record: Mapping[str, Any], found: Check) -> None:
    column = {"pickapic": "label_0", "unpaired": "label"}.get(reader.layout)
    value = record.get(reader.source.columns.get(column, column)) if column else None
    if value in (0, 1):
        found.labelled += 1
        found.first_wins += int(value)
