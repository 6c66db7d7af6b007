"""Progress on long work, on stderr: a live bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0

T = TypeVar("T")


@runtime_checkable
class Advancing(Protocol):
    """A bar of any make, moved by one piece of work at a time."""

    def advance(self) -> None: ...


@dataclass
class Bar:
    """One bar; `advance` moves it and may change the text beside it."""

    progress: Progress | None
    task: TaskID | None
    name: str
    total: int | None
    console: Console
    done: int = 0
    last_line: float = 0.0

    def advance(self, by: int = 1, note: str = "") -> None:
        self.done += by
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, advance=by, note=note)
            return
        now = time.monotonic()
        if now - self.last_line > _SECONDS_BETWEEN_LINES or self.done == self.total:
            self.last_line = now
            of = f"/{self.total}" if self.total else ""
            self.console.print(f"{self.name} {self.done}{of} {note}".rstrip(), highlight=False, soft_wrap=True)


@contextmanager
def bar(name: str, total: int | None, *, shown: bool = True, done: int = 0) -> Iterator[Bar]:
    """A bar for `total` pieces of work, of which `done` are done already; silent if not `shown`."""
    console = Console(stderr=True, quiet=not shown, emoji=False)
    if not console.is_terminal or not shown:
        yield Bar(None, None, name, total, console, done, time.monotonic())
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, completed=done, note="")
        yield Bar(progress, task, name, total, console, done)


def over(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    """The items, with a bar."""
    with bar(name, total) as shown:
        for item in items:
            yield item
            shown.advance()


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Hides the libraries' bars, one for every file, while a folder is read; a hub id keeps them: it may be fetched."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging) if Path(path).exists() else ()
    shown = [log for log in logs if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
