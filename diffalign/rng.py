"""Random numbers that belong to a sample, not to a batch.

Every draw comes from a generator seeded by (seed, number of the sample in the run, purpose). So it does not depend on
batch size, accumulation, process count, device or resume, and two purposes never share a stream.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one place in the tree of random streams, such as `generator(seed, sample, "noise")`."""
    key = "/".join(str(part) for part in (seed, *path)).encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return torch.Generator().manual_seed(number & (2**63 - 1))


@dataclass(frozen=True)
class SampleRng:
    """One random stream per sample of a batch, and per purpose."""

    seed: int
    samples: tuple[int, ...]
    """Number of each sample in the run's stream of samples, 0 first."""

    def normal(self, like: Tensor, purpose: str) -> Float[Tensor, " b *rest"]:
        """Standard normal float32 noise of the shape of `like` [B, ...], drawn on the CPU, on the device of `like`."""
        self._check(len(like))
        rows = [torch.randn(like.shape[1:], generator=generator(self.seed, s, purpose)) for s in self.samples]
        drawn = torch.stack(rows)
        if like.device.type == "cuda":
            return drawn.pin_memory().to(like.device, non_blocking=True)  # a plain copy waits for all that is under way
        return drawn.to(like.device)

    def uniform(self, purpose: str) -> Float[Tensor, " b"]:
        """Float64 draws from [0, 1), one per sample, on the CPU."""
        rows = [torch.rand((), generator=generator(self.seed, s, purpose), dtype=torch.float64) for s in self.samples]
        return torch.stack(rows)

    def _check(self, length: int) -> None:
        if length != len(self.samples):
            raise ValueError(f"like must have {len(self.samples)} samples like rng, got {length}")
