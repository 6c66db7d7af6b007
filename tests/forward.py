"""Own images with advantages, and what every method that noises them afresh is held against."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import losses, paths
from diffalign.paths import NoisePath, Prediction
from diffalign.rng import SampleRng
from diffalign.types import Cond, ImageBatch, Scored, Shared
from tests.toys import images, toy

RNG = SampleRng(0, (0, 1, 2, 3))
PREDICTIONS = ["epsilon", "v_prediction", "velocity"]
ADVANTAGE = torch.tensor([1.2, 0.1, -0.4, -0.9])


def own(prediction: str = "velocity", **changes: Any) -> ImageBatch:
    """Four images of one prompt with advantages that add up to 0, at levels of a walk."""
    t = torch.tensor([0.9, 0.6, 0.3, 0.1]) if prediction == "velocity" else torch.tensor([901, 601, 301, 101])
    return replace(images(), **({"label": None, "advantage": ADVANTAGE, "t": t, "group": (7, 7, 7, 7)} | changes))


@dataclass(frozen=True)
class Fixed(SampleRng):
    """Noise that the test gives."""

    noise: Any = None

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        return self.noise


@dataclass(frozen=True, kw_only=True)
class Given:
    """A denoiser that predicts what the test gives it, whatever it sees."""

    pred: Any
    path: NoisePath
    prediction: Prediction = "velocity"

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.pred


def drawn(policy: Any, batch: ImageBatch, method: Any, rng: SampleRng = RNG) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, target, prediction) at the noise that a method draws."""
    stream = SampleRng(rng.seed, batch.group) if method.needs.whole_groups else rng
    eps = stream.normal(batch.x_0, "noise")
    x_t = paths.add_noise(policy.path, batch.x_0, eps, batch.t)
    target = paths.target(policy.path, policy.prediction, batch.x_0, eps, batch.t)
    return x_t, target, policy(x_t, batch.t, batch.cond)


def native_errors(policy: Any, batch: ImageBatch, method: Any) -> Tensor:
    _, target, pred = drawn(policy, batch, method)
    return losses.squared_error(pred, target)


def flat_gradient(value: Tensor, net: nn.Module) -> Tensor:
    grads = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def at_old(method: Any, prediction: str = "velocity", **changes: Any) -> tuple[Any, Any]:
    """(output, policy) where policy, old policy and reference are one."""
    policy, same = toy(prediction), toy(prediction)
    return method(policy, same, own(prediction, **changes), RNG, Shared(old=same)), policy


def apart(method: Any, prediction: str = "velocity", **changes: Any) -> tuple[Any, Any]:
    """(output, policy) where all three differ."""
    policy, reference, old = (toy(prediction, seed=seed) for seed in (1, 0, 2))
    return method(policy, reference, own(prediction, **changes), RNG, Shared(old=old)), policy


def scored(scores: list[float], group: list[int]) -> Scored:
    return Scored(
        scores={"clip": torch.tensor(scores)},
        weights={"clip": 1.0},
        group=torch.tensor(group),
        prompts=[f"prompt {i}" for i in sorted(set(group))],
    )
