"""What the method table measures of a network, in the same way for every method.

Images: one a held-out caption, from noise that belongs to the caption. Errors: winners and losers of held-out pairs at
fixed noise on ten levels of the noise range, by the policy and by the base model. Work: rows that go through the
network while it trains.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffalign import losses, paths, rewards
from diffalign.evaluate.generate import generate
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.rewards.clip import CLIPEncoder
from diffalign.rng import SampleRng
from diffalign.tiny import scenes
from diffalign.tiny.build import GUIDANCE
from diffalign.types import Cond, Denoiser, PairBatch, RewardBatch

PROMPTS = 512
"""Held-out captions, one image each."""
PROMPT_SEED = 1009
"""Of the table's captions."""
TRIAL_SEED = 777
"""Of the captions that trials are judged by, so that no hyperparameter is chosen on the table's own."""
SAMPLER_STEPS = 10
IMAGE_BATCH = 64
ERROR_PAIRS = 64
"""Held-out pairs whose errors are measured."""
LEVELS = tuple((i + 0.5) / 10 for i in range(10))
"""Shares of the noise range at which they are."""
JUDGES = {"oracle": "oracle", "clip": "clip:tiny-clip", "aesthetic": "aesthetic:tiny-aesthetic"}
"""Rewards by name; the oracle's taste labelled the pairs, the other two had no part in anything."""
ENDS = {"sd": ("conv_in", "conv_out"), "sd3": ("pos_embed", "proj_out")}
"""First and last module of a family's network: every pass enters the first, a whole one reaches the last."""

Images = UInt8[np.ndarray, "n h w 3"]


@cache
def captions(seed: int = PROMPT_SEED, count: int = PROMPTS) -> tuple[str, ...]:
    """Distinct captions, each of a thing whose combination of shape, colour and place was never trained on."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[scenes.caption(scenes.draw_scene(rng, "held_out"), rng)] = None
    return tuple(found)


def make_images(
    source: ModelSource, prompts: Sequence[str], net: nn.Module | None = None, *, guidance: float = GUIDANCE
) -> Images:
    """One image a prompt by a model, or by a network in its place, from noise that belongs to the prompt."""
    pipeline = load_pipeline(source, net=net)
    made = generate(
        pipeline,
        detect_family(source),
        prompts,
        steps=SAMPLER_STEPS,
        guidance=guidance,
        batch_size=IMAGE_BATCH,
    )
    return np.stack([(one.image * 255).round().byte().permute(1, 2, 0).numpy() for one in made])


def as_tensor(images: Images) -> Float[Tensor, "n 3 h w"]:
    """Images as rewards take them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def judge(images: Images, prompts: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(scores by reward, the oracle's attributes by name), one number an image."""
    batch = RewardBatch(images=as_tensor(images), prompts=list(prompts))
    outputs = {name: rewards.load(spec).score(batch) for name, spec in JUDGES.items()}
    scores = {name: _rounded(out.scores) for name, out in outputs.items()}
    return scores, {name: _rounded(values) for name, values in outputs["oracle"].raw.items()}


def embed(images: Images) -> Float[Tensor, "n d"]:
    """Unit embeddings by tiny-clip."""
    return CLIPEncoder("tiny-clip").embed_images(as_tensor(images))


def diversity(embeddings: Float[Tensor, "n d"]) -> dict[str, float]:
    """How different images are from each other.

    `cosine_distance` is the mean of 1 - cosine over all pairs of images. `vendi` is exp of the entropy of the
    eigenvalues of the cosine kernel divided by n: 1 where all images are alike, n where no two have anything in common.

    Paper: Friedman and Dieng, "The Vendi Score", arXiv 2210.02410.
    """
    n = len(embeddings)
    e = embeddings.double()
    distance = 1 - (e.sum(0).square().sum() - e.square().sum()) / (n * (n - 1))
    shares = torch.linalg.eigvalsh(e.T @ e / n).clamp(min=0)
    return {"cosine_distance": float(distance), "vendi": float(torch.special.entr(shares).sum().exp())}


@torch.no_grad()
def movement(policy: Denoiser, base: Denoiser, batch: PairBatch, levels: Sequence[float] = LEVELS) -> dict[str, float]:
    """Errors of winners and losers against the base model's, and how far predictions moved.

    Errors are squared, averaged over elements, pairs and noise levels, in the network's own prediction. `winner` and
    `loser` are error - error of the base: below 0 means that the policy draws such images better than before.
    `prediction_drift` is the mean squared difference of the two predictions.
    """
    x_0, cond = torch.cat([batch.x_w, batch.x_l]), batch.cond.repeat(2)
    err, err_base, moved = [], [], []
    for i, level in enumerate(levels):
        rng = SampleRng(PROMPT_SEED, tuple(i * len(batch) + row for row in range(len(batch))))
        eps = rng.normal(batch.x_w, "noise").repeat(2, 1, 1, 1)
        t = policy.path.at(torch.full((len(x_0),), level, dtype=torch.float64))
        x_t = paths.add_noise(policy.path, x_0, eps, t)
        target = paths.target(policy.path, policy.prediction, x_0, eps, t)
        pred, pred_base = policy(x_t, t, cond), base(x_t, t, cond)
        err.append(losses.squared_error(pred, target))
        err_base.append(losses.squared_error(pred_base, target))
        moved.append(losses.squared_error(pred, pred_base))
    (w, lo), (base_w, base_l) = (torch.stack(e).mean(0).chunk(2) for e in (err, err_base))
    return {
        "winner": float((w - base_w).mean()),
        "loser": float((lo - base_l).mean()),
        "winner_base": float(base_w.mean()),
        "loser_base": float(base_l.mean()),
        "prediction_drift": float(torch.stack(moved).mean()),
    }


def pixel_distance(images: Images, base: Images) -> float:
    """Mean absolute difference of two sets of images made from the same noise, in shares of the range."""
    return float(np.abs(images.astype(np.float64) - base.astype(np.float64)).mean() / 255)


def pair_tensors(batch: PairBatch) -> dict[str, Tensor]:
    """A batch of pairs as tensors by name, to be kept in a file."""
    return {"x_w": batch.x_w, "x_l": batch.x_l, **{f"cond.{k}": v for k, v in batch.cond.tensors.items()}}


def pair_batch(tensors: Mapping[str, Tensor]) -> PairBatch:
    """The batch of such tensors."""
    cond = {name.removeprefix("cond."): value for name, value in tensors.items() if name.startswith("cond.")}
    x_w = tensors["x_w"].float()
    return PairBatch(x_w=x_w, x_l=tensors["x_l"].float(), cond=Cond(cond), samples=tuple(range(len(x_w))))


@dataclass
class Work:
    """Rows that went through a network, with and without gradient, while nobody paused the count."""

    entered: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    """By whether gradients were kept."""
    finished: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    paused: bool = False

    def record(self, samples: int) -> dict[str, float]:
        """Passes for each of `samples` that were trained on; a partial one leaves the network before its end."""
        return {
            "with_gradient": self.finished[True] / samples,
            "without_gradient": self.finished[False] / samples,
            "partial_with_gradient": (self.entered[True] - self.finished[True]) / samples,
            "partial_without_gradient": (self.entered[False] - self.finished[False]) / samples,
        }


@contextmanager
def counting(net: nn.Module, ends: tuple[str, str]) -> Iterator[Work]:
    """Counts rows at the first and the last module of a network; a copy of it made inside counts too."""
    work = Work()

    def tally(into: dict[bool, int]) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            if not work.paused:
                into[torch.is_grad_enabled()] += len(inputs[0])

        return hook

    modules = [net.get_submodule(name) for name in ends]
    hooks = [
        module.register_forward_pre_hook(tally(into))
        for module, into in zip(modules, (work.entered, work.finished), strict=True)
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
