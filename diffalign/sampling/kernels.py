"""Kernels: where a sampler goes from x_t, as mean and total standard deviation of x_s, from the network's prediction.

With (x_0, eps) what the network implies at x_t, five of the eight are mean = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps
and differ in std alone. `ode`: 0. `ddim`, `euler_ancestral`, `flow_ddim`: eta times the posterior's, sigma_s sqrt(1 -
(alpha_t sigma_s / alpha_s sigma_t)^2), on the three kinds of path. `cps`: sigma_s sin(eta pi / 2). `ddpm` writes the
posterior itself; `flow_sde` and `dance` are Euler moves of reverse SDEs with the flow's marginals.
Prediction types are converted after guidance. x_0 is never clipped.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import InputError, near_match
from diffalign.paths import broadcast
from diffalign.sampling.schedule import Kind, Schedule, Step, flow_schedule
from diffalign.sampling.transitions import Form, Move, Reduction, log_prob, posterior
from diffalign.types import Transition

Samples = Float[Tensor, " b *rest"]

LastMove = str
"""`clean` or `noise`: an SDE kernel's move to sigma_s = 0 is noise-free and not trained, or as the formula has it."""


def ode(pred: Samples, x_t: Samples, step: Step) -> Transition:
    """The noise-free move: DDIM with eta 0, an Euler move of the probability-flow ODE of VE, x + v dt of a flow.

    Paper: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12 with sigma = 0.
    """
    still = torch.zeros_like(step.sigma_s)
    if step.kind == "flow":  # the same in one operation, which leaves the rounding of Diffusers' Euler sampler
        return _euler(pred, x_t, step, still, "clean")
    return _towards(pred, x_t, step, still)


def ddim(pred: Samples, x_t: Samples, step: Step, *, eta: float = 1.0) -> Transition:
    """DDIM with noise on a DDPM path; eta = 1 is the DDPM posterior over the same stride.

    Its last move, to index 0, has noise and is trained like the others; see `schedule_of`.

    Paper: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12 and 16.
    """
    _check(step, "vp", "ddim", eta, most=1.0)
    return _towards(pred, x_t, step, eta * _posterior_std(step))


def ddpm(pred: Samples, x_t: Samples, step: Step, *, variance: str = "fixed_small") -> Transition:
    """The DDPM posterior over a stride; `fixed_large` takes the variance of the forward step instead.

    A move to the clean level has no noise, with either variance.

    Paper: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 6, 7 and section 3.2.
    Departs: Diffusers adds noise with `fixed_large` at a last t above 0.
    """
    _check(step, "vp", "ddpm")
    pred, x_t = _wide(pred, x_t)
    x_0, _ = step.implied(pred, x_t)
    q = posterior(step.alpha_t.square(), step.alpha_s.square())
    mean = broadcast(q.of_x_0, x_t).to(x_t) * x_0 + broadcast(q.of_x_t, x_t).to(x_t) * x_t
    chosen = {"fixed_small": q.variance, "fixed_large": q.beta}
    if variance not in chosen:
        raise InputError(f"kernel.variance must be 'fixed_small' or 'fixed_large', got {variance!r}")
    std = torch.where(step.sigma_s > 0, chosen[variance].sqrt(), 0.0)
    return Transition(mean, std.to(mean), std)


def euler_ancestral(pred: Samples, x_t: Samples, step: Step, *, eta: float = 1.0) -> Transition:
    """k-diffusion's ancestral step on x = x_0 + sigma eps, with sigma_up = std; no noise in the last move.

    Paper: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, eq. 6 and 7, in the coordinates of
        Karras et al., arXiv 2206.00364; no paper has the step under this name, the library k-diffusion has.
    """
    _check(step, "ve", "euler_ancestral", eta)
    return _towards(pred, x_t, step, torch.minimum(step.sigma_s, eta * _posterior_std(step)))


def flow_sde(
    pred: Samples, x_t: Samples, step: Step, *, eta: float = 0.7, limit: float = math.inf, last: LastMove = "clean"
) -> Transition:
    """Flow-GRPO's SDE: g = eta sqrt(sigma / (1 - sigma)), the paper's noise level a as eta.

    Args:
        limit: Greatest std of a move; LongCat-Video (arXiv 2510.22200) has 0.45.
        last: `noise` is the authors' code, which injects eta sqrt(sigma^2 / (1 - sigma)) that nothing removes.

    Paper: Liu et al., "Flow-GRPO", arXiv 2505.05470.
    Departs: the last move is noise-free by default. Where sigma = 1 the 1 - sigma of g is taken at the table's second
        sigma, as in the authors' code (yifan123/flow_grpo); the paper's limit is infinite.
    """
    _check(step, "flow", "flow_sde", eta, last=last)
    if limit <= 0:
        raise InputError(f"kernel.limit must be positive, got {limit}")
    g = (eta * step.odds.sqrt()).clamp(max=limit / step.length.sqrt())
    return _euler(pred, x_t, step, g, last)


def dance(pred: Samples, x_t: Samples, step: Step, *, eta: float = 0.3, last: LastMove = "clean") -> Transition:
    """DanceGRPO's SDE of constant diffusion: g = eta. The clean last move is its decoding of the last x_0.

    Paper: Xue et al., "DanceGRPO", arXiv 2505.07818.
    """
    _check(step, "flow", "dance", eta, last=last)
    return _euler(pred, x_t, step, torch.full_like(step.sigma_t, eta), last)


def cps(pred: Samples, x_t: Samples, step: Step, *, eta: float = 0.8) -> Transition:
    """Coefficients-preserving sampling: noise of exactly sigma_s at every level, none in the last move.

    eta = 1 is Diffusers' `stochastic_sampling`. It does not keep the marginals: with the exact velocity of Gaussian
    data its samples have half to two thirds of the data's variance, however many the steps.

    Paper: Wang and Yu, "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching", arXiv
        2509.05952.
    Departs: the paper's log-prob is the normal density; the released code, and `kernel("cps")`, leave out
        1 / (2 std^2) and the constants. Published clip ranges (1e-5) are for that; `form = "normal"` is the paper's.
    """
    _check(step, "flow", "cps", eta, most=1.0)
    return _towards(pred, x_t, step, step.sigma_s * math.sin(eta * math.pi / 2))


def flow_ddim(pred: Samples, x_t: Samples, step: Step, *, eta: float = 1.0) -> Transition:
    """DDIM with noise on a flow, none in the last move; eta = 1 is SDE-DPM-Solver++ of order 1.

    Paper: Zheng et al., "DiffusionNFT", arXiv 2509.16117 (the authors' solver); Song et al., arXiv 2010.02502.
    """
    _check(step, "flow", "flow_ddim", eta, most=1.0)
    return _towards(pred, x_t, step, eta * _posterior_std(step))


KERNELS: dict[str, Callable[..., Transition]] = {
    "ode": ode,
    "ddim": ddim,
    "ddpm": ddpm,
    "euler_ancestral": euler_ancestral,
    "flow_sde": flow_sde,
    "dance": dance,
    "cps": cps,
    "flow_ddim": flow_ddim,
}

_FORMS: dict[str, Form] = {"cps": "scaled_sq"}
"""Log-probs that are not the normal density where nobody chose."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel with its options bound, as a config names it."""

    name: str
    move: Move
    form: Form = "normal"
    """Of its log-probs."""
    solver_order: int = 1
    """Of moves without noise in a rollout, outside a window: 1 is `ode`, 2 is DPM-Solver++(2M) of solvers.py."""

    def __call__(self, pred: Samples, x_t: Samples, step: Step) -> Transition:
        return self.move(pred, x_t, step)

    def log_prob(self, transition: Transition, x_s: Samples, *, reduction: Reduction = "mean") -> Float[Tensor, " b"]:
        """log p(x_s | x_t) per sample in the kernel's form."""
        return log_prob(transition, x_s, reduction=reduction, form=self.form)

    def stds(self, schedule: Schedule) -> Float[Tensor, " n"]:
        """Standard deviation of every move of a walk: 0 where it has no noise."""
        x = torch.zeros(len(schedule), 1, dtype=torch.float64)
        return self(x, x, schedule.moves).std


def kernel(name: str, *, form: str | None = None, solver_order: int = 1, **options: Any) -> Kernel:
    """A kernel by name, with its options bound; options left out have their published values.

    Raises:
        InputError: Unknown name, unknown option, or one out of its range.
    """
    if name not in KERNELS:
        raise InputError(f"kernel must be a known kernel, got {name!r}{near_match(name, KERNELS)}")
    if form not in (None, "normal", "scaled_sq"):
        raise InputError(f"kernel.form must be 'normal' or 'scaled_sq', got {form!r}")
    if solver_order not in (1, 2):
        raise InputError(f"kernel.solver_order must be 1 or 2, got {solver_order!r}")
    known = {p.name: p for p in inspect.signature(KERNELS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            others = sorted(n for n, f in KERNELS.items() if key in inspect.signature(f).parameters)
            hint = f"; it belongs to {', '.join(others)}" if others else near_match(key, known)
            raise InputError(f"kernel {name!r} does not take option {key!r}{hint}")
        if isinstance(known[key].default, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"kernel.{key} must be a number, got {value!r}")
        if isinstance(known[key].default, float):
            options[key] = float(value)
    move = partial(KERNELS[name], **options) if options else KERNELS[name]
    trial = torch.zeros(1, 1)
    move(trial, trial, _trial_step(_KINDS[name]))  # an option out of its range shows here, not at the first step
    chosen: Form = _FORMS.get(name, "normal")
    if form is not None:
        chosen = "normal" if form == "normal" else "scaled_sq"
    return Kernel(name=name, move=move, form=chosen, solver_order=solver_order)


_KINDS: dict[str, Kind] = {"ode": "flow", "ddim": "vp", "ddpm": "vp", "euler_ancestral": "ve", "flow_sde": "flow",
                           "dance": "flow", "cps": "flow", "flow_ddim": "flow"}  # fmt: skip


def _towards(pred: Samples, x_t: Samples, step: Step, std: Float[Tensor, " b"]) -> Transition:
    """alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps: as noisy as level s once noise of `std` is added."""
    pred, x_t = _wide(pred, x_t)
    x_0, eps = step.implied(pred, x_t)
    of_eps = (step.sigma_s.square() - std.square()).clamp(min=0).sqrt()
    mean = broadcast(step.alpha_s, x_t).to(x_t) * x_0 + broadcast(of_eps, x_t).to(x_t) * eps
    return Transition(mean, std.to(mean), std)


def _euler(pred: Samples, x_t: Samples, step: Step, g: Float[Tensor, " b"], last: LastMove) -> Transition:
    """One Euler move of dx = [v - g^2 score / 2] dsigma + g dW, with score = -eps / sigma."""
    pred, x_t = _wide(pred, x_t)
    x_0, eps = step.implied(pred, x_t)
    v = pred if step.prediction == "velocity" else eps - x_0
    g = g if last == "noise" else torch.where(step.sigma_s > 0, g, 0.0)
    of_eps = -step.length * g.square() / (2 * step.sigma_t)
    mean = x_t - broadcast(step.length, x_t).to(x_t) * v + broadcast(of_eps, x_t).to(x_t) * eps
    std = g * step.length.sqrt()
    return Transition(mean, std.to(mean), std)


def _posterior_std(step: Step) -> Float[Tensor, " b"]:
    """Standard deviation of x_s given x_t and x_0."""
    ratio = step.alpha_t * step.sigma_s / (step.alpha_s * step.sigma_t)
    return step.sigma_s * (1 - ratio.square()).clamp(min=0).sqrt()


def _wide(pred: Samples, x_t: Samples) -> tuple[Samples, Samples]:
    """In float32 or better."""
    pred, x_t = (x.float() if x.dtype.itemsize < 4 else x for x in (pred, x_t))
    return pred, x_t


def _check(
    step: Step, kind: Kind, name: str, eta: float = 0.0, *, most: float = math.inf, last: LastMove = "clean"
) -> None:
    if step.kind != kind:
        fitting = ", ".join(sorted({n for n, k in _KINDS.items() if k == step.kind} | {"ode"}))
        raise InputError(f"kernel must fit a {step.kind} schedule, got {name!r}; choose from {fitting}")
    if not 0 <= eta <= most:
        bound = "at least 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise InputError(f"kernel.eta must be {bound} with {name!r}, got {eta}")
    if last not in ("clean", "noise"):
        raise InputError(f"kernel.last must be 'clean' or 'noise', got {last!r}")


def _trial_step(kind: Kind) -> Step:
    """Some move of this kind."""
    moves = flow_schedule(torch.tensor([0.8, 0.4, 0.0])).step(torch.tensor([0]))
    return Step(**{**vars(moves), "kind": kind, "prediction": "velocity" if kind == "flow" else "epsilon"})
