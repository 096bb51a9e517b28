"""Bounds, orders and worked examples that a wrong evaluator fails."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.ranking_worlds import FixedScores, MostPopular, log_dataset, random_world

from recollect.data import global_temporal, leave_one_out
from recollect.data.examples import held_out_cases
from recollect.eval.class_calibration import (
    calibration_columns,
    category_classes,
    miscalibration,
    popularity_classes,
    smoothed_kl,
)
from recollect.eval.list_metrics import (
    coverage,
    entropy,
    gini,
    intra_list_distance,
    list_columns,
    list_totals,
    novelty,
    with_list_metrics,
)
from recollect.eval.parity import augmented_popularity, recbole_totals
from recollect.eval.popularity import (
    exposure_by_group,
    head_items,
    log_popularity,
    log_popularity_difference,
    relative_spread,
)
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.setting import MASKS
from recollect.eval.topk import top_items
from recollect.eval.user_groups import head_share_groups
from recollect.rng import stream

KS = (1, 2, 3, 5, 8, 13, 21)


@given(
    scores=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 400)),
        elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 7.0]) | st.floats(-5, 5, width=32),
    ),
    k=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_top_items_equal_a_full_stable_sort(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.where(np.isneginf(np.take_along_axis(scores, order, axis=1)), -1, order)
    expected = np.full((len(scores), k), -1)
    expected[:, : kept.shape[1]] = kept
    np.testing.assert_array_equal(top_items(scores, k), expected)


@pytest.mark.parametrize("target", ["last", "all"])
def test_metrics_grow_with_the_cut_off_and_keep_their_order(target):
    world = random_world(2)
    split = leave_one_out(world) if target == "last" else global_temporal(world, 0.7, target)
    scores = stream(1, "order").integers(0, 9, size=(len(split.test_row), world.n_items)).astype(np.float32)
    table = evaluate_ranker(FixedScores(scores), world, split, ks=KS)
    growing = ("hr", "ndcg", "mrr") if target == "last" else ("hr", "recall", "map")
    for small, large in itertools.pairwise(KS):
        for name in growing:
            assert (table.column(f"{name}@{small}") <= table.column(f"{name}@{large}") + 1e-12).all(), name
    for k in KS:
        if target == "last":
            assert (table.column(f"mrr@{k}") <= table.column(f"ndcg@{k}") + 1e-12).all()
            assert (table.column(f"ndcg@{k}") <= table.column(f"hr@{k}") + 1e-12).all()
        assert all(
            (table.column(name) >= 0).all() and (table.column(name) <= 1 + 1e-12).all() for name in table.metrics
        )
    shares = [list_totals(table, world, split, k=k, resamples=0)[f"coverage@{k}"]["value"] for k in KS]
    assert shares == sorted(shares)


@pytest.mark.parametrize("mask", MASKS)
def test_a_constant_model_gets_the_closed_form(mask):
    world = random_world(3)
    split = leave_one_out(world)
    table = evaluate_ranker(FixedScores(np.zeros((len(split.test_row), world.n_items))), world, split, mask=mask)
    cases = held_out_cases(world, split, "test", "train" if mask == "train" else "train+val")
    for case, (history, target) in enumerate(zip(cases.histories(), cases.target, strict=True)):
        n = world.n_items if mask == "none" else world.n_items - len(set(history.tolist()) - {int(target)})
        assert table.column("hr@10")[case] == pytest.approx(10 / n, abs=1e-12)
        assert table.column("ndcg@10")[case] == pytest.approx((1 / np.log2(np.arange(2, 12))).sum() / n, abs=1e-12)


def test_a_target_that_recurs_in_the_history_is_not_masked():
    user = np.repeat([0, 1], 5)
    item = [0, 1, 2, 3, 1, 4, 0, 2, 1, 3]  # user 0 returns to item 1
    world = log_dataset(user, item, np.arange(10))
    split = leave_one_out(world)
    scores = np.tile(np.array([5.0, 4.0, 3.0, 2.0, 1.0], dtype=np.float32), (2, 1))
    # Under "train" the validation item (1 for the second user) may still be recommended.
    for mask, above in (("history", [0, 0]), ("train", [0, 1])):
        table = evaluate_ranker(FixedScores(scores), world, split, mask=mask, ks=(1,))
        assert table.greater.tolist() == above, mask
        assert table.lists[0, 0] == 1
    unmasked = evaluate_ranker(FixedScores(scores), world, split, mask="none", ks=(1, 5))
    assert unmasked.greater.tolist() == [1, 3]


def test_masked_items_and_items_outside_the_log_are_never_listed():
    world = random_world(4)
    log = world.interactions
    wider = log_dataset(log.user, log.item, log.time, world.n_items + 5)
    split = leave_one_out(wider)
    scores = stream(2, "wide").normal(size=(len(split.test_row), wider.n_items)).astype(np.float32)
    scores[:, world.n_items :] = 99.0
    table = evaluate_ranker(FixedScores(scores), wider, split, ks=(5,), list_length=wider.n_items)
    narrow = evaluate_ranker(FixedScores(scores[:, : world.n_items]), world, leave_one_out(world), ks=(5,))
    np.testing.assert_array_equal(table.column("ndcg@5"), narrow.column("ndcg@5"))
    cases = held_out_cases(wider, split)
    for history, target, listed in zip(cases.histories(), cases.target, table.lists, strict=True):
        shown = set(listed[listed >= 0].tolist())
        assert shown == set(range(world.n_items)) - (set(history.tolist()) - {int(target)})


def test_a_leaking_fit_is_found_and_a_temporal_one_is_clean():
    world = random_world(5)
    clean, leaky = global_temporal(world, 0.7), leave_one_out(world)
    scores = stream(3, "leak").normal(size=(max(len(clean.test_row), len(leaky.test_row)), world.n_items))
    honest = evaluate_ranker(FixedScores(scores), world, clean).leak
    assert honest is not None
    assert honest.leaking_cases == 0
    peeking = evaluate_ranker(FixedScores(scores), world, clean, rows=np.ones(len(world.interactions), dtype=bool)).leak
    assert peeking is not None
    assert peeking.leaking_cases == peeking.n_cases > 0
    late = evaluate_ranker(FixedScores(scores), world, leaky).leak
    assert late is not None
    assert late.leaking_cases > 0
    assert late.future_share is not None
    assert late.future_share > 0
    known = evaluate_ranker(MostPopular(world, clean.train), world, clean, ks=(1,)).leak
    assert known is not None
    assert known.future_share == 0.0


# Lists


def test_gini_entropy_and_coverage_worked_examples():
    assert gini(np.array([0, 0, 0, 10])) == pytest.approx(0.75)
    assert gini(np.full(7, 3)) == pytest.approx(0.0)
    assert gini(np.r_[np.zeros(99), 5]) == pytest.approx(1 - 1 / 100)
    assert math.isnan(gini(np.zeros(4)))
    assert entropy(np.full(8, 2)) == pytest.approx(math.log(8))
    assert entropy(np.array([0, 0, 5])) == 0.0
    assert coverage(np.array([0, 2, 1, 0])) == 0.5


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_gini_and_entropy_stay_in_their_bounds(counts):
    counts = np.array(counts)
    assert -1e-12 <= gini(counts) <= 1 - 1 / len(counts) + 1e-12
    assert -1e-12 <= entropy(counts) <= math.log(len(counts)) + 1e-12


def test_rank_miscalibration_worked_examples_and_bounds():
    p = np.array([0.6, 0.4])
    assert miscalibration(p, np.array([1.0, 0.0])) == pytest.approx(0.333968, abs=5e-7)
    assert miscalibration(p, np.array([0.5, 0.5])) == pytest.approx(0.004286, abs=5e-7)
    assert smoothed_kl(p, np.zeros(2)) == pytest.approx(math.log(100), abs=1e-12)
    assert miscalibration(p, p) == 0.0
    assert miscalibration(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    generator = stream(4, "dirichlet")
    p, q = generator.dirichlet(np.full(6, 0.3), size=(2, 500))
    found = miscalibration(p, q)
    assert ((found >= 0) & (found <= 1)).all()


def profile_world(histories: list[list[int]], n_items: int, categories=None):
    """One case per user whose history is given; the test item is the last one of the catalogue."""
    lengths = [len(history) + 1 for history in histories]
    item = np.concatenate([[*history, n_items - 1] for history in histories])
    world = log_dataset(
        np.repeat(np.arange(len(histories)), lengths), item, np.arange(len(item)), n_items, categories=categories
    )
    return world, held_out_cases(world, leave_one_out(world))


def test_calibration_of_a_list_like_the_profile_is_zero_and_an_empty_list_is_the_worst():
    categories = [("a",), ("b",), ("a", "b"), (), ("a",)]
    world, cases = profile_world([[0, 1], [0, 0], [3, 3], [0, 1]], 5, categories)
    classes, names = category_classes(world.catalog)
    assert names == ("a", "b")
    np.testing.assert_array_equal(classes[2], [0.5, 0.5])
    lists = np.array([[0, 1], [1, 1], [0, 1], [-1, -1]])
    found = calibration_columns(lists, cases, classes)
    np.testing.assert_allclose(found["kl"], [0.0, math.log(100), 0.0, math.log(100)], atol=1e-12)
    np.testing.assert_allclose(found["js"], [0.0, 1.0, 0.0, 1.0], atol=1e-12)
    first_place = float(miscalibration(np.array([0.5, 0.5]), np.array([1.0, 0.0])))
    np.testing.assert_allclose(found["mrmc"], [first_place / 2, 1.0, 0.0, 1.0], atol=1e-12)
    weighted = calibration_columns(lists, cases, classes, rank_weights=np.array([3.0, 1.0]))
    assert weighted["kl"][0] == pytest.approx(float(smoothed_kl(np.array([0.5, 0.5]), np.array([0.75, 0.25]))))


def test_log_popularity_difference_meets_its_desiderata():
    popularity = np.array([1, 2, 10, 100, 1000, 1001, 3, 50])
    forward = [[0, 2], [3, 4], [1, 1]]
    world, cases = profile_world(forward, 8)
    lists = np.array([[3, 4], [0, 2], [1, 1]])
    found = log_popularity_difference(lists, cases, popularity)
    _, swapped_cases = profile_world(lists.tolist(), 8)
    swapped = log_popularity_difference(np.array(forward), swapped_cases, popularity)
    np.testing.assert_allclose(found, -swapped, atol=1e-12)
    assert found[2] == pytest.approx(0.0, abs=1e-12)
    assert found[0] == pytest.approx((math.log(100 * 1000) - math.log(1 * 10)) / 2)
    np.testing.assert_array_equal(log_popularity(np.array([0, 1, 7])), [0.0, 0.0, math.log(7)])
    tail_step = math.log(2) - math.log(1)
    head_step = math.log(1001) - math.log(1000)
    assert tail_step > 100 * head_step
    assert log_popularity_difference(np.full((3, 2), -1), cases, popularity).tolist() == [0.0, 0.0, 0.0]
    assert world.n_items == 8


def test_head_conventions_on_a_small_catalogue():
    popularity = np.array([1, 50, 3, 3, 1, 0, 0, 0, 0, 42])
    assert np.flatnonzero(head_items(popularity, "items20")).tolist() == [1, 9]
    assert np.flatnonzero(head_items(popularity, "mass80")).tolist() == [1, 9]
    assert head_items(np.ones(5), "items20").sum() == 1
    assert head_items(np.ones(11), "items20").sum() == 3
    assert head_items(np.ones(10), "mass80").sum() == 8
    among = np.zeros(10, dtype=bool)
    among[:5] = True
    assert np.flatnonzero(head_items(popularity, "items20", among)).tolist() == [1]
    np.testing.assert_array_equal(popularity_classes(popularity, (0.2,))[:, 0] == 1, head_items(popularity, "items20"))


def test_items_without_an_event_move_no_head():
    """An item nobody has touched is no candidate, so it makes no head larger."""
    sequences = [(user, item) for user in range(6) for item in (user % 5, (user + 1) % 5, 0)]
    user, item = np.array(sequences).T
    found = []
    for n_items in (5, 11):
        world = log_dataset(user, item, np.arange(len(user)), n_items)
        split = leave_one_out(world)
        table = evaluate_ranker(FixedScores(np.tile(np.arange(n_items, 0.0, -1.0), (6, 1))), world, split)
        columns = list_columns(table, world, split, k=2)
        found.append((columns["mrmc@2:head/tail"], columns["tail_share@2:items20"]))
        found[-1] += (head_share_groups(world, split.train).code,)
    for few, many in zip(*found, strict=True):
        np.testing.assert_array_equal(few, many)


def test_group_exposure_equals_counting_pairs():
    world = random_world(6)
    split = leave_one_out(world)
    cases = held_out_cases(world, split)
    generator = stream(5, "exposure")
    lists = np.array([generator.choice(world.n_items, 6, replace=False) for _ in range(len(cases))])
    group = generator.integers(0, 2, size=world.n_items)
    shown, possible, right, relevant = np.zeros((4, 2))
    for history, target, row in zip(cases.histories(), cases.target, lists, strict=True):
        for item in set(range(world.n_items)) - set(history.tolist()):
            possible[group[item]] += 1
            shown[group[item]] += item in row
            relevant[group[item]] += item == target
            right[group[item]] += item == target and item in row
    np.testing.assert_allclose(exposure_by_group(lists, cases, group), shown / possible, atol=1e-12)
    found = exposure_by_group(lists, cases, group, target=cases.target, target_case=np.arange(len(cases)))
    np.testing.assert_allclose(found, right / relevant, atol=1e-12)
    assert relative_spread(np.array([0.2, 0.2])) == 0.0
    assert relative_spread(np.array([0.4, 0.0])) == 1.0
    assert math.isnan(relative_spread(np.zeros(2)))


def test_intra_list_distance_and_novelty_equal_their_definition():
    generator = stream(6, "vectors")
    vectors = generator.normal(size=(12, 4))
    lists = np.array([[0, 3, 7, 9], [1, 2, -1, -1], [5, -1, -1, -1]])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - unit[a] @ unit[b] for a in lists[0] for b in lists[0] if a < b]
    found = intra_list_distance(lists, vectors)
    np.testing.assert_allclose(found, [np.mean(pairs), 1 - unit[1] @ unit[2], 0.0], atol=1e-12)
    popularity = np.array([1, 2, 4, 8, 0, 1, 1, 1, 1, 1, 1, 1])
    bits = novelty(np.array([[0, 1, 2, 3], [4, -1, -1, -1]]), popularity, 8)
    np.testing.assert_allclose(bits, [np.mean([3, 2, 1, 0]), 3.0], atol=1e-12)


def test_list_columns_join_the_table_and_name_their_convention():
    world = random_world(7)
    split = leave_one_out(world)
    table = evaluate_ranker(MostPopular(world, split.train), world, split, ks=(5, 10))
    classes = {"popularity": popularity_classes(table.popularity)}
    embeddings = {"random": stream(7, "embedding").normal(size=(world.n_items, 3))}
    table, totals = with_list_metrics(
        table, world, split, ks=(5, 10), classes=classes, embeddings=embeddings, resamples=100
    )
    for name in ("tail_share@5:items20", "tail_share@10:mass80", "mrmc@10:popularity", "ild@5:random", "lpd@10"):
        assert np.isfinite(table.column(name)).all(), name
    assert table.aggregate(["arp@10"], resamples=50)["arp@10"]["ci95"][0] is not None
    lift = totals["dgap@10"]
    assert lift["ci95"][0] < lift["value"] == pytest.approx(table.mean("arp@10") / table.mean("gap_profile") - 1)
    for name in ("coverage@5", "gini@5"):
        low, high = totals[name]["ci95"]
        assert 0 <= low <= totals[name]["value"] <= high <= 1, name
    assert None not in [bound for found in totals.values() for bound in found["ci95"]]


def test_recbole_parity_reproduces_its_peculiarities():
    user, item = np.repeat([0, 1, 2], 5), [0, 1, 2, 3, 4, 0, 1, 5, 2, 3, 0, 1, 1, 4, 5]
    world = log_dataset(user, item, np.arange(15), 8)
    split = leave_one_out(world)
    assert augmented_popularity(world, split.train).tolist() == [0, 4, 1, 0, 0, 1, 0, 0], "first events do not count"
    scores = np.tile(np.array([9, 1, 2, 8, 3, 4, 0, 0], dtype=np.float32), (3, 1))
    table = evaluate_ranker(FixedScores(scores), world, split, mask="none", ks=(2,))
    assert table.lists.tolist() == [[0, 3]] * 3
    found = recbole_totals(table, world, split, k=2, tail_ratio=0.5)
    assert found["coverage@2~recbole"] == round(2 / 9, 4), "the padding item counts"
    assert found["entropy@2~recbole"] == round(math.log(2) / 2, 4)
    assert found["gini@2~recbole"] == round(gini(np.array([0] * 7 + [3, 3])), 4)
    assert found["arp@2~recbole"] == 0.0
    assert found["tail_share@2~recbole"] == 0.0, "items without a training event are in no tail"
