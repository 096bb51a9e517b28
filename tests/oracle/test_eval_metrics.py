"""Ranking metrics: closed forms, worked tie examples, free-text lists."""

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.eval.metrics import (
    TIES,
    chance,
    hit_rate,
    lenient_positions,
    list_metrics,
    mrr,
    ndcg,
    rank_counts,
    ranking_metrics,
    strict_positions,
)
from recollect.rng import stream

CUTS = (1, 2, 3, 5, 8, 10, 20)


def brute_force(scores: np.ndarray, target: int, k: int) -> tuple[float, float, float]:
    """HR, NDCG and MRR at k averaged over every rank the target's ties allow."""
    others = np.delete(scores, target)
    first = int((others > scores[target]).sum()) + 1
    ranks = np.arange(first, first + int((others == scores[target]).sum()) + 1)
    inside = ranks <= k
    return (
        float(inside.mean()),
        float((inside / np.log2(ranks + 1)).mean()),
        float((inside / ranks).mean()),
    )


def test_uniform_ranker_of_ten_gets_the_closed_forms():
    expected = chance(10)
    assert expected["ranking/mrr"] == pytest.approx(0.292897, abs=5e-7)
    assert expected["ranking/ndcg@10"] == pytest.approx(0.454356, abs=5e-7)
    assert expected["ranking/ndcg@5"] == pytest.approx(0.294846, abs=5e-7)
    assert expected["ranking/hr@1"] == pytest.approx(0.1, abs=1e-15)


def test_worked_tie_example():
    greater, equal = np.array([8]), np.array([3])
    assert hit_rate(greater, equal, 10)[0] == 0.5
    assert ndcg(greater, equal, 10)[0] == pytest.approx(0.14752, abs=5e-6)


def test_constant_model_gets_k_over_n_wherever_the_target_stands():
    for target in (0, 4, 9):
        counts = rank_counts(np.zeros((1, 10)), np.array([target]))
        assert hit_rate(*counts, 5)[0] == 0.5
        assert ndcg(*counts, 5)[0] == pytest.approx(0.2948, abs=5e-5)


def test_metrics_equal_the_average_over_all_tied_ranks():
    generator = stream(1, "ties")
    scores = generator.integers(0, 4, size=(200, 12)).astype(float)
    target = generator.integers(12, size=200)
    greater, equal = rank_counts(scores, target)
    for k in CUTS:
        expected = np.array([brute_force(row, place, k) for row, place in zip(scores, target, strict=True)])
        got = np.stack([hit_rate(greater, equal, k), ndcg(greater, equal, k), mrr(greater, equal, k)], axis=1)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


def test_tie_options_settle_ties_first_last_and_by_position():
    scores, target = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]]), np.array([2])
    ranks = {tie: int(rank_counts(scores, target, tie=tie)[0][0]) + 1 for tie in TIES if tie != "expectation"}
    assert ranks == {"optimistic": 2, "pessimistic": 4, "index": 3}


def test_monotone_transform_and_constant_per_case_change_nothing():
    generator = stream(2, "monotone")
    scores = generator.normal(size=(50, 10))
    target = generator.integers(10, size=50)
    greater = rank_counts(scores, target)[0]
    for changed in (np.exp(scores), scores.argsort(axis=1).argsort(axis=1), scores + generator.normal(size=(50, 1))):
        np.testing.assert_array_equal(rank_counts(changed, target)[0], greater)


def test_permuting_candidates_with_the_target_changes_nothing():
    generator = stream(3, "permute")
    scores = generator.integers(0, 5, size=(50, 10)).astype(float)
    target = generator.integers(10, size=50)
    order = generator.permutation(10)
    moved = np.argsort(order)[target]
    for before, after in zip(rank_counts(scores, target), rank_counts(scores[:, order], moved), strict=True):
        np.testing.assert_array_equal(before, after)


def test_nan_score_is_refused_and_infinities_are_ranks():
    with pytest.raises(InputError, match="NaN scores, the first is case 1"):
        rank_counts(np.array([[0.0, 1.0], [np.nan, 1.0]]), np.array([0, 1]))
    greater, equal = rank_counts(np.array([[-np.inf, -np.inf, 0.0]]), np.array([0]))
    assert (greater[0], equal[0]) == (1, 1)


def test_target_outside_its_row_is_refused():
    with pytest.raises(InputError, match="target must be between 0 and 2"):
        rank_counts(np.zeros((1, 3)), np.array([3]))


def test_order_of_metrics_holds_for_one_relevant_item():
    generator = stream(4, "order")
    counts = rank_counts(generator.integers(0, 6, size=(300, 15)).astype(float), generator.integers(15, size=300))
    for k in CUTS:
        assert (mrr(*counts, k) <= ndcg(*counts, k) + 1e-12).all()
        assert (ndcg(*counts, k) <= hit_rate(*counts, k) + 1e-12).all()
        assert (hit_rate(*counts, k) <= hit_rate(*counts, k + 1) + 1e-12).all()


# Free-text lists


TITLES = ["Blue", "Kind of Blue", "Hounds of Love", "Remain in Light", "Low"]


def test_strict_list_is_a_permutation_and_keeps_printed_places():
    lines = ["1. Low", "2) An Invented Album", "- 'Blue'", "3. low"]
    position = strict_positions(lines, TITLES, stream(0, "list"))
    assert (position[4], position[0]) == (1, 3)
    assert sorted(position[[1, 2, 3]].tolist()) == [5, 6, 7]
    assert len(set(position.tolist())) == len(TITLES)


def test_missing_items_go_last_in_a_seeded_order():
    first = strict_positions(["Low"], TITLES, stream(0, "list"))
    assert first.tolist() == strict_positions(["Low"], TITLES, stream(0, "list")).tolist()
    orders = {tuple(strict_positions(["Low"], TITLES, stream(seed, "list")).tolist()) for seed in range(30)}
    assert len(orders) > 10


def test_invented_title_hits_only_for_the_lenient_scorer():
    lines = ["Kinds of Blues", "Low"]
    row = list_metrics(lines, TITLES, 1, stream(0, "list"))
    assert row["ranking/hr@1"] == 0.0
    assert row["ranking/hr@1~lenient"] == 1.0
    assert row["ranking/invalid_rate"] == 0.5


def test_ties_count_as_several_hits_for_the_lenient_scorer():
    assert lenient_positions(["Low", "Blue", "low"], "Low").tolist() == [1, 3]


def test_strict_never_exceeds_lenient():
    generator = stream(5, "lists")
    words = [*TITLES, "An Invented Album", "", "1. Low", "Hounds", "BLUE"]
    for case in range(300):
        lines = [words[i] for i in generator.integers(len(words), size=generator.integers(0, 8))]
        target = int(generator.integers(len(TITLES)))
        row = list_metrics(lines, TITLES, target, stream(case, "missing"))
        for name in ranking_metrics(np.zeros(1, dtype=int), np.zeros(1, dtype=int)):
            assert row[name] <= row[f"{name}~lenient"] + 1e-12, (name, lines, TITLES[target])


def test_a_full_list_in_order_is_ranked_as_printed():
    position = strict_positions([f"{i + 1}. {title}" for i, title in enumerate(TITLES)], TITLES, stream(0, "list"))
    assert position.tolist() == [1, 2, 3, 4, 5]
