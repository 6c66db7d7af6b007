"""Errors in the eyes of a frozen encoder: Noise-Conditioned Perception.

A prediction at (x_t, t) and the true one are both carried on to another noise level s, with the same noise; what an
encoder f, the reference's own first half, sees at (x_s, s) is compared: PL = mean |f(x_hat_s) - f(x_s)|^2. With
x_hat_s - x_s = -c_t (eps_hat - eps) this is, to first order, the denoising error under the metric c_t^2 J_f^T J_f.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffalign import losses, paths
from diffalign.denoisers.features import join_levels
from diffalign.errors import InputError
from diffalign.methods.measure import ImageErrors, PairErrors, Safeguard, errors_between, reference_prediction
from diffalign.paths import DDPMPath, FlowPath, NoisePath
from diffalign.rng import SampleRng
from diffalign.sampling.transitions import ddpm_step
from diffalign.types import Cond, Denoiser, Encoder, ImageBatch, PairBatch

LEAST_DT = 0.02
"""A shorter step of a flow leaves features closer together than they are resolved."""


@dataclass(frozen=True, kw_only=True)
class Perception:
    """Where predictions are looked at, and what of the encoder counts.

    Paper: Gambashidze et al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636.
    Departs: t = 0 is taken as t = 1, because the authors' step from t = 0 ends at x_t whatever was predicted. Features
    are float32, where the authors' code casts to fp16, which leaves an error of 23 % in the difference of two inputs.
    Up blocks are no option; in the authors' code that option runs over a single module. The encoder stays what the
    policy was at the start; their `use_current_unet` is left out. For flows and transformers, which the paper leaves
    open, all is ours: the step is x_s = x_t - dt v, taken from t >= dt, and the encoder is the first blocks.
    """

    at: Literal["previous", "uniform"] = "previous"
    """One step on, s = t - 1 (a flow: t - dt), or a uniform s other than t, by a DDIM jump."""
    dt: float | None = None
    """Flows only: length of the step, and least distance of a uniform s from t, in [0.02, 0.5); None is 0.05."""
    mid: bool = False
    """U-Nets only: the middle block belongs to the encoder."""
    blocks: int | None = None
    """Transformers only: how many first blocks the encoder has; None is half of them."""
    multi_level: bool = False
    """Compare the outputs of the first layer and of every block, not only of the last."""
    normalize: bool = False
    """With `multi_level`: multiply level k by C_last / C_k, so that wide and fine levels count less."""
    pool: bool = False
    """Average features over space before they are compared."""

    def __post_init__(self) -> None:
        if self.dt is not None and not LEAST_DT <= self.dt < 0.5:
            raise InputError(
                f"method.perception.dt must be in [{LEAST_DT}, 0.5), got {self.dt}; a shorter step is not resolved"
            )
        if self.blocks is not None and self.blocks < 1:
            raise InputError(f"method.perception.blocks must be at least 1, got {self.blocks}")
        if self.normalize and not self.multi_level:
            raise InputError("method.perception.normalize must be false without multi_level; it weighs levels")

    def features(self, encoder: Encoder, x_s: Tensor, s: Tensor, cond: Cond) -> Float[Tensor, "b d h w"]:
        """What the encoder sees, as one map."""
        levels = encoder.features(x_s, s, cond, mid=self.mid, blocks=self.blocks)
        return join_levels(levels if self.multi_level else levels[-1:], normalize=self.normalize, pool=self.pool)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One t, one s and the noises of a batch."""

    t: Shaped[Tensor, " b"]
    s: Shaped[Tensor, " b"]
    """Noise level at which features are taken."""
    eps: Float[Tensor, "b c h w"]
    variance_noise: Float[Tensor, "b c h w"] | None
    """Of the step from t to s; None is a jump without noise."""

    def repeat(self, times: int) -> "Draw":
        """The whole batch `times` times, one after the other."""
        z = self.variance_noise
        shape = (times, 1, 1, 1)
        return Draw(
            t=self.t.repeat(times),
            s=self.s.repeat(times),
            eps=self.eps.repeat(shape),
            variance_noise=None if z is None else z.repeat(shape),
        )


def draw(path: NoisePath, like: Float[Tensor, "b c h w"], rng: SampleRng, perception: Perception) -> Draw:
    """t at least one step above clean, s beside it or anywhere else, and noises, per sample.

    Raises:
        InputError: `perception.dt` is set and the path is no flow.
    """
    previous = perception.at == "previous"
    variance_noise = None
    if isinstance(path, FlowPath):
        dt = 0.05 if perception.dt is None else perception.dt
        t = path.sample_t(rng).clamp(min=dt)
        s = t - dt if previous else (t + dt + (1 - 2 * dt) * rng.uniform("s")).remainder(1).to(t.dtype)
    elif perception.dt is not None:
        raise InputError(f"method.perception.dt must be left out unless the model is a flow, got {perception.dt}")
    else:
        assert isinstance(path, DDPMPath), "a path is a flow or a DDPM schedule"
        steps = len(path.alpha_bar)
        t = path.sample_t(rng).clamp(min=1)
        s = t - 1 if previous else (t + 1 + ((steps - 1) * rng.uniform("s")).long()).remainder(steps)
        variance_noise = rng.normal(like, "variance_noise") if previous else None
    t, s = t.to(like.device), s.to(like.device)
    return Draw(t=t, s=s, eps=rng.normal(like, "noise"), variance_noise=variance_noise)


def moved(policy: Denoiser, pred: Tensor, x_t: Tensor, at: Draw) -> Float[Tensor, "b c h w"]:
    """x_s from x_t, if the native prediction is right."""
    x_0, eps = paths.to_x0_eps(policy.path, policy.prediction, pred, x_t, at.t)
    if at.variance_noise is None or not isinstance(policy.path, DDPMPath):
        return paths.add_noise(policy.path, x_0, eps, at.s)
    return ddpm_step(policy.path, x_t, x_0, at.t, at.s, at.variance_noise)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Native predictions of a batch of images and what the encoder sees of them; only `pred` and `seen` have gradient.

    What is of the reference is None where it was not asked for.
    """

    pred: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    pred_ref: Float[Tensor, "b c h w"] | None
    seen: Float[Tensor, "b d y x"]
    seen_target: Float[Tensor, "b d y x"]
    seen_ref: Float[Tensor, "b d y x"] | None


def look(
    policy: Denoiser,
    reference: Encoder,
    x_0: Float[Tensor, "b c h w"],
    cond: Cond,
    at: Draw,
    *,
    perception: Perception,
    compare: bool,
) -> Sight:
    """Predictions at `at.t` and features at `at.s`, one forward with gradient of the policy and of the encoder.

    Args:
        compare: The reference predicts too.
    """
    x_t = paths.add_noise(policy.path, x_0, at.eps, at.t)
    target = paths.target(policy.path, policy.prediction, x_0, at.eps, at.t)
    pred_ref = reference_prediction(reference, x_t, at.t, cond) if compare else None
    with torch.no_grad():
        still = [moved(policy, p, x_t, at) for p in (target, pred_ref) if p is not None]
        times = len(still)
        seen_still = perception.features(reference, torch.cat(still), at.s.repeat(times), cond.repeat(times))
    pred = policy(x_t, at.t, cond)
    seen = perception.features(reference, moved(policy, pred, x_t, at), at.s, cond)
    parts = seen_still.chunk(times)
    return Sight(
        pred=pred,
        target=target,
        pred_ref=pred_ref,
        seen=seen,
        seen_target=parts[0],
        seen_ref=parts[1] if compare else None,
    )


def perceptual_errors(
    policy: Denoiser,
    reference: Encoder,
    batch: PairBatch,
    rng: SampleRng,
    *,
    perception: Perception,
    both: float | None = None,
    compare: bool = True,
    safeguard: Safeguard | None = None,
) -> tuple[PairErrors, PairErrors]:
    """What the loss is made of, and the denoising errors under their usual names with the perceptual ones beside them.

    Winner and loser share t, s and both noises.

    Args:
        both: Weight of the perceptual errors beside the denoising errors; None is perceptual errors alone.
        compare: Measure the reference's errors too.
        safeguard: Scales the gradient of the loser's error, by residuals in features; with `both` that of its denoising
            error too, by residuals in latents.
    """
    at = draw(policy.path, batch.x_w, rng, perception)
    x_0 = torch.cat([batch.x_w, batch.x_l])  # [2B, C, H, W]
    s = look(policy, reference, x_0, batch.cond.repeat(2), at.repeat(2), perception=perception, compare=compare)
    level, one = policy.path.noise_level(at.t).float(), torch.ones(len(x_0), device=x_0.device)
    latent = errors_between(
        s.pred, s.target, s.pred_ref, noise_level=level, factor=one, safeguard=None if both is None else safeguard
    )
    felt = errors_between(s.seen, s.seen_target, s.seen_ref, noise_level=level, factor=one, safeguard=safeguard)
    named = {"err_w": felt.err_w, "err_l": felt.err_l, "err_ref_w": felt.err_ref_w, "err_ref_l": felt.err_ref_l}
    if compare:
        named |= {"winner_gain": felt.gain_w, "loser_gain": felt.gain_l}
    metrics = {f"perceptual/{name}": value.detach() for name, value in named.items() if value is not None}
    if safeguard is not None:
        metrics["lambda_safe"] = felt.metrics["lambda_safe"]
    return _mixed(latent, felt, both), replace(latent, metrics=latent.metrics | metrics)


def perceptual_error(
    policy: Denoiser, reference: Encoder, batch: ImageBatch, rng: SampleRng, *, perception: Perception
) -> tuple[ImageErrors, ImageErrors]:
    """Perceptual and denoising errors of single images, each at a t, an s and noises of its own."""
    at = draw(policy.path, batch.x_0, rng, perception)
    s = look(policy, reference, batch.x_0, batch.cond, at, perception=perception, compare=False)
    level = policy.path.noise_level(at.t).float()
    felt = ImageErrors(err=losses.squared_error(s.seen, s.seen_target), err_ref=None, noise_level=level)
    return felt, replace(felt, err=losses.squared_error(s.pred, s.target))


def mixed(err: Float[Tensor, " b"], felt: Float[Tensor, " b"], both: float | None) -> Float[Tensor, " b"]:
    """The perceptual error `felt`, or err + both felt."""
    return felt if both is None else err + both * felt


def check_both(both: float | None) -> None:
    """Raises InputError for a weight of perceptual errors that is not positive."""
    if both is not None and both <= 0:
        raise InputError(f"method.both must be positive, got {both}; leave it out for perceptual errors alone")


def _mixed(latent: PairErrors, felt: PairErrors, both: float | None) -> PairErrors:
    def of(err: Tensor | None, seen: Tensor | None) -> Tensor | None:
        return None if err is None or seen is None else mixed(err, seen, both)

    return replace(
        felt,
        err_w=mixed(latent.err_w, felt.err_w, both),
        err_l=mixed(latent.err_l, felt.err_l, both),
        err_ref_w=of(latent.err_ref_w, felt.err_ref_w),
        err_ref_l=of(latent.err_ref_l, felt.err_ref_l),
        lead_w=of(latent.lead_w, felt.lead_w),
        lead_l=of(latent.lead_l, felt.lead_l),
    )
