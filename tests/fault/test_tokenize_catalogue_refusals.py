"""What cannot be extended, renamed or measured for drift says so."""

import numpy as np
import pytest
from support.additive_tokenizer import GivenCodebooks, crowded_items, random_codebooks

from recollect.errors import InputError
from recollect.tokenize.baseline_options import RandomCodesConfig
from recollect.tokenize.catalogue import churn, extend, refit, relabel, resolve_refit
from recollect.tokenize.drift import DriftBaseline, drift_baseline, measure_drift
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.random_codes import RandomCodes
from recollect.tokenize.rq_gmm import RQGMM


def test_new_items_of_another_dimension_are_refused():
    tokenizer = random_codebooks((2, 4))
    with pytest.raises(InputError, match=r"shape \(3, 5\)"):
        extend(tokenizer, np.zeros((3, 5), dtype=np.float32), np.zeros((1, 2), dtype=np.int32))


def test_churn_compares_the_same_items():
    with pytest.raises(InputError, match="same items"):
        churn(np.zeros((3, 2)), np.zeros((2, 2)))


def test_labels_must_be_permutations():
    tokenizer = random_codebooks((2, 3))
    probe = crowded_items(tokenizer, 5)
    for labels in ([np.arange(2)], [np.arange(2), np.zeros(3, dtype=int)], [np.arange(3), np.arange(3)]):
        with pytest.raises(InputError, match="permutation"):
            relabel(tokenizer, labels, probe)


def test_codes_that_do_not_come_from_a_codebook_cannot_be_renamed_and_the_tokenizer_stays_as_it_was():
    items = crowded_items(random_codebooks((4, 4)), 60, spread=1.0)
    tokenizer = RandomCodes(RandomCodesConfig(levels=2, codebook_size=4)).fit(items)
    before = {name: np.array(array) for name, array in tokenizer.arrays().items()}
    with pytest.raises(InputError, match="cannot be renamed"):
        relabel(tokenizer, [np.array([1, 0, 3, 2])] * 2, items)
    for name, array in tokenizer.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def small_mixture(items, **options):
    return RQGMM(RQGMMConfig(levels=2, codebook_size=4, max_iterations=5, **options)).fit(items)


def test_refit_refuses_previous_codes_the_new_codebooks_cannot_name():
    items = crowded_items(random_codebooks((4, 4)), 60, spread=1.0)

    def fresh():
        return RQGMM(RQGMMConfig(levels=2, codebook_size=4, max_iterations=5))

    with pytest.raises(InputError, match="at least as many codes"):
        refit(fresh(), items, np.full((60, 2), 7))
    with pytest.raises(InputError, match="has 2 levels"):
        refit(fresh(), items, np.zeros((60, 3), dtype=int))
    with pytest.raises(InputError, match="shared"):
        refit(fresh(), items, np.zeros((60, 2), dtype=int), shared=np.arange(60) + 1)
    codes = np.zeros((60, 2), dtype=np.int32)
    with pytest.raises(InputError, match="differ"):
        resolve_refit(codes, codes[:5], codes[:4], random_codebooks((4, 4)), items)


def test_drift_needs_items_and_a_baseline_of_the_same_tokenizer():
    items = crowded_items(random_codebooks((4, 4)), 60, spread=1.0)
    tokenizer = small_mixture(items)
    baseline = drift_baseline(tokenizer, items)
    with pytest.raises(InputError, match="no item"):
        measure_drift(tokenizer, items[:0], baseline)
    with pytest.raises(InputError, match="measure it again"):
        measure_drift(random_codebooks((4, 4)), items, baseline)
    other = DriftBaseline(baseline.measure, baseline.mean[:1], baseline.deviation[:1], baseline.uses[:1], 60)
    with pytest.raises(InputError, match="measure it again"):
        measure_drift(tokenizer, items, other)


def test_drift_of_a_method_without_density_and_reconstruction_is_refused():
    class Silent(GivenCodebooks):
        name = "silent"
        reconstructs = False

    tokenizer = Silent(*random_codebooks((2, 2)).codebooks)
    with pytest.raises(InputError, match="silent has neither"):
        drift_baseline(tokenizer, np.zeros((3, 4), dtype=np.float32))
