"""Dense scores, ranked lists and streamed counts give the same table; relabelling and batching change nothing."""

import numpy as np
import pytest
from support.ranking_worlds import FixedScores, LastItemMarkov, log_dataset, random_world

from recollect.data import global_temporal, leave_one_out
from recollect.eval.list_metrics import with_list_metrics
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.ranking_inputs import StreamedCounts, evaluate_counts, evaluate_lists
from recollect.eval.setting import MASKS, evaluation_setting
from recollect.rng import stream

KS = (1, 3, 10)
SPLITS = {
    "leave-one-out": leave_one_out,
    "successive": lambda dataset: global_temporal(dataset, 0.7, "successive"),
    "all": lambda dataset: global_temporal(dataset, 0.7, "all"),
}


@pytest.fixture(scope="module")
def world():
    return random_world(1)


def some_scores(split, dataset, *, tied: bool) -> np.ndarray:
    shape = (len(split.test_row), dataset.n_items)
    generator = stream(5, "scores")
    return (generator.integers(0, 6, size=shape) if tied else generator.normal(size=shape)).astype(np.float32)


def assert_same(a, b, *, lists: bool = True) -> None:
    assert list(a.metrics) == list(b.metrics)
    for name in a.metrics:
        np.testing.assert_array_equal(a.metrics[name], b.metrics[name], err_msg=name)
    if lists:
        np.testing.assert_array_equal(a.lists, b.lists)


def streamed(scores, dataset, split, block: int, **options):
    setting = evaluation_setting(dataset, split, **options)
    parts = []
    for start in range(0, len(scores), 7):
        stop = min(start + 7, len(scores))
        where = setting.targets_of(start, stop)
        counts = StreamedCounts(setting, start, stop, scores[setting.target_case[where], setting.target[where]])
        for first in range(0, dataset.n_items, block):
            counts.add(scores[start:stop, first : first + block])
        parts.append(counts.result())
    greater, equal, lists = (np.concatenate(column) for column in zip(*parts, strict=True))
    return evaluate_counts(greater, equal, dataset, split, name="fixed", lists=lists, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rule", SPLITS)
@pytest.mark.parametrize("tied", [False, True])
def test_three_forms_of_input_agree_exactly(world, rule, mask, tied):
    split = SPLITS[rule](world)
    scores = some_scores(split, world, tied=tied)
    options = {"mask": mask, "ks": KS}
    dense = evaluate_ranker(FixedScores(scores), world, split, **options)
    assert_same(dense, streamed(scores, world, split, 13, **options))
    every = np.tile(np.arange(world.n_items), (len(scores), 1))
    assert_same(dense, evaluate_lists(every, world, split, name="fixed", scores=scores, **options))
    if not tied:
        order = np.argsort(-scores, axis=1)
        assert_same(dense, evaluate_lists(order, world, split, name="fixed", **options))
        short = evaluate_lists(order[:, :40], world, split, name="fixed", **options)
        for name in (name for name in dense.metrics if "@" in name):
            np.testing.assert_array_equal(short.metrics[name], dense.metrics[name], err_msg=name)


@pytest.mark.parametrize("tie", ["optimistic", "pessimistic", "index"])
def test_settled_ties_agree_between_dense_and_scored_lists(world, tie):
    split = leave_one_out(world)
    scores = some_scores(split, world, tied=True)
    dense = evaluate_ranker(FixedScores(scores), world, split, ks=KS, tie=tie)
    every = np.tile(np.arange(world.n_items), (len(scores), 1))
    assert_same(dense, evaluate_lists(every, world, split, name="fixed", scores=scores, ks=KS, tie=tie))
    if tie != "index":
        assert_same(dense, streamed(scores, world, split, 60, ks=KS, tie=tie))
    assert (dense.equal == 0).all()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_changes_nothing(world, batch_size):
    split = leave_one_out(world)
    scores = some_scores(split, world, tied=True)
    whole = evaluate_ranker(FixedScores(scores), world, split, ks=KS)
    assert_same(whole, evaluate_ranker(FixedScores(scores), world, split, ks=KS, batch_size=batch_size))


def test_the_model_is_shown_each_history_once_and_its_scores_are_left_alone(world):
    split = leave_one_out(world)
    scores = some_scores(split, world, tied=False)
    before, model = scores.copy(), FixedScores(scores)
    evaluate_ranker(model, world, split, batch_size=16)
    np.testing.assert_array_equal(scores, before)
    rows = split.test_row
    for history, row in zip(model.shown, rows, strict=True):
        start = np.searchsorted(world.interactions.user, world.interactions.user[row])
        np.testing.assert_array_equal(history, world.interactions.item[start:row])


def test_strictly_monotone_transforms_and_a_constant_per_case_change_nothing(world):
    split = leave_one_out(world)
    scores = some_scores(split, world, tied=True)
    plain = evaluate_ranker(FixedScores(scores), world, split, ks=KS)
    shift = stream(6, "shift").integers(-9, 9, size=(len(scores), 1))
    ranks = np.stack([np.unique(row, return_inverse=True)[1] for row in scores])
    for changed in (np.exp(scores), ranks, scores + shift):
        assert_same(plain, evaluate_ranker(FixedScores(changed.astype(np.float32)), world, split, ks=KS))


def test_permuting_item_ids_changes_no_accuracy_metric(world):
    split = leave_one_out(world)
    scores = some_scores(split, world, tied=True)
    plain = evaluate_ranker(FixedScores(scores), world, split, ks=KS)
    new_id = stream(7, "relabel").permutation(world.n_items)
    log = world.interactions
    moved_world = log_dataset(log.user, new_id[log.item], log.time, world.n_items)
    moved_scores = np.empty_like(scores)
    moved_scores[:, new_id] = scores
    moved = evaluate_ranker(FixedScores(moved_scores), moved_world, leave_one_out(moved_world), ks=KS)
    assert_same(plain, moved, lists=False)


def test_permuting_users_changes_no_aggregate(world):
    split = leave_one_out(world)
    log = world.interactions
    order = stream(8, "users").permutation(world.n_users)
    rows = np.concatenate([np.flatnonzero(log.user == user) for user in order])
    moved_world = log_dataset(np.argsort(order)[log.user[rows]], log.item[rows], log.time[rows], world.n_items)
    tables = []
    for dataset in (world, moved_world):
        own = leave_one_out(dataset)
        table = evaluate_ranker(LastItemMarkov(dataset, own.train), dataset, own, ks=KS)
        tables.append(with_list_metrics(table, dataset, own, ks=(3,), resamples=10))
    (plain, plain_totals), (moved, moved_totals) = tables
    assert len(plain) == len(split.test_row)
    for name in plain.metrics:
        assert plain.mean(name) == pytest.approx(moved.mean(name), abs=1e-12), name
    for name, found in plain_totals.items():
        assert found["value"] == pytest.approx(moved_totals[name]["value"], abs=1e-12), name


def test_cases_of_a_user_are_averaged_inside_the_user_first(world):
    split = SPLITS["successive"](world)
    table = evaluate_ranker(FixedScores(some_scores(split, world, tied=False)), world, split, ks=KS)
    column = table.column("hr@10")
    by_user = [column[table.user == user].mean() for user in np.unique(table.user)]
    assert table.mean("hr@10") == pytest.approx(np.mean(by_user), abs=1e-12)
    assert abs(column.mean() - np.mean(by_user)) > 1e-3
    found = table.aggregate(["hr@10"], resamples=200)["hr@10"]
    assert found["value"] == pytest.approx(np.mean(by_user), abs=1e-12)
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    assert found["n"] == len(table)
