"""Metrics equal ranx and pytrec_eval on tie-free scores; distances equal SciPy."""

import numpy as np
import pytest

from recollect.eval.distances import (
    area_under_curve_of_counts,
    common_support,
    jensen_shannon_bits,
    kolmogorov_smirnov,
    total_variation,
    wasserstein1,
)
from recollect.eval.metrics import hit_rate, mrr, ndcg, rank_counts
from recollect.rng import stream


@pytest.fixture(scope="module")
def cases() -> tuple[np.ndarray, np.ndarray]:
    generator = stream(11, "library-cases")
    return generator.normal(size=(60, 30)), generator.integers(30, size=60)


@pytest.fixture(scope="module")
def dictionaries(cases) -> tuple[dict, dict]:
    scores, target = cases
    qrels = {f"q{c}": {f"d{place}": 1} for c, place in enumerate(target)}
    run = {f"q{c}": {f"d{s}": float(value) for s, value in enumerate(row)} for c, row in enumerate(scores)}
    return qrels, run


def ours(cases, name: str) -> np.ndarray:
    counts = rank_counts(*cases)
    metric, _, cut = name.partition("@")
    function = {"hit_rate": hit_rate, "ndcg": ndcg, "mrr": mrr}[metric]
    return function(*counts, int(cut)) if cut else function(*counts)


@pytest.mark.parametrize("name", ["hit_rate@1", "hit_rate@5", "hit_rate@10", "ndcg@5", "ndcg@10", "mrr", "mrr@10"])
def test_metrics_equal_ranx(cases, dictionaries, name):
    ranx = pytest.importorskip("ranx")
    qrels, run = (kind(table) for kind, table in zip((ranx.Qrels, ranx.Run), dictionaries, strict=True))
    theirs = ranx.evaluate(qrels, run, name, return_mean=False)
    by_query = dict(zip(qrels.keys(), theirs, strict=True))
    expected = [by_query[f"q{c}"] for c in range(len(cases[1]))]
    np.testing.assert_allclose(ours(cases, name), expected, rtol=0, atol=1e-9)


def test_metrics_equal_pytrec_eval(cases, dictionaries):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {
        "success_1": "hit_rate@1",
        "success_5": "hit_rate@5",
        "success_10": "hit_rate@10",
        "ndcg_cut_5": "ndcg@5",
        "ndcg_cut_10": "ndcg@10",
        "recip_rank": "mrr",
    }
    evaluator = pytrec_eval.RelevanceEvaluator(dictionaries[0], {"success", "ndcg_cut", "recip_rank"})
    theirs = evaluator.evaluate(dictionaries[1])
    for their_name, our_name in names.items():
        expected = [theirs[f"q{c}"][their_name] for c in range(len(cases[1]))]
        np.testing.assert_allclose(ours(cases, our_name), expected, rtol=0, atol=1e-9, err_msg=their_name)


def test_distances_equal_scipy():
    from scipy import stats
    from scipy.spatial.distance import cityblock, jensenshannon

    generator = stream(12, "distances")
    for _ in range(50):
        p, q = generator.dirichlet(np.full(7, 0.4), size=2)
        p[generator.integers(7)] = 0.0
        p /= p.sum()
        assert total_variation(p, q) == pytest.approx(cityblock(p, q) / 2, abs=1e-12)
        assert jensen_shannon_bits(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)
        a = generator.normal(size=generator.integers(1, 40)).round(1)
        b = generator.normal(0.3, 2.0, size=generator.integers(1, 40)).round(1)
        weight_a, weight_b = generator.random(len(a)) + 0.1, generator.random(len(b)) + 0.1
        assert wasserstein1(a, b) == pytest.approx(stats.wasserstein_distance(a, b), abs=1e-12)
        assert wasserstein1(a, b, weight_a, weight_b) == pytest.approx(
            stats.wasserstein_distance(a, b, weight_a, weight_b), abs=1e-12
        )
        assert kolmogorov_smirnov(a, b) == pytest.approx(stats.ks_2samp(a, b).statistic, abs=1e-12)


def test_distances_of_a_distribution_from_itself_are_zero_and_of_disjoint_ones_largest():
    p, q = np.array([1.0, 3.0, 0.0, 0.0]), np.array([0.0, 0.0, 2.0, 2.0])
    assert total_variation(p, p) == jensen_shannon_bits(p, p) == wasserstein1([1, 2], [2, 1]) == 0.0
    assert total_variation(p, q) == pytest.approx(1.0)
    assert jensen_shannon_bits(p, q) == pytest.approx(1.0)


def test_area_under_curve_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = stream(13, "auc")
    score = generator.integers(0, 9, size=200)
    truth = generator.random(200) < 0.3
    support, positive, negative = common_support(score[truth], score[~truth])
    area = area_under_curve_of_counts(
        np.bincount(positive, minlength=len(support)), np.bincount(negative, minlength=len(support))
    )
    assert area == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
