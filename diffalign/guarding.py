"""The guard of a run at work: its images by the policy as it would be exported, its verdict, and what follows from it.

Under guard/ lie step-000000/, the images of the start, which every look of the run is compared with, and those of the
last look. Batches of images are shared out over processes whole; the main process judges them all.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from diffalign import rewards
from diffalign.assemble import Parts
from diffalign.checkpoint import enough_room
from diffalign.errors import RunError
from diffalign.evaluate.generate import make_batch
from diffalign.evaluate.score import columns_of
from diffalign.guard.images import Images, drop_others, paired_images, paired_scores
from diffalign.guard.look import Look, examine
from diffalign.guard.parts import GuardParts
from diffalign.logbook import Logbook
from diffalign.models.load import load_pipeline
from diffalign.models.offload import placed
from diffalign.progress import Bar, bar
from diffalign.types import Reward, RewardBatch

log = logging.getLogger(__name__)


def watch(parts: Parts, guard: GuardParts, book: Logbook, step: int, shown: Bar | None = None) -> bool:
    """Looks at the policy as it is; True where the step must have a checkpoint.

    Args:
        shown: The bar of the training; without it the look has one of its own.

    Raises:
        RunError: An image is not finite, a reward cannot judge, or the images of the start are gone.
    """
    start, now = _images(parts, guard, 0), _images(parts, guard, step)
    if step and not start.whole:
        raise RunError(f"{start.folder} must hold the images of the policy at its start, which looks are compared with")
    if step or not start.whole:
        _make(parts, guard, now, shown)
    found: Look | None = None
    if parts.accelerator.is_main_process:
        drop_others(now.folder.parent, (start.folder, now.folder))
        images, scores = paired_images(now, start), paired_scores(now, start)
        with _placed(parts, [guard.encoder]):
            found = examine(guard, images, scores, seed=parts.cfg.seed)
        about = {"action": guard.settings.action, "whole": guard.standing.whole if found.diverged else step}
        book.guard(step, {**about, **found.entry()}, found.numbers())
    diverged = _agreed(parts, found is not None and found.diverged)
    guard.standing.looked = step
    guard.standing.whole = guard.standing.whole if diverged else step
    if found is not None and diverged:
        log.warning("step %d: training diverges%s: %s", step, _consequence(guard), found.reason)
    return guard.over or (guard.rolls_back and not diverged)


@contextmanager
def _placed(parts: Parts, things: Sequence[object]) -> Iterator[None]:
    """Inside, what holds a network is on the run's device, and afterwards out of training's way."""
    movable = [thing for thing in things if isinstance(thing, rewards.OnDevice)]
    for thing in movable:
        thing.to(parts.accelerator.device)
    try:
        yield
    finally:
        for thing in movable:
            thing.to("cpu")


def _judges(parts: Parts, guard: GuardParts) -> list[Reward]:
    """The guard's rewards; those that judge the run's own rounds are the same ones, loaded once."""
    own = () if parts.online is None or parts.online.judges is None else parts.online.judges.pointwise
    shared = {reward.name: reward for reward in own}
    return [shared.get(reward.name, reward) for reward in guard.rewards]


def _images(parts: Parts, guard: GuardParts, step: int) -> Images:
    folder = parts.folder / "guard" / f"step-{step:06d}"
    return Images(folder=folder, places=guard.places, batch_size=guard.settings.batch_size)


def _make(parts: Parts, guard: GuardParts, now: Images, shown: Bar | None) -> None:
    """Samples and scores the images of a look."""
    main, judges = parts.accelerator.is_main_process, _judges(parts, guard)
    parts.accelerator.wait_for_everyone()  # all have seen what is there before anyone writes
    if main:
        now.begin()
    parts.accelerator.wait_for_everyone()
    mine = now.parts[parts.share.mine :: parts.share.of]
    if mine:
        total = sum(len(now.of(part)) for part in mine)
        with (
            enough_room(now.folder, parts.folder / "checkpoints"),
            _placed(parts, judges),
            _counted(shown, total, main=main) as advance,
        ):
            _sample(parts, guard, now, mine, judges, advance)
    parts.accelerator.wait_for_everyone()
    if main:
        with enough_room(now.folder, parts.folder / "checkpoints"):
            now.finish()
    parts.accelerator.wait_for_everyone()


def _sample(
    parts: Parts, guard: GuardParts, now: Images, mine: range, judges: list[Reward], advance: Callable[[int], None]
) -> None:
    """Batches by the stock pipeline around the network as it is, each scored and written."""
    family, settings, texts = parts.family, guard.settings, guard.prompts.prompts
    whole = load_pipeline(parts.cfg.model, only=("vae", *family.text), net=parts.net)
    with placed(whole, parts.net, offload=parts.cfg.train.offload) as pipeline:
        family.use_sampler(pipeline)
        for part in mine:
            places = now.of(part)
            with parts.accelerator.autocast():
                made = make_batch(pipeline, family, texts, places, steps=settings.steps, guidance=settings.guidance)
            asked = RewardBatch(
                images=torch.stack([one.image for one in made]),
                prompts=[texts[i] for i, _ in places],
                metadata=[guard.prompts.metadata[i] for i, _ in places],
            )
            now.write(part, made, {reward.name: columns_of(reward, asked)[reward.name] for reward in judges})
            advance(len(made))


@contextmanager
def _counted(shown: Bar | None, total: int, *, main: bool) -> Iterator[Callable[[int], None]]:
    """Counts images beside the training's bar, or on a bar of their own."""
    if shown is None:
        with bar("guard", total, shown=main) as own:
            yield own.advance
        return
    done = 0

    def advance(by: int) -> None:
        nonlocal done
        done += by
        shown.advance(0, note=f"guard {done}/{total}")

    yield advance


def _agreed(parts: Parts, diverged: bool) -> bool:
    """What the main process found, in all of them."""
    mine = torch.tensor([float(diverged)], device=parts.accelerator.device)
    return bool(parts.accelerator.reduce(mine, reduction="sum").item())


def _consequence(guard: GuardParts) -> str:
    return {
        "warn": "",
        "stop": " and ends here",
        "roll_back": f", goes back to step {guard.standing.whole} and ends there",
    }[guard.settings.action]
