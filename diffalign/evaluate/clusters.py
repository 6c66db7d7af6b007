"""k-means of rows, seeded: SciPy's, from five k-means++ starts."""

import warnings

import numpy as np
from jaxtyping import Float, Int

from diffalign.errors import InputError

_STARTS = 5
_ROUNDS = 50


def k_means(rows: Float[np.ndarray, "n d"], clusters: int, *, seed: int = 0) -> Float[np.ndarray, "k d"]:
    """Centroids of least squared distance among five starts; the same seed gives the same ones.

    A centroid that nothing is nearest to stays where it is, so there are as many as were asked for.

    Raises:
        InputError: Fewer rows than clusters.

    Paper: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    from scipy.cluster.vq import kmeans2, vq

    if not 1 <= clusters <= len(rows):
        raise InputError(f"clusters must be from 1 to the number of rows, {len(rows)}, got {clusters}")
    rows = rows.astype(np.float64)
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # 0 / 0 where all rows are drawn already
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        found = [kmeans2(rows, clusters, _ROUNDS, minit="++", rng=rng)[0] for _ in range(_STARTS)]
    return min(found, key=lambda centroids: float((vq(rows, centroids)[1] ** 2).sum()))


def nearest(rows: Float[np.ndarray, "n d"], centroids: Float[np.ndarray, "k d"]) -> Int[np.ndarray, " n"]:
    """Place of the nearest centroid of each row."""
    from scipy.cluster.vq import vq

    return vq(rows.astype(np.float64), centroids)[0]
