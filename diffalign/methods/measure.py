"""How the log-ratio of a sample is measured on denoising errors: one t and one noise per pair, four errors.

With err the squared error averaged over elements, an image's log-ratio is err_ref - err up to the factor beta / 2.
Winner and loser share t and noise, which cancels what the errors have in common. Without a reference err_ref is 0.
The difference is formed element by element and then averaged, see `losses.error_gain`; its gradient is that of -err.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign import losses, paths
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Cond, Denoiser, ImageBatch, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class Safeguard:
    """Scales the loser's gradient so that, to first order, a step does not raise the winner's error.

    Paper: Fu et al., "Diffusion-SDPO", arXiv 2511.03317; AIDC-AI/Diffusion-SDPO.
    Departs: the dot product is taken of the residuals themselves, in float32, with a guard of 1e-12 beside them; the
    release guards the mean-squared-error gradients, 2 / N times smaller, with 1e-9.
    """

    mu: float
    """Slack in [0, 1]: the share of the winner's descent that stays. Paper: 0.9 for SD 1.5, 0.6 for SDXL."""
    per_pair: bool = False
    """One factor a pair, instead of the paper's one a micro-batch and process."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise InputError(f"method.safeguard.mu must be in [0, 1], got {self.mu}")


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Squared errors averaged over elements, float32; the first two carry gradient."""

    err_w: Float[Tensor, " b"]
    err_l: Float[Tensor, " b"]
    noise_level: Float[Tensor, " b"]
    """Share of the noise range at each pair's t."""
    err_ref_w: Float[Tensor, " b"] | None = None
    """None without a reference."""
    err_ref_l: Float[Tensor, " b"] | None = None
    lead_w: Float[Tensor, " b"] | None = None
    """err_ref_w - err_w to more digits than the two have, without gradient; None takes their difference."""
    lead_l: Float[Tensor, " b"] | None = None
    metrics: dict[str, Float[Tensor, " b"]] = field(default_factory=dict)
    """What only the predictions themselves could tell: detached, per pair."""

    @property
    def gain_w(self) -> Float[Tensor, " b"]:
        """err_ref_w - err_w: the winner's log-ratio, up to the factor beta / 2."""
        return gain_of(self.err_w, self.err_ref_w, self.lead_w)

    @property
    def gain_l(self) -> Float[Tensor, " b"]:
        """err_ref_l - err_l: the loser's log-ratio, up to the factor beta / 2."""
        return gain_of(self.err_l, self.err_ref_l, self.lead_l)


def gain_of(
    err: Float[Tensor, " b"], err_ref: Float[Tensor, " b"] | None, lead: Float[Tensor, " b"] | None
) -> Float[Tensor, " b"]:
    """err_ref - err with the gradient of -err, and with the value `lead` where that is known to more digits.

    Args:
        err_ref: None without a reference, whose error is 0 then.
    """
    if err_ref is None:
        return -err
    return err_ref - err if lead is None else lead + (err.detach() - err)


def pair_errors(
    policy: Denoiser,
    reference: Denoiser | None,
    batch: PairBatch,
    rng: SampleRng,
    *,
    error_space: ErrorSpace = "native",
    share_noise: bool = True,
    safeguard: Safeguard | None = None,
) -> PairErrors:
    """The four squared errors of each pair, from one forward pass of each model on the joined [2B] batch.

    Args:
        reference: None leaves its errors out. It is not run where the batch has its errors.
        error_space: Which prediction the errors are between; `native` is the network's own.
        share_noise: Winner and loser get the same noise; False draws the loser's apart.
        safeguard: Scales the gradient of the loser's error; values stay as they are.

    Paper: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908, eq. 14.
    """
    t = policy.path.sample_t(rng).to(batch.x_w.device, non_blocking=True)
    eps_w = rng.normal(batch.x_w, "noise")
    eps = torch.cat([eps_w, eps_w if share_noise else rng.normal(batch.x_l, "noise_l")])
    x_0 = torch.cat([batch.x_w, batch.x_l])  # [2B, C, H, W]
    x_t = paths.add_noise(policy.path, x_0, eps, t.repeat(2))
    return errors_at(policy, reference, batch, x_t, eps, t, error_space=error_space, safeguard=safeguard)


def errors_at(
    policy: Denoiser,
    reference: Denoiser | None,
    batch: PairBatch,
    x_t: Float[Tensor, "two_b c h w"],
    eps: Float[Tensor, "two_b c h w"],
    t: Shaped[Tensor, " b"],
    *,
    error_space: ErrorSpace = "native",
    safeguard: Safeguard | None = None,
) -> PairErrors:
    """The four squared errors of each pair at given noised latents; winners first, then losers.

    Args:
        x_t: Noised latents of winners and losers, joined.
        eps: The noise that explains each: x_t = alpha_t x_0 + sigma_t eps.
        t: One per pair.
    """
    x_0 = torch.cat([batch.x_w, batch.x_l])
    cond, twice = batch.cond.repeat(2), t.repeat(2)
    target = paths.target(policy.path, policy.prediction, x_0, eps, twice)
    factor = paths.error_factor(policy.path, policy.prediction, error_space, twice)
    known = None if reference is None or batch.err_ref is None else batch.err_ref.T.flatten()  # [2B]
    pred_ref = None if reference is None or known is not None else reference_prediction(reference, x_t, twice, cond)
    pred = policy(x_t, twice, cond)
    level = policy.path.noise_level(t).float()
    return errors_between(pred, target, pred_ref, noise_level=level, factor=factor, safeguard=safeguard, known=known)


def errors_between(
    pred: Float[Tensor, " two_b *rest"],
    target: Float[Tensor, " two_b *rest"],
    pred_ref: Float[Tensor, " two_b *rest"] | None,
    *,
    noise_level: Float[Tensor, " b"],
    factor: Float[Tensor, " two_b"],
    safeguard: Safeguard | None = None,
    known: Float[Tensor, " two_b"] | None = None,
) -> PairErrors:
    """The four squared errors of each pair, of what was predicted for winners first, then losers.

    Args:
        pred: With gradient.
        factor: What each squared error is multiplied by.
        known: The reference's errors in float64, in place of its predictions.
    """
    err = factor * losses.squared_error(pred, target)
    metrics: dict[str, Tensor] = {}
    err_ref, lead = reference_errors(pred, target, pred_ref, factor, known)
    if pred_ref is not None:
        moved = (factor * losses.squared_error(pred.detach(), pred_ref)).chunk(2)
        metrics |= {"kl_w": moved[0], "kl_l": moved[1]}
    err_w, err_l = err.chunk(2)
    if safeguard is not None:
        residuals = (paths.broadcast(factor.sqrt(), pred) * (pred - target)).detach()
        factor_l = safeguard_factor(*residuals.chunk(2), mu=safeguard.mu, per_pair=safeguard.per_pair)
        err_l = scale_gradient(err_l, factor_l)
        metrics["lambda_safe"] = factor_l
    refs, leads = _halves(err_ref), _halves(lead)
    return PairErrors(
        err_w=err_w,
        err_l=err_l,
        err_ref_w=refs[0],
        err_ref_l=refs[1],
        lead_w=leads[0],
        lead_l=leads[1],
        noise_level=noise_level,
        metrics=metrics,
    )


def _halves(both: Float[Tensor, " two_b"] | None) -> tuple[Tensor | None, Tensor | None]:
    if both is None:
        return None, None
    w, lo = both.chunk(2)
    return w, lo


def reference_errors(
    pred: Float[Tensor, " b *rest"],
    target: Float[Tensor, " b *rest"],
    pred_ref: Float[Tensor, " b *rest"] | None,
    factor: Float[Tensor, " b"],
    known: Float[Tensor, " b"] | None,
) -> tuple[Float[Tensor, " b"] | None, Float[Tensor, " b"] | None]:
    """(err_ref, err_ref - err to more digits), without gradient; (None, None) without a reference.

    Where the reference's errors are `known`, in float64, the policy's are averaged in float64 too: what was averaged
    apart cannot be subtracted element by element.
    """
    if known is not None:
        err = factor * losses.squared_error(pred.detach().double(), target)
        return known.to(target.dtype), (known - err).to(target.dtype)
    if pred_ref is None:
        return None, None
    return factor * losses.squared_error(pred_ref, target), factor * losses.error_gain(pred, pred_ref, target)


def reference_prediction(
    reference: Denoiser, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond
) -> Float[Tensor, "b c h w"]:
    """The reference's native output, without gradient."""
    with torch.no_grad():
        return reference(x_t, t, cond)


@dataclass(frozen=True, kw_only=True)
class ImageErrors:
    """Squared errors of single images, averaged over elements; the first carries gradient."""

    err: Float[Tensor, " b"]
    err_ref: Float[Tensor, " b"] | None
    """None without a reference."""
    noise_level: Float[Tensor, " b"]
    """Share of the noise range at each image's t."""
    lead: Float[Tensor, " b"] | None = None
    """err_ref - err to more digits than the two have, without gradient; None takes their difference."""

    @property
    def gain(self) -> Float[Tensor, " b"]:
        """err_ref - err: the image's log-ratio, up to a factor."""
        return gain_of(self.err, self.err_ref, self.lead)


def image_errors(
    policy: Denoiser,
    reference: Denoiser | None,
    batch: ImageBatch,
    rng: SampleRng,
    *,
    error_space: ErrorSpace = "native",
) -> ImageErrors:
    """Squared errors of each image at a t and a noise of its own."""
    t = policy.path.sample_t(rng).to(batch.x_0.device, non_blocking=True)
    eps = rng.normal(batch.x_0, "noise")
    x_t = paths.add_noise(policy.path, batch.x_0, eps, t)
    target = paths.target(policy.path, policy.prediction, batch.x_0, eps, t)
    factor = paths.error_factor(policy.path, policy.prediction, error_space, t)
    level = policy.path.noise_level(t).float()
    known = None if reference is None or batch.err_ref is None else batch.err_ref[:, 0]
    pred_ref = None if reference is None or known is not None else reference_prediction(reference, x_t, t, batch.cond)
    pred = policy(x_t, t, batch.cond)
    err = factor * losses.squared_error(pred, target)
    err_ref, lead = reference_errors(pred, target, pred_ref, factor, known)
    return ImageErrors(err=err, err_ref=err_ref, noise_level=level, lead=lead)


def safeguard_factor(
    residual_w: Float[Tensor, " b *rest"], residual_l: Float[Tensor, " b *rest"], *, mu: float, per_pair: bool = False
) -> Float[Tensor, " b"]:
    """What the loser's gradient is multiplied by so that the winner's error does not rise to first order.

    clip((1 - mu) |rho_w|^2 / <rho_w, rho_l>, 0, 1) where the dot product is positive, else 1; detached.

    Args:
        residual_w, residual_l: Prediction minus target, rho, of winners and losers at the same noise.
        mu: Share of the winner's descent that stays, in [0, 1].
        per_pair: One factor a pair; False takes the whole micro-batch as one vector, and every pair the same factor.

    Paper: Fu et al., "Diffusion-SDPO", arXiv 2511.03317.
    """
    w, lo = (r.detach().float() if r.dtype.itemsize < 4 else r.detach() for r in (residual_w, residual_l))
    w, lo = (r.flatten(1) if per_pair else r.reshape(1, -1) for r in (w, lo))
    dot, norm = (w * lo).sum(1), w.square().sum(1)
    factor = torch.where(dot > 0, ((1 - mu) * norm / (dot + 1e-12)).clamp(0, 1), torch.ones_like(dot))
    return factor.expand(len(residual_w))


def scale_gradient(value: Float[Tensor, " b"], factor: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The same values, with their gradient multiplied by a factor per sample."""
    return value.detach() + factor * (value - value.detach())


@dataclass(frozen=True, kw_only=True)
class ScoreUse:
    """What a method makes of the scores that a judge gave to the two images of a pair."""

    soft: float | None = None
    """Temperature T of soft labels: the winner is better with probability S((score_w - score_l) / T)."""
    margin: float | None = None
    """Offset a: the winner must lead by a (score_w - score_l) nats. Amini et al., ODPO, arXiv 2402.10571, with the
    identity in place of the logarithm, which knows no negative gap."""

    def __post_init__(self) -> None:
        if self.soft is None and self.margin is None:
            raise InputError("method.scores must set soft or margin, got neither")
        if self.soft is not None and self.soft <= 0:
            raise InputError(f"method.scores.soft must be positive, got {self.soft}")


def pair_step(
    errors: PairErrors,
    implicit_w: Float[Tensor, " b"],
    implicit_l: Float[Tensor, " b"],
    *,
    link: Link,
    batch: PairBatch,
    shared: Shared = ALONE,
    scores: ScoreUse | None = None,
) -> StepLoss:
    """A link on two implicit rewards, and what every pair method logs.

    Raises:
        InputError: `scores` is asked for and the batch has none.
    """
    rewards = None
    chosen = link
    if losses.follows_mean(link):
        chosen = partial(losses.bco_pair, delta=shared.rewards.mean)
        rewards = shared.rewards.add(torch.cat([implicit_w, implicit_l]), shared.reduce)
    if scores is None:
        loss = chosen(implicit_w, implicit_l)
    else:
        gap = score_gap(batch)
        lifted = implicit_w if scores.margin is None else implicit_w - scores.margin * gap
        p = torch.ones_like(gap) if scores.soft is None else torch.sigmoid(gap / scores.soft)
        loss = losses.soft_label(chosen, lifted, implicit_l, p)
    metrics = pair_metrics(errors, implicit_w, implicit_l)
    return StepLoss(loss=loss, metrics=metrics, noise_level=errors.noise_level, rewards=rewards)


def score_gap(batch: PairBatch) -> Float[Tensor, " b"]:
    """score_w - score_l.

    Raises:
        InputError: The batch has no scores.
    """
    score_w, score_l = scores_of(batch)
    return score_w - score_l


def scores_of(batch: PairBatch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """A judge's scores of winners and losers.

    Raises:
        InputError: The batch has none.
    """
    if batch.score_w is None or batch.score_l is None:
        raise InputError("data.path must have score columns for this method, got a batch without scores")
    return batch.score_w, batch.score_l


def pair_metrics(
    errors: PairErrors, implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]
) -> dict[str, Float[Tensor, " b"]]:
    """What every pair method logs, per pair and detached.

    `rewards/*` are TRL's names for the implicit rewards; a margin of exactly 0 counts half in `rewards/accuracies`.
    `winner_gain` and `loser_gain` are err_ref - err: both falling below 0 is likelihood displacement, and `displaced`
    is the share of pairs that win their margin although the winner got worse. `saturation` is the share of the
    reference's error on the winner that is gone, `ranking` whether the winner has the smaller error, `kl_w` and `kl_l`
    the squared change of the prediction. `unsaturated` is sigmoid(-margin), the weight that the sigmoid link leaves to
    a pair. Without a reference there are no gains.
    """
    margin = (implicit_w - implicit_l).detach()
    err_w, err_l = errors.err_w.detach(), errors.err_l.detach()
    found = {
        "rewards/chosen": implicit_w.detach(),
        "rewards/rejected": implicit_l.detach(),
        "rewards/margins": margin,
        "rewards/accuracies": won(margin),
        "err_w": err_w,
        "err_l": err_l,
        "ranking": won(err_l - err_w),
        "unsaturated": torch.sigmoid(-margin),
    }
    if errors.err_ref_w is not None and errors.err_ref_l is not None:
        gain_w, gain_l = errors.gain_w.detach(), errors.gain_l.detach()
        found |= {
            "err_ref_w": errors.err_ref_w,
            "err_ref_l": errors.err_ref_l,
            "winner_gain": gain_w,
            "loser_gain": gain_l,
            "displaced": ((gain_w < 0) & (gain_w > gain_l)).float(),
            "ranking_ref": won(errors.err_ref_l - errors.err_ref_w),
            "saturation": gain_w / errors.err_ref_w.clamp(min=1e-12),
        }
    return found | errors.metrics


def won(difference: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 above 0, 1/2 at exactly 0, 0 below."""
    return (difference > 0).float() + 0.5 * (difference == 0).float()
