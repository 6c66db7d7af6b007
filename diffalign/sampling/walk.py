"""A kernel on a schedule: the one object that a rollout walks by and that training evaluates again."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from diffalign.sampling import transitions
from diffalign.sampling.kernels import Kernel
from diffalign.sampling.schedule import Schedule
from diffalign.types import Cond, Denoiser, Transition


@dataclass(frozen=True, kw_only=True)
class KernelWalk:
    """`types.Walk` of a kernel and a schedule."""

    kernel: Kernel
    schedule: Schedule

    def transition(
        self, denoiser: Denoiser, x_t: Float[Tensor, "b c h w"], step: Int[Tensor, " b"], cond: Cond
    ) -> Transition:
        return transitions.transition(denoiser, self.kernel, x_t, self.schedule.step(step), cond)

    def log_prob(self, transition: Transition, x_s: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        return self.kernel.log_prob(transition, x_s)

    def length(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self.schedule.step(step).length.float()

    def odds(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self.schedule.step(step).odds.float()

    @property
    def stds(self) -> Float[Tensor, " n"]:
        return self.kernel.stds(self.schedule).float()

    def noise_level(self, step: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        last = len(self.schedule) - 1
        return (last - step.cpu()).float() / max(1, last)
