"""FAD: the Fréchet distance of audio embeddings, of a set, of single clips, and extrapolated to endless sets.

A set of N embeddings is further from its reference than its distribution is, by about c / N, so distances of different
N are not comparable. FAD-infinity is the intercept of a line through distances of subsets over 1 / N.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffalign.errors import InputError
from diffalign.rewards.frechet import FrechetDistance, per_sample
from diffalign.rewards.gaussians import Gaussian, Side, frechet_distance
from diffalign.rewards.sets import open_space, pieces
from diffalign.rewards.statistics import Gather, Moments
from diffalign.rng import generator
from diffalign.types import Embedded, MediaEncoder, RewardBatch, alone


@dataclass(frozen=True, kw_only=True)
class FADInfinity:
    """A line through distances over 1 / N."""

    value: float
    """Where 1 / N is 0."""
    slope: float
    r2: float
    """Share of the distances' variance that the line explains; nearly 1 where the extrapolation can be trusted."""
    sizes: tuple[float, ...]
    """Embeddings in the subsets of each point."""
    distances: tuple[float, ...]
    """Mean over the shuffles."""


def fad_infinity(x: Embedded, y: Side, *, points: int = 15, shuffles: int = 5, seed: int = 0) -> FADInfinity:
    """Fréchet distance of a set of endless size, extrapolated.

    Args:
        x: Embeddings of clips; subsets are of whole clips, without replacement.
        y: The reference.
        points: Sizes, from max(D + 1, a fifth of all embeddings) to all of them.
        shuffles: Orders of the clips; the first clips of each are its subsets.
        seed: Of the orders.

    Raises:
        InputError: Too few clips for two sizes above D; `enough` tells.

    Paper: Chong and Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", arXiv 1911.07023.
    Departs: Subsets of one shuffle are nested, from N = total / 5 on instead of 5,000, and several shuffles are
    averaged; fadtk draws with replacement, which keeps the bias at N = total.
    """
    total, width, clips = len(x.rows), x.rows.shape[1], len(x.counts)
    fewest = _fewest(x)
    sizes = sorted({round(v) for v in torch.linspace(fewest, clips, points, dtype=torch.float64).tolist()})
    if points < 2 or shuffles < 1 or not enough(x):
        raise InputError(
            f"FAD-infinity must have subsets of different size with more than {width} embeddings, got {total} "
            f"embeddings of {clips} clips, {points} points and {shuffles} shuffles"
        )
    reference = Gaussian.of(y)
    reference.factor  # noqa: B018
    parts = list(pieces(x.counts))
    counts = torch.zeros(shuffles, len(sizes), dtype=torch.float64)
    found = torch.zeros_like(counts)
    for shuffle in range(shuffles):
        order = torch.randperm(clips, generator=generator(seed, shuffle, "clips")).tolist()
        moments = Moments.empty(width, x.rows.device)
        for place, (start, stop) in enumerate(zip([0, *sizes], sizes, strict=False)):
            moments = moments.add(torch.cat([x.rows[parts[clip]] for clip in order[start:stop]]))
            counts[shuffle, place] = moments.n
            found[shuffle, place] = frechet_distance(moments, reference)
    return _line(counts, found)


def enough(x: Embedded) -> bool:
    """Whether a set has subsets of two sizes above D."""
    return _fewest(x) < len(x.counts) and len(x.rows) > x.rows.shape[1] + 1


def _fewest(x: Embedded) -> int:
    """Clips of the smallest subset."""
    total, clips = len(x.rows), len(x.counts)
    return max(2, -int(-max(x.rows.shape[1] + 1, total / 5) * clips // total)) if total else 2


def _line(counts: Float64[Tensor, "s p"], found: Float64[Tensor, "s p"]) -> FADInfinity:
    """Least squares of the mean distance on 1 / N."""
    inverse, distance = (1 / counts).mean(0), found.mean(0)
    across, up = inverse - inverse.mean(), distance - distance.mean()
    slope = (across @ up) / (across @ across)
    rest = (up - slope * across).square().sum()
    spread = up.square().sum()
    return FADInfinity(
        value=float(distance.mean() - slope * inverse.mean()),
        slope=float(slope),
        r2=float(1 - rest / spread) if spread > 0 else 1.0,
        sizes=tuple(counts.mean(0).tolist()),
        distances=tuple(distance.tolist()),
    )


class FADReward(FrechetDistance):
    """Minus the Fréchet audio distance to a reference set of clips: CLAP embeddings, or "vggish" for classic FAD.

    `raw` holds the distance and its terms, positive. Distances of different encoders (one clip set: VGGish 5.1, CLAP
    0.46, EnCodec 204), of different N, and through different resamplers are not comparable; see `infinity`.

    Paper: Kilgour et al., "Fréchet Audio Distance: A Metric for Evaluating Music Enhancement Algorithms", arXiv
    1812.08466.
    """

    name = "fad"

    def __init__(
        self,
        encoder: str | MediaEncoder = "clap",
        *,
        encoder_options: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        gather: Gather = alone,
    ) -> None:
        """Names an encoder of audio ("clap:laion/clap-htsat-unfused"), or takes one as it is.

        Args:
            encoder: Its spec, or the encoder.
            encoder_options: Keyword arguments of the encoder's class, where it is named.
            device: Where the encoder works.
            gather: Joins the rows of all processes, of which each then brings its share of a set.
        """
        self._open(open_space(self.name, encoder, encoder_options, device, gather))
        if self.modality != "audio":
            raise InputError(f"set reward 'fad' must get an encoder of audio, got {self.version!r}; use 'frechet'")

    @torch.no_grad()
    def per_clip(self, batch: RewardBatch) -> Float[Tensor, " b"]:
        """FAD of each clip by itself, at least 0: for ranking only, its level is that of missing variety.

        Raises:
            InputError: A clip with fewer than two embeddings.
        """
        embedded = self.space.embed(batch)
        return per_sample(embedded, self.held(embedded.rows)).float().to(embedded.rows.device)

    @torch.no_grad()
    def infinity(
        self, batches: Iterable[RewardBatch], *, points: int = 15, shuffles: int = 5, seed: int = 0
    ) -> FADInfinity:
        """FAD-infinity of all batches together."""
        embedded = self.space.collect(batches).embedded
        return fad_infinity(embedded, self.held(embedded.rows), points=points, shuffles=shuffles, seed=seed)

    @torch.no_grad()
    def endless(self, embedded: Embedded) -> FADInfinity | None:
        """FAD-infinity of a set that is embedded already; None where it has too few clips for its width."""
        return fad_infinity(embedded, self.held(embedded.rows)) if enough(embedded) else None
