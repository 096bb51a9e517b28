"""One and several relevant items: equal to ranx and pytrec_eval without ties, and how all three differ on ties.

Every query and document has a name of three characters: ranx compiles anew for each length.
"""

import numpy as np
import pytest

from recollect.errors import ConfigError, InputError
from recollect.eval.case_table import next_item_metrics
from recollect.eval.metrics import hit_rate, mrr, ndcg, rank_counts
from recollect.eval.multi_relevance import several_relevant_metrics
from recollect.rng import stream

N_CASES, N_ITEMS, KS = 40, 30, (1, 5, 10)


def counts_of(scores: np.ndarray, relevant: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    case = np.repeat(np.arange(len(relevant)), [len(items) for items in relevant])
    return case, *rank_counts(scores[case], np.concatenate(relevant))


@pytest.fixture(scope="module")
def cases():
    generator = stream(21, "several-relevant")
    scores = generator.normal(size=(N_CASES, N_ITEMS))
    sizes = generator.integers(1, 12, size=N_CASES)
    relevant = [np.sort(generator.choice(N_ITEMS, size=size, replace=False)) for size in sizes]
    grades = [generator.integers(1, 5, size=size) for size in sizes]
    return scores, relevant, grades


@pytest.fixture(scope="module")
def run(cases) -> dict:
    return {f"q{c:02d}": {f"d{i:02d}": float(s) for i, s in enumerate(row)} for c, row in enumerate(cases[0])}


def qrels(cases, *, graded: bool) -> dict:
    _, relevant, grades = cases
    return {
        f"q{c:02d}": {f"d{item:02d}": int(grade) if graded else 1 for item, grade in zip(items, own, strict=True)}
        for c, (items, own) in enumerate(zip(relevant, grades, strict=True))
    }


@pytest.fixture(scope="module")
def ours(cases) -> dict[str, np.ndarray]:
    return several_relevant_metrics(*counts_of(*cases[:2]), KS, n_cases=N_CASES)


def graded(cases, **options) -> dict[str, np.ndarray]:
    scores, relevant, grades = cases
    grade = np.concatenate(grades)
    return several_relevant_metrics(*counts_of(scores, relevant), KS, n_cases=N_CASES, grade=grade, **options)


def test_several_relevant_items_equal_ranx(cases, run, ours):
    ranx = pytest.importorskip("ranx")
    table = ranx.Qrels(qrels(cases, graded=False))
    names = [*(f"{name}@{k}" for name in ("hit_rate", "recall", "precision", "ndcg", "map") for k in KS), "mrr"]
    theirs = ranx.evaluate(table, ranx.Run(run), names, return_mean=False)
    for name in names:
        our_name = name.replace("hit_rate", "hr")
        np.testing.assert_allclose(ours[our_name], theirs[name], rtol=0, atol=1e-9, err_msg=name)


def test_several_relevant_items_equal_pytrec_eval(cases, run, ours):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    wanted = {"success", "recall", "P", "ndcg_cut", "map_cut", "recip_rank"}
    measures = {f"{name}.{','.join(map(str, KS))}" if name != "recip_rank" else name for name in wanted}
    theirs = pytrec_eval.RelevanceEvaluator(qrels(cases, graded=False), measures).evaluate(run)
    names = {"success": "hr", "recall": "recall", "P": "precision", "ndcg_cut": "ndcg", "map_cut": "map"}
    pairs = {f"{their}_{k}": f"{our}@{k}" for their, our in names.items() for k in KS} | {"recip_rank": "mrr"}
    for their_name, our_name in pairs.items():
        expected = [theirs[query][their_name] for query in run]
        np.testing.assert_allclose(ours[our_name], expected, rtol=0, atol=1e-9, err_msg=their_name)


def test_graded_gain_equals_both_libraries(cases, run):
    ranx, pytrec_eval = pytest.importorskip("ranx"), pytest.importorskip("pytrec_eval")
    table = qrels(cases, graded=True)
    linear = graded(cases)
    of_trec = pytrec_eval.RelevanceEvaluator(table, {"ndcg_cut.5,10"}).evaluate(run)
    of_ranx = ranx.evaluate(ranx.Qrels(table), ranx.Run(run), "ndcg@10", return_mean=False)
    for k in (5, 10):
        np.testing.assert_allclose(linear[f"ndcg@{k}"], [of_trec[q][f"ndcg_cut_{k}"] for q in run], rtol=0, atol=1e-9)
    np.testing.assert_allclose(linear["ndcg@10"], of_ranx, rtol=0, atol=1e-9)


def test_exponential_gain_is_linear_gain_of_two_to_the_grade_minus_one(cases):
    scores, relevant, grades = cases
    powers = np.exp2(np.concatenate(grades)) - 1.0
    expected = several_relevant_metrics(*counts_of(scores, relevant), KS, n_cases=N_CASES, grade=powers)
    np.testing.assert_allclose(graded(cases, gain="exponential")["ndcg@10"], expected["ndcg@10"], rtol=0, atol=1e-12)
    assert (np.abs(expected["ndcg@10"] - graded(cases)["ndcg@10"]) > 1e-3).any()


def test_average_precision_has_the_two_published_denominators(cases, ours):
    sizes = np.array([len(items) for items in cases[1]])
    capped = several_relevant_metrics(*counts_of(*cases[:2]), KS, n_cases=N_CASES, map_denominator="min(relevant,k)")
    for k in KS:
        np.testing.assert_allclose(capped[f"map@{k}"] * np.minimum(sizes, k), ours[f"map@{k}"] * sizes, atol=1e-12)


def test_users_without_recommendations_count_zero_as_ranx_does_when_told_to(cases, run):
    ranx = pytest.importorskip("ranx")
    scores, relevant, _ = cases
    missing = {query: row for query, row in run.items() if query != "q03"}
    table = ranx.Qrels(qrels(cases, graded=False))
    with pytest.raises(Exception):  # noqa: B017, PT011 - the library's own assertion
        ranx.evaluate(table, ranx.Run(missing), "ndcg@10")
    theirs = ranx.evaluate(table, ranx.Run(missing), "ndcg@10", make_comparable=True)
    case, greater, equal = counts_of(scores, relevant)
    ours = several_relevant_metrics(case, greater, equal, KS, n_cases=N_CASES, listed=case != 3)
    assert ours["ndcg@10"].mean() == pytest.approx(theirs, abs=1e-9)
    assert all(column[3] == 0.0 for column in ours.values())


def test_constant_scores_show_how_the_libraries_break_ties():
    ranx, pytrec_eval = pytest.importorskip("ranx"), pytest.importorskip("pytrec_eval")
    places, discounted = (0, 4, 9), 1 / np.log2(6)
    table = {f"q{place:02d}": {f"d{place:02d}": 1} for place in places}
    constant = {query: {f"d{index:02d}": 1.0 for index in range(10)} for query in table}
    of_ranx = ranx.evaluate(ranx.Qrels(table), ranx.Run(constant), "ndcg@5", return_mean=False)
    np.testing.assert_allclose(of_ranx, [1.0, discounted, 0.0], atol=1e-12, err_msg="insertion order")
    of_trec = pytrec_eval.RelevanceEvaluator(table, {"ndcg_cut.5"}).evaluate(constant)
    assert [of_trec[query]["ndcg_cut_5"] for query in table] == [0.0, 0.0, 1.0], "document id descending"
    for place in places:
        ours = several_relevant_metrics(*counts_of(np.ones((1, 10)), [np.array([place])]), (5,), n_cases=1)
        assert ours["ndcg@5"][0] == pytest.approx(0.2948, abs=5e-5)
        assert ours["hr@5"][0] == 0.5


def test_tie_free_scores_equal_torchmetrics_and_its_ties_are_averaged_for_ndcg_alone():
    retrieval = pytest.importorskip("torchmetrics").retrieval
    torch = pytest.importorskip("torch")
    generator = stream(23, "torchmetrics")
    # Positive scores: its reciprocal rank takes a target with a score of 0 or less for irrelevant.
    scores, target = np.exp(generator.normal(size=(50, 30))), generator.integers(30, size=50)
    greater, equal = rank_counts(scores, target)
    ours = next_item_metrics(greater, equal, (1, 5, 10))
    relevant = torch.from_numpy(np.eye(30, dtype=np.int64)[target].ravel())
    query = torch.arange(50).repeat_interleave(30)

    def theirs(name, cut=None):
        metric = getattr(retrieval, f"Retrieval{name}")
        return float(metric(top_k=cut)(torch.from_numpy(scores.ravel()), relevant, indexes=query))

    for cut in (1, 5, 10):
        for metric, name in (("hr", "HitRate"), ("hr", "Recall"), ("ndcg", "NormalizedDCG"), ("mrr", "MRR")):
            assert theirs(name, cut) == pytest.approx(ours[f"{metric}@{cut}"].mean(), abs=1e-6), (name, cut)
    assert theirs("MRR") == pytest.approx(ours["mrr"].mean(), abs=1e-6)
    constant, first = torch.ones(10), torch.zeros(10, dtype=torch.int64)
    for place, hit in ((0, 1.0), (4, 1.0), (9, 0.0)):
        one = first.clone()
        one[place] = 1
        assert float(retrieval.RetrievalNormalizedDCG(top_k=5)(constant, one, indexes=first)) == pytest.approx(
            0.2948, abs=5e-5
        )
        assert float(retrieval.RetrievalHitRate(top_k=5)(constant, one, indexes=first)) == hit


def test_one_relevant_item_gives_the_metrics_of_next_item_cases():
    generator = stream(22, "one-relevant")
    scores, target = generator.integers(0, 5, size=(80, 20)).astype(float), generator.integers(20, size=80)
    greater, equal = rank_counts(scores, target)
    table = several_relevant_metrics(np.arange(80), greater, equal, KS, n_cases=80)
    for k in KS:
        for name in ("hr", "recall"):
            np.testing.assert_allclose(table[f"{name}@{k}"], hit_rate(greater, equal, k), atol=1e-12)
        np.testing.assert_allclose(table[f"ndcg@{k}"], ndcg(greater, equal, k), atol=1e-12)
        np.testing.assert_allclose(table[f"map@{k}"], mrr(greater, equal, k), atol=1e-12)
    np.testing.assert_allclose(table["mrr"], mrr(greater, equal), atol=1e-12)


def test_tied_metrics_are_the_average_over_random_orders_of_the_ties():
    generator = stream(23, "tied-orders")
    scores = generator.integers(0, 3, size=(6, 9)).astype(float)
    relevant = [np.sort(generator.choice(9, size=size, replace=False)) for size in (1, 2, 3, 4, 8, 9)]
    exact = several_relevant_metrics(*counts_of(scores, relevant), (1, 3, 5, 9), n_cases=6)
    draws = 5_000
    for case, items in enumerate(relevant):
        # Distinct noise below the smallest gap orders every tie at random, and then nothing is tied.
        broken = scores[case] + 0.5 * generator.random((draws, 9))
        sampled = several_relevant_metrics(*counts_of(broken, [items] * draws), (1, 3, 5, 9), n_cases=draws)
        for name, column in sampled.items():
            noise = 5 * column.std() / np.sqrt(draws) + 1e-9
            assert abs(column.mean() - exact[name][case]) < noise, (case, name)


def test_impossible_counts_and_options_are_refused():
    one = (np.zeros(1, dtype=int),) * 3
    with pytest.raises(InputError, match="1 have none"):
        several_relevant_metrics(*one, (5,), n_cases=2)
    two_in_one_place = (np.zeros(2, dtype=int), np.zeros(2, dtype=int), np.zeros(2, dtype=int))
    with pytest.raises(InputError, match="belong to no ranking"):
        several_relevant_metrics(*two_in_one_place, (5,), n_cases=1)
    with pytest.raises(ConfigError, match="gain must be"):
        several_relevant_metrics(*one, (5,), n_cases=1, gain="square")
    with pytest.raises(ConfigError, match="map_denominator must be"):
        several_relevant_metrics(*one, (5,), n_cases=1, map_denominator="k")
