"""What holds for every tokenizer of the comparison: book-keeping, invariances, bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.baseline_tokenizers import METHODS, clustered, unfitted

pytest.importorskip("faiss")
pytest.importorskip("k_means_constrained")

ADDITIVE = ["rq-kmeans", "balanced", "constrained", "vq", "random"]
KMEANS = ["rq-kmeans", "vq", "pq"]


@pytest.mark.parametrize("method", METHODS)
def test_codes_lie_inside_the_codebooks_and_equal_rows_have_equal_codes(method):
    rows = clustered()
    rows[100:140] = rows[7]
    tokenizer = unfitted(method).fit(rows)
    codes = tokenizer.encode(rows).codes
    assert codes.dtype == np.int32
    assert codes.shape == (240, len(tokenizer.codebook_sizes))
    assert codes.min() >= 0
    assert (codes.max(axis=0) < tokenizer.codebook_sizes).all()
    assert (codes[100:140] == codes[7]).all()


@pytest.mark.parametrize("method", METHODS)
def test_codes_do_not_depend_on_the_batch(method):
    rows = clustered(300)
    tokenizer = unfitted(method, block_rows=64).fit(rows)
    whole = tokenizer.encode(rows).codes
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(tokenizer.encode(rows[order]).codes, whole[order])
    for start, stop in [(0, 1), (1, 8), (290, 300)]:
        np.testing.assert_array_equal(tokenizer.encode(rows[start:stop]).codes, whole[start:stop])


@pytest.mark.parametrize("method", ADDITIVE)
def test_the_sum_of_codebook_rows_plus_the_last_residual_is_the_input(method):
    rows = clustered()
    tokenizer = unfitted(method).fit(rows)
    found = tokenizer.encode(rows)
    books = [tokenizer.arrays()[f"codebook.{level}"] for level in range(len(tokenizer.codebook_sizes))]
    residual = rows.copy()
    for level, book in enumerate(books):
        residual -= book[found.codes[:, level]]
    np.testing.assert_allclose(rows - tokenizer.decode(found.codes), residual, atol=1e-5)
    np.testing.assert_allclose(found.distance, np.square(residual).sum(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rq-kmeans", "pq", "opq", "random"])
def test_error_does_not_grow_with_depth(method):
    rows = clustered()
    tokenizer = unfitted(method).fit(rows)
    codes = tokenizer.encode(rows).codes
    errors = [np.square(rows - tokenizer.decode(codes[:, :depth])).sum() for depth in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] <= np.square(rows - rows.mean(axis=0)).sum()


def test_reported_relative_error_is_that_of_the_decoded_rows():
    rows = clustered()
    tokenizer = unfitted("rq-kmeans").fit(rows)
    codes = tokenizer.encode(rows).codes
    total = np.square(rows - rows.mean(axis=0)).sum()
    for depth, level in enumerate(tokenizer.report.levels, start=1):
        error = np.square(rows - tokenizer.decode(codes[:, :depth])).sum()
        assert level["relative_mse"] == pytest.approx(error / total, rel=1e-4)


@pytest.mark.parametrize("method", ["rq-kmeans", "balanced", "vq", "pq"])
def test_translating_the_rows_changes_no_code(method):
    rows = np.round(clustered() * 256) / 256  # sums with the shift are exact in float32
    shift = np.arange(rows.shape[1], dtype=np.float32)
    first = unfitted(method).fit(rows)
    moved = unfitted(method).fit(rows + shift)
    same = (first.encode(rows).codes == moved.encode(rows + shift).codes).mean()
    assert same > 0.99  # centroids are rounded at another magnitude


@pytest.mark.parametrize("method", ["rq-kmeans", "vq", "prq-kmeans"])
def test_turning_the_rows_changes_no_code(method):
    rows = clustered()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0].astype(np.float32)
    first = unfitted(method).fit(rows)
    turned = unfitted(method).fit(rows @ rotation)
    assert (first.encode(rows).codes == turned.encode(rows @ rotation).codes).mean() > 0.99


@pytest.mark.parametrize("method", ["rq-kmeans", "prq-kmeans", "random"])
def test_every_row_twice_is_weight_two(method):
    rows = clustered()
    twice = unfitted(method).fit(np.repeat(rows, 2, axis=0))
    weighted = unfitted(method).fit(rows, weight=np.full(240, 2.0))
    assert (twice.encode(rows).codes == weighted.encode(rows).codes).mean() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_items_outside_the_mask_do_not_matter(method):
    rows = clustered()
    mask = np.arange(240) % 3 > 0
    masked = unfitted(method).fit(rows, mask=mask)
    other = rows.copy()
    other[~mask] = 1e3
    np.testing.assert_array_equal(masked.encode(rows).codes, unfitted(method).fit(other, mask=mask).encode(rows).codes)
    np.testing.assert_array_equal(masked.encode(rows).codes, unfitted(method).fit(rows[mask]).encode(rows).codes)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("random", "prq-kmeans")])
def test_alternatives_begin_with_the_emitted_code_and_are_distinct(method):
    rows = clustered()
    tokenizer = unfitted(method).fit(rows)
    found = tokenizer.encode(rows, top_m=4)
    assert found.alternatives.shape == (*found.codes.shape, 4)
    np.testing.assert_array_equal(found.alternatives[:, :, 0], found.codes)
    ordered = np.sort(found.alternatives, axis=2)
    assert (np.diff(ordered, axis=2) > 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), level_count=st.integers(1, 4), size=st.integers(1, 30))
def test_random_codes_are_uniform_and_unrelated_to_the_rows(seed, level_count, size):
    rows = clustered(60, 4, seed)
    tokenizer = unfitted("random", levels=level_count, codebook_size=size, seed=seed).fit(rows)
    codes = tokenizer.encode(rows).codes
    assert codes.min() >= 0
    assert codes.max() < size


def test_random_codes_pass_a_uniformity_test_and_differ_by_seed_and_level():
    from scipy.stats import chisquare

    rows = np.random.default_rng(0).normal(size=(8000, 3)).astype(np.float32)
    codes = unfitted("random", codebook_size=16).fit(rows).encode(rows).codes
    for level in range(3):
        assert chisquare(np.bincount(codes[:, level], minlength=16)).pvalue > 1e-4
    assert (codes[:, 0] == codes[:, 1]).mean() < 0.1
    other = unfitted("random", codebook_size=16, seed=1).fit(rows).encode(rows).codes
    assert (codes == other).mean() < 0.1


def test_normalised_residuals_offer_no_reconstruction_and_say_so():
    rows = clustered()
    tokenizer = unfitted("rq-kmeans-unit").fit(rows)
    assert not tokenizer.reconstructs
    assert tokenizer.encode(rows).distance is None
    assert any("normalize_residuals" in warning for warning in tokenizer.report.warnings)
    assert all("relative_mse" not in level for level in tokenizer.report.levels)


def test_normalised_residuals_ignore_the_length_of_a_row():
    rows = clustered()
    tokenizer = unfitted("rq-kmeans-unit").fit(rows)
    np.testing.assert_array_equal(tokenizer.encode(rows * 8).codes, tokenizer.encode(rows).codes)


@pytest.mark.parametrize("method", ["rq-kmeans", "balanced", "prq-kmeans", "pq", "opq", "random"])
def test_another_seed_gives_other_codes(method):
    rows = clustered()
    first = unfitted(method, seed=0).fit(rows).encode(rows).codes
    second = unfitted(method, seed=1).fit(rows).encode(rows).codes
    assert (first != second).any()
