"""What holds for every tokenizer trained by gradient, whatever it has learnt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.trained_tokenizers import METHODS, fitted, small_tokenizer, unit_embeddings

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.fsq import digits_of, index_of

NAMES = sorted(METHODS)


@pytest.fixture(scope="module")
def rows():
    return unit_embeddings()


@pytest.fixture(scope="module")
def tokenizers(rows):
    return {name: fitted(name, rows) for name in NAMES}


def assert_same_encoding(found, expected):
    for field in ("codes", "distance", "alternatives"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_encodes_and_decodes_bit_for_bit(name, tokenizers, rows, tmp_path):
    tokenizer = tokenizers[name]
    save_file(dict(tokenizer.arrays()), tmp_path / "arrays.safetensors")
    loaded = small_tokenizer(name)
    loaded.take_arrays(load_file(tmp_path / "arrays.safetensors"))
    encoding = tokenizer.encode(rows, top_m=3)
    assert_same_encoding(loaded.encode(rows, top_m=3), encoding)
    np.testing.assert_array_equal(loaded.decode(encoding.codes), tokenizer.decode(encoding.codes))
    for key, array in tokenizer.arrays().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(loaded.arrays()[key], array)
    assert (loaded.dimension, loaded.codebook_sizes) == (tokenizer.dimension, tokenizer.codebook_sizes)


@pytest.mark.parametrize("name", NAMES)
def test_the_forms_of_an_encoding_are_those_of_the_contract(name, tokenizers, rows):
    tokenizer = tokenizers[name]
    sizes = tokenizer.codebook_sizes
    encoding = tokenizer.encode(rows, top_m=2, return_posterior=True)
    assert (encoding.codes.dtype, encoding.codes.shape) == (np.int32, (300, len(sizes)))
    assert (encoding.distance.dtype, encoding.distance.shape) == (np.float32, (300,))
    assert (encoding.alternatives.dtype, encoding.alternatives.shape) == (np.int32, (300, len(sizes), 2))
    assert encoding.confidence is encoding.entropy is encoding.probability is None
    assert ((encoding.codes >= 0) & (encoding.codes < np.array(sizes))).all()
    np.testing.assert_array_equal(encoding.alternatives[:, :, 0], encoding.codes)
    assert (encoding.alternatives[:, :, 0] != encoding.alternatives[:, :, 1]).all()
    decoded = tokenizer.decode(encoding.codes)
    assert (decoded.dtype, decoded.shape) == (np.float32, rows.shape)
    np.testing.assert_allclose(((rows - decoded) ** 2).sum(1), encoding.distance, rtol=1e-4, atol=1e-6)
    for level, size in enumerate(sizes):
        codebook = tokenizer.arrays()[f"codebook.{level}"]
        assert (codebook.dtype, codebook.shape[0]) == (np.float32, size)
    assert len(tokenizer.report.levels) == len(sizes)


@pytest.mark.parametrize("name", NAMES)
def test_an_items_codes_do_not_depend_on_its_batch_mates(name, tokenizers, rows):
    tokenizer = tokenizers[name]
    whole = tokenizer.encode(rows, top_m=2)
    order = stream(0, "order").permutation(len(rows))
    shuffled = tokenizer.encode(rows[order], top_m=2)
    np.testing.assert_array_equal(shuffled.codes, whole.codes[order])
    np.testing.assert_array_equal(shuffled.alternatives, whole.alternatives[order])
    for row in range(0, 300, 50):
        np.testing.assert_array_equal(tokenizer.encode(rows[row : row + 1]).codes[0], whole.codes[row])


@pytest.mark.parametrize("name", NAMES)
def test_equal_items_get_equal_codes(name, tokenizers, rows):
    doubled = tokenizers[name].encode(np.concatenate([rows, rows])).codes
    np.testing.assert_array_equal(doubled[:300], doubled[300:])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_arrays_and_another_seed_others(name, tokenizers, rows):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = fitted(name, rows), fitted(name, rows, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for key, array in tokenizers[name].arrays().items():
        np.testing.assert_array_equal(again.arrays()[key], array)
    weights = "encoder.0.weight"
    assert not np.array_equal(other.arrays()[weights], again.arrays()[weights])


@pytest.mark.parametrize("name", NAMES)
def test_items_the_mask_leaves_out_change_nothing(name, rows):
    mask = np.arange(300) % 3 > 0
    whole = fitted(name, rows, mask=mask)
    other = rows.copy()
    other[~mask] = unit_embeddings(100, seed=9)
    changed = fitted(name, other, mask=mask)
    for key, array in whole.arrays().items():
        np.testing.assert_array_equal(changed.arrays()[key], array)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_report_tells_the_error_and_the_use_of_every_depth(name, is_weighted, rows):
    weight = stream(2, "weight").uniform(0, 3, size=300) if is_weighted else None
    tokenizer = fitted(name, rows, weight=weight)
    share = np.ones(300) if weight is None else weight
    codes, mean = tokenizer.encode(rows).codes, np.average(rows.astype(np.float64), axis=0, weights=share)
    for depth, level in enumerate(tokenizer.report.levels):
        error = share @ ((rows - tokenizer.decode(codes[:, : depth + 1])) ** 2).sum(1)
        total = share @ ((rows - mean) ** 2).sum(1)
        assert level["relative_mse"] == pytest.approx(error / total, rel=1e-4)
        assert level["used_codes"] == len(np.unique(codes[:, depth]))
        assert level["used_codes"] + level["dead_codes"] == tokenizer.codebook_sizes[depth]


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_mapped_file_gives_what_the_array_gives(name, tokenizers, rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for key, array in fitted(name, mapped).arrays().items():
        np.testing.assert_array_equal(tokenizers[name].arrays()[key], array)


def test_weights_count_by_their_ratio_and_equal_ones_not_at_all(tokenizers, rows):
    name = "rq-vae"
    plain = tokenizers[name].arrays()["encoder.0.weight"]
    equal = fitted(name, rows, weight=np.full(300, 7.0)).arrays()["encoder.0.weight"]
    np.testing.assert_allclose(equal, plain, atol=1e-6)
    popular = np.where(np.arange(300) < 30, 100.0, 1.0)
    errors = []
    for weight in (None, popular):
        tokenizer = fitted(name, rows, weight=weight, steps=300, hidden=(), batch_size=300)
        errors.append(float(tokenizer.encode(rows[:30]).distance.mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_undone_by_decode_and_saved(name, rows):
    shifted = 50 + 3 * rows
    tokenizer = fitted(name, shifted, preprocess=("centre", "pca"), pca_dimension=6, steps=100)
    encoding = tokenizer.encode(shifted)
    decoded = tokenizer.decode(encoding.codes)
    assert decoded.shape == shifted.shape
    assert ((shifted - decoded) ** 2).sum() < ((shifted - shifted.mean(0)) ** 2).sum()
    loaded = small_tokenizer(name, preprocess=("centre", "pca"), pca_dimension=6)
    loaded.take_arrays(tokenizer.arrays())
    assert loaded.dimension == 24
    assert_same_encoding(loaded.encode(shifted), encoding)
    np.testing.assert_array_equal(loaded.decode(encoding.codes), decoded)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [lambda x: 1e-3 * x, lambda x: 500 + 100 * x], ids=["tiny", "far"])
def test_units_and_origin_of_the_rows_change_nothing(name, change, rows):
    changed = change(rows.astype(np.float64)).astype(np.float32)
    plain, other = fitted(name, rows, steps=60), fitted(name, changed, steps=60)
    codes, others = plain.encode(rows).codes, other.encode(changed).codes
    assert (codes == others).mean() > 0.97
    is_same = (codes == others).all(axis=1)
    expected = change(plain.decode(codes).astype(np.float64))
    np.testing.assert_allclose(other.decode(codes)[is_same], expected[is_same], atol=0.05 * changed.std())
    errors = [tokenizer.report.levels[-1]["relative_mse"] for tokenizer in (plain, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_levels_alone_can_be_decoded(name, tokenizers, rows):
    tokenizer = tokenizers[name]
    codes = tokenizer.encode(rows).codes
    for depth in range(1, codes.shape[1] + 1):
        assert tokenizer.decode(codes[:, :depth]).shape == rows.shape


def test_embeddings_of_one_dimension_are_coded(rows):
    for name in NAMES:
        assert fitted(name, rows[:, :1]).encode(rows[:, :1]).codes.shape[0] == 300


def test_no_rows_have_no_codes(tokenizers, rows):
    for tokenizer in tokenizers.values():
        encoding = tokenizer.encode(rows[:0])
        assert encoding.codes.shape == (0, len(tokenizer.codebook_sizes))
        assert tokenizer.decode(encoding.codes).shape == (0, 24)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 300), min_size=1, max_size=6), st.data())
def test_index_and_digits_are_inverse(counts, data):
    digits = np.array([[data.draw(st.integers(0, count - 1)) for count in counts] for _ in range(3)])
    index = index_of(digits, counts)
    np.testing.assert_array_equal(digits_of(index, counts), digits)
    expected = [sum(int(d) * int(np.prod(counts[:l], dtype=object)) for l, d in enumerate(row)) for row in digits]  # noqa: E741
    assert index.tolist() == expected


def test_an_index_beyond_64_bits_is_refused():
    counts = (2**16,) * 5
    with pytest.raises(InputError, match="more than 64 bits"):
        index_of(np.zeros((1, 5), dtype=np.int64), counts)
    with pytest.raises(InputError, match="more than 64 bits"):
        digits_of(np.zeros(1, dtype=np.int64), counts)
