"""What a run holds on one device, from its rehearsal."""

import math
from dataclasses import dataclass

from diffalign.rehearsal import Encoding, Rehearsal
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
    """VAE and text encoders, where there is no cache."""
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
        return max(self.stays + self.step, self.building_cache)


def memory_of(cfg: TrainConfig, r: Rehearsal, inputs: Encoding, device: str, processes: int = 1) -> MemoryUse:
    """Bytes by what they are for.

    Args:
        processes: How many share out what is sharded.
    """
    cached = cfg.data.cache is not False
    turns = cfg.train.offload and device == "cuda"  # on a CPU all of them are in the one memory that there is
    beside = r.weights + r.adapters if device == "cpu" else 0  # the denoiser is loaded first, and moved last

    def own(size: int) -> int:
        return -(-size // processes) if cfg.train.shard else size

    gradients = own(4 * r.trainable)
    peak, reference_peak = r.peak, r.reference_peak
    if cfg.train.shard:
        peak, reference_peak = peak + r.gathered + gradients, reference_peak + r.gathered
    return MemoryUse(
        weights=own(r.weights),
        adapters=r.adapters,
        second_network=own(r.second),
        optimizer=own(optimizer_bytes(cfg, r.trained)),
        ema=0 if cfg.train.ema_decay is None else own(4 * r.trainable),
        encoders=0 if cached else inputs.weights,
        activations=r.saved,
        gradients=gradients,
        reference_forward=reference_peak,
        step=max(peak, reference_peak, 0 if cached else inputs.peak),
        building_cache=(inputs.largest if turns else inputs.weights) + inputs.peak + beside if cached else 0,
        gathered=r.gathered,
    )


def optimizer_bytes(cfg: TrainConfig, trained: tuple[int, ...]) -> int:
    """AdamW's two moments of tensors of these sizes, and its step counts."""
    if cfg.optimizer.name == "adamw":
        return sum(8 * n + 4 for n in trained)
    small = sum(8 * n for n in trained if n < STATES_8BIT)
    return small + sum(2 * n + 8 * math.ceil(n / BLOCK_8BIT) for n in trained if n >= STATES_8BIT)
