"""The same codes after saving, after an interruption, from disk and in a second run."""

import numpy as np
import pytest
from safetensors.numpy import load, save
from support.baseline_tokenizers import METHODS, clustered, unfitted

pytest.importorskip("faiss")
pytest.importorskip("k_means_constrained")


@pytest.mark.parametrize("steps", [None, ("l2", "pca")], ids=["as-is", "l2-pca"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stored_tokenizer_encodes_and_decodes_to_the_same_bits(method, steps):
    rows = clustered()
    tokenizer = unfitted(method, preprocess=steps).fit(rows[:200])
    stored = load(save({name: np.ascontiguousarray(array) for name, array in tokenizer.arrays().items()}))
    other = unfitted(method, preprocess=steps)
    other.take_arrays(stored)
    assert other.dimension == tokenizer.dimension
    assert other.codebook_sizes == tokenizer.codebook_sizes
    first, second = tokenizer.encode(rows), other.encode(rows)
    np.testing.assert_array_equal(second.codes, first.codes)
    if tokenizer.reconstructs:
        np.testing.assert_array_equal(second.distance, first.distance)
        np.testing.assert_array_equal(other.decode(first.codes), tokenizer.decode(first.codes))
    for name, array in other.arrays().items():
        np.testing.assert_array_equal(array, tokenizer.arrays()[name])


@pytest.mark.parametrize("method", METHODS)
def test_two_fits_and_a_memory_mapped_fit_agree_to_the_bit(method, tmp_path):
    rows = clustered()
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    first, second = unfitted(method).fit(rows), unfitted(method).fit(mapped)
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(second.arrays()[name], array)
    np.testing.assert_array_equal(first.encode(rows).codes, second.encode(mapped).codes)


@pytest.mark.parametrize("method", ["rq-kmeans", "rq-kmeans-unit", "balanced", "constrained", "prq-kmeans", "random"])
def test_an_interrupted_fit_goes_on_to_the_same_codebooks(method, tmp_path, monkeypatch):
    rows = clustered()
    whole = unfitted(method).fit(rows)
    stopped = unfitted(method)
    fit_level = stopped.fit_level

    def until_level_two(level, *arguments):
        if level == 2:
            raise KeyboardInterrupt
        return fit_level(level, *arguments)

    monkeypatch.setattr(stopped, "fit_level", until_level_two)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(rows, checkpoint=tmp_path)
    resumed = unfitted(method).fit(rows, checkpoint=tmp_path)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], array)
    assert resumed.report.warnings == whole.report.warnings


def test_residuals_computed_anew_at_every_pass_give_the_same_codebooks():
    rows = clustered()
    kept = unfitted("rq-kmeans").fit(rows)
    anew = unfitted("rq-kmeans", residual_memory_mb=0, block_rows=50).fit(rows)
    for name, array in kept.arrays().items():
        np.testing.assert_array_equal(anew.arrays()[name], array)


def test_float64_rows_are_fitted_as_float32():
    rows = clustered()
    first, second = unfitted("pq").fit(rows), unfitted("pq").fit(rows.astype(np.float64))
    np.testing.assert_array_equal(first.encode(rows).codes, second.encode(rows.astype(np.float64)).codes)
