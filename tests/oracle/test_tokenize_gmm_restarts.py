"""Several starts of a mixture: the likeliest fit is kept, and it is one that could have been made alone."""

from dataclasses import replace

import numpy as np
import pytest
from support.gmm_worlds import clouds, plain, rows_of

from recollect.tokenize.baseline_options import RQKMeansConfig
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.gmm_fit import fit_mixture
from recollect.tokenize.gmm_restarts import fit_best
from recollect.tokenize.quality import perplexity
from recollect.tokenize.rq_gmm import RQGMM

VALUES = clouds(seed=3, n=500, d=6, k=20)
OPTIONS = {"initialisation": "random_points", "max_iterations": 15, "reseed_rounds": 0, "seed": 6}


def test_the_likeliest_of_the_restarts_is_kept_bit_for_bit():
    config = RQGMMConfig(**OPTIONS, restarts=4)
    alone = [fit_mixture(rows_of(VALUES), 12, config, restart=restart) for restart in range(4)]
    likelihoods = [fit.report["log_likelihood"] for fit in alone]
    best = int(np.argmax(likelihoods))
    assert best not in (0, 3)  # neither the first nor the last one is right by accident
    found = fit_best(rows_of(VALUES), 12, config)
    assert found.report["restarts"] == likelihoods
    assert (found.report["kept"], found.report["log_likelihood"]) == (best, likelihoods[best])
    for name in ("means", "variance", "log_weight"):
        np.testing.assert_array_equal(getattr(found.mixture, name), getattr(alone[best].mixture, name))


def test_a_mixture_may_begin_as_often_as_k_means():
    assert RQGMMConfig().restarts == RQKMeansConfig().restarts


def test_further_restarts_leave_the_earlier_ones_as_they_were():
    few, many = (fit_best(rows_of(VALUES), 12, RQGMMConfig(**OPTIONS, restarts=n)).report for n in (2, 5))
    assert many["restarts"][:2] == few["restarts"]
    assert many["log_likelihood"] >= few["log_likelihood"]


def test_of_equally_likely_fits_the_first_is_kept():
    report = fit_best(rows_of(VALUES), 1, RQGMMConfig(**OPTIONS, restarts=3)).report
    assert report["restarts"] == [report["log_likelihood"]] * 3
    assert report["kept"] == 0


def test_given_means_are_fitted_once():
    start = [VALUES[:12]]
    config = RQGMMConfig(levels=1, codebook_size=12, initialisation="given", max_iterations=3, restarts=3)
    assert len(RQGMM(config, start=start).fit(VALUES).report.levels[0]["restarts"]) == 1


def test_annealing_alternate_anneals_every_second_restart():
    options = plain("tied_spherical", max_iterations=12, restarts=3, seed=2)
    found = fit_best(rows_of(VALUES), 12, replace(options, annealing="alternate")).report["restarts"]
    ways = [
        fit_mixture(rows_of(VALUES), 12, replace(options, annealing=way), restart=restart).report["log_likelihood"]
        for restart, way in enumerate(("none", "all", "none"))
    ]
    assert found == ways
    assert fit_mixture(rows_of(VALUES), 12, options, restart=1).report["log_likelihood"] != ways[1]


def test_annealing_auto_is_alternate_where_updates_see_all_rows():
    assert [RQGMMConfig().anneals(restart) for restart in range(4)] == [False, True, False, True]
    assert not any(RQGMMConfig(batch_rows=512).anneals(restart) for restart in range(4))


@pytest.mark.parametrize("seed", [0, 1])
def test_annealing_shares_codes_out_where_rows_of_uneven_length_trap_a_hard_start(seed):
    """Rows without clusters in many dimensions, as residuals are: means of few rows are far from every other row, so a
    hard start leaves most rows to the few means near the origin."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(1500, 128)) * np.exp(generator.normal(0, 0.2, size=(1500, 1)))
    found = {}
    for way in ("none", "all"):
        options = {"levels": 1, "codebook_size": 32, "covariance": "tied_spherical", "restarts": 1, "seed": seed}
        model = RQGMM(RQGMMConfig(**options, annealing=way)).fit(values.astype(np.float32))
        used = perplexity(model.encode(values.astype(np.float32)).codes[:, 0])
        found[way] = (used, model.report.levels[0]["relative_mse"])
    assert found["all"][0] > 1.3 * found["none"][0]
    assert found["all"][1] < found["none"][1]


@pytest.mark.parametrize("initialisation", ["kmeans", "kmeans++", "random_points"])
def test_every_restart_of_every_level_begins_elsewhere(initialisation):
    config = RQGMMConfig(levels=2, codebook_size=12, max_iterations=3, initialisation=initialisation)
    for level in RQGMM(config).fit(VALUES).report.levels:
        assert len(set(level["restarts"])) == 3
