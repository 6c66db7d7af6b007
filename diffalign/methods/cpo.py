"""CPO: implicit reward = -(beta / 2) err, no reference; loss = link(winner's, loser's) + sft_weight err_w."""

from dataclasses import dataclass, replace

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, ScoreUse, pair_errors, pair_step
from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class CPO:
    """Contrastive preference optimization on denoising errors: which image has the smaller error, without a reference.

    Without a reference the difficulty of an image stays in its reward, so the loss favours images that are easy to
    denoise, and nothing but the term on the winner holds the policy.

    Paper: Xu et al., "Contrastive Preference Optimization", arXiv 2401.08417; on diffusion models as in Gambashidze et
    al., "Aligning Diffusion Models with Noise-Conditioned Perception", arXiv 2406.17636, whose slope of 2500 is a beta
    of 5000 here.
    Departs: the term on the winner, which the second paper has and its code has not, is kept.
    """

    beta: float = 5000.0
    """Steepness; half of it multiplies a squared error averaged over elements."""
    sft_weight: float = 1.0
    """Weight of the winner's error. The diffusion paper gives none: this is 1.0 in the first paper."""
    link: Link = losses.sigmoid
    """What is done with the margin; only links that depend on nothing else."""
    error_space: ErrorSpace = "native"
    """Between which predictions the errors are; `native` is what the network predicts, at constant weight."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO)."""
    scores: ScoreUse | None = None
    """Soft labels or margins from the data's score columns."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if self.sft_weight < 0:
            raise InputError(f"method.sft_weight must be at least 0, got {self.sft_weight}")
        name = losses.link_name(self.link)
        if not losses.PROPERTIES[name].margin_only:
            fit = ", ".join(n for n, p in losses.PROPERTIES.items() if p.margin_only)
            raise InputError(
                f"method.link must be one of {fit} with method 'cpo', got {name!r}, which gives a meaning to each "
                "reward alone; that needs a reference"
            )

    @property
    def needs(self) -> Needs:
        return Needs(data="pairs", references=("none",), scores=self.scores is not None)

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(policy, None, batch, rng, error_space=self.error_space, safeguard=self.safeguard)
        implicit_w = -0.5 * self.beta * e.err_w
        implicit_l = -0.5 * self.beta * e.err_l
        out = pair_step(e, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared, scores=self.scores)
        return replace(out, loss=out.loss + self.sft_weight * e.err_w)
