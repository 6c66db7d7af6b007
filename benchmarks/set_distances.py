"""Time and memory of a Fréchet distance: ours, scipy's matrix square root, and torchmetrics' formula.

At full size, D = 2048 and N = 50,000, as of Inception features. Every way gets the same rows, or the same means and
covariances; the ways are timed in turn in one process, medians are reported. Memory is the growth of a process of its
own from before a way starts to its peak, so that what LAPACK takes is counted too.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.environment import describe
from diffalign.errors import RunError
from diffalign.progress import bar
from diffalign.rewards.gaussians import Gaussian, frechet_distance
from diffalign.rewards.statistics import Moments

CHUNK = 1000
"""Rows that an encoder hands over at a time."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the two sets are."""

    rows: int
    width: int


SIZES = {"small": Size(rows=600, width=48), "full": Size(rows=50_000, width=2048)}


@dataclass(frozen=True, kw_only=True)
class World:
    """The two sets, and what each way may start from."""

    x: Tensor
    y: Tensor
    mean_x: Tensor
    mean_y: Tensor
    covariance_x: Tensor
    covariance_y: Tensor
    known: Gaussian
    """The reference y with its factor, as it is loaded from a file."""


def build(size: Size, seed: int = 0) -> World:
    """Rows as networks give them: float32, not negative, a few strong directions and a long tail."""
    rng = torch.Generator().manual_seed(seed)
    strong = torch.randn(64, size.width, generator=rng) / 8
    tail = torch.arange(1, size.width + 1) ** -0.25

    def rows(shift: float) -> Tensor:
        drawn = torch.randn(size.rows, 64, generator=rng) @ strong
        drawn += torch.randn(size.rows, size.width, generator=rng) * tail
        return drawn.add_(shift).relu_()

    x, y = rows(0.1), rows(0.0)
    a, b = Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y))
    return World(
        x=x,
        y=y,
        mean_x=a.mean,
        mean_y=b.mean,
        covariance_x=a.covariance,
        covariance_y=b.covariance,
        known=Gaussian.from_factor(b.mean, b.factor, b.n),
    )


def ours_from_a_stream(world: World) -> float:
    """Moments of float32 chunks, then the symmetric route; the reference is loaded with its factor."""
    moments = Moments.empty(world.x.shape[1])
    for chunk in world.x.split(CHUNK):
        moments = moments.add(chunk)
    return float(frechet_distance(moments, world.known))


def ours_from_moments(world: World) -> float:
    """From two means and covariances, nothing known beforehand."""
    a = Gaussian(mean=world.mean_x, covariance=world.covariance_x, n=len(world.x))
    return float(frechet_distance(a, Gaussian(mean=world.mean_y, covariance=world.covariance_y, n=len(world.y))))


def ours_with_a_known_reference(world: World) -> float:
    """From one mean and covariance, and the reference's factor."""
    return float(
        frechet_distance(Gaussian(mean=world.mean_x, covariance=world.covariance_x, n=len(world.x)), world.known)
    )


def scipy_from_rows(world: World) -> float:
    """numpy's mean and covariance of all rows as float64, then scipy's square root: what FID scripts do."""
    rows = world.x.double().numpy()
    return _by_sqrtm(rows.mean(0), np.cov(rows, rowvar=False), world)


def scipy_from_moments(world: World) -> float:
    """scipy's square root of the product of two covariances."""
    return _by_sqrtm(world.mean_x.numpy(), world.covariance_x.numpy(), world)


def torchmetrics_from_a_stream(world: World) -> float:
    """torchmetrics' metric at float64, fed with chunks; the reference's sums are given."""
    metric = _metric(world.x.shape[1])
    n = len(world.y)
    metric.real_features_sum = world.mean_y * n
    metric.real_features_cov_sum = world.covariance_y * (n - 1) + n * torch.outer(world.mean_y, world.mean_y)
    metric.real_features_num_samples = torch.tensor(n)
    for chunk in world.x.split(CHUNK):
        metric.update(chunk, real=False)
    return float(metric.compute())


def torchmetrics_from_moments(world: World) -> float:
    """torchmetrics' formula: eigenvalues of the product, which is not symmetric."""
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(world.mean_x, world.covariance_x, world.mean_y, world.covariance_y))


WAYS: dict[str, Callable[[World], float]] = {
    "ours, from a stream": ours_from_a_stream,
    "ours, from moments": ours_from_moments,
    "ours, from moments, reference known": ours_with_a_known_reference,
    "scipy.linalg.sqrtm, from rows": scipy_from_rows,
    "scipy.linalg.sqrtm, from moments": scipy_from_moments,
    "torchmetrics, from a stream": torchmetrics_from_a_stream,
    "torchmetrics, from moments": torchmetrics_from_moments,
}


def measure(size: str = "full", *, rounds: int = 3, warmup: int = 1, threads: int = 1) -> dict[str, Any]:
    """The table of one size: for every way its seconds, its bytes at the peak, and its distance from our number."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # torchmetrics speaks of memory when its metric is made
    world = build(SIZES[size])
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    found: dict[str, float] = {}
    with bar("Fréchet distances in turn", (rounds + warmup) * len(WAYS)) as shown:
        for i in range(rounds + warmup):
            for name, way in WAYS.items():
                begin = time.perf_counter()
                found[name] = way(world)
                if i >= warmup:
                    seconds[name].append(time.perf_counter() - begin)
                shown.advance(note=name)
    del world
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(measure_memory, (size, name, threads)) for name in WAYS}
    first = next(iter(found.values()))
    ways = [
        {
            "way": name,
            "seconds": statistics.median(times),
            "seconds_range": [min(times), max(times)],
            "peak_bytes": memory[name],
            "distance": found[name],
            "off_ours": abs(found[name] - first) / first,
        }
        for name, times in seconds.items()
    ]
    about = SIZES[size]
    return {
        "rows": about.rows,
        "width": about.width,
        "rounds": rounds,
        "threads": threads,
        "environment": describe(torch.device("cpu")),
        "ways": ways,
    }


def measure_memory(size: str, name: str, threads: int) -> int:
    """Bytes by which this process grows while one way runs, at its peak; a smaller problem has loaded the libraries."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    WAYS[name](build(SIZES["small"]))
    world = build(SIZES[size])
    _reset_peak()
    before = _status("VmRSS")
    WAYS[name](world)
    return _status("VmHWM") - before


def _reset_peak() -> None:
    """Sets the kernel's record of this process's peak to what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RunError(
            f"memory must be measured on Linux, where /proc/self/clear_refs can be written: {error}"
        ) from error


def _status(field: str) -> int:
    """A number of /proc/self/status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def _by_sqrtm(mean: np.ndarray, covariance: np.ndarray, world: World) -> float:
    import scipy.linalg

    mean_y, covariance_y = world.mean_y.numpy(), world.covariance_y.numpy()
    root = scipy.linalg.sqrtm(covariance @ covariance_y)
    apart = mean - mean_y
    return float(apart @ apart + np.trace(covariance) + np.trace(covariance_y) - 2 * np.trace(root).real)


def _metric(width: int) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = torch.nn.Identity()
    features.num_features = width
    return FrechetInceptionDistance(feature=features).set_dtype(torch.float64)


def show(table: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("way", "s", "peak MB", "off", title=f"Fréchet distance, N = {table['rows']}, D = {table['width']}")
    for row in table["ways"]:
        shown.add_row(row["way"], f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['off_ours']:.1e}")
    Console().print(shown)


def main() -> None:
    """Measures one size."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=SIZES, default="full")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--warmup", type=int, default=1)
    options.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is the least noisy")
    options.add_argument("--out", type=Path, help="write the table there as JSON")
    asked = options.parse_args()
    table = measure(asked.size, rounds=asked.rounds, warmup=asked.warmup, threads=asked.threads)
    show(table)
    if asked.out is not None:
        asked.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
