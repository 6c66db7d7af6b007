"""What a guard looks at, how often, and what it does where training only pleases its own reward."""

from dataclasses import dataclass
from typing import Literal

from diffalign.errors import InputError
from diffalign.evaluate.image_checks import DIVERSITY

Action = Literal["warn", "stop", "roll_back"]


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Looks at fixed prompts and fixed noise while training goes on; the policy as it started is what counts as sound.

    Bounds are those of the checks of an evaluation; each must be passed by more than chance.
    """

    every: int
    """Optimizer steps from one look to the next; online a multiple of online.updates."""
    prompts: str
    """A file or a set by name, at least 8 prompts; best none that are trained on."""
    held_out: tuple[str, ...]
    """Rewards by spec that training never sees."""
    trained: tuple[str, ...] = ()
    """Rewards by spec that training is to raise, or that labelled its pairs; left out with online.rewards, which are
    these. Where there are none, nobody knows whether training's own reward rose, and any loss counts."""
    limit: int | None = None
    """Keep so many prompts, those of least sha256."""
    images_per_prompt: int = 4
    """Diversity needs at least 4; 8 are better."""
    steps: int = 20
    """Of the sampler, which is the deterministic one of evaluations."""
    guidance: float = 7.5
    batch_size: int = 8
    """Images that are sampled at a time, per device."""
    encoder: str | None = None
    """By spec, for diversity and drift; None takes that of the first reward that has one, held-out ones first."""
    win_rate: float = 0.5
    """Bound of a held-out reward's win rate against the start: its whole interval below this is a loss."""
    diversity: float = DIVERSITY
    """Share of the start's diversity within prompts that must be left."""
    drift: float | None = None
    """Most 1 - cosine from the start's image of the same noise, whatever the rewards do; None reports it only."""
    action: Action = "warn"
    """Where training diverges: say so and go on; end the run with the weights as they are; or go back to the last
    checkpoint that was found whole, and end there."""

    def __post_init__(self) -> None:
        for name in ("every", "images_per_prompt", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"guard.{name} must be at least 1, got {getattr(self, name)}")
        if not self.held_out:
            raise InputError("guard.held_out must name at least one reward that training never sees, got none")
        if self.guidance < 1:
            raise InputError(f"guard.guidance must be at least 1, which is off, got {self.guidance}")
        for name in ("win_rate", "diversity"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"guard.{name} must be in (0, 1], got {getattr(self, name)}")
        if self.drift is not None and self.drift <= 0:
            raise InputError(f"guard.drift must be positive, got {self.drift}; leave it out to report it only")
