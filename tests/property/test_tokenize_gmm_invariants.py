"""What must hold for every mixture: a likelihood that grows, responsibilities that sum to 1, and invariances."""

import numpy as np
import pytest
import torch
from support.gmm_worlds import COVARIANCES, clouds, plain, rows_of, start_at

from recollect.tokenize.gmm import Mixture, Scorer, normalise_, weighted_sums
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.gmm_fit import fit_mixture
from recollect.tokenize.rq_gmm import RQGMM, GaussianLevel


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_log_likelihood_never_falls(covariance):
    values = clouds(seed=1, n=2000, d=8, k=20)
    found = fit_mixture(rows_of(values), 16, plain(covariance, max_iterations=30, initialisation="random_points"))
    trace = [*found.report["log_likelihood_trace"], found.report["log_likelihood"]]
    assert np.diff(trace).min() > -1e-10


def test_log_likelihood_falls_only_where_components_are_reseeded():
    values = clouds(seed=2, n=400, d=3, k=4, spread=6.0)
    start = start_at(values, 12, "diag")
    far = Mixture(start.means.clone(), start.variance, start.log_weight)
    far.means[:3] += 1000  # three components no row is near to
    found = fit_mixture(rows_of(values), 12, plain(max_iterations=40, minimum_points=2.0), start=far)
    falls = int((np.diff(found.report["log_likelihood_trace"]) < -1e-10).sum())
    assert found.report["reseeded"][0] >= 3
    assert falls <= len(found.report["reseeded"]) <= 5
    assert np.abs(found.mixture.means.numpy()).max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("length", [1.0, 1e3])
def test_responsibilities_sum_to_one_for_long_rows_and_many_components(covariance, dtype, length):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(300, 12))
    values = values / np.linalg.norm(values, axis=1, keepdims=True) * length
    k, shape = 1024, {"diag": (1024, 12), "spherical": (1024, 1), "tied_diag": (1, 12), "tied_spherical": (1, 1)}
    mixture = Mixture(
        torch.from_numpy(generator.normal(size=(k, 12)) * length),
        torch.from_numpy(generator.uniform(1e-3, 1, size=shape[covariance])),
        torch.full((k,), -np.log(k), dtype=torch.float64),
    )
    rows = torch.from_numpy(values).to(dtype)
    scorer = Scorer(mixture, covariance, dtype)
    features = scorer.features(rows, torch.empty(len(rows), scorer.width, dtype=dtype))
    gamma = scorer.relative(features, torch.empty(len(rows), k, dtype=dtype))
    log_density = normalise_(gamma)
    assert torch.isfinite(gamma).all()
    assert torch.isfinite(log_density).all()
    assert (gamma.double().sum(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
def test_statistics_of_sharp_and_blurred_responsibilities_equal_the_dense_product(sharpness):
    generator = torch.Generator().manual_seed(0)
    gamma = torch.randn(500, 64, dtype=torch.float64, generator=generator).mul_(sharpness)
    normalise_(gamma)
    features = torch.randn(500, 10, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(weighted_sums(gamma, features), gamma.T @ features, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [1.0, 1e3])
def test_long_rows_are_fitted_and_coded_without_nan(length):
    values = clouds(seed=3, n=3000, d=6, k=40) * length
    model = RQGMM(RQGMMConfig(levels=1, codebook_size=1024, max_iterations=3, lloyd_steps=2)).fit(values)
    found = model.encode(values[:200], return_posterior=True)
    assert np.isfinite(found.confidence).all()
    assert np.isfinite(found.entropy).all()
    assert np.isfinite(model.report.levels[0]["log_likelihood"])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_translation_does_not_change_codes(covariance):
    values = np.round(clouds(seed=4, n=1000, d=5, k=12) * 64) / 64  # so that moving by whole numbers is exact
    options = RQGMMConfig(levels=2, codebook_size=16, covariance=covariance, max_iterations=15)
    here = RQGMM(options).fit(values)
    there = RQGMM(options).fit(values + np.float32(512))
    np.testing.assert_array_equal(here.encode(values).codes[:, 0], there.encode(values + np.float32(512)).codes[:, 0])
    assert (here.encode(values).codes == there.encode(values + np.float32(512)).codes).mean() > 0.99  # residuals round
    assert here.report.levels[1]["relative_mse"] == pytest.approx(there.report.levels[1]["relative_mse"], rel=1e-2)


@pytest.mark.parametrize("covariance", ["spherical", "tied_spherical"])
def test_rotation_does_not_change_codes_of_spherical_kinds(covariance):
    values = clouds(seed=5, n=1000, d=6, k=10, spread=4.0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    turned = (values.astype(np.float64) @ rotation).astype(np.float32)
    start = values[:10].astype(np.float64)
    options = RQGMMConfig(
        levels=1, codebook_size=10, covariance=covariance, initialisation="given", precision="float64", shrinkage=0
    )
    here = RQGMM(options, start=[start]).fit(values).encode(values).codes
    there = RQGMM(options, start=[start @ rotation]).fit(turned).encode(turned).codes
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_order_of_rows_does_not_change_the_fit(covariance):
    values = clouds(seed=6, n=1500, d=5, k=12)
    order = np.random.default_rng(0).permutation(len(values))
    start = start_at(values, 12, covariance)
    options = plain(covariance, max_iterations=20, shrinkage=10.0)
    here = fit_mixture(rows_of(values), 12, options, start=start).mixture
    there = fit_mixture(rows_of(values[order]), 12, options, start=start).mixture
    torch.testing.assert_close(here.means, there.means, rtol=0, atol=1e-8)
    torch.testing.assert_close(here.variance, there.variance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_row_twice_is_a_row_of_weight_two(covariance):
    values = clouds(seed=7, n=900, d=4, k=8)
    start = start_at(values, 8, covariance)
    options = plain(covariance, max_iterations=20, shrinkage=10.0, minimum_points=2.0, variance_floor=1e-3)
    twice = fit_mixture(rows_of(np.concatenate([values, values])), 8, options, start=start)
    weighted = fit_mixture(rows_of(values), 8, options, weight=np.full(len(values), 2.0), start=start)
    torch.testing.assert_close(twice.mixture.means, weighted.mixture.means, rtol=0, atol=1e-8)
    torch.testing.assert_close(twice.mixture.variance, weighted.mixture.variance, rtol=0, atol=1e-8)
    torch.testing.assert_close(twice.mixture.log_weight, weighted.mixture.log_weight, rtol=0, atol=1e-8)
    assert twice.report["log_likelihood"] == pytest.approx(weighted.report["log_likelihood"], abs=1e-10)


def test_weight_two_everywhere_gives_the_codebooks_of_adjacent_duplicates():
    values = clouds(seed=8, n=800, d=4, k=8)
    options = RQGMMConfig(levels=2, codebook_size=8, precision="float64", max_iterations=10)
    twice = RQGMM(options).fit(np.repeat(values, 2, axis=0))
    weighted = RQGMM(options).fit(values, weight=np.full(len(values), 2.0))
    np.testing.assert_array_equal(twice.encode(values).codes, weighted.encode(values).codes)


def test_rows_of_weight_zero_do_not_count():
    values = clouds(seed=9, n=600, d=4, k=6)
    start = start_at(values, 6, "diag")
    weight = (np.arange(600) % 3 > 0).astype(np.float64)
    options = plain(max_iterations=10, shrinkage=10.0)
    without = fit_mixture(rows_of(values[weight > 0]), 6, options, start=start).mixture
    zeroed = fit_mixture(rows_of(values), 6, options, weight=weight, start=start).mixture
    torch.testing.assert_close(without.means, zeroed.means, rtol=0, atol=1e-8)


def test_equal_rows_get_equal_codes():
    values = np.repeat(clouds(seed=10, n=300, d=4, k=6), 3, axis=0)
    model = RQGMM(RQGMMConfig(levels=3, codebook_size=8)).fit(values)
    codes = model.encode(values).codes.reshape(300, 3, 3)
    assert (codes == codes[:, :1]).all()


def test_shrinkage_and_floor_bound_the_variances():
    values = np.repeat(clouds(seed=11, n=60, d=3, k=4), 10, axis=0)  # ten copies each: singular without a bound
    free = fit_mixture(rows_of(values), 40, plain(max_iterations=10, regularisation=1e-12)).mixture
    floored = fit_mixture(rows_of(values), 40, plain(max_iterations=10, variance_floor=1e-2)).mixture
    shrunk = fit_mixture(rows_of(values), 40, plain(max_iterations=10, shrinkage=1e9)).mixture
    assert free.variance.min() < 1e-6
    assert floored.variance.min() >= 1e-2 * values.astype(np.float64).var(axis=0).mean() * (1 - 1e-9)
    assert (shrunk.variance - shrunk.variance[:1]).abs().max() < 1e-6


def test_annealed_responsibilities_sharpen_and_the_end_is_a_fixed_point_of_plain_em():
    values = clouds(seed=12, n=1500, d=8, k=10)
    options = plain(max_iterations=150, annealing="all", initialisation="random_points", tolerance=1e-9)
    found = fit_mixture(rows_of(values), 10, options)
    trace = found.report["log_likelihood_trace"]
    assert trace[5] < trace[-1]
    assert np.diff(trace[50:]).min() > -1e-9
    again = fit_mixture(rows_of(values), 10, plain(max_iterations=1), start=found.mixture)
    assert again.report["log_likelihood"] == pytest.approx(found.report["log_likelihood"], abs=1e-5)


def test_stepwise_em_reaches_the_likelihood_of_full_batches():
    values = clouds(seed=13, n=6000, d=6, k=12)
    full = fit_mixture(rows_of(values), 12, RQGMMConfig(max_iterations=50))
    stepwise = fit_mixture(rows_of(values), 12, RQGMMConfig(codebook_size=12, max_iterations=15, batch_rows=512))
    assert stepwise.report["iterations"] == 1
    assert stepwise.report["passes"] <= 15
    assert stepwise.report["log_likelihood"] > full.report["log_likelihood"] - 0.05


@pytest.mark.parametrize("emission", ["posterior", "nearest_mean"])
def test_emitted_code_is_the_best_by_the_rule(emission):
    values = clouds(seed=14, n=1500, d=6, k=12)
    config = RQGMMConfig(levels=1, codebook_size=12, emission=emission)
    model = RQGMM(config).fit(values)
    level = model.levels[0]
    assert isinstance(level, GaussianLevel)
    rows = torch.from_numpy(values).double()
    n, k = len(rows), 12
    everyone = torch.arange(n).repeat_interleave(k), torch.arange(k).repeat(n)
    joint = level.mixture.log_joint(rows[everyone[0]], everyone[1]).reshape(n, k)
    distance = torch.cdist(rows, level.means.double())
    expected = joint.argmax(dim=1) if emission == "posterior" else distance.argmin(dim=1)
    found = model.encode(values, return_posterior=True, top_m=4)
    np.testing.assert_array_equal(found.codes[:, 0], expected.numpy())
    np.testing.assert_array_equal(found.alternatives[:, 0, 0], found.codes[:, 0])
    posterior = joint.softmax(dim=1)
    emitted = posterior.gather(1, expected[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.confidence[:, 0], emitted, atol=1e-4)
    np.testing.assert_allclose(level.log_likelihood(torch.from_numpy(values)), joint.logsumexp(dim=1), atol=1e-3)
    assert (np.diff(found.probability[:, 0], axis=1) <= 1e-6).all() or emission == "nearest_mean"


@pytest.mark.parametrize("initialisation", ["kmeans", "kmeans++", "random_points"])
def test_the_seed_decides_the_fit(initialisation):
    values = clouds(seed=15, n=500, d=4, k=8)

    def means(seed):
        options = RQGMMConfig(levels=1, codebook_size=8, max_iterations=3, initialisation=initialisation, seed=seed)
        return RQGMM(options).fit(values).arrays()["codebook.0"]

    np.testing.assert_array_equal(means(1), means(1))
    assert (means(1) != means(2)).any()
