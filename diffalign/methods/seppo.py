"""SePPO: the loser is an image that an earlier policy made; implicit rewards beta/2 gain_w and s beta/2 gain_l.

The reference theta_j is that earlier policy. s asks of the winner alone which of the two models is ahead: where the
policy denoises it no worse than the reference, the self-sampled image is a loser (s = 1); where the reference denoises
it better, its image is pulled in beside the winner (s = -1), or left out (s = 0).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import losses
from diffalign.errors import InputError
from diffalign.losses import Link
from diffalign.methods.measure import Safeguard, pair_errors, pair_step
from diffalign.rng import SampleRng
from diffalign.types import ALONE, Denoiser, Needs, PairBatch, Replay, Shared, StepLoss

Flip = Literal["sign", "indicator", "off"]


@dataclass(frozen=True, kw_only=True)
class SePPO:
    """Self-sampled preferences: winners from the data against images of an earlier policy, which is the reference.

    Paper: Zhang et al., "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment", arXiv 2410.05255 v1; v2
    calls it SSPO, self-sampling preference optimization.
    Departs: there is no training code. Equal errors of the winner count as s = 1, where the sign would be 0 and drop
    the self-sampled image where a policy is its own reference. beta is not published; the default is SPIN-Diffusion's.
    Errors are averaged over elements and halved, and a pair shares t and noise, as in `diffusion_dpo`.
    """

    beta: float = 2000.0
    """KL strength; multiplies a squared error *averaged* over elements, hence in the thousands."""
    link: Link = losses.sigmoid
    """What is done with the two implicit rewards; by name in a config."""
    flip: Flip = "sign"
    """Where the reference is ahead on the winner, its image is a second winner, or left out; or always the loser."""
    replay: Replay = "uniform"
    """Which policy before a round is its reference: any, the last, or the first one."""
    safeguard: Safeguard | None = None
    """Keeps the winner from getting worse (Diffusion-SDPO), as long as the other image is never a winner too."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"method.beta must be positive, got {self.beta}")
        if self.safeguard is not None and self.flip == "sign":
            raise InputError(
                "method.safeguard must be left out with flip = 'sign'; it holds back the gradient of losers, and that "
                "makes winners of some of them"
            )

    @property
    def needs(self) -> Needs:
        return Needs(data="images", references=("pool",), replay=self.replay)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: PairBatch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss:
        e = pair_errors(policy, reference, batch, rng, safeguard=self.safeguard)
        assert e.err_ref_w is not None, "a pool always gives a reference"
        s = flip_sign(e.err_w, e.err_ref_w, self.flip)
        implicit_w = 0.5 * self.beta * e.gain_w
        implicit_l = 0.5 * self.beta * s * e.gain_l
        out = pair_step(e, implicit_w, implicit_l, link=self.link, batch=batch, shared=shared)
        return replace(out, metrics=out.metrics | {"flipped": (s < 1).float()})


def flip_sign(err_w: Float[Tensor, " b"], err_ref_w: Float[Tensor, " b"], mode: Flip) -> Float[Tensor, " b"]:
    """What the self-sampled image counts: 1 as a loser; where the reference is ahead on the winner, as `mode` says.

    Args:
        err_w, err_ref_w: Errors of policy and reference on the winner; equal ones count for the policy.
        mode: Where the reference is ahead: -1 (`sign`), 0 (`indicator`), or 1 all the same (`off`).

    Returns:
        s, without gradient.

    Paper: Zhang et al., arXiv 2410.05255, the anchor-based adaptive flipper.
    """
    behind = {"sign": -1.0, "indicator": 0.0, "off": 1.0}[mode]
    return torch.where(err_ref_w >= err_w, 1.0, behind).to(err_w.dtype)
