"""One round of an online run: its images, by whom they are sampled and judged, and its folder."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from diffalign import rng
from diffalign.assemble import Parts
from diffalign.checkpoint import enough_room
from diffalign.data.orders import Order
from diffalign.online.parts import OnlineParts
from diffalign.online.sampling import reference_log_probs, sample_part
from diffalign.online.scoring import Scoring, images_of
from diffalign.online.store import Entry, Store
from diffalign.progress import bar
from diffalign.types import Cond, Denoiser, FollowsOld, OnlineMethod, Trajectory


@dataclass(frozen=True, kw_only=True)
class OwnRound:
    """One round of an online run, 1 first."""

    parts: Parts
    online: OnlineParts
    number: int

    @property
    def first(self) -> int:
        """Steps taken before the round."""
        return (self.number - 1) * self.online.settings.updates

    @property
    def start(self) -> int:
        """Steps taken before what is left of it."""
        return max(self.first, self.parts.start)

    @property
    def fresh(self) -> bool:
        """The policy is the one that the round begins with."""
        return self.start == self.first

    @property
    def root(self) -> Path:
        """Folder of all rounds."""
        return self.parts.folder / "rounds"

    @property
    def folder(self) -> Path:
        return self.root / f"round-{self.number}"

    @property
    def method(self) -> OnlineMethod:
        method = self.parts.cfg.method
        assert isinstance(method, OnlineMethod), "a method on prompts selects"
        return method

    @property
    def sampler(self) -> Denoiser:
        """The policy that makes the images, without the wrappers that training has around its network."""
        slow = self.online.old
        if slow is not None and isinstance(self.method, FollowsOld) and self.method.old_samples(self.first):
            return slow.denoiser
        return cast(Denoiser, replace(self.parts.policy, net=self.parts.net))

    def entries(self) -> list[Entry]:
        """The round's images: its prompts in an order that is shuffled anew every time all had their turn."""
        s, prompts, seed = self.online.settings, self.online.prompts, self.parts.cfg.seed
        order = Order(len(prompts), seed)
        found = []
        for place in range(s.prompts):
            row = order.item((self.number - 1) * s.prompts + place)
            for member in range(s.group):
                own, shared = (("image", place, member), ("group", place))
                found.append(
                    Entry(
                        id=f"{place:05d}-{member}",
                        prompt=prompts.prompts[row],
                        group=place,
                        seed=_seed(seed, self.number, *own),
                        noise_seed=_seed(seed, self.number, *(shared if s.shared_noise else own)),
                        metadata=prompts.metadata[row],
                    )
                )
        return found


def tidy(this: OwnRound) -> None:
    """Removes later rounds of a run that went back, and of earlier ones what only training needed."""
    for place in this.root.glob("round-*"):
        number = int(place.name.removeprefix("round-"))
        if number > this.number:
            shutil.rmtree(place)
        elif number < this.number:
            Store(place, (), 1).thin()
    for file in (this.root / "history").glob("round-*.json"):
        if int(file.stem.removeprefix("round-")) > this.number:
            file.unlink()


def sample(this: OwnRound, store: Store, cond: Cond, uncond: Cond) -> None:
    """Samples and scores the round's batches that are not there yet, this process its share of them."""
    parts, online, main = this.parts, this.online, this.parts.accelerator.is_main_process
    wanting = [p for p in store.parts if not (store.sampled(p) and (online.judges is None or store.judged(p)))]
    parts.accelerator.wait_for_everyone()  # all have looked before anyone writes
    mine = wanting[parts.share.mine :: parts.share.of]
    if main and wanting:
        store.write_manifest(_about(this))
    if mine:
        _make(this, store, mine, cond, uncond)
    parts.accelerator.wait_for_everyone()


def _make(this: OwnRound, store: Store, mine: list[int], cond: Cond, uncond: Cond) -> None:
    """Samples and scores batches, a score as soon as there is an image."""
    parts, online = this.parts, this.online
    policy = this.sampler
    window = online.window(parts.cfg.seed, this.number)
    device, root = parts.accelerator.device, parts.folder / "checkpoints"
    if online.judges is not None:
        online.judges.to(device)
    total = sum(len(store.rows(part)) for part in mine)
    with (
        bar(f"round {this.number}", total, shown=parts.accelerator.is_main_process) as shown,
        Scoring(online.judges, store, shown.advance) as scoring,
        enough_room(store.folder, root),
    ):
        for part in mine:
            if store.sampled(part):
                images = images_of(store, part)
            else:
                walked, images = sample_part(
                    online, policy, store, part, cond, uncond,
                    window=window, device=device, autocast=parts.accelerator.autocast,
                )  # fmt: skip
                store.write_part(part, walked, images, _under_reference(this, walked, uncond))
            scoring.submit(part, images)
    online.encoders.rest()
    if parts.cfg.train.offload and online.judges is not None:
        online.judges.to("cpu")


def _under_reference(this: OwnRound, walked: Trajectory, uncond: Cond) -> Float[Tensor, "b n"] | None:
    """Log-probs of a batch's moves under the reference, where the method has the KL in its reward."""
    parts = this.parts
    if not parts.cfg.method.needs.log_ratio:
        return None
    assert parts.reference is not None, "a method that asks for log-ratios has a reference"
    return reference_log_probs(
        this.online, parts.reference.denoiser, walked, uncond, device=parts.accelerator.device,
        autocast=parts.accelerator.autocast,
    )  # fmt: skip


def _about(this: OwnRound) -> dict[str, Any]:
    """How the images of a round were sampled, for the manifest."""
    s, walk = this.online.settings, this.online.walk
    window = this.online.window(this.parts.cfg.seed, this.number)
    return {
        "round": this.number,
        "model": this.parts.cfg.model.path,
        "kernel": walk.kernel.name,
        "steps": s.steps,
        "guidance": s.guidance,
        "window": None if window is None else [window.start, window.stop],
        "levels": [round(float(t), 6) for t in walk.schedule.levels],
    }


def _seed(*path: int | str) -> int:
    """A seed for one place in the tree of random streams."""
    return rng.generator(int(path[0]), "rollout", *path[1:]).initial_seed()
