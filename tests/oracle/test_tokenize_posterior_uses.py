"""Posterior uses and drift against their definitions and planted truths."""

import json
from itertools import product

import numpy as np
import pytest
from support.additive_tokenizer import crowded_items, random_codebooks

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.drift import DriftBaseline, drift_baseline, measure_drift
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.posterior import (
    alternative_ids,
    items_to_encode_again,
    review_flags,
    sample_ids,
    soft_features,
)
from recollect.tokenize.protocol import Encoding
from recollect.tokenize.rq_gmm import RQGMM


def encoded(top_m=3, n=20):
    tokenizer = random_codebooks((6, 6, 6))
    items = crowded_items(tokenizer, n, spread=0.5)
    return tokenizer.encode(items, top_m=top_m, return_posterior=True)


def test_alternatives_are_the_likeliest_tuples_of_the_product():
    encoding = encoded()
    found = alternative_ids(encoding, 5)
    for row in range(20):
        scored = [
            (float(np.prod([encoding.probability[row, level, place] for level, place in enumerate(places)])), places)
            for places in product(range(3), repeat=3)
        ]
        best = sorted(scored, key=lambda pair: -pair[0])[:5]
        np.testing.assert_allclose(found.probability[row], [p for p, _ in best], rtol=1e-6)
        for place, codes in enumerate(found.codes[row]):
            chances = [
                encoding.probability[row, level, encoding.alternatives[row, level].tolist().index(code)]
                for level, code in enumerate(codes.tolist())
            ]
            assert np.prod(chances) == pytest.approx(found.probability[row, place], rel=1e-5)
    np.testing.assert_array_equal(found.codes[:, 0], encoding.codes)


def test_sampled_digits_follow_the_posterior():
    shares = np.array([[[0.7, 0.2, 0.1]]])
    n = 30_000
    encoding = Encoding(
        np.zeros((n, 1), dtype=np.int32),
        alternatives=np.tile(np.array([[[4, 2, 9]]], dtype=np.int32), (n, 1, 1)),
        probability=np.tile(shares / 2, (n, 1, 1)),  # what the top codes leave over is not drawn
    )
    drawn = sample_ids(encoding, stream(0, "test"))
    found = [(drawn == code).mean() for code in (4, 2, 9)]
    np.testing.assert_allclose(found, shares[0, 0], atol=0.01)
    np.testing.assert_array_equal(drawn, sample_ids(encoding, stream(0, "test")))


def test_soft_features_are_posterior_weighted_rows():
    encoding = encoded(top_m=2)
    generator = np.random.default_rng(0)
    tables = [generator.normal(size=(6, width)) for width in (2, 3, 4)]
    found = soft_features(encoding, tables)
    assert found.shape == (20, 9)
    expected = sum(encoding.probability[7, 1, m] * tables[1][encoding.alternatives[7, 1, m]] for m in range(2))
    np.testing.assert_allclose(found[7, 2:5], expected, rtol=1e-5)


def test_soft_features_of_a_certain_posterior_are_the_hard_ones():
    codes = np.array([[1], [0]], dtype=np.int32)
    alternatives = np.array([[[1, 0]], [[0, 1]]], dtype=np.int32)
    encoding = Encoding(codes, alternatives=alternatives, probability=np.array([[[1.0, 0.0]], [[1.0, 0.0]]]))
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(soft_features(encoding, [table]), table[codes[:, 0]].astype(np.float32))


def test_flags_and_drops_read_the_confidence():
    codes = np.zeros((3, 2), dtype=np.int32)
    before = Encoding(codes, confidence=np.array([[0.4, 0.9], [0.5, 0.1], [0.9, 0.9]]))
    after = Encoding(codes, confidence=np.array([[0.9, 0.9], [0.5, 0.05], [0.9, 0.7]]))
    assert review_flags(before).tolist() == [True, False, False]
    assert items_to_encode_again(before, after).tolist() == [False, False, True]


def test_posterior_uses_refuse_encodings_without_a_posterior():
    bare = Encoding(np.zeros((2, 2), dtype=np.int32))
    for use in (
        lambda: alternative_ids(bare, 1),
        lambda: sample_ids(bare, stream(0, "x")),
        lambda: soft_features(bare, [np.zeros((1, 1))] * 2),
        lambda: review_flags(bare),
        lambda: items_to_encode_again(bare, bare),
    ):
        with pytest.raises(InputError, match="rq-gmm"):
            use()
    encoding = encoded()
    with pytest.raises(InputError, match="between 1 and 27"):
        alternative_ids(encoding, 28)
    with pytest.raises(InputError, match="one table per level"):
        soft_features(encoding, [np.zeros((6, 1))])
    with pytest.raises(InputError, match="table of level 0"):
        soft_features(encoding, [np.zeros((1, 1))] * 3)
    with pytest.raises(InputError, match="below must be a probability"):
        review_flags(encoding, 1.5)


def small_mixture(items, covariance="diag"):
    return RQGMM(RQGMMConfig(levels=2, codebook_size=4, covariance=covariance, max_iterations=8)).fit(items)


@pytest.fixture(scope="module")
def bunches():
    return crowded_items(random_codebooks((4, 4)), 900, spread=0.3, centres=4)


@pytest.mark.parametrize("covariance", ["diag", "tied_spherical"])
def test_drift_measures_the_negative_log_likelihood_of_every_level(bunches, covariance):
    tokenizer = small_mixture(bunches[:600], covariance)
    baseline = drift_baseline(tokenizer, bunches[:600])
    residual = bunches[:600].astype(np.float64)
    codes = tokenizer.encode(bunches[:600]).codes
    arrays = tokenizer.arrays()
    for level in range(2):
        means, variance, weight = (arrays[f"{name}.{level}"] for name in ("codebook", "variance", "log_weight"))
        variance = np.broadcast_to(variance, means.shape)
        squares = ((residual[:, None] - means) ** 2 / variance).sum(-1)
        joint = weight - 0.5 * (squares + np.log(2 * np.pi * variance).sum(-1))
        likelihood = np.logaddexp.reduce(joint, axis=1)
        assert baseline.mean[level] == pytest.approx(-likelihood.mean(), abs=2e-3)
        residual = residual - means[codes[:, level]]


def test_items_like_the_fitted_ones_do_not_drift_and_others_do(bunches):
    tokenizer = small_mixture(bunches[:600])
    baseline = drift_baseline(tokenizer, bunches, mask=np.arange(900) < 600)
    baseline = DriftBaseline.from_json(json.loads(json.dumps(baseline.to_json())))
    alike = measure_drift(tokenizer, bunches[600:], baseline)
    assert (np.abs(alike.standard_errors) < 4).all()
    assert (alike.utilisation > 0.9).all()
    other = measure_drift(tokenizer, bunches[600:] + 1.5, baseline)
    assert other.measure == "negative_log_likelihood"
    assert other.standard_errors[0] > 10
    assert json.loads(json.dumps(other.to_json()))["n_items"] == 300


def test_drift_of_a_method_without_density_is_its_squared_error_after_each_level():
    tokenizer = random_codebooks((4, 4))
    items = crowded_items(tokenizer, 50, spread=0.3)
    baseline = drift_baseline(tokenizer, items)
    codes = tokenizer.encode(items).codes
    for level in range(2):
        error = ((items - tokenizer.decode(codes[:, : level + 1])) ** 2).sum(1).mean()
        assert baseline.mean[level] == pytest.approx(error, rel=1e-4)
    same = measure_drift(tokenizer, items, baseline)
    np.testing.assert_array_equal(same.growth, [0, 0])
    np.testing.assert_array_equal(same.standard_errors, [0, 0])
    assert same.unused_before.tolist() == [0, 0]


def test_new_items_on_codes_nobody_had_are_counted():
    tokenizer = random_codebooks((4, 4))
    near = np.repeat(tokenizer.codebooks[0][:1], 10, axis=0)
    baseline = drift_baseline(tokenizer, near)
    mixed = np.concatenate([near[:3], tokenizer.codebooks[0][1:2]])
    found = measure_drift(tokenizer, mixed, baseline)
    first = tokenizer.encode(mixed).codes[:, 0]
    assert found.unused_before[0] == pytest.approx((first != first[0]).mean())
