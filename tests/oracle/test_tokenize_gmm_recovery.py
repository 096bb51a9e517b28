"""Mixtures and trees whose truth is known are found again."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.rq_gmm import RQGMM


def uneven_mixture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """4,000 rows of 8 components in 8 dimensions whose scales differ per component and dimension."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(8, 8)) * 2
    scales = np.exp(generator.uniform(np.log(0.1), np.log(3), size=(8, 8)))
    labels = generator.integers(8, size=4000)
    return (centres[labels] + scales[labels] * generator.normal(size=(4000, 8))).astype(np.float32), labels


def recovery(seed: int) -> tuple[float, float, float, float]:
    """Adjusted Rand index and mean squared error of the mixture, then of k-means with ten restarts."""
    values, labels = uneven_mixture(seed)
    kmeans = KMeans(8, n_init=10, random_state=seed).fit(values)
    options = RQGMMConfig(
        levels=1,
        codebook_size=8,
        covariance="diag",
        max_iterations=200,
        tolerance=0,
        shrinkage=0,
        initialisation="given",
    )
    model = RQGMM(options, start=[kmeans.cluster_centers_]).fit(values)
    found = model.encode(values)
    error = float(((values - model.decode(found.codes)) ** 2).mean())
    return (
        adjusted_rand_score(labels, found.codes[:, 0]),
        error,
        adjusted_rand_score(labels, kmeans.labels_),
        kmeans.inertia_ / values.size,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uneven_components_are_recovered_where_kmeans_has_the_smaller_error(seed):
    found, error, kmeans_found, kmeans_error = recovery(seed)
    assert found >= 0.995
    assert kmeans_found < found
    assert kmeans_error < error


@pytest.mark.slow
def test_uneven_components_are_recovered_on_ten_seeds():
    results = np.array([recovery(seed) for seed in range(10)])
    assert results[:, 0].min() >= 0.995
    assert results[:, 2].mean() < 0.95
    assert results[:, 3].mean() < results[:, 1].mean()


def test_two_level_tree_is_recovered_exactly():
    generator = np.random.default_rng(0)
    coarse, fine = generator.normal(size=(8, 16)) * 10, generator.normal(size=(8, 16)) * 2
    first, second = generator.integers(8, size=(2, 3000))
    values = (coarse[first] + fine[second] + 0.05 * generator.normal(size=(3000, 16))).astype(np.float32)

    model = RQGMM(RQGMMConfig(levels=2, codebook_size=8)).fit(values)
    codes = model.encode(values).codes

    assert adjusted_rand_score(first, codes[:, 0]) == 1.0
    assert adjusted_rand_score(second, codes[:, 1]) == 1.0
