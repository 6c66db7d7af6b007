"""k-means of rows, seeded, with k-means++ starts."""

import numpy as np
from jaxtyping import Float, Int

from diffalign.errors import InputError

_STARTS = 5
_ROUNDS = 100


def k_means(rows: Float[np.ndarray, "n d"], clusters: int, *, seed: int = 0) -> Float[np.ndarray, "k d"]:
    """Centroids of least squared distance among five starts; the same seed gives the same ones.

    Raises:
        InputError: Fewer rows than clusters.

    Paper: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    if not 1 <= clusters <= len(rows):
        raise InputError(f"clusters must be from 1 to the number of rows, {len(rows)}, got {clusters}")
    rows = rows.astype(np.float64)
    rng = np.random.default_rng(seed)
    found = [_settled(rows, _start(rows, clusters, rng)) for _ in range(_STARTS)]
    return min(found, key=lambda centroids: float(_squared(rows, centroids).min(1).sum()))


def nearest(rows: Float[np.ndarray, "n d"], centroids: Float[np.ndarray, "k d"]) -> Int[np.ndarray, " n"]:
    """Place of the nearest centroid of each row."""
    return _squared(rows.astype(np.float64), centroids).argmin(1)


def _start(rows: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Rows, each drawn in proportion to its squared distance from those drawn before."""
    chosen = [int(rng.integers(len(rows)))]
    while len(chosen) < clusters:
        distance = _squared(rows, rows[chosen]).min(1)
        total = distance.sum()
        chances = distance / total if total > 0 else np.full(len(rows), 1 / len(rows))
        chosen.append(int(rng.choice(len(rows), p=chances)))
    return rows[chosen]


def _settled(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Lloyd's rounds until nothing moves; a centroid that nothing is nearest to stays where it is."""
    owner = np.full(len(rows), -1)
    for _ in range(_ROUNDS):
        closest = _squared(rows, centroids).argmin(1)
        if (closest == owner).all():
            break
        owner = closest
        centroids = np.stack(
            [rows[owner == c].mean(0) if (owner == c).any() else centroid for c, centroid in enumerate(centroids)]
        )
    return centroids


def _squared(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances, [n, k]; never below 0."""
    cross = rows @ centroids.T
    return np.maximum((rows**2).sum(1)[:, None] - 2 * cross + (centroids**2).sum(1)[None], 0)
