"""What a run holds on one device, from its rehearsal."""

import math
from dataclasses import dataclass, replace

import torch

from diffalign.bare import Encoding
from diffalign.rehearsal import Rehearsal
from diffalign.settings import TrainConfig

STATES_8BIT = 4096
"""bitsandbytes keeps the states of tensors smaller than this in float32."""
BLOCK_8BIT = 256
"""Elements that share one float32 scale of an 8-bit state."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on one device."""

    weights: int
    """Of the denoiser, in the type that they are stored in."""
    adapters: int
    second_network: int
    """A frozen copy, as reference of a full fine-tuning."""
    optimizer: int
    ema: int
    encoders: int
    """VAE and text encoders, where there is no cache, or images are the run's own."""
    activations: int
    """Saved for the backward pass of one micro-batch."""
    gradients: int
    reference_forward: int
    step: int
    """Most at a time of activations, gradients and workspace, or of the reference's forward pass."""
    building_cache: int
    """All of the device while the cache is built; 0 without one."""
    gathered: int = 0
    """Most at a time of sharded weights that are gathered, and of their gradients before they are shared out."""
    sampling: int = 0
    """All of the device while a round of own images is made, without the judges; 0 where there are none."""

    @property
    def stays(self) -> int:
        """What is there in every moment of training."""
        return self.weights + self.adapters + self.second_network + self.optimizer + self.ema + self.encoders

    @property
    def workspace(self) -> int:
        """What a step holds at its peak beyond its saved activations."""
        return max(0, self.step - self.activations)

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return max(self.stays + self.step, self.building_cache, self.sampling)


def memory_of(
    cfg: TrainConfig, r: Rehearsal, inputs: Encoding, device: str, processes: int = 1, *, kept: int = 0
) -> MemoryUse:
    """Bytes by what they are for.

    Args:
        processes: How many share out what is sharded.
        kept: States that a rollout keeps of an image.
    """
    cached, own = cfg.data.cache is not False and cfg.online is None, cfg.online
    turns = cfg.train.offload and device == "cuda"  # on a CPU all of them are in the one memory that there is
    beside = r.weights + r.adapters if device == "cpu" else 0  # the denoiser is loaded first, and moved last

    def share(size: int) -> int:
        return -(-size // processes) if cfg.train.shard else size

    gradients = share(4 * r.trainable)
    peak, reference_peak = r.peak, r.reference_peak
    if cfg.train.shard:
        peak, reference_peak = peak + r.gathered + gradients, reference_peak + r.gathered
    found = MemoryUse(
        weights=share(r.weights),
        adapters=r.adapters,
        second_network=share(r.second),
        optimizer=share(optimizer_bytes(cfg, r.trained)),
        ema=0 if cfg.train.ema_decay is None else share(4 * r.trainable),
        encoders=0 if cached or (own is not None and turns) else inputs.weights,
        activations=r.saved,
        gradients=gradients,
        reference_forward=reference_peak,
        step=max(peak, reference_peak, inputs.peak if cfg.data.cache is False else 0),
        building_cache=(inputs.largest if turns else inputs.weights) + inputs.peak + beside if cached else 0,
        gathered=r.gathered,
    )
    if own is None:
        return found
    walk = sampling_peak(r, inputs, rows=own.batch_size, kept=kept, dtype=getattr(torch, own.store_dtype))
    return replace(found, sampling=found.stays + (inputs.largest if turns else 0) + walk)


def sampling_peak(r: Rehearsal, inputs: Encoding, *, rows: int, kept: int, dtype: torch.dtype) -> int:
    """Most bytes at a time beside weights while images are sampled, decoded, or their prompts encoded.

    Args:
        rows: Images at a time.
        kept: States that are kept of each. They are float32 while the walk goes on, and then joined.
        dtype: Of what is kept beside the decoding.
    """
    state = 4 * rows * math.prod(inputs.latent)
    joined = kept * state * dtype.itemsize // 4
    return max(r.sampling_peak + (kept + 2) * state, 2 * kept * state + joined, joined + 2 * state + inputs.peak)


def optimizer_bytes(cfg: TrainConfig, trained: tuple[int, ...]) -> int:
    """AdamW's two moments of tensors of these sizes, and its step counts."""
    if cfg.optimizer.name == "adamw":
        return sum(8 * n + 4 for n in trained)
    small = sum(8 * n for n in trained if n < STATES_8BIT)
    return small + sum(2 * n + 8 * math.ceil(n / BLOCK_8BIT) for n in trained if n >= STATES_8BIT)
