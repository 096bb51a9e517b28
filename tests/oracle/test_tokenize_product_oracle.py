"""PQ and OPQ against faiss on the same codebooks and rotation."""

import numpy as np
import pytest

from recollect.tokenize.baseline_options import OPQConfig, PQConfig
from recollect.tokenize.product import OPQ, PQ, block_bounds

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Correlated rows, so that turning them helps."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(0, 1, (16, 16)) * np.geomspace(2, 0.05, 16)
    return (generator.standard_normal((1500, 16)) @ mixing.T).astype(np.float32)


def faiss_pq(codebooks: list[np.ndarray]):
    levels, (size, width) = len(codebooks), codebooks[0].shape
    quantiser = faiss.ProductQuantizer(levels * width, levels, int(np.log2(size)))
    faiss.copy_array_to_vector(np.concatenate(codebooks).ravel(), quantiser.centroids)
    return quantiser


def unpacked(quantiser, points: np.ndarray) -> np.ndarray:
    return faiss.unpack_bitstrings(quantiser.compute_codes(points), quantiser.M, quantiser.nbits)


def test_pq_codes_and_reconstructions_equal_those_of_faiss(points):
    tokenizer = PQ(PQConfig(levels=4, codebook_size=32)).fit(points)
    arrays = tokenizer.arrays()
    quantiser = faiss_pq([arrays[f"codebook.{level}"] for level in range(4)])
    codes = tokenizer.encode(points).codes
    np.testing.assert_array_equal(codes, unpacked(quantiser, points))
    np.testing.assert_array_equal(tokenizer.decode(codes), quantiser.decode(quantiser.compute_codes(points)))


def test_codebooks_trained_by_faiss_give_its_codes(points):
    quantiser = faiss.ProductQuantizer(16, 4, 5)
    quantiser.train(points)
    books = faiss.vector_to_array(quantiser.centroids).reshape(4, 32, 4)
    tokenizer = PQ(PQConfig(levels=4, codebook_size=32))
    tokenizer.take_arrays({f"codebook.{level}": books[level] for level in range(4)} | {"mean": points.mean(0)})
    np.testing.assert_array_equal(tokenizer.encode(points).codes, unpacked(quantiser, points))


def test_pq_error_is_no_higher_than_that_of_faiss(points):
    tokenizer = PQ(PQConfig(levels=4, codebook_size=32)).fit(points)
    quantiser = faiss.ProductQuantizer(16, 4, 5)
    quantiser.train(points)
    theirs = np.square(points - quantiser.decode(quantiser.compute_codes(points))).mean()
    assert tokenizer.encode(points).distance.mean() / 16 <= 1.005 * theirs


@pytest.mark.parametrize("levels", [4, 3])  # 3 does not divide 16: turned into 18 dimensions
def test_opq_rotation_is_orthogonal_and_its_codes_are_those_of_faiss(points, levels):
    tokenizer = OPQ(OPQConfig(levels=levels, codebook_size=32)).fit(points)
    arrays = tokenizer.arrays()
    rotation = arrays["rotation"]
    assert rotation.shape == (-(-16 // levels) * levels, 16)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(16), atol=1e-5)
    turning = faiss.LinearTransform(16, len(rotation))
    faiss.copy_array_to_vector(rotation.ravel(), turning.A)
    turning.is_trained = True
    turned = turning.apply(points)
    quantiser = faiss_pq([arrays[f"codebook.{level}"] for level in range(levels)])
    codes = tokenizer.encode(points).codes
    # the rotated rows differ by float32 rounding, so a row on the border of two cells may fall to either side
    assert (codes == unpacked(quantiser, turned)).mean() > 0.999
    theirs = quantiser.decode(quantiser.compute_codes(turned)) @ rotation
    ours = tokenizer.decode(codes)
    assert np.square(points - ours).mean() == pytest.approx(np.square(points - theirs).mean(), rel=1e-5)


def test_turning_lowers_the_error_of_correlated_rows(points):
    straight = PQ(PQConfig(levels=4, codebook_size=32)).fit(points).encode(points).distance.mean()
    turned = OPQ(OPQConfig(levels=4, codebook_size=32)).fit(points).encode(points).distance.mean()
    assert turned < 0.95 * straight


def test_opq_error_is_no_higher_than_that_of_faiss(points):
    ours = OPQ(OPQConfig(levels=4, codebook_size=32)).fit(points).encode(points).distance.mean()
    turning = faiss.OPQMatrix(16, 4)
    turning.train(points)
    turned = turning.apply(points)
    quantiser = faiss.ProductQuantizer(16, 4, 5)
    quantiser.train(turned)
    theirs = np.square(turned - quantiser.decode(quantiser.compute_codes(turned))).sum(1).mean()
    assert ours <= 1.01 * theirs


def test_distance_is_the_squared_error_of_the_reconstruction(points):
    for tokenizer in (PQ(PQConfig(levels=3, codebook_size=16)), OPQ(OPQConfig(levels=3, codebook_size=16))):
        found = tokenizer.fit(points).encode(points)
        error = np.square(points - tokenizer.decode(found.codes)).sum(1)
        np.testing.assert_allclose(found.distance, error, rtol=1e-4, atol=1e-4)


def test_blocks_without_a_code_are_decoded_to_the_mean(points):
    tokenizer = PQ(PQConfig(levels=4, codebook_size=16)).fit(points)
    partial = tokenizer.decode(tokenizer.encode(points).codes[:, :2])
    np.testing.assert_allclose(partial[:, 8:], np.tile(points.mean(0)[8:], (len(points), 1)), atol=1e-5)


def test_block_bounds_share_the_rest_among_the_first_blocks():
    assert block_bounds(10, 3) == [0, 4, 7, 10]
    assert block_bounds(16, 4) == [0, 4, 8, 12, 16]
