"""Several processes of one evaluation, as `accelerate launch` and `torchrun` start them: who does what, and waiting.

Work is dealt out by whole batches that are the same for any number of processes, and goes to disk; so the result is
that of one process. What fails in one ends all, with its message.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from diffalign.errors import InputError, RunError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among its siblings."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """The part of the work that is this process's."""
        return work[self.rank :: self.count]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits at its end until all processes are there; what one of them met, all raise.

        Raises:
            RunError, InputError: Of the first process that met one; others' faults are theirs to raise.
        """
        error: Exception | None = None
        try:
            yield
        except (RunError, InputError) as met:
            error = met
        if self.count > 1:
            found: list[tuple[type[Exception], str] | None] = [None] * self.count
            distributed.all_gather_object(found, None if error is None else (type(error), str(error)))
            first = next((each for each in found if each is not None), None)
            if first is not None and error is None:
                error = first[0](first[1])
        if error is not None:
            raise error

    def from_main(self, value: T | None) -> T:
        """What the main process has, in all of them."""
        held = [value]
        if self.count > 1:
            distributed.broadcast_object_list(held, src=0)
        assert held[0] is not None, "the main process must have a value"
        return held[0]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that were started together, in contact; alone where there is one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    own = not distributed.is_initialized()
    if own:  # gloo carries words, not tensors; a slow sibling may take days
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(rank=distributed.get_rank(), count=count)
    finally:
        if own:
            distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, where each has one."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
