"""Kernel distances of sets as rewards over any encoder: KID, CMMD and KAD.

The reference is kept as rows. What differs is the kernel and whether the estimate is unbiased; the credit of a sample
is the distance without it minus the distance of all, exactly or to first order by the witness function.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.mmd import (
    CMMD_SCALE,
    CMMD_SIGMA,
    KAD_SCALE,
    Kernel,
    KernelSums,
    KernelTally,
    gaussian,
    kid_subsets,
    median_distance,
    mmd2,
    polynomial,
    unit,
    within,
)
from diffalign.rewards.mmd import cmmd as cmmd
from diffalign.rewards.mmd import kad as kad
from diffalign.rewards.mmd import kid as kid
from diffalign.rewards.sets import Space, credit_of, open_space
from diffalign.rewards.statistics import Gather, double
from diffalign.types import Embedded, MediaEncoder, Modality, RewardBatch, SetOutput, alone


class _KernelReward(ABC):
    """A set reward by a squared MMD; never made itself."""

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    scale: ClassVar[float]
    range: ClassVar[tuple[float, float]]
    needs_reference = True
    licence = "the encoder's"
    space: Space
    reference: Tensor | None
    """Rows of the reference set."""
    _within: Tensor | None
    """Mean kernel within the reference, once it has been asked for."""

    @abstractmethod
    def _prepare(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        """Embeddings as the kernel takes them."""

    @abstractmethod
    def _kernel(self, reference: Float64[Tensor, "m d"]) -> Kernel:
        """The kernel for this reference."""

    @abstractmethod
    def _values(self, rows: Float64[Tensor, "n d"], reference: Float64[Tensor, "m d"]) -> dict[str, float]:
        """Native values of a set; the one under the reward's name is the distance."""

    @property
    def modality(self) -> Modality:
        return self.space.encoder.modality

    @property
    def requires(self) -> frozenset[str]:
        return self.space.requires

    def to(self, device: torch.device | str) -> "_KernelReward":
        self.space.to(device)
        return self

    def fit_reference(self, batches: Iterable[RewardBatch]) -> None:
        """Takes the rows of the reference set."""
        self._take(self.space.collect(batches).embedded.rows)

    def save_reference(self, file: str | Path) -> None:
        """Writes its rows."""
        held = self._held()
        self.space.save(file, "rows", {"rows": held}, rows=len(held))

    def load_reference(self, file: str | Path) -> None:
        """Reads what `save_reference` of any kernel distance with this encoder has written."""
        self._take(self.space.load(file, "rows", {"rows": 2})[0]["rows"])

    @torch.no_grad()
    def score_set(self, batches: Iterable[RewardBatch]) -> SetOutput:
        """Minus the distance of all batches together."""
        self._held()
        return self.of_rows(self.space.collect(batches).embedded)

    def embed(self, batch: RewardBatch) -> Embedded:
        """A batch in the encoder's space."""
        return self.space.embed(batch)

    @torch.no_grad()
    def of_rows(self, embedded: Embedded) -> SetOutput:
        """Minus the distance of a set that is embedded already."""
        self.space.check_enough(len(embedded.rows), len(embedded.counts))
        raw = self._values(self._prepare(embedded.rows), self._prepare(self._held(embedded.rows)))
        return SetOutput(score=-raw[self.name], raw=raw, samples=len(embedded.counts))

    @torch.no_grad()
    def tally(self, pool: Embedded, members: Sequence[int]) -> KernelTally:
        """Minus the distance of a set of the pool's samples, in full, while they are exchanged."""
        self.space.check_enough(sum(pool.counts[i] for i in members), len(members))
        reference = self._prepare(self._held(pool.rows))
        kernel = self._kernel(reference)
        rows = Embedded(rows=self._prepare(pool.rows), counts=pool.counts)
        yy = self._inside(reference, kernel)
        return KernelTally.of(rows, members, reference, kernel, unbiased=self.unbiased, factor=-self.scale, yy=yy)

    def differentiable_score(self, batch: RewardBatch) -> Float[Tensor, ""]:
        """Minus the distance of one batch, in full, with gradient to its media."""
        rows = self.space.embed_with_graph(batch).rows
        reference = self._prepare(self._held(rows))
        found = mmd2(self._prepare(rows), reference, self._kernel(reference), unbiased=self.unbiased)
        return -(self.scale * found).float()

    @torch.no_grad()
    def credit(self, batch: RewardBatch, mode: str = "loo") -> Float[Tensor, " b"]:
        """What each sample does for the distance of the batch, in full; "self" is minus its own distance."""
        ways = {"loo": KernelSums.leave_one_out, "influence": KernelSums.influence, "self": self._alone}
        way = credit_of(mode, ways)
        embedded = self.space.embed(batch)
        reference = self._prepare(self._held(embedded.rows))
        kernel = self._kernel(reference)
        set_ = Embedded(rows=self._prepare(embedded.rows), counts=embedded.counts)
        yy = self._inside(reference, kernel)
        sums = KernelSums.of(set_, reference, kernel, unbiased=self.unbiased, yy=yy)
        return (self.scale * way(sums)).float().to(embedded.rows.device)

    def _inside(self, reference: Float64[Tensor, "m d"], kernel: Kernel) -> Float64[Tensor, ""]:
        """Mean kernel within the reference."""
        if self._within is None:
            self._within = within(reference, kernel, unbiased=self.unbiased)
        return self._within

    def _alone(self, sums: KernelSums) -> Float64[Tensor, " b"]:
        """Minus the distance of each sample's own rows."""
        least = 2 if self.unbiased else 1
        short = [i for i, count in enumerate(sums.counts) if count < least]
        if short:
            raise InputError(
                f"every sample must have at least {least} embeddings to be a set of its own, got fewer for samples "
                f"{short[:8]}"
            )
        return -sums.each()

    def _open(self, space: Space) -> None:
        self.space, self.reference, self._within = space, None, None

    def _take(self, rows: Tensor) -> None:
        self.reference, self._within = rows, None

    def _held(self, like: Tensor | None = None) -> Tensor:
        """The reference, on the device and of the width of a set."""
        if self.reference is None:
            raise self.space.no_reference()
        if like is not None:
            self.space.check_width(like.shape[1], self.reference.shape[1])
            if self.reference.device != like.device:
                self._take(self.reference.to(like.device))
        return self.reference


class KIDReward(_KernelReward):
    """Minus KID to a reference set: a polynomial kernel on embeddings, unbiased, so fair to small sets.

    The mean of 100 random subsets of up to 1,000 rows, as published numbers are; `raw` holds it and the subsets'
    standard deviation. On CLIP embeddings unless told otherwise; numbers of different encoders are not comparable. May
    be above 0 for sets that are as good as alike. Credit, gradient and tally are of all rows, without subsets.

    Paper: Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.
    """

    name = "kid"
    unbiased = True
    scale = 1.0
    range = (float("-inf"), float("inf"))

    def __init__(
        self,
        encoder: str | MediaEncoder = "clip",
        *,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder, or takes one as it is; `gather` joins the rows of all processes."""
        if subsets < 1 or subset_size < 2:
            raise InputError(f"set reward kid: subsets must be at least 1 of size 2, got {subsets} of {subset_size}")
        self._open(open_space(self.name, encoder, encoder_options, device, gather))
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    @property
    def version(self) -> str:
        return f"{self.space.encoder.version}, {self.subsets} subsets of {self.subset_size}, seed {self.seed}"

    def _prepare(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        return double(rows)

    def _kernel(self, reference: Float64[Tensor, "m d"]) -> Kernel:
        return polynomial(reference.shape[1])

    def _values(self, rows: Float64[Tensor, "n d"], reference: Float64[Tensor, "m d"]) -> dict[str, float]:
        mean, std = kid_subsets(rows, reference, subsets=self.subsets, size=self.subset_size, seed=self.seed)
        return {"kid": float(mean), "kid_std": float(std)}


class CMMDReward(_KernelReward):
    """Minus CMMD to a reference set: CLIP ViT-L/14-336 embeddings, Gaussian kernel, times 1000; at most 39.6 away.

    In effect ten times the square distance of the mean unit embeddings: it does not see how varied a set is. Needs few
    samples. COCO is a poor reference for high resolution.

    Paper: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation", arXiv
    2401.09603.
    """

    name = "cmmd"
    unbiased = False
    scale = CMMD_SCALE
    range = (-39.602654, 0.0)

    def __init__(
        self,
        encoder: str | MediaEncoder = "clip:openai/clip-vit-large-patch14-336",
        *,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder, or takes one as it is; `gather` joins the rows of all processes."""
        self._open(open_space(self.name, encoder, encoder_options, device, gather))

    @property
    def version(self) -> str:
        return f"{self.space.encoder.version}, sigma 10, x1000"

    def _prepare(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        return unit(rows)

    def _kernel(self, reference: Float64[Tensor, "m d"]) -> Kernel:
        return gaussian(CMMD_SIGMA)

    def _values(self, rows: Float64[Tensor, "n d"], reference: Float64[Tensor, "m d"]) -> dict[str, float]:
        return {"cmmd": float(cmmd(rows, reference))}


class KADReward(_KernelReward):
    """Minus KAD to a reference set: Gaussian kernel of the reference's median distance, unbiased, times 100.

    The kernel distance for audio, better than FAD for few clips; CLAP embeddings unless told otherwise. May be above 0
    for sets that are as good as alike.

    Paper: Chung et al., "KAD: No More FAD! An Effective and Efficient Evaluation Metric for Audio Generation", arXiv
    2502.15602.
    """

    name = "kad"
    unbiased = True
    scale = KAD_SCALE
    range = (-200.0, 200.0)

    def __init__(
        self,
        encoder: str | MediaEncoder = "clap",
        *,
        bandwidth: float | int | None = None,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder, or takes one as it is; `bandwidth` instead of the reference's median distance."""
        if bandwidth is not None and not bandwidth > 0:
            raise InputError(f"set reward kad: bandwidth must be above 0, got {bandwidth!r}")
        self._open(open_space(self.name, encoder, encoder_options, device, gather))
        self.bandwidth = bandwidth

    @property
    def version(self) -> str:
        width = "median of the reference" if self.bandwidth is None else f"{self.bandwidth:g}"
        return f"{self.space.encoder.version}, bandwidth {width}, x100"

    def _prepare(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        return double(rows)

    def _kernel(self, reference: Float64[Tensor, "m d"]) -> Kernel:
        return gaussian(self._bandwidth(reference))

    def _values(self, rows: Float64[Tensor, "n d"], reference: Float64[Tensor, "m d"]) -> dict[str, float]:
        bandwidth = self._bandwidth(reference)
        return {"kad": float(kad(rows, reference, bandwidth=bandwidth)), "bandwidth": bandwidth}

    def _bandwidth(self, reference: Float64[Tensor, "m d"]) -> float:
        return median_distance(reference) if self.bandwidth is None else self.bandwidth
