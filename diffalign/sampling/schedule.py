"""Levels of noise that a sampler walks down, read from Diffusers' own scheduler objects.

x = alpha x_0 + sigma eps at every level, in one of three kinds. `vp`: alpha^2 + sigma^2 = 1, t an index. `ve`: alpha =
1, so latents are sqrt(sigma^2 + 1) larger than VP ones and the network is given x / sqrt(sigma^2 + 1). `flow`: alpha =
1 - sigma, t = sigma. Tables are float64 on the CPU, so that coefficients cost no rounding and no synchronisation; what
is multiplied with latents is float32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffalign import paths
from diffalign.errors import InputError, near_match
from diffalign.paths import Prediction, broadcast

Kind = Literal["vp", "ve", "flow"]
MOST_FLOW_MOVES = 1000
"""Of a walk along a flow: its t is continuous, and the number of training steps in its config only the scale of t."""
Last = Literal["alpha_bar_0", "scheduler"]
"""Where a DDIM schedule ends: at the level of index 0, or at the scheduler's `final_alpha_cumprod`."""
Table = Literal["analytic", "diffusers"]
"""Levels of a flow: u = 1 - k/N shifted once, or as the scheduler's `set_timesteps(N)` has them, shifted twice."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One move from t to a less noisy s for each sample: what the network is told, coefficients at both ends."""

    kind: Kind
    prediction: Prediction
    """What the network's output is."""
    t: Shaped[Tensor, " b"]
    s: Shaped[Tensor, " b"]
    alpha_t: Float[Tensor, " b"]
    sigma_t: Float[Tensor, " b"]
    alpha_s: Float[Tensor, " b"]
    sigma_s: Float[Tensor, " b"]
    sigma_1: Float[Tensor, " b"]
    """The table's second sigma, for a kernel that is singular at the first."""

    @property
    def length(self) -> Float[Tensor, " b"]:
        """sigma_t - sigma_s, positive: minus the dt of papers on flows."""
        return self.sigma_t - self.sigma_s

    @property
    def odds(self) -> Float[Tensor, " b"]:
        """sigma_t / (1 - sigma_t) of a flow; at sigma_t = 1, where it is infinite, with the table's second sigma below.

        The second sigma as in the authors' code of Flow-GRPO (yifan123/flow_grpo), and in GenRL's of LongCat.
        """
        return self.sigma_t / (1 - torch.where(self.sigma_t == 1, self.sigma_1, self.sigma_t))

    def rows(self, index: Int[Tensor, " n"]) -> "Step":
        """Moves by number."""
        names = ("t", "s", "alpha_t", "sigma_t", "alpha_s", "sigma_s", "sigma_1")
        return replace(self, **{name: vars(self)[name][index] for name in names})

    def seen(self, x_t: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        """What the network is given for x_t."""
        return x_t if self.kind != "ve" else broadcast(self._scale(), x_t).to(x_t) * x_t

    def implied(
        self, pred: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"]
    ) -> tuple[Float[Tensor, " b *rest"], Float[Tensor, " b *rest"]]:
        """Clean latents and noise that a native prediction at x_t implies; never clipped."""
        scale = self._scale() if self.kind == "ve" else torch.ones_like(self.alpha_t)
        alpha_t, sigma_t = ((scale * c).to(x_t) for c in (self.alpha_t, self.sigma_t))
        return paths.implied(self.prediction, pred, self.seen(x_t), alpha_t, sigma_t)

    def _scale(self) -> Float[Tensor, " b"]:
        """From the latents of a VE walk to those of unit variance that its network was trained on."""
        return (self.alpha_t.square() + self.sigma_t.square()).rsqrt()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All moves of a walk, the noisiest first."""

    moves: Step
    start_std: float = 1.0
    """Standard deviation of x_init."""

    def __len__(self) -> int:
        return len(self.moves.t)

    @property
    def levels(self) -> Shaped[Tensor, " m"]:
        """t of every level, one more than there are moves."""
        return torch.cat([self.moves.t, self.moves.s[-1:]])

    def step(self, index: Int[Tensor, " b"]) -> Step:
        """The move of each sample by its number, 0 first; the index may differ from sample to sample.

        Raises:
            ValueError: No move has that number.
        """
        index = index.cpu()
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise ValueError(f"index must be in [0, {len(self)}), got {index.tolist()}")
        return self.moves.rows(index)


def flow_schedule(sigma: Float[Tensor, " m"], prediction: Prediction = "velocity") -> Schedule:
    """A walk along a straight path over these levels, from 1 down to 0."""
    wide = sigma.double()
    moves = Step(
        kind="flow",
        prediction=prediction,
        t=sigma[:-1],
        s=sigma[1:],
        alpha_t=1 - wide[:-1],
        sigma_t=wide[:-1],
        alpha_s=1 - wide[1:],
        sigma_s=wide[1:],
        sigma_1=wide[1].expand(len(wide) - 1),
    )
    return Schedule(moves=moves)


def vp_schedule(
    t: Int[Tensor, " n"],
    s: Int[Tensor, " n"],
    bar_t: Float[Tensor, " n"],
    bar_s: Float[Tensor, " n"],
    prediction: Prediction,
) -> Schedule:
    """A walk along a DDPM path from each t to its s, at these alpha_bar."""
    bar_t, bar_s = bar_t.double(), bar_s.double()
    sigma_s = (1 - bar_s).sqrt()
    moves = Step(
        kind="vp",
        prediction=prediction,
        t=t,
        s=s,
        alpha_t=bar_t.sqrt(),
        sigma_t=(1 - bar_t).sqrt(),
        alpha_s=bar_s.sqrt(),
        sigma_s=sigma_s,
        sigma_1=sigma_s[:1].expand(len(t)),
    )
    return Schedule(moves=moves)


def ve_schedule(
    t: Shaped[Tensor, " n"], sigma: Float[Tensor, " m"], prediction: Prediction, start_std: float
) -> Schedule:
    """A walk of x = x_0 + sigma eps over these levels; t is what the network is told at all but the last."""
    wide = sigma.double()
    one = torch.ones(len(t), dtype=torch.float64)
    moves = Step(
        kind="ve",
        prediction=prediction,
        t=t,
        s=torch.cat([t[1:], torch.zeros_like(t[:1])]),
        alpha_t=one,
        sigma_t=wide[:-1],
        alpha_s=one,
        sigma_s=wide[1:],
        sigma_1=wide[1].expand(len(t)),
    )
    return Schedule(moves=moves, start_std=start_std)


def schedule_of(scheduler: Any, *, last: Last = "alpha_bar_0") -> Schedule:
    """The walk of a Diffusers scheduler whose timesteps are set.

    Args:
        scheduler: DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler or
            FlowMatchEulerDiscreteScheduler.
        last: Only DDIM asks. A DDPM walk ends at the clean level, as its scheduler does.

    Raises:
        InputError: Another scheduler, one without timesteps, or a learned variance.

    Departs: a DDIM walk goes from t to t - T // N, and below index 0 to index 0, whatever `set_alpha_to_one` says: as
        in the authors' code of DDPO and D3PO, so that its last move has noise and can be trained. `clip_sample` and
        `thresholding` are not followed, as those two do not for latents.
    """
    name = type(scheduler).__name__
    if name not in _READERS:
        raise InputError(
            f"scheduler must be one of {', '.join(_READERS)}, got {name!r}; make one of them from its config"
        )
    return _READERS[name](scheduler, last)


def few_steps(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is that of a model distilled to a few steps.

    That is LCM, TCD, SD-Turbo, SDXL-Turbo, and flows that noise their clean latents anew at every move.
    """
    name, spacing = str(config.get("_class_name")), config.get("timestep_spacing")
    turbo = (name, spacing) == ("EulerAncestralDiscreteScheduler", "trailing")
    return name in ("LCMScheduler", "TCDScheduler") or turbo or bool(config.get("stochastic_sampling"))


def make_schedule(
    kernel: str,
    config: Mapping[str, Any],
    steps: int,
    *,
    table: Table = "analytic",
    sigmas: Callable[[int], Sequence[float]] | None = None,
    tokens: int | None = None,
) -> Schedule:
    """The walk that a kernel takes over a model whose scheduler config this is.

    Args:
        kernel: By name; `ode` walks with DDIM, or with the Euler moves of a flow, to where the stock pipeline ends.
        config: The folder's scheduler config; only its constants and spacing count, not its class's own moves.
        table: Of a flow. The two differ much (N = 10, shift 3: the last level but one is 0.25 or 0.0089), so log it.
        sigmas: Steps -> the levels of table `diffusers` before the shift, of a pipeline that has its own.
        tokens: Of an image, for a scheduler whose shift grows with them.

    Raises:
        InputError: Unknown kernel, a kernel on the wrong kind of model, steps out of range, or a dynamic shift of
            images of unknown size.

    Departs: the analytic table is the default; `diffusers` is that of the stock SD3 pipeline and of
        Flow-GRPO's recipes.
    """
    flows = str(config.get("_class_name", "")).startswith("FlowMatch")
    kind = "flow" if flows else "DDPM"
    known = _schedulers()[kind]
    if kernel not in known:
        every = {name for names in _schedulers().values() for name in names}
        if kernel not in every:
            raise InputError(f"kernel must be a known kernel, got {kernel!r}{near_match(kernel, every)}")
        raise InputError(f"kernel must fit a {kind} model, got {kernel!r}; choose from {', '.join(sorted(known))}")
    scheduler = known[kernel].from_config(dict(config))
    most = MOST_FLOW_MOVES if flows else scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise InputError(f"steps must be in [1, {most}], got {steps}")
    shift = {"mu": _mu(scheduler.config, tokens)} if flows and scheduler.config.use_dynamic_shifting else {}
    if flows and table == "analytic":
        scheduler.set_timesteps(sigmas=even_levels(steps), **shift)
    elif flows and sigmas is not None:
        scheduler.set_timesteps(sigmas=list(sigmas(steps)), **shift)
    else:
        scheduler.set_timesteps(steps, **shift)
    return schedule_of(scheduler, last="scheduler" if kernel == "ode" else "alpha_bar_0")


def even_levels(steps: int) -> list[float]:
    """1, 1 - 1 / N, ..., 1 / N."""
    return [1 - k / steps for k in range(steps)]


def shift_at(config: Any, tokens: int) -> float:
    """mu of a flow's scheduler whose shift grows with the number of an image's tokens: a line through two points.

    Paper: Esser et al., arXiv 2403.03206, section 5.3.2, for why; the line is that of FLUX.1's authors.
    """
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (tokens - config.base_image_seq_len))


def _mu(config: Any, tokens: int | None) -> float:
    if tokens is None:
        raise InputError(
            "scheduler.use_dynamic_shifting must be false, got true, where nobody says how many tokens an image has; "
            "set the timesteps with the pipeline's mu and call schedule_of"
        )
    return shift_at(config, tokens)


def _schedulers() -> dict[str, dict[str, Any]]:
    """Whose levels a kernel walks over, by the kind of model."""
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        EulerAncestralDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    return {
        "DDPM": {
            "ode": DDIMScheduler,
            "ddim": DDIMScheduler,
            "ddpm": DDPMScheduler,
            "euler_ancestral": EulerAncestralDiscreteScheduler,
        },
        "flow": dict.fromkeys(("ode", "flow_sde", "dance", "cps", "flow_ddim"), FlowMatchEulerDiscreteScheduler),
    }


def _ddim(scheduler: Any, last: Last) -> Schedule:
    t = _timesteps(scheduler)
    s = t - scheduler.config.num_train_timesteps // len(t)
    end = scheduler.alphas_cumprod[0] if last == "alpha_bar_0" else scheduler.final_alpha_cumprod
    return _vp(scheduler, t, s, end)


def _ddpm(scheduler: Any, last: Last) -> Schedule:
    if str(scheduler.config.variance_type).startswith("learned"):
        raise InputError(
            f"scheduler.variance_type must be fixed, got {scheduler.config.variance_type!r}; freeze the variance head"
        )
    t = _timesteps(scheduler)
    return _vp(scheduler, t, torch.cat([t[1:], torch.tensor([-1])]), scheduler.one)


def _vp(scheduler: Any, t: Int[Tensor, " n"], s: Int[Tensor, " n"], end: Tensor) -> Schedule:
    bars = scheduler.alphas_cumprod.cpu()
    inside = s.clamp(min=0)
    bar_s = torch.where(s < 0, end.cpu().to(bars), bars[inside])
    return vp_schedule(t, inside, bars[t], bar_s, scheduler.config.prediction_type)


def _timesteps(scheduler: Any) -> Int[Tensor, " n"]:
    if scheduler.num_inference_steps is None:
        raise InputError("scheduler must have its timesteps set, got none; call set_timesteps first")
    return scheduler.timesteps.cpu().long()


def _ve(scheduler: Any, last: Last) -> Schedule:
    if scheduler.num_inference_steps is None:
        raise InputError("scheduler must have its timesteps set, got none; call set_timesteps first")
    t = scheduler.timesteps.cpu()
    t = t.long() if torch.equal(t, t.round()) else t.float()
    return ve_schedule(t, scheduler.sigmas.cpu(), scheduler.config.prediction_type, float(scheduler.init_noise_sigma))


def _flow(scheduler: Any, last: Last) -> Schedule:
    sigma = scheduler.sigmas.cpu()
    if len(sigma) != len(scheduler.timesteps) + 1:
        raise InputError("scheduler must have its timesteps set, got none; call set_timesteps first")
    return flow_schedule(sigma)


_READERS: dict[str, Callable[[Any, Last], Schedule]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "EulerAncestralDiscreteScheduler": _ve,
    "EulerDiscreteScheduler": _ve,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
