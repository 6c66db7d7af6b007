"""Diffusion-KTO: loss = lambda_y (1 - S(y beta (g - z))), g = err_ref - err, y = +1 or -1, z a mean of g."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffalign.errors import InputError
from diffalign.methods.measure import image_errors, won
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ErrorKind, ImageBatch, Needs, Shared, StepLoss, alone

Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]
Baseline = Literal["mean", "class_means"]


@dataclass(frozen=True, kw_only=True)
class DiffusionKTO:
    """Human utility of single images, each good or bad, above a baseline that stands for the KL from the reference.

    Paper: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465; jacklishufan/
    diffusion-kto.
    Departs: the reference is run in the policy's own precision and never casts trained weights, where the release
    truncates them to fp16. The release's third baseline, on captions rolled within the batch, is left out.
    """

    beta: float = 1000.0
    """KL strength on errors averaged over elements, on the authors' scale: no factor 1/2."""
    utility: Utility = "sigmoid"
    """S(x); loss-averse log S(x), steep where x is negative; or risk-seeking -log S(-x), steep where it is positive and
    then without a bound on the loss."""
    baseline: Baseline = "mean"
    """z: mean gain of the micro-batch over all processes, at least 0; or the average of the means of good and of bad,
    not cut."""
    weight_good: float = 1.0
    """lambda of good images."""
    weight_bad: float = 1.0
    """lambda of bad images."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        for name, value in (("weight_good", self.weight_good), ("weight_bad", self.weight_bad)):
            if value < 0:
                raise InputError(f"method.{name} must be at least 0, got {value}")
        if self.weight_good == self.weight_bad == 0:
            raise InputError("method.weight_good must be positive where weight_bad is 0, got 0 for both")

    @property
    def needs(self) -> Needs:
        errors = ErrorKind(error_space=self.error_space)
        return Needs(data="labelled", references=("start", "ema"), batch_statistics=True, errors=errors)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: ImageBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        if batch.label is None:
            raise InputError("data must say of each image whether it is good for method 'diffusion_kto', got no labels")
        e = image_errors(policy, reference, batch, rng, error_space=self.error_space)
        gain = e.gain
        sums = class_sums(gain, batch.label, reduce=shared.reduce)
        z = kto_baseline(sums, kind=self.baseline)
        loss = kto_loss(gain, batch.label, z, beta=self.beta, utility=self.utility)
        weight = torch.where(batch.label > 0, self.weight_good, self.weight_bad)
        metrics = self._metrics(gain.detach(), batch.label, z, sums, e.err.detach())
        return StepLoss(loss=weight * loss, metrics=metrics, noise_level=e.noise_level)

    def _metrics(
        self,
        gain: Float[Tensor, " b"],
        label: Float[Tensor, " b"],
        z: Float[Tensor, ""],
        sums: "ClassSums",
        err: Float[Tensor, " b"],
    ) -> dict[str, Float[Tensor, " b"]]:
        """The release's names, TRL's and ours. Those of one class average to the mean over its own images."""
        lead = label * self.beta * (gain - z)
        count = sums.count.sum()
        good, bad = (
            gain * on * count / n.clamp(min=1) for on, n in zip((label > 0, label < 0), sums.count, strict=True)
        )
        return {
            "likelihood": gain,
            "kl": z.expand(len(gain)),
            "diff_pos": good,
            "diff_neg": bad,
            "share_pos": (label > 0).to(gain.dtype),
            "rewards/chosen": self.beta * good,
            "rewards/rejected": self.beta * bad,
            "rewards/margins": lead,
            "rewards/accuracies": won(lead),
            "winner_gain": good,
            "loser_gain": bad,
            "err": err,
        }


@dataclass(frozen=True)
class ClassSums:
    """Sum of gains and number of images, good first, then bad; over the micro-batch of all processes."""

    total: Float[Tensor, "2"]
    count: Float[Tensor, "2"]


def class_sums(
    gain: Float[Tensor, " b"], label: Float[Tensor, " b"], *, reduce: Callable[[Tensor], Tensor] = alone
) -> ClassSums:
    """Gains added up by label, without gradient; one sum over processes."""
    on = torch.stack([label > 0, label < 0]).to(gain.dtype)  # [2, B]
    return ClassSums(*reduce(torch.stack([on @ gain.detach(), on.sum(1)])))


def kto_baseline(sums: ClassSums, *, kind: Baseline = "mean") -> Float[Tensor, ""]:
    """z, the gain that counts as nothing gained.

    Args:
        kind: `mean`, over all images and at least 0; or `class_means`, the average of the two classes' means, in which
            a class without an image is left out.
    """
    if kind == "mean":
        return (sums.total.sum() / sums.count.sum()).clamp(min=0)
    return (sums.total / sums.count.clamp(min=1)).sum() / (sums.count > 0).sum()


def kto_loss(
    gain: Float[Tensor, " b"],
    label: Float[Tensor, " b"],
    baseline: Float[Tensor, ""],
    *,
    beta: float,
    utility: Utility = "sigmoid",
) -> Float[Tensor, " b"]:
    """Minus the utility of label * beta * (gain - baseline), for `sigmoid` plus 1; 1/2 at 0 there.

    Paper: Li et al., arXiv 2404.04465.
    """
    x = label * beta * (gain - baseline)
    if utility == "sigmoid":
        return torch.sigmoid(-x)
    return -functional.logsigmoid(x) if utility == "loss_averse" else functional.logsigmoid(-x)
