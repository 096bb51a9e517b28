"""k-means by faiss on every row it is given, run until it has converged.

Two habits of faiss are undone. It trains on 256 random points per centroid unless told otherwise, without an error;
here it sees all rows. It begins at random points; here at greedy k-means++ seeds, which end at a lower error. Weights
are brought to the mean 1, because its splitting of empty clusters never ends on weights that are all below 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recollect.errors import MissingExtra
from recollect.rng import call_seed
from recollect.tokenize.baseline_options import KMeansConfig
from recollect.tokenize.greedy_seeds import greedy_seeds, positive_rows, seed_sample
from recollect.tokenize.rows import RowSource, TensorRows, spans


@dataclass(frozen=True)
class Clusters:
    """What a fit found.

    means: (K, D) float32.  objective: weighted squared error before each iteration of the run that was kept.
    finals: last objective of every run.  has_converged: ended by `tolerance`, not by `iterations`.
    splits: empty clusters filled by splitting a large one, over the run.
    """

    means: np.ndarray
    objective: list[float]
    finals: list[float]
    has_converged: bool
    splits: int

    def report(self) -> dict[str, Any]:
        """JSON values for a fit report."""
        return {
            "iterations": len(self.objective),
            "objective_first": self.objective[0],
            "objective_last": self.objective[-1],
            "objective_of_restarts": self.finals,
            "has_converged": self.has_converged,
            "splits": self.splits,
        }


def import_faiss(purpose: str) -> Any:
    """The module faiss.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("faiss-cpu", "tokenize", purpose) from error
    return faiss


def fit_kmeans(
    points: np.ndarray, n_codes: int, config: KMeansConfig, *, names: tuple[str | int, ...], weight: np.ndarray | None
) -> Clusters:
    """The best of `config.restarts` converged runs.

    Args:
        points: (n, D) float32.
        n_codes: K <= n.
        config: seeding, restarts, iterations, tolerance, seed.
        names: of the random streams, such as (method, level).
        weight: (n,) float >= 0; None = equal.

    Raises:
        InputError: fewer points of positive weight than codes.
        MissingExtra: faiss is not installed.
    """
    points, weight = _weighted_points(points, n_codes, weight)
    points, origin = _near_origin(points)
    best: Clusters | None = None
    finals: list[float] = []
    for restart in range(config.restarts):
        seed = call_seed(config.seed, *names, restart)
        seeding = ("k-means++", "partition")[restart % 2] if config.seeding == "alternate" else config.seeding
        first = first_means(points, n_codes, seeding, seed, weight)
        found = lloyd(points, first, iterations=config.iterations, tolerance=config.tolerance, weight=weight)
        finals.append(found.objective[-1])
        if best is None or finals[-1] < best.objective[-1]:
            best = found
    assert best is not None  # restarts >= 1
    return Clusters(best.means + origin, best.objective, finals, best.has_converged, best.splits)


def first_means(
    points: np.ndarray, n_codes: int, seeding: str, seed: int, weight: np.ndarray | None = None
) -> np.ndarray:
    """(K, D) float32 means to begin from: greedy k-means++, distinct rows, or means of a partition.

    A partition gives every mean as many random rows as the others, so all begin near the mean of the points.

    Raises:
        InputError: by k-means++, fewer points of positive weight than codes.
    """
    generator = np.random.RandomState(seed)
    if seeding == "random":
        share = None if weight is None else weight / weight.sum()
        return points[generator.choice(len(points), n_codes, replace=False, p=share)].copy()
    if seeding == "partition":
        return _partition_means(points, generator.permutation(len(points)) % n_codes, n_codes, weight)
    draws = np.random.default_rng(seed)
    if (chosen := seed_sample(len(points), n_codes, weight, draws)) is not None:
        points, weight = points[chosen], None if weight is None else weight[chosen]
    return points[greedy_seeds(torch.from_numpy(points), n_codes, weight, draws)]


def _partition_means(points: np.ndarray, part: np.ndarray, n_codes: int, weight: np.ndarray | None) -> np.ndarray:
    """(K, D) float32 weighted means of the points of each part (n,), none of which is empty."""
    import scipy.sparse

    share = np.ones(len(points)) if weight is None else np.asarray(weight, dtype=np.float64)
    table = scipy.sparse.csr_array((share, (part, np.arange(len(points)))), shape=(n_codes, len(points)))
    return ((table @ points) / np.bincount(part, share, n_codes)[:, None]).astype(np.float32)


def lloyd(
    points: np.ndarray,
    first: np.ndarray,
    *,
    iterations: int,
    tolerance: float = 0.0,
    weight: np.ndarray | None = None,
) -> Clusters:
    """Lloyd's iterations by faiss from the means `first` (K, D) over all `points` (n, D), both float32.

    `weight` (n,) must not be below 1 everywhere (see the module's text); `fit_kmeans` sees to that.
    """
    faiss = import_faiss("k-means")
    trainer = faiss.Kmeans(
        points.shape[1],
        len(first),
        niter=iterations,
        nredo=1,
        seed=1234,  # used for splitting empty clusters only
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # never a sample, whatever K
        early_stop_threshold=tolerance,
    )
    share = None if weight is None else np.ascontiguousarray(weight, dtype=np.float32)
    trainer.train(points, weights=share, init_centroids=np.ascontiguousarray(first, dtype=np.float32))
    objective = [float(value) for value in trainer.obj]
    splits = sum(int(step["nsplit"]) for step in trainer.iteration_stats)
    means = np.array(trainer.centroids, dtype=np.float32)
    return Clusters(means, objective or [0.0], objective[-1:], len(objective) < iterations, splits)


def points_of(residuals: RowSource, block_rows: int) -> np.ndarray:
    """All rows of a source as one (n, D) float32 array, which faiss needs; a tensor in memory is not copied."""
    if isinstance(residuals, TensorRows) and residuals.values.device.type == "cpu":
        return residuals.values.numpy()
    points = np.empty((len(residuals), residuals.dimension), dtype=np.float32)
    for start, stop in spans(len(residuals), block_rows):
        points[start:stop] = residuals.block(start, stop).cpu().numpy()
    return points


def _near_origin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points whose mean is not far away compared with their spread, and what was subtracted, (D,) float32.

    faiss and the seeds expand squared distances into squares and products, which cancel in float32 otherwise.
    """
    mean = points.mean(axis=0, dtype=np.float64)
    some = points[:: max(1, len(points) // 4096)]  # the comparison is a rough one
    spread = np.square(some - mean).sum(axis=1).mean()
    if mean @ mean <= 10 * spread:
        return points, np.zeros(points.shape[1], dtype=np.float32)
    origin = mean.astype(np.float32)
    return points - origin, origin


def _weighted_points(
    points: np.ndarray, n_codes: int, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Points of positive weight, and weights of mean 1, or None where they are equal."""
    if weight is None:
        return points, None
    positive = positive_rows(weight, n_codes)
    if len(positive) < len(points):
        points, weight = points[positive], weight[positive]
    weight = weight / weight.mean()
    return points, None if (weight == weight[0]).all() else weight
