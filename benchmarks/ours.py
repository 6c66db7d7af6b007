"""Our step with each saving on or off: the collator, the method and `fit` themselves, assembled as a run's are.

It starts where the plain loop does, from pixels and token ids in memory; a cache is in memory too, so that neither
side reads a disk.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from benchmarks.plain import LR, MAX_GRAD_NORM, RANK, SLOPE, VAE_BATCH, Precision
from benchmarks.worlds import World
from diffalign.data.batches import Collator, LatentScale, Source, stream
from diffalign.data.cache import Share
from diffalign.denoisers.unet import SD
from diffalign.fit import StepReport, fit
from diffalign.fixed_draws import known_draws, measure_with
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.models.load import ModelSource
from diffalign.models.lora import LoraSettings, adapter_reference, add_lora
from diffalign.models.save import trainable
from diffalign.paths import NoisePath, Prediction
from diffalign.placing import make_accelerator, make_optimizer, place_net
from diffalign.recompute import Checkpointing
from diffalign.rng import SampleRng
from diffalign.settings import DataSettings, OptimizerSettings, TrainConfig, TrainSettings
from diffalign.types import Batch, Cond, Denoiser


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which savings our step has."""

    name: str
    latent_cache: bool = False
    text_cache: bool = False
    reference: Literal["call", "flags", "copy"] = "call"
    """Adapters switched by the library call, or by their flags; or a second, frozen network."""
    joined: bool = True
    """Winners and losers in one forward pass; the plain loop has that too."""
    channels_last: bool = False
    compile: bool = False
    recompute: Checkpointing = False
    precision: Precision = "no"
    fixed_draws: int | None = None
    """Draws a pair at which the reference's errors are known, computed before the first step."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a cache holds of a world: posterior moments of the images, conditions of the prompts."""

    mean: Float[Tensor, "2b c h w"]
    std: Float[Tensor, "2b c h w"]
    text: Float[Tensor, "b l d"]


@torch.no_grad()
def encode(world: World, device: torch.device) -> Encoded:
    """The cache of a world."""
    vae, text = (copy.deepcopy(net).to(device) for net in (world.vae, world.text))
    parts = [vae.encode(some.to(device)).latent_dist for some in world.pixels.split(VAE_BATCH)]
    mean, std = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    return Encoded(mean=mean.cpu(), std=std.cpu(), text=text(world.ids.to(device))[0].cpu())


class WorldRows:
    """A world's pairs as the collator asks for them: from the cache, or encoded when asked for, as `LiveRows` does."""

    marks = None

    def __init__(self, world: World, variant: Variant, device: torch.device, cache: Encoded) -> None:
        self.world, self.device, self.cache = world, device, cache
        self.vae = None if variant.latent_cache else copy.deepcopy(world.vae).to(device)
        self.text = None if variant.text_cache else copy.deepcopy(world.text).to(device)

    def __len__(self) -> int:
        return self.world.sizes.pairs

    @torch.no_grad()
    def latents(
        self, rows: Sequence[int], samples: Sequence[int], member: Literal["w", "l"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        places = torch.tensor(rows) + (0 if member == "w" else len(self))
        if self.vae is None:
            return self.cache.mean[places], self.cache.std[places]
        pixels = self.world.pixels[places].to(self.device)
        parts = [self.vae.encode(some).latent_dist for some in pixels.split(VAE_BATCH)]
        return torch.cat([p.mean for p in parts]).cpu(), torch.cat([p.std for p in parts]).cpu()

    @torch.no_grad()
    def cond(self, rows: Sequence[int], dropped: Sequence[bool]) -> Cond:
        if self.text is None:
            return Cond({"prompt_embeds": self.cache.text[list(rows)]})
        return Cond({"prompt_embeds": self.text(self.world.ids[list(rows)].to(self.device))[0].cpu()})

    def prompt(self, row: int) -> str:
        return f"prompt {row}"  # of token ids alone; never encoded


@dataclass(frozen=True, kw_only=True)
class LibraryCall:
    """The adapter-off reference as scripts have it: two calls that walk every module and flip `requires_grad`."""

    policy: Denoiser
    net: Any

    @property
    def path(self) -> NoisePath:
        return self.policy.path

    @property
    def prediction(self) -> Prediction:
        return self.policy.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        self.net.disable_adapters()
        try:
            with torch.no_grad():
                return self.policy(x_t, t, cond)
        finally:
            self.net.enable_adapters()


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A denoiser that takes winners and losers in two forward passes."""

    denoiser: Denoiser

    @property
    def path(self) -> NoisePath:
        return self.denoiser.path

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Shaped[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        halves = slice(0, len(t) // 2), slice(len(t) // 2, None)
        return torch.cat([self.denoiser(x_t[half], t[half], cond.rows(half)) for half in halves])


class Ours:
    """A run without end, on a network placed as `diffalign train` places it."""

    def __init__(self, world: World, variant: Variant, device: torch.device, cache: Encoded) -> None:
        cfg = _config(world, variant, device)
        accelerator = make_accelerator(cfg)
        self.rows = WorldRows(world, variant, device, cache)
        self.net = copy.deepcopy(world.unet)
        add_lora(self.net, cfg.lora, SD.lora_targets, seed=cfg.seed)
        place_net(self.net, cfg, accelerator, adapted=True)
        optimizer = make_optimizer(cfg, list(trainable(self.net).values()))
        net, optimizer = accelerator.prepare(self.net, optimizer)
        self.method = cfg.method
        self.policy: Denoiser = SD.make_denoiser(net, world.scheduler, None)
        if variant.reference == "flags":
            self.reference: Denoiser = adapter_reference(self.policy, self.net)
        elif variant.reference == "call":
            self.reference = LibraryCall(policy=self.policy, net=self.net)
        else:
            second = place_net(copy.deepcopy(world.unet), cfg, accelerator, adapted=True)
            self.reference = SD.make_denoiser(second, world.scheduler, None)
        if not variant.joined:
            self.policy, self.reference = Apart(denoiser=self.policy), Apart(denoiser=self.reference)
        scale = LatentScale(scale=world.vae.config.scaling_factor, shift=world.vae.config.shift_factor or 0.0)
        collator = Collator(rows=self.rows, kind="pairs", scale=scale, seed=cfg.seed)
        source: Source = collator
        if variant.fixed_draws is not None:
            assert self.method.needs.errors is not None, "Diffusion-DPO says which errors it is made of"
            measure = measure_with(self.reference, self.method.needs.errors, cfg.seed, accelerator)
            source = known_draws(collator, variant.fixed_draws, measure, batch_size=len(self.rows))
        self.batches = stream(source, batch_size=len(self.rows), accumulate=1, share=Share())
        self._reports = fit(
            self.policy,
            self.reference,
            self.method,
            self.batches,
            optimizer,
            steps=sys.maxsize,
            max_grad_norm=cfg.train.max_grad_norm,
            seed=cfg.seed,
            accelerator=accelerator,
        )

    def step(self) -> StepReport:
        """One optimizer step."""
        return next(self._reports)

    def backward(self, batch: Batch) -> None:
        """Loss and gradients of a batch, as `fit` has them, and no update."""
        rng = SampleRng(0, batch.samples)
        self.method(self.policy, self.reference, batch, rng).loss.mean().backward()


def _config(world: World, variant: Variant, device: torch.device) -> TrainConfig:
    return TrainConfig(
        output="in memory",
        model=ModelSource(path="in memory"),
        data=DataSettings(path="in memory"),
        method=DiffusionDPO(beta=2 * SLOPE),
        train=TrainSettings(
            steps=1,
            batch_size=world.sizes.pairs,
            precision=variant.precision,
            device="cuda" if device.type == "cuda" else "cpu",
            channels_last=variant.channels_last,
            compile=variant.compile,
            gradient_checkpointing=variant.recompute,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        optimizer=OptimizerSettings(lr=LR),
        lora=LoraSettings(rank=RANK),
    )
