"""PRQ-KMeans against its equations, written out naively, and against its stated identity."""

import numpy as np
import pytest
import torch

from recollect.tokenize.baseline_options import PRQKMeansConfig
from recollect.tokenize.prq_kmeans import PRQKMeans, projection_residual, soft_update


def rows(n: int, dimension: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    middle = generator.normal(0.3, 1, (25, dimension))
    return (middle[generator.integers(25, size=n)] + generator.normal(0, 0.4, (n, dimension))).astype(np.float32)


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_soft_update_is_the_weighted_mean_over_the_nearest_centres():
    points = normalised(rows(60, 5).astype(np.float64))
    centres = normalised(np.random.default_rng(1).normal(size=(7, 5)))
    weight = np.random.default_rng(2).uniform(0.5, 2, 60)
    sums, masses = np.zeros((7, 5)), np.zeros(7)
    for point, share in zip(points, weight, strict=True):
        cosines = centres @ point
        nearest = np.argsort(-cosines)[:3]
        pulls = np.exp(15 * cosines[nearest])
        for code, pull in zip(nearest, pulls / pulls.sum(), strict=True):
            sums[code] += share * pull * point
            masses[code] += share * pull
    found = soft_update(torch.tensor(points), torch.tensor(centres), 3, 15.0, torch.tensor(weight))
    np.testing.assert_allclose(found[0].numpy(), sums, atol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), masses, atol=1e-12)


def test_codes_follow_the_written_out_chain():
    points = rows(400, 8)
    tokenizer = PRQKMeans(PRQKMeansConfig(levels=3, codebook_size=12)).fit(points)
    arrays = tokenizer.arrays()
    unit = normalised(points.astype(np.float64))
    mean = unit.mean(0)
    residual = normalised(unit - (unit @ mean)[:, None] * mean / (mean @ mean))
    codes = tokenizer.encode(points).codes
    for level in range(3):
        centres = arrays[f"codebook.{level}"].astype(np.float64)
        cosines = residual @ normalised(centres).T
        np.testing.assert_array_equal(codes[:, level], cosines.argmax(1))
        chosen = centres[codes[:, level]]
        share = (residual * chosen).sum(1) / np.square(chosen).sum(1)
        residual = normalised(residual - share[:, None] * chosen)


def test_residual_is_orthogonal_to_its_centroid_and_the_nearest_such_unit_vector():
    generator = np.random.default_rng(3)
    residual = torch.tensor(normalised(generator.normal(size=(200, 10))).astype(np.float32))
    centre = torch.tensor((generator.uniform(0.2, 3, (200, 1)) * generator.normal(size=(200, 10))).astype(np.float32))
    left = projection_residual(residual, centre)
    assert (left * centre / centre.norm(dim=1, keepdim=True)).sum(1).abs().max() < 1e-5
    np.testing.assert_allclose(left.norm(dim=1), 1, atol=1e-6)
    reached = (residual - left).norm(dim=1)
    for _ in range(50):
        other = torch.tensor(generator.normal(size=(200, 10)).astype(np.float32))
        other = projection_residual(other, centre)  # a random unit vector orthogonal to the centre
        assert (reached <= (residual - other).norm(dim=1) + 1e-6).all()


def test_plain_residual_keeps_the_variance_along_the_centroid_that_projection_removes():
    """Mean square of (r - c) along c within a cluster = Var(r . c^), where c is the cluster's mean."""
    cluster = normalised(rows(300, 6).astype(np.float64))
    centre = cluster.mean(0)
    direction = centre / np.linalg.norm(centre)
    along = (cluster - centre) @ direction
    assert np.square(along).mean() == pytest.approx(np.var(cluster @ direction), rel=1e-9)
    left = projection_residual(torch.tensor(cluster), torch.tensor(np.tile(centre, (300, 1))))
    assert (left.double() @ torch.tensor(direction)).abs().max() < 1e-6


def test_an_item_along_its_centre_leaves_nothing():
    centre = torch.tensor([[0.0, 2.0, 0.0]])
    assert projection_residual(torch.tensor([[0.0, 1.0, 0.0]]), centre).tolist() == [[0.0, 0.0, 0.0]]


def test_planted_directions_are_found():
    generator = np.random.default_rng(4)
    directions = np.linalg.qr(generator.normal(size=(12, 12)))[0][:6]
    truth = generator.integers(6, size=1200)
    points = (directions[truth] + generator.normal(0, 0.05, (1200, 12))).astype(np.float32)
    points *= generator.uniform(0.1, 10, (1200, 1)).astype(np.float32)  # lengths mean nothing to this method
    codes = PRQKMeans(PRQKMeansConfig(levels=1, codebook_size=6)).fit(points).encode(points).codes[:, 0]
    pairs = {(int(label), int(code)) for label, code in zip(truth, codes, strict=True)}
    assert len(pairs) == 6
