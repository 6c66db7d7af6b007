"""What an evaluation has done, on disk: files that appear whole, and journals of one line per piece of work.

A piece of work is known by a key, the hash of everything that it depends on. A line is written after its work is safe;
a line that a kill cut off is dropped. Every process writes journals of its own, and reads all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

JOURNALS = "journal"
"""Folder of the journals."""


def key(*parts: Any) -> str:
    """Hash of what a piece of work depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(file: Path, data: bytes) -> None:
    """Writes a file beside its name and puts it in place: it is never there in part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with beside.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(file)


def read_journal(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Lines of all processes by their key."""
    found = {}
    for file in sorted((folder / JOURNALS).glob(f"{name}.*.jsonl")):
        for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last line break is not whole
            row = json.loads(line)
            found[row["key"]] = row
    return found


@contextmanager
def appending(folder: Path, name: str, rank: int) -> Iterator["Appender"]:
    """This process's journal of a name, open at its end, without a line that was cut off."""
    file = folder / JOURNALS / f"{name}.{rank}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as handle:
        whole = file.read_bytes().rfind(b"\n") + 1
        handle.truncate(whole)
        yield Appender(handle)


class Appender:
    """Writes lines that are safe when `write` returns."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.handle.flush()
        os.fsync(self.handle.fileno())


def digest_of(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
