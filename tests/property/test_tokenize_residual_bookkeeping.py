"""The chain of levels: residuals, reconstruction, beam, alternatives, and what it refuses."""

import numpy as np
import pytest
import torch
from support.gmm_worlds import COVARIANCES, clouds

from recollect.errors import InputError
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.nearest import NearestMeans
from recollect.tokenize.rq_gmm import RQGMM

VALUES = clouds(seed=1, n=1200, d=6, k=30)


def fitted(**options) -> RQGMM:
    return RQGMM(RQGMMConfig(**({"levels": 3, "codebook_size": 16, "max_iterations": 10} | options))).fit(VALUES)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_input_minus_reconstruction_is_the_last_residual(covariance):
    model = fitted(covariance=covariance)
    found = model.encode(VALUES)
    residual = torch.from_numpy(VALUES)
    for level, fitted_level in enumerate(model.levels):
        residual = fitted_level.remainder(residual, torch.from_numpy(found.codes[:, level].astype(np.int64)))
    np.testing.assert_allclose(VALUES - model.decode(found.codes), residual.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.distance, residual.square().sum(dim=1).numpy(), rtol=1e-3, atol=1e-5)


def test_reported_relative_mse_is_that_of_each_depth_and_falls():
    model = fitted(emission="nearest_mean")
    codes = model.encode(VALUES).codes
    total = ((VALUES - VALUES.mean(axis=0)) ** 2).sum()
    by_depth = [((VALUES - model.decode(codes[:, : depth + 1])) ** 2).sum() / total for depth in range(3)]
    reported = [level["relative_mse"] for level in model.report.levels]
    np.testing.assert_allclose(reported, by_depth, rtol=1e-3)
    assert by_depth[0] > by_depth[1] > by_depth[2]


def test_dead_codes_are_counted():
    model = fitted()
    codes = model.encode(VALUES).codes
    assert [level["dead_codes"] for level in model.report.levels] == [16 - len(set(codes[:, i])) for i in range(3)]
    assert len(model.report.warnings) == sum(level["dead_codes"] > 0 for level in model.report.levels)


def test_unused_codes_are_warned_of_and_a_new_fit_forgets_the_old_report():
    model = RQGMM(RQGMMConfig(levels=1, codebook_size=8, max_iterations=3))
    model.fit(np.repeat(VALUES[:4], 10, axis=0))
    assert model.report.warnings == ["level 1: 4 of 8 codes are the code of no fitted item"]
    assert model.fit(VALUES).report.warnings == []


def test_a_wider_beam_finds_smaller_errors_and_beam_one_is_greedy():
    model = fitted(emission="nearest_mean")
    greedy, wide, wider = (model.encode(VALUES, beam=beam) for beam in (1, 4, 16))
    exhaustive = greedy_by_hand(model)
    np.testing.assert_array_equal(greedy.codes, exhaustive)
    assert wider.distance.mean() <= wide.distance.mean() < greedy.distance.mean()
    np.testing.assert_allclose(
        wide.distance, ((VALUES - model.decode(wide.codes)) ** 2).sum(axis=1), rtol=1e-3, atol=1e-5
    )


def greedy_by_hand(model: RQGMM) -> np.ndarray:
    residual, columns = VALUES.astype(np.float64), []
    for level in model.levels:
        means = level.means.double().numpy()
        code = ((residual[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        residual = residual - means[code]
        columns.append(code)
    return np.stack(columns, axis=1)


def test_a_beam_as_wide_as_all_tuples_is_exhaustive():
    model = RQGMM(RQGMMConfig(levels=2, codebook_size=6, max_iterations=5)).fit(VALUES)
    tuples = np.array([(a, b) for a in range(6) for b in range(6)])
    errors = ((VALUES[:, None] - model.decode(tuples)) ** 2).sum(axis=2)
    best = errors.min(axis=1)
    np.testing.assert_allclose(model.encode(VALUES, beam=36).distance, best, rtol=1e-4, atol=1e-5)


def test_soft_residual_takes_the_posterior_mean_and_codes_stay_the_argmax():
    model = fitted(residual="soft", covariance="tied_spherical")
    level = model.levels[0]
    rows = torch.from_numpy(VALUES)
    posterior = level.candidates(rows, 1)[1].exp()
    left = level.remainder(rows, torch.zeros(len(rows), dtype=torch.int64))
    torch.testing.assert_close(left, rows - posterior @ level.means, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model.encode(VALUES).codes[:, 0], posterior.argmax(dim=1).numpy())


def test_projection_residual_is_orthogonal_to_the_mean_and_the_nearest_such_vector():
    level = fitted(residual="projection").levels[0]
    rows = torch.from_numpy(VALUES)
    codes = level.candidates(rows, 1)[0][:, 0]
    left, means = level.remainder(rows, codes), level.means[codes]
    assert ((left * means).sum(dim=1) / means.norm(dim=1)).abs().max() < 1e-5
    other = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    other = other - (other * means).sum(dim=1, keepdim=True) / means.square().sum(dim=1, keepdim=True) * means
    assert ((rows - left).norm(dim=1) <= (rows - other).norm(dim=1) + 1e-5).all()


def test_projection_refuses_what_needs_a_reconstruction():
    model = fitted(residual="projection")
    assert not model.reconstructs
    assert model.encode(VALUES).distance is None
    with pytest.raises(InputError, match="no additive reconstruction"):
        model.decode(model.encode(VALUES).codes)
    with pytest.raises(InputError, match="beam 2 needs the hard residual"):
        model.encode(VALUES, beam=2)
    with pytest.raises(InputError, match="beam 2 needs the hard residual"):
        fitted(residual="soft").encode(VALUES, beam=2)


def test_posterior_is_returned_only_when_asked_for():
    model = fitted()
    bare, full = model.encode(VALUES[:50]), model.encode(VALUES[:50], return_posterior=True, top_m=5)
    assert bare.confidence is None
    assert bare.entropy is None
    assert bare.alternatives is None
    assert full.confidence.shape == full.entropy.shape == (50, 3)
    assert full.alternatives.shape == full.probability.shape == (50, 3, 5)
    np.testing.assert_allclose(full.probability[..., 0], full.confidence, rtol=1e-4)
    assert (full.probability.sum(axis=2) <= 1 + 1e-5).all()
    assert all(len(set(row)) == 5 for row in full.alternatives.reshape(-1, 5))


def test_alternatives_of_a_beam_follow_the_emitted_codes():
    model = fitted()
    beam = model.encode(VALUES[:100], beam=4, top_m=3, return_posterior=True)
    residual = torch.from_numpy(VALUES[:100])
    for level, fitted_level in enumerate(model.levels):
        np.testing.assert_array_equal(beam.alternatives[:, level], fitted_level.candidates(residual, 3)[0].numpy())
        residual = fitted_level.remainder(residual, torch.from_numpy(beam.codes[:, level].astype(np.int64)))


def test_masked_items_do_not_influence_the_fit_and_are_encoded():
    mask = np.arange(len(VALUES)) % 4 > 0
    poisoned = VALUES.copy()
    poisoned[~mask] = np.nan
    options = RQGMMConfig(levels=2, codebook_size=16, max_iterations=5)
    with_mask, alone = RQGMM(options).fit(poisoned, mask=mask), RQGMM(options).fit(VALUES[mask])
    for name, array in alone.arrays().items():
        np.testing.assert_array_equal(with_mask.arrays()[name], array)
    assert with_mask.encode(VALUES).codes.shape == (len(VALUES), 2)


def test_close_calls_go_to_the_true_nearest_mean_and_ties_to_the_lower_code():
    generator = np.random.default_rng(0)
    means = generator.normal(size=(40, 64)).astype(np.float32)
    means[20:] = means[:20] * (1 + np.float32(1e-6))  # rivals nearer than float32 products can tell
    means[39] = means[19]  # and an exact tie
    rows = (means[generator.integers(40, size=2000)] + 0.1 * generator.normal(size=(2000, 64))).astype(np.float32)
    distance = ((rows[:, None].astype(np.float64) - means.astype(np.float64)) ** 2).sum(axis=2)
    found = NearestMeans(torch.from_numpy(means))(torch.from_numpy(rows))[:, 0].numpy()
    np.testing.assert_array_equal(found, distance.argmin(axis=1))
    ranked = NearestMeans(torch.from_numpy(means))(torch.from_numpy(rows), 3).numpy()
    np.testing.assert_array_equal(ranked[:, 0], found)


@pytest.mark.parametrize("steps", [("l2",), ("centre",), ("pca",), ("direction",)])
def test_preprocessed_chain_decodes_into_the_input_space(steps):
    model = fitted(preprocess=steps)
    codes = model.encode(VALUES).codes
    decoded = model.decode(codes)
    assert decoded.shape == VALUES.shape
    assert np.isfinite(decoded).all()
    if steps in (("centre",), ("pca",)):
        total = ((VALUES - VALUES.mean(axis=0)) ** 2).sum()
        assert ((VALUES - decoded) ** 2).sum() / total == pytest.approx(
            model.report.levels[-1]["relative_mse"], rel=1e-2
        )
