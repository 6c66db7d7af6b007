"""Opening preference data: a parquet file, a folder, a `datasets` id or a shipped data set, as records by column name.

A layout is known by its columns; image folders become records with the same columns.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import InputError, near_match

Layout = Literal["pickapic", "trl", "unpaired", "folders"]

LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "pickapic": ("caption", "jpg_0", "jpg_1", "label_0"),
    "trl": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "image", "label"),
}
"""Columns that make a layout; other columns are left alone."""

SCORES: dict[Layout, tuple[str, str]] = {
    "pickapic": ("score_0", "score_1"),
    "trl": ("score_chosen", "score_rejected"),
}
"""Columns that a layout may have besides: scores of its two images by one judge, higher is better."""

LABELS: dict[Layout, str] = {"pickapic": "label_0", "unpaired": "label"}
"""Column of the label, where a layout has one."""

IMAGES: dict[Layout, tuple[str, ...]] = {
    "pickapic": ("jpg_0", "jpg_1"),
    "trl": ("chosen", "rejected"),
    "unpaired": ("image",),
    "folders": ("chosen", "rejected"),
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


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
        known = sorted({c for columns in (*LAYOUTS.values(), *SCORES.values()) for c in columns})
        for name in self.columns:
            if name not in known:
                raise InputError(f"data.columns must rename standard columns, got {name!r}{near_match(name, known)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit must be at least 1, got {self.limit}")


FOLDERS = "folders:"
"""In place of a folder, where a source is win/ and lose/."""


def open_source(source: PairSource, path: str) -> tuple[Any, Sequence[str], str]:
    """(records, column names, folder that file names are relative to, or `FOLDERS`)."""
    folder = Path(path)
    if (folder / "win").is_dir() and (folder / "lose").is_dir():
        return _win_lose(folder), (), FOLDERS
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
            record.update({key: as_number(record[key]) for key in LABELS.values() if key in record})
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


def as_number(text: str) -> float | None:
    """The number or truth value that a cell of text spells, or None."""
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


def find_layout(path: str, columns: Sequence[str], renamed: Mapping[str, str]) -> Layout:
    """The layout whose columns are there, by their own names."""

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
