"""What methods are called with: pairs, single images, moves of rollouts."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from diffalign.types.denoisers import Cond, common
from diffalign.types.rollouts import Walk


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Pairs that share a prompt: clean latents of winner and loser, scaled as the denoiser takes them."""

    x_w: Float[Tensor, "b c h w"]
    x_l: Float[Tensor, "b c h w"]
    cond: Cond
    samples: tuple[int, ...]
    """Number of each pair in the run's stream, from which its random numbers are derived."""
    score_w: Float[Tensor, " b"] | None = None
    """Scores of the winners by some judge, from the data's score columns."""
    score_l: Float[Tensor, " b"] | None = None
    """Scores of the losers by the same judge."""
    err_ref: Float[Tensor, "b 2"] | None = None
    """The reference's errors on winner and loser, float64, where they are known beforehand."""
    real: "ImageBatch | None" = None
    """An image of the data beside each pair of own images, where the method asks for it."""

    def __len__(self) -> int:
        return len(self.x_w)

    def to(self, device: torch.device | str) -> "PairBatch":
        return replace(
            self,
            x_w=self.x_w.to(device, non_blocking=True),
            x_l=self.x_l.to(device, non_blocking=True),
            cond=self.cond.to(device),
            score_w=None if self.score_w is None else self.score_w.to(device, non_blocking=True),
            score_l=None if self.score_l is None else self.score_l.to(device, non_blocking=True),
            err_ref=None if self.err_ref is None else self.err_ref.to(device, non_blocking=True),
            real=None if self.real is None else self.real.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        names = ("x_w", "x_l", "score_w", "score_l", "err_ref")
        named = {name: getattr(self, name) for name in names}
        real = {} if self.real is None else {f"real.{name}": value for name, value in self.real.tensors().items()}
        return {**{k: v for k, v in named.items() if v is not None}, **common(self.samples, self.cond), **real}


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Single images with their prompts: clean latents, scaled as the denoiser takes them."""

    x_0: Float[Tensor, "b c h w"]
    cond: Cond
    samples: tuple[int, ...]
    """Number of each image in the run's stream, from which its random numbers are derived."""
    label: Float[Tensor, " b"] | None = None
    """+1 for a good image, -1 for a bad one, where the data is labelled."""
    advantage: Float[Tensor, " b"] | None = None
    """How much better than others of its round an image was, where a method trains on its own samples."""
    t: Shaped[Tensor, " b"] | None = None
    """The t to train at, where the method takes those of the walk that made the image; None draws it."""
    err_ref: Float[Tensor, "b 1"] | None = None
    """The reference's error, float64, where it is known beforehand."""
    group: tuple[int, ...] | None = None
    """Images of one prompt and pass share a number, from which the random numbers that they share are derived."""

    def __len__(self) -> int:
        return len(self.x_0)

    def to(self, device: torch.device | str) -> "ImageBatch":
        return replace(
            self,
            x_0=self.x_0.to(device, non_blocking=True),
            cond=self.cond.to(device),
            label=None if self.label is None else self.label.to(device, non_blocking=True),
            advantage=None if self.advantage is None else self.advantage.to(device, non_blocking=True),
            t=None if self.t is None else self.t.to(device, non_blocking=True),
            err_ref=None if self.err_ref is None else self.err_ref.to(device, non_blocking=True),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        names = ("x_0", "label", "advantage", "t", "err_ref")
        named = {name: getattr(self, name) for name in names}
        return {**{k: v for k, v in named.items() if v is not None}, **common(self.samples, self.cond)}


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """Single moves of rollouts, each with what its image was worth."""

    x_t: Float[Tensor, "b c h w"]
    x_s: Float[Tensor, "b c h w"]
    step: Int[Tensor, " b"]
    """Number of each move in the walk; on the CPU, where the walk's tables are."""
    log_prob_old: Float[Tensor, " b"]
    """Of the moves under the policy that made them."""
    advantage: Float[Tensor, " b"]
    cond: Cond
    walk: Walk
    samples: tuple[int, ...]
    """Number of each move in the run's stream."""
    mean_old: Float[Tensor, "b c h w"] | None = None
    """Where the policy that made them would have gone without noise, if the method needs it."""

    def __len__(self) -> int:
        return len(self.x_t)

    def to(self, device: torch.device | str) -> "TransitionBatch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("x_t", "x_s", "log_prob_old",
                                                                                     "advantage")}  # fmt: skip
        mean_old = None if self.mean_old is None else self.mean_old.to(device, non_blocking=True)
        return replace(self, **moved, mean_old=mean_old, cond=self.cond.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        names = ("x_t", "x_s", "step", "log_prob_old", "advantage", "mean_old")
        held = {name: getattr(self, name) for name in names}
        return {k: v for k, v in held.items() if v is not None} | common(self.samples, self.cond)


@dataclass(frozen=True, kw_only=True)
class TransitionPairs:
    """Moves of the same number on the ways to a better and a worse image of one prompt."""

    x_t_w: Float[Tensor, "b c h w"]
    x_s_w: Float[Tensor, "b c h w"]
    x_t_l: Float[Tensor, "b c h w"]
    x_s_l: Float[Tensor, "b c h w"]
    step: Int[Tensor, " b"]
    """Number of each move in the walk, the same for both; on the CPU."""
    cond: Cond
    walk: Walk
    samples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.x_t_w)

    def to(self, device: torch.device | str) -> "TransitionPairs":
        names = ("x_t_w", "x_s_w", "x_t_l", "x_s_l")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, cond=self.cond.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the batch by name, to keep a batch aside."""
        names = ("x_t_w", "x_s_w", "x_t_l", "x_s_l", "step")
        return {name: getattr(self, name) for name in names} | common(self.samples, self.cond)


Batch = PairBatch | ImageBatch | TransitionBatch | TransitionPairs
