"""Preference data, read untouched, by its column names: rows of (prompt, chosen image, rejected image).

Layouts: `pickapic` (caption, jpg_0, jpg_1, label_0), `trl` (prompt, chosen, rejected), `unpaired` (prompt, image,
label), each as parquet, as a `datasets` id, or as a folder with metadata.jsonl or metadata.csv whose image columns
hold file names; and `folders` (win/ and lose/ with equal file names and .txt captions). Ties and unlabelled rows are
dropped and counted.
"""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import InputError, near_match
from diffalign.shipped import DATASETS, resolve

Layout = Literal["pickapic", "trl", "unpaired", "folders"]

LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "pickapic": ("caption", "jpg_0", "jpg_1", "label_0"),
    "trl": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "image", "label"),
}
"""Columns that make a layout; other columns are left alone."""

_IMAGES = {"pickapic": ("jpg_0", "jpg_1"), "trl": ("chosen", "rejected"), "unpaired": ("image",)}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Row:
    """One preference, or one image with a good label (then `rejected` is None). Images are encoded bytes."""

    number: int
    """Place in the source, 0 first."""
    prompt: str
    chosen: bytes
    rejected: bytes | None


@dataclass(frozen=True)
class Dropped:
    """A row that trains nothing, and why."""

    number: int
    reason: Literal["tie", "unlabelled", "bad label", "broken"]
    detail: str = ""


@dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """Where and why, for the first broken rows."""

    def add(self, row: Row | Dropped) -> None:
        self.rows += 1
        if isinstance(row, Row):
            self.kept += 1
            return
        self.dropped[row.reason] = self.dropped.get(row.reason, 0) + 1
        if row.reason == "broken" and len(self.broken) < 20:
            self.broken.append(f"row {row.number}: {row.detail}")

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


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where preference data lies and how its columns are called."""

    path: str
    """Parquet file, folder, `datasets` id on the hub, or name of a shipped data set ("tiny-sd-pairs")."""
    split: str = "train"
    """Split of a `datasets` id."""
    revision: str | None = None
    """Branch, tag or commit of a `datasets` id."""
    streaming: bool = False
    """Read a `datasets` id while it downloads, instead of first downloading all of it."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Own names of the standard columns, such as `caption = "text"`."""
    limit: int | None = None
    """Read only the first rows."""

    def __post_init__(self) -> None:
        known = sorted({c for columns in LAYOUTS.values() for c in columns})
        for name in self.columns:
            if name not in known:
                raise InputError(f"data.columns must rename standard columns, got {name!r}{near_match(name, known)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit must be at least 1, got {self.limit}")


class PairReader:
    """An opened source: its layout, its columns, and its rows in order."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self.path = resolve(source.path, DATASETS)
        self.table, columns, self.root = _open(source, self.path)
        self.columns = tuple(columns)
        self.layout = _layout(self.path, self.columns, source.columns) if self.root != _FOLDERS else "folders"

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

    def check_fits(self, kind: Literal["pairs", "images", "labelled"]) -> None:
        """Raises InputError if a method takes pairs and there are none here."""
        if kind == "pairs" and not self.paired:
            raise InputError("data.path must have pairs for this method, got unpaired images; method 'sft' takes those")

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
        value = {name: record[self.source.columns.get(name, name)] for name in LAYOUTS.get(self.layout, ("prompt",))}
        prompt = record["prompt"] if self.layout == "folders" else value["caption" if "caption" in value else "prompt"]
        if not isinstance(prompt, str):
            raise InputError(
                f"data.path must have text prompts, got {type(prompt).__name__} {repr(prompt)[:40]} in row {number}"
            )
        try:
            return self._labelled(number, prompt, record if self.layout == "folders" else value)
        except (OSError, TypeError) as error:
            return Dropped(number, "broken", " ".join(str(error).split()))

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
            if not value["label"]:
                return Dropped(number, "bad label")
            return Row(number, prompt, self._bytes(value["image"]), None)
        if self.layout != "pickapic":
            return Row(number, prompt, self._bytes(value["chosen"]), self._bytes(value["rejected"]))
        label = value["label_0"]
        if label == 0.5:
            return Dropped(number, "tie")
        if label not in (0, 1):
            return Dropped(number, "unlabelled")
        first, second = self._bytes(value["jpg_0"]), self._bytes(value["jpg_1"])
        return Row(number, prompt, first, second) if label == 1 else Row(number, prompt, second, first)

    def _bytes(self, value: Any) -> bytes:
        """Encoded bytes of an image cell: bytes, a file name, a `datasets` image, or a PIL image."""
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


_FOLDERS = "folders:"


def _open(source: PairSource, path: str) -> tuple[Any, Sequence[str], str]:
    """(records, column names, folder that file names are relative to)."""
    folder = Path(path)
    if (folder / "win").is_dir() and (folder / "lose").is_dir():
        return _win_lose(folder), (), _FOLDERS
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            records = _metadata(folder / name)
            return records, list(records[0]) if records else (), str(folder)
    if folder.exists():
        files = [str(folder)] if folder.is_file() else sorted(str(p) for p in folder.rglob("*.parquet"))
        if not files or not all(f.endswith(".parquet") for f in files):
            raise InputError(
                f"data.path must be a parquet file, a folder of them, a folder with metadata.jsonl or metadata.csv, or "
                f"one with win/ and lose/, got {path!r}"
            )
        return _parquet(files, path)
    if path.count("/") > 1 or path.startswith(("/", ".")) or path.endswith(".parquet"):
        raise InputError(f"data.path must exist, got {path!r}")
    return _hub(source, path)


def _parquet(files: list[str], path: str) -> tuple[Any, Sequence[str], str]:
    table = ParquetRows(files, path)
    return table, table.columns, str(Path(path).parent if Path(path).is_file() else path)


class ParquetRows:
    """Rows of parquet files, read in small groups; a row is a dict of plain Python values."""

    def __init__(self, files: list[str], path: str) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self.files = [pyarrow.parquet.ParquetFile(file) for file in files]
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise InputError(f"data.path must be readable parquet, got {path!r}: {error}") from error
        self.columns = self.files[0].schema_arrow.names

    def __len__(self) -> int:
        return sum(file.metadata.num_rows for file in self.files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return next(self.skip(number))

    def skip(self, start: int) -> Iterator[dict[str, Any]]:
        """Rows from `start` on."""
        for file in self.files:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start >= rows:
                    start -= rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    skipped = min(start, batch.num_rows)
                    start -= skipped
                    yield from batch.slice(skipped).to_pylist()


def _hub(source: PairSource, path: str) -> tuple[Any, Sequence[str], str]:
    import datasets

    try:
        table = datasets.load_dataset(path, split=source.split, revision=source.revision, streaming=source.streaming)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"data.path must be a local path or a `datasets` id, got {path!r}: {reason}") from error
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table, table.column_names or list(next(iter(table))), "."


def _metadata(file: Path) -> list[dict[str, Any]]:
    """Records of a metadata file; columns that end in `_file_name` lose the ending, `file_name` is the image."""
    with file.open(encoding="utf-8", newline="") as handle:
        if file.suffix == ".csv":
            records: list[dict[str, Any]] = list(csv.DictReader(handle))
        else:
            records = [_json_line(file, number, line) for number, line in enumerate(handle, 1) if line.strip()]
    renamed = [{_plain(key): value for key, value in record.items()} for record in records]
    if file.suffix == ".csv":
        for record in renamed:
            record.update({key: _number(record[key]) for key in ("label", "label_0") if key in record})
    return renamed


def _json_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} must hold one JSON object a line, got line {number}: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} must hold one JSON object a line, got {line.strip()[:60]!r} in line {number}")
    return record


def _plain(key: str) -> str:
    return "image" if key == "file_name" else key.removesuffix("_file_name")


def _number(text: str) -> float | None:
    words = {"true": 1.0, "false": 0.0, "": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return float(text)
    except ValueError:
        return None


def _win_lose(folder: Path) -> list[dict[str, Any]]:
    records = []
    for win in sorted(p for p in (folder / "win").rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES):
        name = win.relative_to(folder / "win")
        lose = folder / "lose" / name
        if not lose.is_file():
            raise InputError(
                f"data.path must have equal file names in win/ and lose/, got win/{name} without lose/{name}"
            )
        captions = [p for p in (win.with_suffix(".txt"), (folder / name).with_suffix(".txt")) if p.is_file()]
        if not captions:
            raise InputError(f"data.path must have a caption for every pair, got win/{name} without {name.stem}.txt")
        prompt = captions[0].read_text(encoding="utf-8").strip()
        records.append({"prompt": prompt, "chosen": {"path": str(win)}, "rejected": {"path": str(lose)}})
    return records


def _layout(path: str, columns: Sequence[str], renamed: Mapping[str, str]) -> Layout:
    def missing(layout: Layout) -> list[str]:
        return [c for c in LAYOUTS[layout] if renamed.get(c, c) not in columns]

    for layout in LAYOUTS:
        if not missing(layout):
            return layout
    if not columns:
        raise InputError(f"data.path must have rows, got none in {path!r}")
    nearest = min(LAYOUTS, key=lambda layout: len(missing(layout)) / len(LAYOUTS[layout]))
    forms = "; ".join(", ".join(c) for c in LAYOUTS.values())
    raise InputError(
        f"data.path must have the columns of a known layout ({forms}), got {', '.join(columns)}; nearest is "
        f"{nearest!r}, which misses {', '.join(missing(nearest))}; other names go into data.columns"
    )


def _ends(file: Path) -> bytes:
    """First and last 64 KiB of a file."""
    with file.open("rb") as handle:
        head = handle.read(1 << 16)
        handle.seek(max(0, file.stat().st_size - (1 << 16)))
        return head + handle.read()
