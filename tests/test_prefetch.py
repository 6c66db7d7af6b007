"""Batches made one ahead: the same ones, errors in their place, and a thread that ends."""

import threading
from contextlib import closing
from itertools import count, islice

import pytest
import torch

from diffalign.data.prefetch import ahead
from diffalign.errors import InputError
from diffalign.fit import fit
from diffalign.methods.diffusion_dpo import DiffusionDPO
from tests.toys import pairs, toy


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_batches_come_in_order_and_none_beyond_the_end_is_asked_for():
    asked = []

    def made():
        for i in count():
            asked.append(i)
            yield pairs(2, seed=i)

    found = list(ahead(islice(made(), 3), pinned=False))
    assert all(torch.equal(batch.x_w, pairs(2, seed=i).x_w) for i, batch in enumerate(found))
    assert (len(found), asked) == (3, [0, 1, 2])
    assert threads() == []


def test_the_next_batch_is_made_while_the_last_is_used():
    second = threading.Event()

    def made():
        yield pairs(1)
        second.set()
        yield pairs(1)

    with closing(ahead(made(), pinned=False)) as batches:
        next(batches)
        assert second.wait(timeout=10)


def test_an_error_comes_in_the_place_of_its_batch_as_it_was_raised():
    def made():
        yield pairs(1)
        raise InputError("data.path must have readable images, got row 3")

    batches = ahead(made(), pinned=False)
    assert len(next(batches)) == 1
    with pytest.raises(InputError, match=r"^data\.path must have readable images, got row 3$"):
        next(batches)
    assert threads() == []


def test_a_caller_that_stops_early_ends_the_thread():
    with closing(ahead((pairs(1) for _ in count()), pinned=False)) as batches:
        next(batches)
        assert len(threads()) == 1
    assert threads() == []


def test_training_is_the_same_to_the_last_bit():
    def losses(batches):
        policy = toy()
        optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-2)
        return [r.metrics["loss"] for r in fit(policy, toy(), DiffusionDPO(), batches, optimizer, steps=4)]

    made = [pairs(4, seed=i) for i in range(4)]
    assert losses(iter(made)) == losses(ahead(iter(made), pinned=False))


@pytest.mark.gpu
def test_pinned_batches_hold_the_same_numbers():
    [batch] = ahead(iter([pairs(2)]), pinned=True)
    assert batch.x_w.is_pinned()
    assert batch.cond["c"].is_pinned()
    assert torch.equal(batch.to("cuda").x_l.cpu(), pairs(2).x_l)
