"""Diffusion-DPO end to end on numbers: a mixture of two Gaussians, and people who prefer the one at +1.

The figures that the assertions lean on are those of a reference run of the same experiment: slope b = beta / 2 of 50
moves the samples towards +1 while the winner's error falls; b = 1 is too weak a leash, both errors rise and samples
overshoot.
"""

import copy
import math

import pytest
import torch
from torch import nn

from diffalign.fit import fit
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.paths import DDPMPath
from diffalign.types import Cond, PairBatch
from tests.toys import Toy, sd_alpha_bar

pytestmark = pytest.mark.slow

BATCH = 512
PATH = DDPMPath(alpha_bar=sd_alpha_bar().float())
NOTHING = Cond({"c": torch.zeros(BATCH, 1)})


class MLP(nn.Module):
    """eps from (x, 16 sines and cosines of t)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), 8)))

    def forward(self, x, level, c):
        angles = level.float()[:, None] * self.frequencies
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1)
        return self.layers(features).reshape(x.shape)


def mixture(size: int, rng: torch.Generator, sign: torch.Tensor | None = None) -> torch.Tensor:
    sign = torch.randint(0, 2, (size, 1, 1, 1), generator=rng) * 2 - 1 if sign is None else sign
    return sign + 0.1 * torch.randn(size, 1, 1, 1, generator=rng)


@pytest.fixture(scope="module")
def base() -> MLP:
    """The pre-trained network: half of its samples are at +1, half at -1."""
    torch.manual_seed(0)
    net, rng = MLP(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(3000):
        x_0, t = mixture(BATCH, rng), torch.randint(1000, (BATCH,), generator=rng)
        eps = torch.randn(x_0.shape, generator=rng)
        alpha_bar = PATH.alpha_bar[t].reshape(-1, 1, 1, 1)
        pred = net(alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps, PATH.noise_level(t), None)
        loss = (pred - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def align(base: MLP, slope: float, *, winners: float = 1.0, steps: int = 300):
    """(network, first loss, mean metrics of the last 50 steps)."""
    net = copy.deepcopy(base)
    policy, reference = Toy(net=net, path=PATH), Toy(net=base, path=PATH)
    rng = torch.Generator().manual_seed(1)

    def batches():
        first = 0
        while True:
            x_w, x_l = (mixture(BATCH, rng, torch.tensor(s)) for s in (winners, -winners))
            yield PairBatch(x_w=x_w, x_l=x_l, cond=NOTHING, samples=tuple(range(first, first + BATCH)))
            first += BATCH

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    reports = list(fit(policy, reference, DiffusionDPO(beta=2 * slope), batches(), optimizer, steps=steps))
    last = {k: sum(r.metrics[k] for r in reports[-50:]) / 50 for k in reports[0].metrics}
    return net, reports[0].metrics["loss"], last


@torch.no_grad()
def samples(net: MLP, size: int = 2000) -> torch.Tensor:
    """Deterministic DDIM, 100 steps."""
    x = torch.randn(size, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    times = list(range(999, -1, -10))
    for t, s in zip(times, [*times[1:], None], strict=True):
        a = PATH.alpha_bar[t]
        eps = net(x, PATH.noise_level(torch.full((size,), t)), None)
        x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        after = torch.tensor(1.0) if s is None else PATH.alpha_bar[s]
        x = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    return x.flatten()


def test_the_base_is_balanced(base):
    assert 0.4 < (samples(base) > 0).float().mean() < 0.6


def test_a_firm_leash_moves_samples_to_the_winners_and_the_winners_error_falls(base):
    net, first, last = align(base, 50.0)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last["rewards/accuracies"] > 0.9
    assert last["winner_gain"] > 0
    x = samples(net)
    assert x.mean() > 0.2
    assert (x > 0).float().mean() > 0.6


def test_swapped_labels_move_samples_the_other_way(base):
    net, _, last = align(base, 50.0, winners=-1.0)
    assert last["rewards/accuracies"] > 0.9
    assert samples(net).mean() < -0.2


def test_a_weak_leash_displaces_both_and_overshoots(base):
    net, _, last = align(base, 1.0)
    assert last["rewards/accuracies"] > 0.9
    assert last["winner_gain"] < 0
    assert last["loser_gain"] < last["winner_gain"]
    assert samples(net).mean() > 1.1
