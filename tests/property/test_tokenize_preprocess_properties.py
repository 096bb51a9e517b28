"""Preprocessing: inverses, blocks, storage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.baseline_tokenizers import clustered, unfitted

from recollect.tokenize.preprocess import Preprocess, PreprocessConfig

CHAINS = [
    PreprocessConfig(),
    PreprocessConfig(("l2",)),
    PreprocessConfig(("centre",)),
    PreprocessConfig(("pca",)),
    PreprocessConfig(("pca",), pca_dimension=4, whiten=True),
    PreprocessConfig(("direction",)),
    PreprocessConfig(("l2", "centre", "pca"), pca_dimension=6),
]


def label(config: PreprocessConfig) -> str:
    return "+".join(config.preprocess or ("none",)) + (f"-{config.pca_dimension}" if config.pca_dimension else "")


@pytest.mark.parametrize("config", CHAINS, ids=label)
def test_what_is_invertible_comes_back_and_what_is_not_is_undone_as_far_as_it_can_be(config):
    rows = clustered()
    chain = Preprocess(config).fit(rows)
    back = chain.invert(chain.apply(rows))
    assert back.shape == rows.shape
    if chain.is_invertible:
        np.testing.assert_allclose(back, rows, atol=1e-4)
    elif config.preprocess in (("l2",), ("pca",)):
        np.testing.assert_allclose(chain.apply(back), chain.apply(rows), atol=1e-4)


def test_only_lossless_chains_call_themselves_invertible():
    rows = clustered()
    lossless = [label(config) for config in CHAINS if Preprocess(config).fit(rows).is_invertible]
    assert lossless == ["none", "centre", "pca"]


@pytest.mark.parametrize("config", CHAINS, ids=label)
def test_a_row_comes_out_the_same_in_any_block(config):
    rows = clustered(700, 33)
    chain = Preprocess(config).fit(rows)
    whole = chain.apply(rows)
    for start, stop in [(0, 1), (3, 10), (250, 700), (699, 700)]:
        np.testing.assert_array_equal(chain.apply(rows[start:stop]), whole[start:stop])


@pytest.mark.parametrize("config", CHAINS, ids=label)
def test_stored_and_loaded_chains_agree_to_the_bit(config):
    rows = clustered()
    chain = Preprocess(config).fit(rows)
    other = Preprocess(config)
    other.take_arrays(chain.arrays())
    np.testing.assert_array_equal(other.apply(rows), chain.apply(rows))
    np.testing.assert_array_equal(other.invert(chain.apply(rows)), chain.invert(chain.apply(rows)))
    if config.preprocess:
        assert other.describe() == chain.describe()


def test_a_memory_mapped_array_gives_the_same_chain(tmp_path):
    rows = clustered(500)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    config = PreprocessConfig(("l2", "pca"), pca_dimension=5, whiten=True)
    ours = Preprocess(config).fit(mapped).arrays()
    for name, array in Preprocess(config).fit(rows).arrays().items():
        np.testing.assert_array_equal(ours[name], array)


def test_blocks_smaller_than_the_array_change_nothing_that_matters(monkeypatch):
    rows = clustered(500)
    config = PreprocessConfig(("direction", "pca"), pca_dimension=5)
    whole = Preprocess(config).fit(rows).apply(rows)
    monkeypatch.setattr("recollect.tokenize.preprocess._BLOCK", 37)
    np.testing.assert_allclose(Preprocess(config).fit(rows).apply(rows), whole, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_unit_rows_have_length_one_and_zeros_stay_zeros(scale, seed):
    rows = clustered(20, 5, seed) * np.float32(scale)
    rows[3] = 0
    found = Preprocess(PreprocessConfig(("l2",))).fit(rows).apply(rows)
    lengths = np.linalg.norm(found, axis=1)
    assert lengths[3] == 0
    np.testing.assert_allclose(np.delete(lengths, 3), 1, atol=1e-6)


@pytest.mark.parametrize("method", ["rq-kmeans", "pq", "opq", "balanced", "random"])
def test_tokenizers_fit_and_decode_through_their_preprocessing(method):
    rows = clustered(dimension=12)
    tokenizer = unfitted(method, preprocess=("centre", "pca"), pca_dimension=6).fit(rows)
    outside = Preprocess(PreprocessConfig(("centre", "pca"), pca_dimension=6)).fit(rows)
    alone = unfitted(method).fit(outside.apply(rows))
    codes = tokenizer.encode(rows).codes
    np.testing.assert_array_equal(codes, alone.encode(outside.apply(rows)).codes)
    np.testing.assert_allclose(tokenizer.decode(codes), outside.invert(alone.decode(codes)), atol=1e-5)
    assert tokenizer.dimension == 12
