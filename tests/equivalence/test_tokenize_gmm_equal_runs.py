"""Runs that must agree: any block size, in memory or streamed, alone or in a batch, before and after saving."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.gmm_worlds import COVARIANCES, clouds

from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.rq_gmm import RQGMM

VALUES = clouds(seed=1, n=3000, d=24, k=60)
OPTIONS = {"levels": 3, "codebook_size": 32, "max_iterations": 6}

CHILD = textwrap.dedent("""
    import resource, sys

    import numpy as np

    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.rq_gmm import RQGMM

    options = dict(levels=1, codebook_size=512, max_iterations=1, initialisation="random_points", residual_memory_mb=0)
    items = np.load(sys.argv[1], mmap_mode="r")
    RQGMM(RQGMMConfig(**options)).fit(items[:10000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    RQGMM(RQGMMConfig(**options)).fit(items)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
""")


def equal_arrays(one: RQGMM, other: RQGMM) -> None:
    assert one.arrays().keys() == other.arrays().keys()
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name], err_msg=name)


@pytest.fixture(scope="module", params=COVARIANCES)
def model(request) -> RQGMM:
    return RQGMM(RQGMMConfig(**OPTIONS, covariance=request.param)).fit(VALUES)


def test_two_fits_are_bit_identical(model):
    equal_arrays(model, RQGMM(model.config).fit(VALUES))


def test_codes_do_not_depend_on_batch_mates(model):
    whole = model.encode(VALUES).codes
    order = np.random.default_rng(0).permutation(len(VALUES))
    np.testing.assert_array_equal(model.encode(VALUES[order]).codes, whole[order])
    for size in (1, 2, 3, 7, 33, 250):
        parts = [model.encode(VALUES[start : start + size]).codes for start in range(0, min(250, 40 * size), size)]
        found = np.concatenate(parts)
        np.testing.assert_array_equal(found, whole[: len(found)])


def test_codes_do_not_depend_on_the_block_size(model):
    whole = model.encode(VALUES).codes
    for block_rows in (1, 17, 1000):
        other = RQGMM(RQGMMConfig(**OPTIONS, covariance=model.config.covariance, block_rows=block_rows))
        other.take_arrays(model.arrays())
        rows = VALUES[:200] if block_rows == 1 else VALUES
        np.testing.assert_array_equal(other.encode(rows).codes, whole[: len(rows)])


def test_encoding_after_save_and_load_is_bit_identical(model, tmp_path):
    save_file(dict(model.arrays()), tmp_path / "codebooks.safetensors")
    again = RQGMM(model.config)
    again.take_arrays(load_file(tmp_path / "codebooks.safetensors"))
    before = model.encode(VALUES, beam=2, top_m=3, return_posterior=True)
    after = again.encode(VALUES, beam=2, top_m=3, return_posterior=True)
    for name in ("codes", "distance", "confidence", "entropy", "alternatives", "probability"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)
    np.testing.assert_array_equal(model.decode(before.codes), again.decode(after.codes))
    equal_arrays(model, again)


@pytest.mark.parametrize("residual", ["hard", "projection", "soft"])
def test_streaming_from_disk_equals_keeping_residuals_in_memory(residual, tmp_path):
    np.save(tmp_path / "items.npy", VALUES)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    in_memory = RQGMM(RQGMMConfig(**OPTIONS, residual=residual)).fit(VALUES)
    streamed = RQGMM(RQGMMConfig(**OPTIONS, residual=residual, residual_memory_mb=0)).fit(mapped)
    equal_arrays(in_memory, streamed)


def test_memory_of_a_fit_does_not_grow_with_items_times_codes(tmp_path):
    """A child fits 100,000 items it maps from disk; N x K float32 would be 205 MB, the file is 3 MB."""
    np.save(tmp_path / "items.npy", np.resize(VALUES[:, :8], (100_000, 8)))
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "items.npy")], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60_000  # KiB above what a fit of 10,000 rows had reached


def test_float64_and_float16_input_are_read_as_float32():
    half = VALUES.astype(np.float16)
    options = RQGMMConfig(**OPTIONS)
    equal_arrays(RQGMM(options).fit(half), RQGMM(options).fit(half.astype(np.float32)))
    equal_arrays(RQGMM(options).fit(VALUES.astype(np.float64)), RQGMM(options).fit(VALUES))


def test_embeddings_are_never_modified():
    values = VALUES.copy()
    model = RQGMM(RQGMMConfig(**OPTIONS)).fit(values)
    model.encode(values, beam=2)
    np.testing.assert_array_equal(values, VALUES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_cuda_fits_like_the_cpu_and_encodes_the_same_codes(covariance):
    on_cpu = RQGMM(RQGMMConfig(**OPTIONS, covariance=covariance)).fit(VALUES)
    on_cuda = RQGMM(RQGMMConfig(**OPTIONS, covariance=covariance, device="cuda")).fit(VALUES)
    equal_arrays(on_cuda, RQGMM(on_cuda.config).fit(VALUES))
    for one, other in zip(on_cpu.report.levels, on_cuda.report.levels, strict=True):
        assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-2)
    loaded = RQGMM(RQGMMConfig(**OPTIONS, covariance=covariance, device="cuda"))
    loaded.take_arrays(on_cpu.arrays())
    np.testing.assert_array_equal(loaded.encode(VALUES).codes, on_cpu.encode(VALUES).codes)
