"""Prompt files, read untouched: .txt (one a line), .jsonl, .json, .csv, .tsv (no quoting, as PartiPrompts is written).

Blanks around a prompt are kept, since the seed of an image is derived from the prompt's bytes; blank prompts are
skipped in .txt only, and are errors elsewhere.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.errors import InputError, near_match
from diffalign.shipped import PROMPTS, resolve

_COLUMNS = ("Prompt", "prompt", "caption")
_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in the order of their file, each with whatever else its row says."""

    name: str
    prompts: list[str]
    metadata: list[dict[str, Any]]
    indexed: bool = False
    """Rows are places of a published list: a prompt that is given twice is two rows, each with seeds of its own."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the prompts in their order, each ended by a zero byte."""
        return hashlib.sha256(b"".join(p.encode() + b"\0" for p in self.prompts)).hexdigest()

    def rows(self, index: list[int]) -> "PromptSet":
        return replace(self, prompts=[self.prompts[i] for i in index], metadata=[self.metadata[i] for i in index])


def read_prompts(spec: str | Path, limit: int | None = None) -> PromptSet:
    """The prompts of a file, or of a set by name ("tiny", or a published one as `data.prompt_sets` takes it).

    Args:
        limit: Keep so many: those of least sha256, in the file's order. Files are often sorted by category, so that
            their first rows would be a biased choice.

    Raises:
        InputError: No such file or set, an unknown format, a missing column, a prompt that is not text, no prompt at
            all, or a published set that has changed.
    """
    from diffalign.data import prompt_sets

    name = str(spec).partition(":")[0]
    published = name in prompt_sets.SETS and not Path(spec).is_file()
    found = prompt_sets.read_set(str(spec)) if published else read_file(spec)
    return found if limit is None else _limited(found, limit)


def read_file(spec: str | Path) -> PromptSet:
    """The prompts of a file or a shipped set."""
    file = _find(str(spec))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts must be UTF-8, got {str(spec)!r}: {error}") from error
    read = {".txt": _lines, ".jsonl": _json_lines, ".json": _json_list, ".csv": _table, ".tsv": _table}[file.suffix]
    rows = list(read(text, file))
    if not rows:
        raise InputError(f"prompts must hold at least one prompt, got none in {str(spec)!r}")
    return PromptSet(name=str(spec), prompts=[p for p, _ in rows], metadata=[m for _, m in rows])


def by_hash(prompts: list[str]) -> list[int]:
    """Places of prompts by ascending sha256 of their UTF-8 bytes: an order that nobody chose."""
    return sorted(range(len(prompts)), key=lambda i: (hashlib.sha256(prompts[i].encode()).digest(), i))


def quick_rows(found: PromptSet, labels: list[str] | None, count: int = 96) -> PromptSet:
    """About `count` prompts, in their order: of each label equally many, those of least sha256; all if there are fewer.

    PartiPrompts' twelve categories give 8 prompts each.
    """
    groups: dict[str, list[int]] = {}
    for i in by_hash(found.prompts):
        groups.setdefault(labels[i] if labels is not None else "", []).append(i)
    each = max(1, count // len(groups))
    return found.rows(sorted(i for members in groups.values() for i in members[:each]))


def _limited(found: PromptSet, limit: int) -> PromptSet:
    if limit < 1:
        raise InputError(f"limit of prompts must be at least 1, got {limit}")
    return found.rows(sorted(by_hash(found.prompts)[:limit]))


def _find(spec: str) -> Path:
    file = Path(resolve(spec, PROMPTS))
    if not file.is_file():
        from diffalign.data.prompt_sets import SETS

        known = sorted([*PROMPTS, *SETS])
        near = near_match(spec, known) if "did you mean" in near_match(spec, known) else ""
        raise InputError(f"prompts must be a file or a set by name ({', '.join(known)}), got {spec!r}{near}")
    if file.suffix not in _SUFFIXES:
        raise InputError(f"prompts must be a {', '.join(_SUFFIXES)} file, got {spec!r}")
    return file


def _lines(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in text.split("\n"):
        prompt = line.removesuffix("\r")
        if prompt.strip():
            yield prompt, {}


def _json_lines(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _entry(_parsed(line, file, number), f"{file}, line {number}")


def _json_list(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = _parsed(text, file, 1)
    if not isinstance(entries, list):
        raise InputError(f"prompts in {file} must be a JSON list, got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        yield _entry(entry, f"{file}, entry {number}")


def _table(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".tsv":
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = [c for c in reader.fieldnames or [] if c is not None]
    chosen = next((c for c in _COLUMNS if c in columns), None)
    if chosen is None:
        found = ", ".join(columns) or "none"
        raise InputError(f"prompts in {file} must have a column {', '.join(_COLUMNS)}, got {found}")
    try:
        for row in reader:
            others = {k: v for k, v in row.items() if k is not None and k != chosen}
            yield _text(row[chosen], f"{file}, line {reader.line_num}"), others
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num} must be a row of a table: {error}") from error


def _entry(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    """A prompt and its metadata, from a JSON string or object."""
    if isinstance(entry, str):
        return _text(entry, where), {}
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be a string or an object with a prompt, got {type(entry).__name__}")
    chosen = next((c for c in _COLUMNS if c in entry), None)
    if chosen is None:
        raise InputError(f"{where} must have a key {', '.join(_COLUMNS)}, got {', '.join(entry) or 'none'}")
    return _text(entry[chosen], where), {k: v for k, v in entry.items() if k != chosen}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} must have a prompt that is text, got {value!r}")
    return value


def _parsed(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number + error.lineno - 1} must be valid JSON: {error.msg}") from error
