"""What an online run is made of beside its policy: prompts, encoders, judges, the walk that samples."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.data.batches import LatentScale
from diffalign.data.prepare import Encoders, vae_scale
from diffalign.data.prompts import PromptSet
from diffalign.denoisers import Context, Family
from diffalign.denoisers.family import PLAIN
from diffalign.errors import InputError
from diffalign.evaluate.media import Medium, medium_of
from diffalign.models.load import ModelSource, load_scheduler_config
from diffalign.models.policy import Reference, make_old
from diffalign.online.scoring import Judges, load_judges
from diffalign.online.settings import KernelSettings, OnlineSettings
from diffalign.sampling.kernels import Kernel
from diffalign.sampling.rollout import check_solver, draw_window, noisy_steps
from diffalign.sampling.schedule import few_steps, make_schedule
from diffalign.sampling.walk import KernelWalk
from diffalign.types import Needs


@dataclass(frozen=True, kw_only=True)
class OnlineParts:
    """Everything that rounds are made with."""

    settings: OnlineSettings
    prompts: PromptSet
    encoders: Encoders
    scale: LatentScale
    medium: Medium
    """What samples are, as files and as judges take them."""
    judges: Judges | None
    """None: people judge."""
    walk: KernelWalk
    shape: tuple[int, int, int]
    """Channels, height and width of latents; of clips channels, frames and 1."""
    old: Reference | None
    """The policy that samples, where it is another than the one that is trained."""

    def window(self, seed: int, number: int) -> range | None:
        """Moves with noise of a round; None for all that can have it."""
        chosen = self.settings.window
        if chosen is None:
            return None
        low, high = chosen.bounds(len(self.walk.schedule))
        return draw_window(chosen.size, low, high, seed=seed, place=("round", number))


def make_online(
    settings: OnlineSettings,
    needs: Needs,
    source: ModelSource,
    family: Family,
    policy: Any,
    *,
    prompts: PromptSet,
    zeros: bool,
    context: Context,
    adapted: bool,
    device: torch.device,
    offload: bool = False,
    text_dtype: torch.dtype = torch.float32,
) -> OnlineParts:
    """The parts of an online run.

    Raises:
        InputError: Prompts, rewards or a walk that cannot be.
    """
    if len(prompts) < settings.prompts:
        raise InputError(
            f"data.path must hold at least the {settings.prompts} prompts of a round, got {len(prompts)}; lower "
            "online.prompts"
        )
    medium = medium_of(family.modality, context, heard_hz=settings.heard_hz, mono=settings.mono)
    return OnlineParts(
        settings=settings,
        prompts=prompts,
        encoders=Encoders(source, family, device, zeros=zeros, offload=offload, context=context, text_dtype=text_dtype),
        scale=vae_scale(source),
        medium=medium,
        judges=None if settings.by_people else load_judges(settings, medium),
        walk=make_walk(settings, needs, source, family=family, context=context),
        shape=context.latents,
        old=make_old(policy, adapted=adapted) if needs.old else None,
    )


def make_walk(
    settings: OnlineSettings,
    needs: Needs,
    source: ModelSource,
    *,
    family: Family | None = None,
    context: Context = PLAIN,
) -> KernelWalk:
    """The walk that samples, and for methods on moves is trained on.

    Args:
        family: None is one without levels of its own and without a shift that grows with the image.
        context: How large what is made is.

    Raises:
        InputError: A kernel that is not for this model, one without noise where log-probs are needed, or a window that
            does not fit.
    """
    config = load_scheduler_config(source)
    on_moves = needs.items in ("transitions", "transition_pairs")
    if not on_moves and few_steps(config):
        raise InputError(
            f"model.path must be a model of many steps with a method that noises its own images, got {source.path!r}, "
            "which was distilled to a few; take a method on moves (ddpo, d3po), or the model that it was made from"
        )
    chosen = choose_kernel(
        settings.kernel, flows=str(config.get("_class_name", "")).startswith("FlowMatch"), on_moves=on_moves
    )
    levels = None if family is None else family.levels
    tokens = None if family is None else math.prod(context.latents[1:]) // family.patch**2
    schedule = make_schedule(chosen.name, config, settings.steps, table=settings.table, sigmas=levels, tokens=tokens)
    noisy = noisy_steps(chosen, schedule)
    if on_moves and not noisy:
        raise InputError(
            f"online.kernel must have noise with a method that needs log-probs of its moves, got {chosen.name!r} "
            "without any; raise online.kernel.eta, or leave online.kernel out"
        )
    check_solver(chosen, len(schedule), len(noisy) if settings.window is None else settings.window.size)
    if settings.window is not None:
        if not on_moves:
            raise InputError("online.window must be left out with a method that does not train on moves")
        low, high = settings.window.bounds(len(schedule))
        if not 1 <= settings.window.size <= high - low or low < 0 or high - 1 not in noisy:
            raise InputError(
                f"online.window must have a size in [1, {high - low}] within the moves with noise, [{noisy[0]}, "
                f"{noisy[-1] + 1}), got size {settings.window.size} in [{low}, {high})"
            )
    return KernelWalk(kernel=chosen, schedule=schedule)


def choose_kernel(named: KernelSettings | None, *, flows: bool, on_moves: bool) -> Kernel:
    """The kernel of the config, or the published one: noise-free, DDIM with eta 1, or Flow-GRPO's SDE."""
    if named is not None:
        return named.make()
    default = "ode" if not on_moves else "flow_sde" if flows else "ddim"
    return KernelSettings(name=default).make()
