"""Preprocessing against scikit-learn and the written-out formulas."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from recollect.tokenize.preprocess import Preprocess, PreprocessConfig


def rows(n: int = 300, dimension: int = 7) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(n, dimension)) @ generator.normal(size=(dimension, dimension)) + 2).astype(
        np.float32
    )


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("keep", [0, 3])
def test_pca_equals_scikit_learn_up_to_signs(whiten, keep):
    points = rows()
    ours = Preprocess(PreprocessConfig(("pca",), pca_dimension=keep, whiten=whiten)).fit(points)
    theirs = PCA(n_components=keep or None, whiten=whiten, svd_solver="full").fit(points.astype(np.float64))
    expected = theirs.transform(points.astype(np.float64))
    if whiten:  # scikit-learn divides by n - 1
        expected *= np.sqrt(len(points) / (len(points) - 1))
    np.testing.assert_allclose(np.abs(ours.apply(points)), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(
        ours.invert(ours.apply(points)), theirs.inverse_transform(theirs.transform(points)), atol=1e-4
    )


def test_whitened_rows_have_the_identity_as_covariance():
    points = rows()
    found = Preprocess(PreprocessConfig(("pca",), whiten=True)).fit(points).apply(points)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(7), atol=1e-4)


def test_direction_removes_the_mean_of_the_unit_rows():
    points = rows()
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    mean = unit.mean(0)
    expected = unit - (unit @ mean)[:, None] * mean / (mean @ mean)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = Preprocess(PreprocessConfig(("direction",))).fit(points).apply(points)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found @ mean).max() < 1e-6


def test_steps_are_fitted_on_what_the_steps_before_them_leave():
    points = rows()
    chain = Preprocess(PreprocessConfig(("l2", "centre"))).fit(points)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(chain.apply(points), unit - unit.mean(0), atol=1e-6)
    other = Preprocess(PreprocessConfig(("centre", "l2"))).fit(points)
    centred = points - points.mean(0)
    np.testing.assert_allclose(other.apply(points), centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)


def test_weights_count_like_repeated_rows_and_rows_left_out_do_not_count():
    points = rows()
    weight = np.random.default_rng(1).integers(1, 4, size=200).astype(np.float64)
    config = PreprocessConfig(("centre", "pca"), pca_dimension=4)
    weighted = Preprocess(config).fit(points, np.arange(200), weight)
    repeated = Preprocess(config).fit(np.repeat(points[:200], weight.astype(int), axis=0))
    np.testing.assert_allclose(weighted.apply(points), repeated.apply(points), atol=1e-4)
