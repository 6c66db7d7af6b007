"""Rounds of an online run: prompts to rollouts to scores to batches, and every piece of it on disk as it is made.

Round k samples with the policy as it stands at its start, or with the slow copy that a method asks for. What its
images are depends on (config, seed, k) and those weights alone, whatever the number of processes: batches of images are
shared out whole. A killed round makes what is missing. See `online.store` for the files.
"""

import time
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from diffalign import rng
from diffalign.assemble import Parts
from diffalign.checkpoint import enough_room, restore_
from diffalign.denoisers.guided import Guided
from diffalign.errors import RunError
from diffalign.logbook import Logbook
from diffalign.online.collate import RoundCollator, RoundOrder, turns_of
from diffalign.online.real import real_before, with_real
from diffalign.online.sampling import remember_old
from diffalign.online.settings import KEPT_POLICIES
from diffalign.online.store import Store
from diffalign.online_round import OwnRound, sample, tidy
from diffalign.online_scores import scored_images, statistics
from diffalign.pool import Pool
from diffalign.rounds import Phase
from diffalign.types import Cond, Denoiser, FollowsOld, Selection


def own_phases(parts: Parts, book: Logbook) -> Iterator[Phase]:
    """What is left of an online run, round by round, each sampled and judged when it is asked for.

    Raises:
        RunError: A judge failed or cannot tell images apart, an image is not finite, or people have yet to label.
    """
    assert parts.online is not None, "an online run has parts of its own"
    updates = parts.online.settings.updates
    for number in range(parts.start // updates + 1, parts.cfg.train.steps // updates + 1):
        yield _begin(OwnRound(parts=parts, online=parts.online, number=number), book)


def _begin(this: OwnRound, book: Logbook) -> Phase:
    """Makes a round ready: its reference, its images, what they are worth, and what of them is trained on."""
    parts, online, began = this.parts, this.online, time.monotonic()
    if parts.accelerator.is_main_process:
        tidy(this)
    parts.accelerator.wait_for_everyone()
    _move_models(this)
    store = Store(this.folder, this.entries(), online.settings.batch_size, online.medium)
    cond, uncond = _conditions(this, store)
    sample(this, store, cond, uncond)
    sampled = time.monotonic()
    scored, images = scored_images(this, store)
    selection = this.method.select(scored, rng.generator(parts.cfg.seed, "round", this.number, "select"))
    if not len(selection.places):
        raise RunError(
            f"round {this.number} must have images that differ in score to learn from, got none in {len(scored)} "
            f"images of {online.settings.prompts} prompts; raise online.group or online.prompts, or look at the reward"
        )
    collator = _collator(this, store, cond, selection, images)
    policy, reference = _guided(this, uncond)
    if parts.cfg.method.needs.items == "transitions":
        _remember_old(this, store, collator, policy)
    if this.fresh:
        made = {"images": online.settings.images, "images_so_far": online.settings.images * this.number}
        told = {"round": this.number, **made, "kept": len(selection.places)}
        seconds = {"sampling_seconds": round(sampled - began, 4), "seconds": round(time.monotonic() - began, 4)}
        book.round(this.start, {**told, **statistics(scored), **selection.metrics, **seconds})
    return Phase(
        policy=policy,
        reference=reference,
        old=None if online.old is None else online.old.denoiser,
        collator=with_real(collator, parts.collator, parts.cfg.method.needs),
        held=None,
        start=this.start,
        stop=this.first + online.settings.updates,
    )


def _move_models(this: OwnRound) -> None:
    """Puts the slow copy that samples, and a reference that each round renews, where this round has them."""
    parts, old = this.parts, this.online.old
    if parts.reference is not None and parts.reference_kind == "pool":
        pool = Pool(this.root / "policies")
        _keep(this, pool, this.number - 1, parts.parameters)
        restore_(parts.reference.parameters, pool.policy(this.number - 1, parts.reference.parameters))
    if old is None:
        return
    pool = Pool(this.root / "old")
    if this.fresh and this.number > 1:
        restore_(old.parameters, pool.policy(this.number - 1, old.parameters))
        old.follow(parts.parameters, decay=_old_decay(this))
    if this.fresh:
        _keep(this, pool, this.number, old.parameters)
    restore_(old.parameters, pool.policy(this.number, old.parameters))


def _keep(this: OwnRound, pool: Pool, number: int, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Adds weights to a pool at the round's start, and lets go of those that no resumed run can ask for."""
    if this.fresh and this.parts.accelerator.is_main_process:
        pool.drop_from(number)
        pool.drop_before(number - KEPT_POLICIES + 1)
        with enough_room(pool.folder, this.parts.folder / "checkpoints"):
            pool.add(number, parameters)
    this.parts.accelerator.wait_for_everyone()


def _old_decay(this: OwnRound) -> float:
    method = this.parts.cfg.method
    assert isinstance(method, FollowsOld), "a method with a slow copy says how slow"
    return method.old_decay(this.first)


def _conditions(this: OwnRound, store: Store) -> tuple[Cond, Cond]:
    """(conditions of the round's prompts by place, those of the empty prompt), on the CPU."""
    texts = [entry.prompt for entry in store.entries[:: this.online.settings.group]]
    both = this.online.encoders.prompts([*texts, ""])
    this.online.encoders.rest()
    return both.rows(slice(0, -1)), both.rows(slice(-1, None))


def _guided(this: OwnRound, uncond: Cond) -> tuple[Denoiser, Denoiser | None]:
    """Policy and reference as they are trained: guided, as they sampled, where moves are what is trained on."""
    parts, w = this.parts, this.online.settings.guidance
    reference = None if parts.reference is None else parts.reference.denoiser
    if w == 1 or parts.cfg.method.needs.items not in ("transitions", "transition_pairs"):
        return parts.policy, reference
    device = uncond.to(parts.accelerator.device)
    policy = Guided(denoiser=parts.policy, uncond=device, guidance=w)
    return policy, None if reference is None else Guided(denoiser=reference, uncond=device, guidance=w)


def _collator(
    this: OwnRound, store: Store, cond: Cond, selection: Selection, images: Int[Tensor, " n"]
) -> RoundCollator:
    """Batches of what was selected."""
    parts, needs, settings = this.parts, this.parts.cfg.method.needs, this.online.settings
    assert needs.items is not None, "a method on prompts says what it is called with"
    t, moves = parts.cfg.train, len(this.online.walk.schedule)
    first = this.first * t.batch_size * t.accumulate * parts.share.of
    turns, draw = turns_of(this.method, store.walk()[0], moves)
    order = RoundOrder(
        rows=len(selection.places),
        turns=turns,
        moves=moves,
        draw=draw,
        first=first - real_before(first, needs.real_share),
        block=t.batch_size * parts.share.of,
        unit=settings.group if needs.whole_groups else 1,
        seed=parts.cfg.seed,
        round=this.number,
    )
    return RoundCollator(
        store=store,
        walk=this.online.walk,
        cond=cond,
        selection=selection,
        images=images,
        kind=needs.items,
        order=order,
        mean_old=needs.mean_old,
    )


def _remember_old(this: OwnRound, store: Store, collator: RoundCollator, policy: Denoiser) -> None:
    """Log-probs of the policy that sampled, computed again where training sees other batches than sampling did."""
    parts, settings, needs = this.parts, this.online.settings, this.parts.cfg.method.needs
    t = parts.cfg.train
    if not settings.evaluated_again(t.batch_size, mean_old=needs.mean_old):
        return
    missing = [part for part in store.parts if not store.has_old(part)]
    parts.accelerator.wait_for_everyone()
    if missing and not this.fresh:
        raise RunError(
            f"{store.folder} must hold the log-probs of the policy that sampled, got none for batch {missing[0]} of a "
            "round that is under way; resume from a checkpoint at the start of the round"
        )
    remember_old(
        store,
        missing[parts.share.mine :: parts.share.of],
        collator,
        policy,
        with_mean=needs.mean_old,
        batch_size=t.batch_size,
        device=parts.accelerator.device,
        autocast=parts.accelerator.autocast,
    )
    parts.accelerator.wait_for_everyone()
