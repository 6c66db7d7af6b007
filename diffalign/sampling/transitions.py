"""One move x_t -> x_s along a DDPM path: q(x_s | x_t, x_0) = N(mean, std^2), s < t.

With abar_t = alpha_t^2, alpha = abar_t / abar_s and beta = 1 - alpha:
mean = sqrt(abar_s) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_s) / (1 - abar_t) x_t,
std^2 = (1 - abar_s) / (1 - abar_t) beta.
"""

from jaxtyping import Float, Int
from torch import Tensor

from diffalign.paths import DDPMPath, broadcast

LEAST_VARIANCE = 1e-20


def ddpm_posterior(
    path: DDPMPath,
    x_t: Float[Tensor, " b *rest"],
    x_0: Float[Tensor, " b *rest"],
    t: Int[Tensor, " b"],
    s: Int[Tensor, " b"],
) -> tuple[Float[Tensor, " b *rest"], Float[Tensor, " b"]]:
    """Mean and standard deviation of x_s, given x_t and the clean latents.

    The variance is at least 1e-20. At s = t it is that, and the mean is x_t whatever x_0 is.

    Paper: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 6 and 7, with one step from t to
        s in place of the schedule's.
    """
    bars = path.alpha_bar.to(t.device)
    bar_t, bar_s = bars[t], bars[s]
    alpha = bar_t / bar_s
    of_x_0 = bar_s.sqrt() * (1 - alpha) / (1 - bar_t)
    of_x_t = alpha.sqrt() * (1 - bar_s) / (1 - bar_t)
    variance = (1 - bar_s) / (1 - bar_t) * (1 - alpha)
    return broadcast(of_x_0, x_0) * x_0 + broadcast(of_x_t, x_t) * x_t, variance.clamp(min=LEAST_VARIANCE).sqrt()


def ddpm_step(
    path: DDPMPath,
    x_t: Float[Tensor, " b *rest"],
    x_0: Float[Tensor, " b *rest"],
    t: Int[Tensor, " b"],
    s: Int[Tensor, " b"],
    variance_noise: Float[Tensor, " b *rest"],
) -> Float[Tensor, " b *rest"]:
    """x_s from x_t, clean latents as predicted, and the noise of the step.

    Two predictions of the noise at one `variance_noise` end c_t = beta / (sqrt(alpha) sqrt(1 - abar_t)) times their
    difference apart, with the opposite sign; at s = t they end at the same place.
    """
    mean, std = ddpm_posterior(path, x_t, x_0, t, s)
    return mean + broadcast(std, x_t) * variance_noise
