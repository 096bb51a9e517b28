"""RQ-KMeans against scikit-learn and faiss, and the chain's encoder against faiss's residual quantiser."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, kmeans_plusplus

from recollect.errors import ConfigError
from recollect.tokenize.baseline_options import KMeansConfig, RQKMeansConfig, VQConfig
from recollect.tokenize.greedy_seeds import greedy_seeds
from recollect.tokenize.kmeans import first_means, fit_kmeans, lloyd
from recollect.tokenize.rq_kmeans import VQ, RQKMeans

faiss = pytest.importorskip("faiss")


def blobs(n: int, dimension: int, seed: int = 0, centres: int = 40) -> np.ndarray:
    generator = np.random.default_rng(seed)
    middle = generator.normal(0, 1, (centres, dimension))
    return (middle[generator.integers(centres, size=n)] + generator.normal(0, 0.5, (n, dimension))).astype(np.float32)


def test_lloyd_ends_at_the_labels_and_centroids_of_scikit_learn():
    points = blobs(3000, 12)
    first = first_means(points, 32, "k-means++", 5)
    ours = lloyd(points, first, iterations=300)
    theirs = KMeans(32, init=first, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(points)
    assert ours.splits == 0
    np.testing.assert_allclose(ours.means, theirs.cluster_centers_, atol=2e-5)
    labels = ((points[:, None] - ours.means[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(labels, theirs.labels_)
    assert ours.objective[-1] == pytest.approx(theirs.inertia_, rel=1e-5)


def test_one_iteration_uses_every_point_where_faiss_by_default_draws_a_sample():
    points = blobs(4000, 6)
    first = points[:8].copy()
    labels = ((points[:, None] - first[None]) ** 2).sum(-1).argmin(1)
    exact = np.stack([points[labels == code].astype(np.float64).mean(0) for code in range(8)])
    np.testing.assert_allclose(lloyd(points, first, iterations=1).means, exact, atol=6e-7 * 10)
    default = faiss.Kmeans(6, 8, niter=1)  # 256 points per centroid at most: 2,048 of 4,000
    default.train(points, init_centroids=first)
    assert np.abs(default.centroids - exact).max() > 1e-3


def test_weights_count_like_repeated_points():
    points = blobs(600, 5)
    weight = np.random.default_rng(1).integers(1, 5, size=600)
    first = points[:20].copy()
    weighted = lloyd(points, first, iterations=30, weight=weight)
    repeated = lloyd(np.repeat(points, weight, axis=0), first, iterations=30)
    np.testing.assert_allclose(weighted.means, repeated.means, atol=2e-5)


def seed_error(points: np.ndarray, means: np.ndarray) -> float:
    return float(((points[:, None] - means[None]) ** 2).sum(-1).min(1).sum())


def test_greedy_seeds_are_as_good_as_those_of_scikit_learn():
    points = blobs(1500, 8)
    ours = [seed_error(points, first_means(points, 40, "k-means++", seed)) for seed in range(12)]
    theirs = [seed_error(points, kmeans_plusplus(points, 40, random_state=seed)[0]) for seed in range(12)]
    random = [seed_error(points, first_means(points, 40, "random", seed)) for seed in range(12)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.03)
    assert np.mean(random) > 1.1 * np.mean(theirs)  # or the bound above would tell nothing apart


def test_greedy_seeds_are_distinct_rows_and_none_has_weight_zero():
    points = np.repeat(blobs(30, 4), 5, axis=0)  # five of each
    weight = np.tile([1.0, 0.0, 2.0, 0.0, 0.0], 30)
    chosen = greedy_seeds(torch.from_numpy(points), 30, weight, np.random.default_rng(0))
    assert (weight[chosen] > 0).all()
    assert len(np.unique(points[chosen], axis=0)) == 30
    more = greedy_seeds(torch.from_numpy(points), 40, weight, np.random.default_rng(0))  # 10 must repeat
    assert len(np.unique(points[more], axis=0)) == 30


def test_a_partition_begins_at_means_of_equal_parts():
    points = blobs(600, 5)
    means = first_means(points, 20, "partition", 3)
    np.testing.assert_allclose(means.mean(axis=0), points.astype(np.float64).mean(axis=0), atol=1e-5)
    spread = np.square(points - points.mean(axis=0)).sum(axis=1).mean()
    assert np.square(means - points.mean(axis=0)).sum(axis=1).mean() == pytest.approx(spread / 30, rel=0.5)
    every = first_means(points, 600, "partition", 3)
    np.testing.assert_allclose(np.sort(every, axis=0), np.sort(points, axis=0), atol=1e-6)
    weight = np.random.default_rng(1).random(600)
    one = first_means(points, 1, "partition", 3, weight)
    np.testing.assert_allclose(one[0], np.average(points.astype(np.float64), axis=0, weights=weight), atol=1e-5)


def test_alternate_seeding_keeps_the_better_of_both_kinds():
    points = blobs(800, 8)
    fits = {
        way: fit_kmeans(points, 32, KMeansConfig(seeding=way, restarts=2), names=("t",), weight=None)
        for way in ("k-means++", "partition", "alternate")
    }
    expected = [fits["k-means++"].finals[0], fits["partition"].finals[1]]
    assert fits["alternate"].finals == expected
    assert fits["alternate"].objective[-1] == min(expected)
    with pytest.raises(ConfigError, match="set restarts to 2 or more"):
        KMeansConfig(seeding="alternate", restarts=1)


def test_small_weights_end_and_do_not_change_the_result():
    """faiss's splitting of empty clusters does not end on weights that are all below 1."""
    points = np.repeat(blobs(30, 4), 4, axis=0)  # 30 distinct points for 40 codes: clusters stay empty
    config = KMeansConfig(iterations=10, restarts=1)
    tiny = fit_kmeans(points, 40, config, names=("t",), weight=np.full(len(points), 1e-6))
    plain = fit_kmeans(points, 40, config, names=("t",), weight=None)
    np.testing.assert_array_equal(tiny.means, plain.means)


def test_points_of_weight_zero_do_not_count():
    points = blobs(500, 4)
    weight = np.r_[np.ones(400), np.zeros(100)]
    config = KMeansConfig(restarts=1)
    with_zeros = fit_kmeans(points, 16, config, names=("t",), weight=weight)
    without = fit_kmeans(points[:400].copy(), 16, config, names=("t",), weight=None)
    np.testing.assert_array_equal(with_zeros.means, without.means)


def test_the_error_is_no_higher_than_scikit_learns_best_of_as_many_restarts():
    points = blobs(2000, 16, centres=100)
    config = RQKMeansConfig(levels=2, codebook_size=64)
    ours = RQKMeans(config).fit(points)
    theirs = KMeans(64, n_init=config.restarts, random_state=0, max_iter=300, tol=1e-6).fit(points)
    error = ours.report.levels[0]["objective_last"]
    assert error <= 1.01 * theirs.inertia_
    assert all(level["has_converged"] for level in ours.report.levels)


def test_rows_far_from_the_origin_are_clustered_as_well():
    points = blobs(1500, 8, centres=80)
    far = points + np.float32(1000)
    near_error = fit_kmeans(points, 48, KMeansConfig(), names=("t",), weight=None).objective[-1]
    means = fit_kmeans(far, 48, KMeansConfig(), names=("t",), weight=None).means
    error = ((far[:, None].astype(np.float64) - means[None]) ** 2).sum(-1).min(1).sum()
    assert error == pytest.approx(near_error, rel=0.01)


def test_the_best_of_several_restarts_is_kept():
    points = blobs(1500, 8, centres=80)
    found = fit_kmeans(points, 48, KMeansConfig(restarts=4), names=("t",), weight=None)
    assert len(found.finals) == 4
    assert found.objective[-1] == min(found.finals) < max(found.finals)


def test_vq_is_the_first_level_of_rq_kmeans_up_to_its_seeds():
    points = blobs(800, 6)
    one = VQ(VQConfig(codebook_size=16, seed=3)).fit(points)
    codes = one.encode(points).codes
    nearest = ((points[:, None] - one.arrays()["codebook.0"][None]) ** 2).sum(-1).argmin(1)
    assert codes.shape == (800, 1)
    np.testing.assert_array_equal(codes[:, 0], nearest)


@pytest.fixture(scope="module")
def faiss_quantiser():
    """Gaussian rows in 16 dimensions and a faiss residual quantiser of 2 x 6 bits trained on them."""
    points = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
    quantiser = faiss.ResidualQuantizer(16, 2, 6)
    quantiser.max_beam_size = 1
    quantiser.train(points)
    tokenizer = RQKMeans(RQKMeansConfig(levels=2, codebook_size=64))
    books = faiss.vector_to_array(quantiser.codebooks).reshape(2, 64, 16)
    tokenizer.take_arrays({"codebook.0": books[0], "codebook.1": books[1]})
    return points, quantiser, tokenizer


def faiss_codes(quantiser, points: np.ndarray, beam: int) -> np.ndarray:
    quantiser.max_beam_size = beam
    return faiss.unpack_bitstrings(quantiser.compute_codes(points), 2, 6)


def test_greedy_codes_equal_those_of_faiss_on_every_row(faiss_quantiser):
    points, quantiser, tokenizer = faiss_quantiser
    theirs = faiss_codes(quantiser, points, 1)
    ours = tokenizer.encode(points)
    np.testing.assert_array_equal(ours.codes, theirs)
    their_error = np.square(points - quantiser.decode(quantiser.compute_codes(points))).mean()
    assert ours.distance.mean() / 16 == pytest.approx(their_error, abs=1e-6)
    np.testing.assert_allclose(
        tokenizer.decode(ours.codes), quantiser.decode(quantiser.compute_codes(points)), atol=1e-6
    )


@pytest.mark.parametrize(("beam", "measured"), [(1, 0.41145), (5, 0.40123), (16, 0.40009)])
def test_beam_error_is_that_of_faiss(faiss_quantiser, beam, measured):
    points, quantiser, tokenizer = faiss_quantiser
    theirs = faiss_codes(quantiser, points, beam)
    their_error = float(np.square(points - tokenizer.decode(theirs.astype(np.int32))).mean())
    our_error = float(np.square(points - tokenizer.decode(tokenizer.encode(points, beam=beam).codes)).mean())
    assert our_error == pytest.approx(their_error, rel=0.005)
    assert our_error == pytest.approx(measured, rel=0.03)  # of other Gaussian rows
    if beam > 1:
        assert our_error < float(np.square(points - tokenizer.decode(tokenizer.encode(points).codes)).mean())
