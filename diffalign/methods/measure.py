"""How the log-ratio of a sample is measured on denoising errors: one t and one noise per pair, four errors.

With err the squared error averaged over elements, an image's log-ratio is err_ref - err up to the factor beta / 2.
Winner and loser share t and noise, which cancels what the errors have in common.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses, paths
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import Denoiser, ImageBatch, PairBatch


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Squared errors averaged over elements, float32; the first two carry gradient."""

    err_w: Float[Tensor, " b"]
    err_l: Float[Tensor, " b"]
    err_ref_w: Float[Tensor, " b"]
    err_ref_l: Float[Tensor, " b"]
    noise_level: Float[Tensor, " b"]
    """Share of the noise range at each pair's t."""


def pair_errors(
    policy: Denoiser,
    reference: Denoiser,
    batch: PairBatch,
    rng: SampleRng,
    *,
    error_space: ErrorSpace = "native",
    share_noise: bool = True,
) -> PairErrors:
    """The four squared errors of each pair, from one forward pass of each model on the joined [2B] batch.

    Args:
        error_space: Which prediction the errors are between; `native` is the network's own.
        share_noise: Winner and loser get the same noise; False draws the loser's apart.

    Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14.
    """
    device = batch.x_w.device
    x_0 = torch.cat([batch.x_w, batch.x_l])  # [2B, C, H, W]
    cond = batch.cond.repeat(2)
    t = policy.path.sample_t(rng).to(device).repeat(2)
    eps_w = rng.normal(batch.x_w, "noise")
    eps = torch.cat([eps_w, eps_w if share_noise else rng.normal(batch.x_l, "noise_l")])
    x_t = paths.add_noise(policy.path, x_0, eps, t)
    target = paths.target(policy.path, policy.prediction, x_0, eps, t)
    factor = paths.error_factor(policy.path, policy.prediction, error_space, t)
    with torch.no_grad():
        err_ref = factor * losses.squared_error(reference(x_t, t, cond), target)
    err = factor * losses.squared_error(policy(x_t, t, cond), target)
    err_w, err_l = err.chunk(2)
    err_ref_w, err_ref_l = err_ref.chunk(2)
    level = policy.path.noise_level(t[: len(batch)]).float()
    return PairErrors(err_w=err_w, err_l=err_l, err_ref_w=err_ref_w, err_ref_l=err_ref_l, noise_level=level)


def image_errors(
    policy: Denoiser, batch: ImageBatch, rng: SampleRng, *, error_space: ErrorSpace = "native"
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Squared error of each image at one t and one noise, averaged over elements, and its noise level."""
    t = policy.path.sample_t(rng).to(batch.x_0.device)
    eps = rng.normal(batch.x_0, "noise")
    x_t = paths.add_noise(policy.path, batch.x_0, eps, t)
    target = paths.target(policy.path, policy.prediction, batch.x_0, eps, t)
    err = losses.squared_error(policy(x_t, t, batch.cond), target)
    factor = paths.error_factor(policy.path, policy.prediction, error_space, t)
    return factor * err, policy.path.noise_level(t).float()


def pair_metrics(
    errors: PairErrors, implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]
) -> dict[str, Float[Tensor, " b"]]:
    """What every pair method logs, per pair and detached.

    `rewards/*` are TRL's names for the implicit rewards; a margin of exactly 0 counts half in `rewards/accuracies`.
    `winner_gain` and `loser_gain` are err_ref - err: both falling below 0 is likelihood displacement, and `displaced`
    is the share of pairs that win their margin although the winner got worse. `unsaturated` is sigmoid(-margin), the
    weight that the sigmoid link leaves to a pair.
    """
    margin = (implicit_w - implicit_l).detach()
    winner_gain = (errors.err_ref_w - errors.err_w).detach()
    loser_gain = (errors.err_ref_l - errors.err_l).detach()
    return {
        "rewards/chosen": implicit_w.detach(),
        "rewards/rejected": implicit_l.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "err_w": errors.err_w.detach(),
        "err_l": errors.err_l.detach(),
        "err_ref_w": errors.err_ref_w,
        "err_ref_l": errors.err_ref_l,
        "winner_gain": winner_gain,
        "loser_gain": loser_gain,
        "displaced": ((winner_gain < 0) & (winner_gain > loser_gain)).float(),
        "unsaturated": torch.sigmoid(-margin),
    }
