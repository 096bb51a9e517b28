"""One level of EM against scikit-learn, a textbook loop, gradients and Lloyd's algorithm."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from support.gmm_worlds import COVARIANCES, clouds, log_densities, plain, rows_of, start_at, textbook_step

from recollect.tokenize.gmm import Mixture
from recollect.tokenize.gmm_fit import fit_mixture
from recollect.tokenize.rq_gmm import GaussianLevel


def sklearn_after(values: np.ndarray, start: Mixture, covariance: str, steps: int) -> GaussianMixture:
    precision = 1 / start.variance.numpy()
    model = GaussianMixture(
        len(start.means),
        covariance_type=covariance,
        reg_covar=0,
        tol=0,
        max_iter=steps,
        means_init=start.means.numpy(),
        precisions_init=precision if covariance == "diag" else precision[:, 0],
        weights_init=start.log_weight.exp().numpy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it did not converge
        return model.fit(values.astype(np.float64))


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
@pytest.mark.parametrize("steps", [1, 20])
def test_parameters_equal_scikit_learn_after_t_steps(covariance, steps):
    values = clouds(seed=1, n=1500, d=6, k=12)
    start = start_at(values, 9, covariance)
    theirs = sklearn_after(values, start, covariance, steps)

    ours = fit_mixture(rows_of(values), 9, plain(covariance, max_iterations=steps), start=start)

    assert ours.report["iterations"] == steps
    np.testing.assert_allclose(ours.mixture.means.numpy(), theirs.means_, atol=1e-8)
    variance = ours.mixture.variance.numpy()
    np.testing.assert_allclose(variance if covariance == "diag" else variance[:, 0], theirs.covariances_, atol=1e-8)
    np.testing.assert_allclose(ours.mixture.log_weight.exp().numpy(), theirs.weights_, atol=1e-8)
    assert ours.report["log_likelihood"] == pytest.approx(theirs.score(values.astype(np.float64)), abs=1e-8)


def test_one_step_too_few_is_told_apart_from_scikit_learn():
    values = clouds(seed=1, n=1500, d=6, k=12)
    start = start_at(values, 9, "diag")
    theirs = sklearn_after(values, start, "diag", 20)
    ours = fit_mixture(rows_of(values), 9, plain(max_iterations=19), start=start)
    assert np.abs(ours.mixture.means.numpy() - theirs.means_).max() > 1e-6


def test_float32_products_stay_close_to_scikit_learn():
    values = clouds(seed=2, n=3000, d=24, k=16)
    start = fit_mixture(rows_of(values), 16, plain(max_iterations=1)).mixture
    theirs = sklearn_after(values, start, "diag", 8)
    ours = fit_mixture(rows_of(values), 16, plain(max_iterations=8, precision="float32"), start=start)
    assert ours.report["precision"] == "float32"
    assert ours.report["log_likelihood"] == pytest.approx(theirs.score(values.astype(np.float64)), abs=1e-3)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_every_covariance_equals_a_textbook_loop(covariance):
    values = clouds(seed=3, n=200, d=3, k=5)
    start = start_at(values, 4, covariance)
    expected = start
    for _ in range(6):
        expected = textbook_step(torch.from_numpy(values).double(), expected, covariance)

    found = fit_mixture(rows_of(values), 4, plain(covariance, max_iterations=6), start=start).mixture

    for name in ("means", "variance", "log_weight"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_single_component_has_the_moments_of_the_data(covariance):
    values = clouds(seed=4, n=300, d=4, k=3)
    found = fit_mixture(rows_of(values), 1, plain(covariance, max_iterations=1)).mixture
    exact = values.astype(np.float64)
    variance = exact.var(axis=0) if "diag" in covariance else exact.var(axis=0).mean()
    np.testing.assert_allclose(found.means.numpy()[0], exact.mean(axis=0), atol=1e-10)
    np.testing.assert_allclose(np.broadcast_to(found.variance.numpy()[0], np.shape(variance) or (1,)), variance)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradient_of_the_likelihood_vanishes_at_convergence(covariance):
    values = clouds(seed=5, n=400, d=2, k=3, spread=4.0)
    fitted = fit_mixture(rows_of(values), 3, plain(covariance, max_iterations=600, seed=1)).mixture
    means = fitted.means.clone().requires_grad_()
    log_variance = fitted.variance.log().requires_grad_()
    logits = fitted.log_weight.clone().requires_grad_()

    mixture = Mixture(means, log_variance.exp(), logits.log_softmax(dim=0))
    log_densities(torch.from_numpy(values).double(), mixture).logsumexp(dim=1).mean().backward()

    for parameter in (means, log_variance, logits):
        assert parameter.grad.abs().max() < 1e-5


def test_small_equal_variance_and_weights_make_em_lloyds_algorithm():
    values = clouds(seed=6, n=1200, d=5, k=10)
    k = 8
    first = values[np.random.default_rng(0).choice(len(values), k, replace=False)].astype(np.float64)
    theirs = KMeans(k, init=first, n_init=1, algorithm="lloyd", tol=0, max_iter=200).fit(values.astype(np.float64))
    variance, weight = torch.full((1, 1), 1e-8, dtype=torch.float64), torch.full((k,), -np.log(k), dtype=torch.float64)
    options = plain("tied_spherical", max_iterations=1, precision="auto")

    means = torch.from_numpy(first)
    for _ in range(theirs.n_iter_):
        step = fit_mixture(rows_of(values), k, options, start=Mixture(means, variance, weight))
        means = step.mixture.means

    np.testing.assert_allclose(means.numpy(), theirs.cluster_centers_, atol=1e-6)
    level = GaussianLevel(Mixture(means, variance, weight), options)
    codes = level.candidates(torch.from_numpy(values), 1)[0][:, 0].numpy()
    np.testing.assert_array_equal(codes, theirs.labels_)


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_shrinkage_mixes_in_so_many_points_of_the_pooled_variance(covariance):
    values = clouds(seed=6, n=300, d=3, k=5)
    start = start_at(values, 4, covariance)
    rows = torch.from_numpy(values).double()
    mass = log_densities(rows, start).softmax(dim=1).sum(dim=0)[:, None]
    own = textbook_step(rows, start, covariance).variance
    pooled = (mass * own).sum(dim=0) / len(values)

    found = fit_mixture(rows_of(values), 4, plain(covariance, max_iterations=1, shrinkage=25.0), start=start).mixture

    torch.testing.assert_close(found.variance, (mass * own + 25 * pooled) / (mass + 25), rtol=1e-9, atol=1e-9)


def test_a_dead_component_begins_anew_at_the_least_likely_row_with_the_pooled_variance_and_the_weight_of_a_row():
    values = clouds(seed=7, n=120, d=3, k=4)
    start = start_at(values, 4, "diag")
    start.means[2] += 1e4  # nothing is near to it
    rows = torch.from_numpy(values).double()
    scores = log_densities(rows, start)
    gamma = scores.softmax(dim=1)
    alive, mass = [0, 1, 3], gamma.sum(dim=0)
    means, variance, weight = start.means.clone(), start.variance.clone(), mass / len(rows)
    for k in alive:
        means[k] = gamma[:, k] @ rows / mass[k]
        variance[k] = gamma[:, k] @ (rows - means[k]) ** 2 / mass[k]
    means[2] = rows[scores.logsumexp(dim=1).argmin()]
    variance[2] = mass[alive] @ variance[alive] / mass[alive].sum()
    weight[2] = 1 / len(rows)
    expected = textbook_step(rows, Mixture(means, variance, (weight / weight.sum()).log()), "diag")

    found = fit_mixture(rows_of(values), 4, plain(max_iterations=2, minimum_points=2.0), start=start)

    assert found.report["reseeded"] == [1]
    for name in ("means", "variance", "log_weight"):
        torch.testing.assert_close(getattr(found.mixture, name), getattr(expected, name), rtol=1e-7, atol=1e-7)


def test_stepwise_updates_mix_statistics_at_the_rate_of_cappe_and_moulines():
    values = clouds(seed=8, n=200, d=3, k=4)
    mixture = start_at(values, 4, "diag")
    rows = torch.from_numpy(values).double()
    weight = mixture.log_weight.exp()[:, None]
    kept = [weight, weight * mixture.means, weight * (mixture.variance + mixture.means**2)]
    for update in range(3):  # batches of all rows: an update a pass
        gamma = log_densities(rows, mixture).softmax(dim=1) / len(rows)
        seen = [gamma.sum(dim=0)[:, None], gamma.T @ rows, gamma.T @ rows**2]
        rate = (update + 2) ** -0.7
        kept = [(1 - rate) * old + rate * new for old, new in zip(kept, seen, strict=True)]
        means = kept[1] / kept[0]
        mixture = Mixture(means, kept[2] / kept[0] - means**2, (kept[0][:, 0] / kept[0].sum()).log())
    expected = textbook_step(rows, mixture, "diag")  # the fit ends with one full step

    start = start_at(values, 4, "diag")
    found = fit_mixture(rows_of(values), 4, plain(max_iterations=3, batch_rows=256), start=start)

    assert (found.report["passes"], found.report["iterations"]) == (3, 1)
    for name in ("means", "variance", "log_weight"):
        torch.testing.assert_close(getattr(found.mixture, name), getattr(expected, name), rtol=1e-7, atol=1e-7)
