"""What methods share that noise their own samples afresh and need no transition densities, so any sampler will do.

Of an image x_0 and its x_t = alpha_t x_0 + sigma_t eps, three models predict the target: e, e_old and e_ref are their
squared errors averaged over elements, of the policy, of the old policy and of the reference. Papers on flows write t
for sigma_t. A is the image's advantage within its group. At policy = old, every method's gradient is A grad e times a
positive number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses, paths
from diffalign.advantages import Recipe
from diffalign.errors import InputError
from diffalign.methods.measure import reference_prediction
from diffalign.methods.selection import select_by_advantage
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import Denoiser, ImageBatch, ReferenceKind, Scored, Selection, Shared

ADVANTAGE_MAX = 5.0
"""Advantages are clipped to plus and minus this (`adv_clip_max` in the authors' codes)."""

Levels = Literal["walk", "path"]
"""Train at the t of the moves that made the image, or at a t that the noise path draws."""


@dataclass(frozen=True, kw_only=True)
class Renoised:
    """Images noised afresh, and what three models predict there; only `pred` carries gradient."""

    x_0: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    """What a native prediction should equal."""
    pred: Float[Tensor, "b c h w"]
    pred_old: Float[Tensor, "b c h w"] | None
    pred_ref: Float[Tensor, "b c h w"] | None
    sigma_t: Float[Tensor, " b"]
    factor: Float[Tensor, " b"]
    """Squared error in the method's error space divided by the squared native error."""
    noise_level: Float[Tensor, " b"]

    def residual(self, pred: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Prediction minus target in the error space, up to its sign."""
        return paths.broadcast(self.factor.sqrt(), pred) * (pred - self.target)

    def error(self, pred: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Squared error in the error space, averaged over elements."""
        return self.factor * losses.squared_error(pred, self.target)


def renoise(
    policy: Denoiser,
    reference: Denoiser | None,
    batch: ImageBatch,
    rng: SampleRng,
    *,
    old: Denoiser | None = None,
    error_space: ErrorSpace = "native",
    share_in_group: bool = False,
) -> Renoised:
    """Noises each image at `batch.t`, or else at a t that the path draws, and asks each model once.

    Args:
        reference, old: None leaves their predictions out.
        error_space: Which prediction the errors are between; `native` is the network's own.
        share_in_group: Images of one group get the same noise, and the same t where it is drawn.

    Raises:
        InputError: `share_in_group` and the batch does not say which images belong together.
    """
    stream = SampleRng(rng.seed, groups_of(batch)) if share_in_group else rng
    t = (policy.path.sample_t(stream) if batch.t is None else batch.t).to(batch.x_0.device)
    eps = stream.normal(batch.x_0, "noise")
    x_t = paths.add_noise(policy.path, batch.x_0, eps, t)
    pred_ref = None if reference is None else reference_prediction(reference, x_t, t, batch.cond)
    pred_old = None if old is None else reference_prediction(old, x_t, t, batch.cond)
    return Renoised(
        x_0=batch.x_0,
        target=paths.target(policy.path, policy.prediction, batch.x_0, eps, t),
        pred=policy(x_t, t, batch.cond),
        pred_old=pred_old,
        pred_ref=pred_ref,
        sigma_t=policy.path.coefficients(t)[1],
        factor=paths.error_factor(policy.path, policy.prediction, error_space, t),
        noise_level=policy.path.noise_level(t).float(),
    )


def adaptive_error(residual: Float[Tensor, " b *rest"]) -> Float[Tensor, " b"]:
    """mean(residual^2) / omega with omega = mean |residual|, at least 1e-5 and without gradient.

    Linear in the size of the residual, so that t of large errors do not drown the others.

    Paper: Zheng et al., "DiffusionNFT", arXiv 2509.16117, the self-normalised x_0 regression.
    """
    omega = residual.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return residual.square().flatten(1).mean(1) / omega


def weighted_kl(
    pred: Float[Tensor, "b c h w"], anchor: Float[Tensor, "b c h w"] | None, weight: float
) -> Float[Tensor, " b"]:
    """weight mean((pred - anchor)^2) of native predictions, the KL of papers on flows; 0 where the weight is.

    Raises:
        InputError: There is a weight and no anchor.
    """
    if weight == 0:
        return pred.new_zeros(len(pred))
    if anchor is None:
        raise InputError(f"reference must be given to a method with a KL weight, got None and {weight}")
    return weight * losses.squared_error(pred, anchor)


def references_for(kl_weight: float) -> tuple[ReferenceKind, ...]:
    """A reference where the KL weighs something; else one may be there to log the distance from it."""
    return ("start", "ema") if kl_weight > 0 else ("none", "start", "ema")


def old_policy(shared: Shared, method: str) -> Denoiser:
    """The old policy.

    Raises:
        InputError: There is none.
    """
    if shared.old is None:
        raise InputError(f"shared.old must be the old policy for method {method!r}, got None")
    return shared.old


def advantage_of(batch: ImageBatch, method: str) -> Float[Tensor, " b"]:
    """Advantages of a batch, clipped.

    Raises:
        InputError: It has none.
    """
    if batch.advantage is None:
        raise InputError(f"batch.advantage must be given for method {method!r}, got None")
    return batch.advantage.clamp(-ADVANTAGE_MAX, ADVANTAGE_MAX)


def groups_of(batch: ImageBatch) -> tuple[int, ...]:
    """Number of each image's group.

    Raises:
        InputError: The batch does not say.
    """
    if batch.group is None or len(batch.group) != len(batch):
        raise InputError(f"batch.group must have {len(batch)} numbers, one an image, got {batch.group!r}")
    return batch.group


def forward_metrics(f: Renoised, advantage: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
    """What every method of the family logs, per image and detached; names of the authors' codes where they have one.

    `err` and its like are split into `err_pos` and `err_neg` by the sign of the advantage; these average to the mean
    over the images of their sign. `kl_div` is the squared distance of the native prediction from the reference's,
    `old_kl_div` that of the old policy from it, `old_deviate` that of the policy from the old one. `norm_ratio` is the
    length of the prediction by that of the reference's: its growth shows in colours and contrast.
    """
    pred = f.pred.detach()
    squared_x_0 = f.x_0.square().flatten(1)
    found = {"x0_norm": squared_x_0.mean(1), "x0_norm_max": squared_x_0.amax(1)}
    found |= by_sign("err", f.error(pred), advantage)
    if f.pred_ref is not None:
        found |= by_sign("err_ref", f.error(f.pred_ref), advantage)
        found["kl_div"] = losses.squared_error(pred, f.pred_ref)
        lengths = [p.flatten(1).norm(dim=1) for p in (pred, f.pred_ref)]
        found["norm_ratio"] = lengths[0] / lengths[1].clamp(min=1e-12)
    if f.pred_old is not None:
        found |= by_sign("err_old", f.error(f.pred_old), advantage)
        deviate = (pred - f.pred_old).square().flatten(1)
        found |= {"old_deviate": deviate.mean(1), "old_deviate_max": deviate.amax(1)}
    if f.pred_ref is not None and f.pred_old is not None:
        found["old_kl_div"] = losses.squared_error(f.pred_old, f.pred_ref)
    return found


def by_sign(name: str, values: Float[Tensor, " b"], advantage: Float[Tensor, " b"]) -> dict[str, Float[Tensor, " b"]]:
    """Values under their name, and under `_pos` and `_neg` scaled to average to the mean of their sign."""
    found = {name: values}
    for suffix, on in (("pos", advantage > 0), ("neg", advantage < 0)):
        found[f"{name}_{suffix}"] = values * on * len(on) / on.sum().clamp(min=1)
    return found


def select_images(
    scored: Scored, change: Callable[[Float[Tensor, " m"]], Float[Tensor, " m"]] = lambda advantage: advantage
) -> Selection:
    """All images of prompts whose images differ in score, with their advantages: (R - mean of its prompt) / std of all.

    Args:
        change: What is made of the clipped advantages.
    """
    found = select_by_advantage(scored, Recipe(advantage="global_std", combine="scores", clip_advantage=ADVANTAGE_MAX))
    assert found.weight is not None, "an advantage is one"
    return replace(found, weight=change(found.weight))


def leading(fraction: float, moves: int) -> int:
    """How many moves are in this share of a walk, from the noisiest on; at least one."""
    return max(1, int(fraction * moves))


def count_levels(levels: int, count: int | None, where: str) -> int:
    """How many of `levels` levels are trained: all, or `count`.

    Raises:
        InputError: There are not as many.
    """
    if levels < max(1, count or 1):
        raise InputError(
            f"method.level_count must be at most {levels}, as many as there are {where}, got {count}; take more moves "
            "or fewer levels"
        )
    return levels if count is None else count


def draw_levels(levels: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` different ones of the first `levels` moves, in random order."""
    return tuple(torch.randperm(levels, generator=generator)[:count].tolist())


def check_at_least(least: int, **values: int | float | None) -> None:
    """Raises InputError for a hyperparameter that is less; None is not set."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InputError(f"method.{name} must be at least {least}, got {value}")


def check_positive(**values: int | float | None) -> None:
    """Raises InputError for a hyperparameter that is not positive; None is not set."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InputError(f"method.{name} must be positive, got {value}")


def check_fraction(**values: int | float) -> None:
    """Raises InputError for a hyperparameter outside (0, 1]."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise InputError(f"method.{name} must be in (0, 1], got {value}")
