"""Linear-DPO: loss = w (err_w - err_l), w = clip(0.5 - 0.2 h, eta, clip_high) without gradient, h the margin."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError
from diffalign.methods.measure import Safeguard, pair_errors, pair_metrics
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, ErrorKind, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class LinearDPO:
    """The gradient of a pair weighted linearly in its margin, against a reference that follows the policy.

    The reference enters through the weight only. The loss is not bounded below and may be negative: watch
    `winner_gain` and `loser_gain`. Nothing here preserves the winner; `safeguard` does.

    Paper: "Linear-DPO", arXiv 2605.21123; WhynotChen0105/Linear-DPO.
    Departs: the reference moves after the optimizer's step, so that it averages the policies that were reached.
    """

    beta: float = 100.0
    """Slope of the margin h = beta (gain_w - gain_l), on the paper's own scale, without the factor 1/2. Published: 100
    for SD 1.5, 500 for SDXL."""
    eta: float = 0.01
    """Least weight, that of a pair which is won clearly. Paper: 0.01; code: 0.001 for SD 1.5, 0 for SDXL."""
    clip_high: float = 1.0
    """Greatest weight, that of a pair which is lost clearly. Paper: 1; the authors' code: 1 - eta."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO)."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if not 0 <= self.eta <= 0.5:
            raise InputError(f"method.eta must be in [0, 0.5], got {self.eta}")
        if not 0.5 <= self.clip_high <= 1:
            raise InputError(f"method.clip_high must be in [0.5, 1], got {self.clip_high}")

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", references=("ema", "start"), errors=ErrorKind(error_space=self.error_space))

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(policy, reference, batch, rng, error_space=self.error_space, safeguard=self.safeguard)
        implicit_w = self.beta * e.gain_w
        implicit_l = self.beta * e.gain_l
        weight = linear_weight(implicit_w - implicit_l, eta=self.eta, clip_high=self.clip_high)
        metrics = {**pair_metrics(e, implicit_w, implicit_l), "weight": weight}
        return StepLoss(loss=weight * (e.err_w - e.err_l), metrics=metrics, noise_level=e.noise_level)


def linear_weight(margin: Float[Tensor, " b"], *, eta: float, clip_high: float = 1.0) -> Float[Tensor, " b"]:
    """clip(0.5 - 0.2 margin, eta, clip_high), detached: 1/2 at margin 0, more for a pair that is lost."""
    return (0.5 - 0.2 * margin.detach()).clamp(eta, clip_high)
