"""FSQ's digits, values and index against the reference library, and what training is worth."""

import numpy as np
import pytest
import torch
from support.trained_tokenizers import fitted, unit_embeddings

from recollect.rng import stream
from recollect.tokenize.fsq import ScalarQuantiser, digits_of, index_of

reference = pytest.importorskip("vector_quantize_pytorch").FSQ

COUNTS = [(8, 5, 5, 5), (3,), (4, 7, 16), (256, 3)]


def latents(counts, n=500, scale=2.0):
    return torch.from_numpy(stream(0, "latent", len(counts)).normal(scale=scale, size=(n, len(counts))))


@pytest.mark.parametrize("counts", COUNTS)
def test_digits_and_their_index_are_the_librarys(counts):
    library, latent = reference(list(counts)), latents(counts).float()
    values, index = library(latent[:, None])
    digits = ScalarQuantiser(counts).codes_of(latent, 1)
    np.testing.assert_array_equal(index_of(digits.numpy(), counts), index[:, 0].numpy())
    torch.testing.assert_close(ScalarQuantiser(counts).vectors(digits).float(), values[:, 0])


@pytest.mark.parametrize("counts", COUNTS)
def test_every_tuple_of_digits_is_one_index_and_one_row_of_the_librarys_codebook(counts):
    index = np.arange(int(np.prod(counts)))
    digits = digits_of(index, counts)
    assert digits.dtype == np.int32
    assert len(np.unique(digits, axis=0)) == len(index)
    np.testing.assert_array_equal(index_of(digits, counts), index)
    values = ScalarQuantiser(counts).vectors(torch.from_numpy(digits.astype(np.int64)))
    torch.testing.assert_close(values.float(), reference(list(counts)).implicit_codebook)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_bounded_position_rounds_to_the_digit(counts):
    quantiser, latent = ScalarQuantiser(counts), latents(counts)
    digits = quantiser.codes_of(latent, 1)
    for level in range(len(counts)):
        position = quantiser.bounded(latent, level)
        assert ((position - digits[:, level]).abs() < 0.5 + 1e-6).all()
        if counts[level] <= 16:
            assert set(digits[:, level].tolist()) == set(range(counts[level]))


def test_the_alternatives_of_a_scalar_are_the_digits_beside_it():
    quantiser, latent = ScalarQuantiser((8, 5)), latents((8, 5))
    digits = quantiser.codes_of(latent, 1)
    found = quantiser.alternatives(latent, digits, 3)
    assert torch.equal(found[:, :, 0], digits)
    for level in range(2):
        distance = (quantiser.bounded(latent, level)[:, None] - found[:, level]).abs()
        assert (distance.diff(dim=1) >= -1e-6).all()
        assert ((found[:, level, 0] - found[:, level, 1]).abs() == 1).all()


def test_the_gradient_passes_the_rounding_as_that_of_the_bounded_scalar():
    quantiser, latent = ScalarQuantiser((8, 5)), latents((8, 5), n=20, scale=0.5).requires_grad_()
    (found,) = torch.autograd.grad(quantiser(latent).vector.sum(), latent)
    expected = torch.zeros_like(found)
    for level, size in enumerate((8, 5)):
        (gradient,) = torch.autograd.grad((quantiser.bounded(latent, level) / (size // 2)).sum(), latent)
        expected += gradient
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_digits_above_the_middle_stand_for_the_values_they_are_stored_as():
    tokenizer = fitted("fsq", unit_embeddings(), steps=2)
    codebooks = tokenizer.arrays()
    np.testing.assert_allclose(codebooks["codebook.0"][:, 0], np.arange(-4, 4) / 4)
    np.testing.assert_allclose(codebooks["codebook.1"][:, 0], [-1, -0.5, 0, 0.5, 1])
    assert tokenizer.codebook_sizes == (8, 5, 5, 5)


def test_training_beats_the_untrained_network():
    rows = unit_embeddings(512, 24, 4)
    errors = []
    for steps in (1, 400):
        tokenizer = fitted("fsq", rows, steps=steps, hidden=(64,), batch_size=256)
        decoded = tokenizer.decode(tokenizer.encode(rows).codes)
        errors.append(((rows - decoded) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum())
    assert errors[1] < 0.6 < 0.95 < errors[0]


def crowded_unit_rows(n=600, dimension=256):
    """Rows of length 1 about a common direction, as a language model's are: some .04 of deviation per dimension."""
    generator = stream(0, "crowded")
    inside = generator.normal(size=(n, 12)) @ generator.normal(size=(12, dimension)) / np.sqrt(12)
    rows = generator.normal(size=dimension) + inside + 0.2 * generator.normal(size=(n, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("counts", [(8, 8, 8, 8, 8, 8), (8, 5, 5, 5)])
def test_the_scalars_of_unit_rows_with_little_variance_use_their_values(counts):
    rows = crowded_unit_rows()
    assert 0.03 < rows.std(0).mean() < 0.06
    tokenizer = fitted("fsq", rows, counts=counts, hidden=(128, 64), steps=100, batch_size=200)
    codes = tokenizer.encode(rows).codes
    for level, count in enumerate(counts):
        assert len(np.unique(codes[:, level])) >= 0.8 * count
        assert tokenizer.report.levels[level]["usage"] >= 0.8
    assert tokenizer.report.levels[-1]["relative_mse"] < 0.8
    assert not tokenizer.report.warnings
