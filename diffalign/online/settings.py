"""The `[online]` section: prompts of a round, images of a prompt, how they are sampled and who judges them."""

from dataclasses import asdict, dataclass
from typing import Literal

from diffalign.errors import InputError
from diffalign.sampling.kernels import Kernel, kernel
from diffalign.sampling.schedule import Table

KEPT_POLICIES = 3
"""Rounds whose reference or slow copy stays on disk: more than a resumed run goes back."""


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """By which kernel the walk goes; options left out have their published values."""

    name: str
    eta: float | None = None
    """Strength of the noise; what it means is the kernel's."""
    limit: float | None = None
    """Greatest std of a move of `flow_sde`."""
    last: Literal["clean", "noise"] | None = None
    """What `flow_sde` and `dance` do in the last move."""
    variance: Literal["fixed_small", "fixed_large"] | None = None
    """Of `ddpm`."""
    form: Literal["normal", "scaled_sq"] | None = None
    """Of log-probs; None is the kernel's own."""
    solver_order: Literal[1, 2] | None = None
    """Of moves without noise: 1, where it is left out, is DDIM or a flow's Euler move; 2 is DPM-Solver++(2M)."""

    def make(self) -> Kernel:
        """The kernel with its options.

        Raises:
            InputError: Unknown name, an option that the kernel does not have, or one out of its range.
        """
        options = {k: v for k, v in asdict(self).items() if v is not None}
        return kernel(options.pop("name"), **options)


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """Consecutive moves with noise, drawn anew for every round; the others are noise-free and not trained.

    Paper: Li et al., "MixGRPO", arXiv 2507.21802; Flow-GRPO-Fast of yifan123/flow_grpo.
    """

    size: int
    low: int = 0
    """First move that may be in it."""
    high: int | None = None
    """One after the last that may; None is half of the moves."""

    def bounds(self, moves: int) -> tuple[int, int]:
        """[low, high) on a walk of so many moves."""
        return self.low, moves // 2 if self.high is None else self.high


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Rounds: prompts are drawn, images made of each, judged, and trained on for some updates."""

    rewards: tuple[str, ...] = ()
    """Pointwise rewards by spec, as `diffalign list rewards` names them. None of them, and no set reward: people label
    the images of each round."""
    weights: tuple[float, ...] = ()
    """Of the rewards, in their order; 1 each where left out."""
    set_reward: str | None = None
    """A reward of whole sets by spec, for methods that build sets."""
    set_reference: str | None = None
    """What it compares with: a folder of images, or a file of its own statistics."""
    prompts: int = 8
    """Prompts of a round, over all processes."""
    group: int = 8
    """Images of each prompt."""
    updates: int = 1
    """Optimizer steps of a round."""
    steps: int = 10
    """Moves of the sampler."""
    guidance: float = 1.0
    """w in uncond + w (cond - uncond) while sampling; methods on moves train the guided model too."""
    batch_size: int = 8
    """Images that are sampled at a time, per device."""
    kernel: KernelSettings | None = None
    """None: noise-free for methods on images; for methods on moves DDIM with eta 1, or Flow-GRPO's SDE on a flow."""
    window: WindowSettings | None = None
    """None: every move for which the kernel has noise."""
    table: Table = "analytic"
    """Levels of a flow; `diffusers` are those of the stock pipeline."""
    shared_noise: bool = False
    """Images of a prompt start from the same noise (D3PO, DanceGRPO, MixGRPO)."""
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    """Log-probs of the policy that sampled: computed again as training will, where its batches have another shape, or
    taken from the rollout."""
    store_dtype: Literal["float32", "float16"] = "float32"
    """Of states on disk; with float16 the walk goes on from the rounded ones."""
    heard_hz: int | None = None
    """Samples a second at which rewards get clips, which are resampled to it; None is the model's own."""
    mono: bool = False
    """Rewards get the mean of a clip's channels."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "updates", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"online.{name} must be at least 1, got {getattr(self, name)}")
        if self.guidance < 1:
            raise InputError(f"online.guidance must be at least 1, which is off, got {self.guidance}")
        if self.heard_hz is not None and self.heard_hz < 1:
            raise InputError(f"online.heard_hz must be at least 1, got {self.heard_hz}")
        if self.weights and len(self.weights) != len(self.rewards):
            raise InputError(
                f"online.weights must be one for each of the {len(self.rewards)} rewards, got {len(self.weights)}"
            )
        if self.set_reference is not None and self.set_reward is None:
            raise InputError("online.set_reference must be left out without online.set_reward, which compares with it")

    @property
    def images(self) -> int:
        """Images of a round, over all processes."""
        return self.prompts * self.group

    def evaluated_again(self, batch_size: int, *, mean_old: bool) -> bool:
        """Whether log-probs of the policy that sampled are computed again, in training's batches of this size.

        Args:
            mean_old: The method needs the means of its moves too, which a rollout does not keep.
        """
        same_shape = batch_size == self.batch_size and self.images % self.batch_size == 0
        return mean_old or not (self.old_log_probs == "rollout" or same_shape)

    @property
    def by_people(self) -> bool:
        """Nobody but people judges."""
        return not self.rewards and self.set_reward is None
