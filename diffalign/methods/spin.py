"""SPIN-Diffusion: self-play against the policy of the round before, which makes the losers and is the reference."""

from dataclasses import dataclass

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard
from diffalign.methods.seppo import SePPO
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Shared, StepLoss


@dataclass(frozen=True, kw_only=True)
class SPINDiffusion:
    """SePPO whose reference is always the last policy and whose self-sampled image is always the loser.

    Every round starts at margin 0, where the policy is its own reference.

    Paper: Yuan et al., "Self-Play Fine-Tuning of Diffusion Models for Text-to-Image Generation", arXiv 2402.10210.
    Departs: a pair shares t and noise, and errors are averaged over elements and halved, as in `diffusion_dpo`. beta is
    one for all rounds, where the authors are said to have raised it from 2000 to 5000 after the first.
    """

    beta: float = 2000.0
    """KL strength; multiplies a squared error *averaged* over elements, hence in the thousands (2000 to 5000)."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO)."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")

    @property
    def needs(self) -> Needs:
        return self._as_seppo().needs

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        return self._as_seppo()(policy, reference, batch, rng, shared)

    def _as_seppo(self) -> SePPO:
        return SePPO(beta=self.beta, link=self.link, flip="off", replay="last", safeguard=self.safeguard)
