"""Batches made one ahead in a thread, in memory that a GPU copies from while it computes."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from diffalign.types import Batch, Cond, ImageBatch


def ahead(batches: Iterator[Batch], *, pinned: bool) -> Generator[Batch, None, None]:
    """The same batches in the same order, the next one made in a thread while the caller works on the last.

    Nothing is asked for beyond the end of `batches`, so a stretch of a stream is cut out first. An error is raised
    where its batch would have come. Closing the iterator waits for the batch being made and ends the thread.

    Args:
        pinned: Tensors are moved into page-locked memory, which needs a GPU.
    """

    def make() -> Batch | None:
        batch = next(batches, None)
        return pin(batch) if batch is not None and pinned else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        coming = thread.submit(make)
        while (batch := coming.result()) is not None:
            coming = thread.submit(make)
            yield batch


def pin(batch: Batch) -> Batch:
    """The batch in page-locked memory."""
    held = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {name: value.pin_memory() for name, value in held.items() if isinstance(value, Tensor)}
    moved |= {name: pin(value) for name, value in held.items() if isinstance(value, ImageBatch)}
    return replace(batch, **moved, cond=Cond({name: value.pin_memory() for name, value in batch.cond.tensors.items()}))
