"""Twenty steps of every method on a toy, compared with stored numbers: a refactor changes none of them.

`python -m tests.test_golden` writes them anew; the commit that does so says why.
"""

import json
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import pytest
import torch

from diffalign.environment import versions
from diffalign.fit import fit
from diffalign.methods import METHODS
from diffalign.types import Batch, Needs, TransitionBatch, TransitionPairs
from tests.forward import own
from tests.moves import moves, rows, walk_of
from tests.toys import images, pairs, toy

FOLDER = Path(__file__).parent / "golden"
PREDICTIONS = ("epsilon", "velocity")
OPTIONS = {
    "diffusion_dpo": {"beta": 10.0},
    "ncp_cpo": {"beta": 10.0, "both": 1e3},
    "ncp_dpo": {"beta": 10.0, "both": 1e3},
    "ncp_sft": {"both": 1e3},
    "cpo": {"beta": 10.0},
    "diffusion_kto": {"beta": 10.0},
    "dmpo": {"beta": 10.0},
    "linear_dpo": {"beta": 10.0},
    "inpo": {"beta": 10.0},
    "seppo": {"beta": 10.0},
    "smpo": {"beta": 10.0},
    "spin": {"beta": 10.0},
    "d3po": {"beta": 1.0},
    "dgpo": {"beta": 10.0},
    "dragon": {"beta": 10.0},
    "online_dpo": {"beta": 10.0},
}
"""beta in the thousands would magnify the last digits, which differ between processors."""
WALKS = {"epsilon": ("ddim", {"eta": 1.0}), "velocity": ("flow_sde", {})}


def batches(needs: Needs, prediction: str) -> Iterator[Batch]:
    """Batches without end: 8 images or pairs of noise, or 4 moves that the policy made before its first step."""
    items = needs.batches if needs.items is None else needs.items
    if items in ("transitions", "transition_pairs"):
        name, options = WALKS[prediction]
        every = moves(toy(prediction), walk_of(name, **options))
        parts = [rows(every, slice(first, first + 4)) for first in range(0, len(every), 4)]
        yield from cycle(parts if items == "transitions" else map(paired, parts))
    for seed in count():
        if needs.items == "images":
            yield own(prediction, x_0=images(4, seed).x_0)
        else:
            yield pairs(8, seed) if items == "pairs" else images(8, seed)


def paired(batch: TransitionBatch) -> TransitionPairs:
    """The first two moves against the last two, all of one number."""
    return TransitionPairs(
        x_t_w=batch.x_t[:2],
        x_s_w=batch.x_s[:2],
        x_t_l=batch.x_t[2:],
        x_s_l=batch.x_s[2:],
        step=batch.step[:2],
        cond=batch.cond.rows(slice(2)),
        walk=batch.walk,
        samples=batch.samples[:2],
    )


def run(name: str) -> dict[str, list[float]]:
    """Losses of 20 steps by prediction type."""
    method = METHODS[name](**OPTIONS.get(name, {}))
    needs, losses = method.needs, {}
    for prediction in PREDICTIONS:
        policy = toy(prediction)
        optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-4)
        reports = fit(
            policy,
            None if needs.references[0] == "none" else toy(prediction),
            method,
            batches(needs, prediction),
            optimizer,
            steps=20,
            max_grad_norm=1.0,
            old=toy(prediction) if needs.old else None,
        )
        losses[prediction] = [report.metrics["loss"] for report in reports]
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_give_the_stored_losses(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    for prediction, losses in run(name).items():
        assert losses == pytest.approx(stored["losses"][prediction], abs=1e-5), f"made with {stored['versions']}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in METHODS:
        content = {"versions": versions(("torch", "numpy")), "losses": run(method)}
        (FOLDER / f"{method}.json").write_text(json.dumps(content, indent=1) + "\n")
