"""Twenty steps of every method on a toy, compared with stored numbers: a refactor changes none of them.

`python -m tests.test_golden` writes them anew; the commit that does so says why.
"""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from diffalign.environment import versions
from diffalign.fit import fit
from diffalign.methods import METHODS
from tests.toys import ON_DATA, images, pairs, toy

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
}
"""beta in the thousands would magnify the last digits, which differ between processors."""


def run(name: str) -> dict[str, list[float]]:
    """Losses of 20 steps by prediction type."""
    method = METHODS[name](**OPTIONS.get(name, {}))
    losses = {}
    for prediction in PREDICTIONS:
        policy = toy(prediction)
        make = pairs if method.needs.batches == "pairs" else images
        batches = (make(8, seed=i) for i in count())
        optimizer = torch.optim.AdamW(policy.net.parameters(), lr=1e-4)
        reports = fit(policy, toy(prediction), method, batches, optimizer, steps=20, max_grad_norm=1.0)
        losses[prediction] = [report.metrics["loss"] for report in reports]
    return losses


@pytest.mark.parametrize("name", ON_DATA)
def test_twenty_steps_give_the_stored_losses(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    for prediction, losses in run(name).items():
        assert losses == pytest.approx(stored["losses"][prediction], abs=1e-5), f"made with {stored['versions']}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in ON_DATA:
        content = {"versions": versions(("torch", "numpy")), "losses": run(method)}
        (FOLDER / f"{method}.json").write_text(json.dumps(content, indent=1) + "\n")
