"""What a guard is made of: prompts, judges, an encoder, and what it knows of the run so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffalign import rewards
from diffalign.data.cards import read_card
from diffalign.data.prompts import PromptSet, read_prompts
from diffalign.errors import InputError
from diffalign.evaluate.diversity import MIN_IMAGES
from diffalign.evaluate.examine import encoder_of
from diffalign.evaluate.findings import MIN_PROMPTS
from diffalign.guard.settings import GuardSettings
from diffalign.online.scoring import check_takes
from diffalign.online.settings import OnlineSettings
from diffalign.types import MediaEncoder, Reward


@dataclass
class Standing:
    """What the guard knows of the run; checkpoints carry it."""

    looked: int = 0
    """Step of the last look."""
    whole: int = 0
    """Step of the last look that found nothing; the start is whole by definition."""


@dataclass(frozen=True, kw_only=True)
class GuardParts:
    """Everything that a guard looks with."""

    settings: GuardSettings
    prompts: PromptSet
    rewards: tuple[Reward, ...]
    """Held-out ones first."""
    trained: Mapping[str, float]
    """1 by name of a reward that training raises, -1 of one that it lowers."""
    encoder: MediaEncoder | None
    standing: Standing = field(default_factory=Standing)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the rewards that training never sees."""
        return tuple(reward.name for reward in self.rewards[: len(self.settings.held_out)])

    @property
    def places(self) -> list[tuple[int, int]]:
        """(prompt's place, number of its seed) of every image."""
        return [(i, k) for i in range(len(self.prompts)) for k in range(self.settings.images_per_prompt)]

    def looks_at(self, step: int) -> bool:
        return step % self.settings.every == 0

    @property
    def diverged(self) -> bool:
        """The last look found a divergence."""
        return self.standing.looked != self.standing.whole

    @property
    def over(self) -> bool:
        """Training ends, or has ended, where the last look was."""
        return self.diverged and self.settings.action != "warn"

    @property
    def rolls_back(self) -> bool:
        """What was found whole must stay on disk."""
        return self.settings.action == "roll_back"


def make_guard(settings: GuardSettings, online: OnlineSettings | None, data: str) -> GuardParts:
    """The guard of a config; rewards hold no weights until they score.

    Args:
        online: Of a run on its own images.
        data: Preference data whose card may name the reward that labelled them.

    Raises:
        InputError: Too few prompts, an unknown reward or encoder, or a held-out reward that training sees.
    """
    prompts = read_prompts(settings.prompts, settings.limit)
    if len(prompts) < MIN_PROMPTS:
        raise InputError(
            f"guard.prompts must hold at least {MIN_PROMPTS} prompts, on fewer nothing can be told from chance; got "
            f"{len(prompts)} of {settings.prompts!r}"
        )
    own = settings.trained if online is None or not online.rewards else online.rewards
    weights = (1.0,) * len(own) if online is None or not online.weights else online.weights
    held_out, trained = _loaded(settings.held_out, "held_out"), _loaded(own, "trained")
    _check_held_out(settings.held_out, held_out, trained, data)
    everyone = (*held_out, *trained)
    names = [reward.name for reward in everyone]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"guard: rewards must have names of their own, got {twice[0]!r} twice")
    return GuardParts(
        settings=settings,
        prompts=prompts,
        rewards=everyone,
        trained={r.name: math.copysign(1, w) for r, w in zip(trained, weights, strict=True) if w},
        encoder=_encoder(settings, everyone),
    )


def _loaded(specs: Sequence[str], key: str) -> tuple[Reward, ...]:
    found = tuple(rewards.load(spec) for spec in specs)
    for reward in found:
        check_takes(reward, f"guard.{key}")
    return found


def _check_held_out(specs: Sequence[str], held_out: Sequence[Reward], trained: Sequence[Reward], data: str) -> None:
    """Raises InputError for a judge that training sees: by what it loads to, or by the card of its data."""
    card = read_card(data)
    labels = {card[key] for key in ("labels", "scores") if key in card}
    seen = {(reward.name, reward.version): "training raises it" for reward in trained}
    for spec, reward in zip(specs, held_out, strict=True):
        why = seen.get((reward.name, reward.version)) or (f"it judged {data}" if spec in labels else None)
        if why is not None:
            raise InputError(f"guard.held_out must name rewards that training never sees, got {spec!r}, and {why}")


def _encoder(settings: GuardSettings, everyone: Sequence[Reward]) -> MediaEncoder | None:
    if settings.encoder is None:
        found = encoder_of(everyone)
        if found is None and settings.drift is not None:
            raise InputError(
                "guard.encoder must be there with guard.drift, which is measured by it; no reward of the guard has one"
            )
        return found
    if settings.images_per_prompt < MIN_IMAGES:
        raise InputError(
            f"guard.images_per_prompt must be at least {MIN_IMAGES} with guard.encoder, for diversity within prompts; "
            f"got {settings.images_per_prompt}"
        )
    found = rewards.load_encoder(settings.encoder)
    if found.modality != "image":
        raise InputError(f"guard.encoder must be of images, got {settings.encoder!r} of {found.modality}")
    return found
