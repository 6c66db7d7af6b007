"""What a method needs, what it is called with and what it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.paths import ErrorSpace
from diffalign.rng import SampleRng
from diffalign.types.batches import Batch
from diffalign.types.denoisers import Denoiser
from diffalign.types.rewards import Embedded, SetReward


def alone(total: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return total


@dataclass(frozen=True)
class RunningMean:
    """Mean of everything that was added, kept as sum and count; 0 while there is nothing. Never waits for a device."""

    total: Float[Tensor, ""] | float = 0.0
    count: Float[Tensor, ""] | float = 0.0

    @property
    def mean(self) -> Float[Tensor, ""] | float:
        return self.total / self.count if isinstance(self.count, Tensor) or self.count else 0.0

    def numbers(self) -> dict[str, float]:
        """Sum and count for a checkpoint; waits for the device."""
        return {"total": float(self.total), "count": float(self.count)}

    def add(self, values: Float[Tensor, " n"], reduce: Callable[[Tensor], Tensor] = alone) -> "RunningMean":
        """With the values of every process added."""
        both = torch.stack([values.detach().double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
        total, count = reduce(both)
        return RunningMean(self.total + total, self.count + count)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a micro-batch shares with those before it and with the other processes."""

    rewards: RunningMean = field(default_factory=RunningMean)
    """Of all implicit rewards before this micro-batch, winners and losers alike; for links that ask for it."""
    reduce: Callable[[Tensor], Tensor] = alone
    """Sum over processes, without gradient."""
    old: Denoiser | None = None
    """The policy that made the round's images, where the method asks for it."""


ALONE = Shared()


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a method makes of one batch: no averaging inside, the trainer takes the means."""

    loss: Float[Tensor, " b"]
    metrics: dict[str, Float[Tensor, " b"]]
    """Detached, per sample, under TRL's names where TRL has one."""
    noise_level: Float[Tensor, " b"]
    """Where each sample's t lies between clean (0) and pure noise (1); metrics are also kept by decile of it."""
    rewards: RunningMean | None = None
    """The running mean with this micro-batch in it, where the method keeps one."""


ReferenceKind = Literal["none", "start", "ema", "pool"]
"""No reference; the policy as it started; a moving average of the policy; an earlier checkpoint of it."""

Items = Literal["transitions", "transition_pairs", "images", "pairs", "labelled"]
"""What a method makes of a round of its own images: their moves, moves of pairs of them, the images or pairs."""

Replay = Literal["uniform", "last", "first"]
"""Which of the policies before a round is its reference."""


@dataclass(frozen=True, kw_only=True)
class ErrorKind:
    """Which squared errors of a model at a draw of t and noise."""

    error_space: ErrorSpace = "native"
    share_noise: bool = True
    """Winner and loser get the same noise."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method must be given; whatever is against it is an error before anything runs."""

    data: Literal["pairs", "images", "labelled", "prompts"]
    """Winner and loser; winners alone; single images, each good or bad; or prompts alone."""
    references: tuple[ReferenceKind, ...] = ("start",)
    """What the policy may be measured against, the method's own choice first."""
    scores: bool = False
    """Pairs come with scores of both images."""
    float32_features: bool = False
    """The reference is run in part, with gradient, on differences that only float32 resolves."""
    batch_statistics: bool = False
    """A mean over the micro-batch of all processes enters the loss, so that needs two samples or more."""
    replay: Replay | None = None
    """Training goes in rounds: the loser is an image that the round's reference samples for the winner's prompt."""
    items: Items | None = None
    """Of a method that takes prompts: what it is called with."""
    group_at_least: int = 1
    """Images of one prompt without which there is nothing to compare."""
    whole_groups: bool = False
    """All images of a prompt must be in one micro-batch."""
    old: bool = False
    """The policy that made the round's images is called in training too, and follows the trained one slowly."""
    of_sets: bool = False
    """A reward of whole sets may judge the images."""
    mean_old: bool = False
    """Moves come with the mean of the policy that made them."""
    log_ratio: bool = False
    """Images come with how much likelier their moves were under the policy that made them than under the reference."""
    real_share: float = 0.0
    """Of a method that takes prompts: share of its samples that are rows of the data, with their images."""
    real_beside: bool = False
    """Of a method that takes prompts: every pair comes with a row of the data beside it."""
    errors: ErrorKind | None = None
    """Of a method to which the reference is its errors at each draw and nothing more, so that they may be known
    beforehand: which errors."""

    @property
    def real(self) -> bool:
        """Prompts are those of data with images, which are trained on too."""
        return self.real_share > 0 or self.real_beside

    @property
    def batches(self) -> Literal["pairs", "images", "labelled"]:
        """What a method on data is called with: the data's kind, or winners that rounds have joined to losers."""
        if self.data == "prompts":
            raise ValueError("needs.data must be images to have batches of them, got 'prompts'")
        return self.data if self.replay is None else "pairs"


@runtime_checkable
class Method(Protocol):
    """A paper's loss: a frozen dataclass of its hyperparameters and one call."""

    @property
    def needs(self) -> Needs: ...

    def __call__(
        self, policy: Denoiser, reference: Denoiser | None, batch: Batch, rng: SampleRng, shared: Shared = ALONE
    ) -> StepLoss: ...


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The images of a round with what judges said of them; those that a judge could not score are left out."""

    scores: Mapping[str, Float[Tensor, " n"]]
    """By reward, in the config's order; means of people's labels under the name `people`."""
    weights: Mapping[str, float]
    """Of each reward in the sum."""
    group: Int[Tensor, " n"]
    """Number of each image's prompt in the round; images of a prompt lie together."""
    prompts: Sequence[str]
    """By that number."""
    past: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """Scores of earlier rounds by reward and prompt, the oldest first."""
    embedded: Embedded | None = None
    """The images in the space of `set_reward`."""
    set_reward: SetReward | None = None
    log_ratio: Float[Tensor, " n"] | None = None
    """Sum over an image's moves with noise of log_prob - log_prob_ref, as they were sampled, each averaged over
    elements; where the method asks for it."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def total(self) -> Float[Tensor, " n"]:
        """Weighted sum of the scores, float64."""
        rows = [self.weights[name] * scores.double() for name, scores in self.scores.items()]
        return torch.stack(rows).sum(0)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a round is trained on."""

    places: Int[Tensor, "m k"]
    """Images by place in the round: one a row, or winner and loser."""
    weight: Float[Tensor, " m"] | None = None
    """An advantage, or +1 and -1 for good and bad images; None for pairs."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was counted on the way."""


@runtime_checkable
class OnlineMethod(Method, Protocol):
    """A method that trains on images of its own policy, round by round."""

    def select(self, scored: Scored, generator: torch.Generator) -> Selection:
        """What of a round is trained on; a pure function of the scores and of what `generator` draws."""
        ...


@runtime_checkable
class FollowsOld(Protocol):
    """A method with an old policy: after every round old <- d old + (1 - d) policy."""

    def old_decay(self, step: int) -> float:
        """d, after so many optimizer steps of the run."""
        ...

    def old_samples(self, step: int) -> bool:
        """Whether the old policy makes the images of a round that starts at this step; else the trained one does."""
        ...


@runtime_checkable
class TrainsAtLevels(Protocol):
    """A method that trains an image of a round several times, each time at another t and noise."""

    def passes(self, moves: int) -> int:
        """How many times, after a walk of so many moves.

        Raises:
            InputError: The walk is too short for what the method was told.
        """
        ...

    def train_levels(self, moves: int, generator: torch.Generator) -> tuple[int, ...] | None:
        """Numbers of the moves at whose t one image is trained, one for each pass; None leaves t to the noise path.

        Where `needs.whole_groups`, all images of a group are trained at what one call draws.
        """
        ...
