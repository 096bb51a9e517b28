"""Splits, ties and the leak detector."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.data import (
    fingerprint,
    global_temporal,
    history_bounds,
    leak_check,
    leave_one_out,
    refit_mask,
    tie_shuffle,
    tied_event_share,
    tied_target_share,
)
from recollect.errors import ConfigError, DataError
from recollect.types import Catalog, Dataset, Interactions, Split, Users


def dataset_of(events, clock="unix"):
    events = sorted((user, time, row, item) for row, (user, item, time) in enumerate(events))
    user, time, row, item = (np.array(column, dtype=np.int64) for column in zip(*events, strict=True))
    n_users, n_items = int(user.max()) + 1, int(item.max()) + 1
    names = np.array([f"i{number}" for number in range(n_items)], dtype=object)
    catalog = Catalog(names, names, np.zeros(n_items, np.int16), ((),) * n_items, np.full(n_items, None, dtype=object))
    users = Users(np.array([f"u{number}" for number in range(n_users)], dtype=object))
    return Dataset("random", Interactions(user, item, time, row=row), catalog, users, ("things",), {"clock": clock})


EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 40)), min_size=12, max_size=80)


@settings(max_examples=80, deadline=None)
@given(events=EVENTS)
def test_leave_one_out_takes_the_last_two_events_of_users_with_three(events):
    dataset = dataset_of(events)
    split = leave_one_out(dataset)
    log = dataset.interactions
    expected_test, expected_valid = [], []
    for user in range(dataset.n_users):
        rows = np.flatnonzero(log.user == user)
        if len(rows) >= 3:
            expected_test.append(rows[-1])
            expected_valid.append(rows[-2])
    assert split.test_row.tolist() == expected_test
    assert split.valid_row.tolist() == expected_valid
    assert set(np.flatnonzero(~split.train)) == {*expected_test, *expected_valid}
    start, end = history_bounds(dataset, split)
    hidden_start, hidden_end = history_bounds(dataset, split, history="train")
    for case, row in enumerate(split.test_row):
        assert (log.user[start[case] : row] == log.user[row]).all()
        assert start[case] == 0 or log.user[start[case] - 1] != log.user[row]
        assert end[case] == row
        assert (hidden_start[case], hidden_end[case]) == (start[case], row - 1)
    assert np.flatnonzero(~refit_mask(dataset, split)).tolist() == expected_test


@settings(max_examples=80, deadline=None)
@given(events=EVENTS, target=st.sampled_from(["last", "first", "random", "successive", "all"]))
def test_global_temporal_split_never_leaks(events, target):
    dataset = dataset_of(events)
    try:
        split = global_temporal(dataset, 0.8, target)
    except DataError:
        return
    log = dataset.interactions
    assert log.time[split.train].max() <= split.t_cut_valid < split.t_cut
    assert (log.time[split.test_row] > split.t_cut).all()
    assert (log.time[split.valid_row] > split.t_cut_valid).all()
    assert (log.time[split.valid_end - 1] <= split.t_cut).all()
    known = np.unique(log.item[refit_mask(dataset, split)])
    recommended = np.tile(known[:3], (len(split.test_row), 1))
    report = leak_check(dataset, split, trained=refit_mask(dataset, split), recommended=recommended)
    assert report.leaking_cases == 0
    assert report.future_share in (0.0, None)
    start, end = history_bounds(dataset, split)
    assert (end > start).all()


def test_targets_of_the_global_split():
    # user 0 has events at 0..4 and 10, 11, 12; user 1 fills the past; user 2 is new and has no history
    events = [(0, time, time) for time in range(5)] + [(1, time, time) for time in range(5)]
    events += [(0, 5, 10), (0, 6, 11), (0, 7, 12), (2, 8, 12)]
    dataset = dataset_of(events)
    q = 10 / 14
    items = dataset.interactions.item
    cases = {target: global_temporal(dataset, q, target) for target in ("last", "first", "successive", "all")}
    assert items[cases["last"].test_row].tolist() == [7]
    assert items[cases["first"].test_row].tolist() == [5]
    assert items[cases["successive"].test_row].tolist() == [5, 6, 7]
    everything = cases["all"]
    assert items[everything.test_row[0] : everything.test_end[0]].tolist() == [5, 6, 7]
    drawn = {int(items[global_temporal(dataset, q, "random", seed).test_row[0]]) for seed in range(20)}
    assert drawn == {5, 6, 7}


def test_leak_detector_fires_on_a_leaking_split():
    dataset = dataset_of([(user, item, 100 * user + item) for user in range(3) for item in range(6)])
    honest = global_temporal(dataset, 0.6, "last")
    assert leak_check(dataset, honest).leaking_cases == 0
    leaking = Split(
        train=np.ones(len(dataset.interactions), dtype=bool),
        valid_row=honest.valid_row,
        test_row=honest.test_row,
        rule="leaking",
        t_cut=honest.t_cut,
    )
    assert leak_check(dataset, leaking).leaking_cases == len(honest.test_row) > 0
    # leave-one-out leaks by construction: the other users' later events are in train
    assert leak_check(dataset, leave_one_out(dataset)).leaking_cases == 2


def test_recommended_future_items_are_counted():
    dataset = dataset_of([(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 5), (1, 1, 6), (1, 3, 7)])
    split = leave_one_out(dataset)  # cuts: 2 for user 0, 7 for user 1
    recommended = np.array([[3, 0, -1], [3, 2, 1]])
    assert leak_check(dataset, split, recommended=recommended).future_share == pytest.approx(1 / 5)
    with pytest.raises(DataError, match="test cases"):
        leak_check(dataset, split, recommended=recommended[:1])


def test_tie_shares_count_equal_times_of_one_user():
    dataset = dataset_of([(0, 0, 1), (0, 1, 2), (0, 2, 2), (1, 0, 2), (1, 1, 3), (1, 2, 4)])
    assert tied_event_share(dataset) == pytest.approx(2 / 6)
    assert tied_target_share(dataset, leave_one_out(dataset)) == 0.5


@settings(max_examples=40, deadline=None)
@given(events=EVENTS, seed=st.integers(0, 5))
def test_tie_shuffle_permutes_inside_tied_groups_only(events, seed):
    dataset = dataset_of(events)
    shuffled = tie_shuffle(dataset, seed)
    before, after = dataset.interactions, shuffled.interactions
    assert (after.user == before.user).all()
    assert (after.time == before.time).all()
    assert (np.lexsort((after.row, after.time, after.user)) == np.arange(len(after))).all()
    pairs = [sorted(zip(log.user, log.time, log.item, strict=True)) for log in (before, after)]
    assert pairs[0] == pairs[1]
    assert (tie_shuffle(dataset, seed).interactions.item == after.item).all()
    assert fingerprint(shuffled) != fingerprint(dataset)


def test_tie_shuffle_reaches_every_order():
    dataset = dataset_of([(0, item, 7) for item in range(3)])
    orders = {tuple(tie_shuffle(dataset, seed).interactions.item) for seed in range(60)}
    assert len(orders) == 6


def test_a_log_without_a_clock_is_not_cut_in_time():
    dataset = dataset_of([(0, item, item) for item in range(10)], clock="position")
    with pytest.raises(ConfigError, match="no clock"):
        global_temporal(dataset)
    with pytest.raises(ConfigError, match="no clock"):
        tie_shuffle(dataset, 0)
    assert leak_check(dataset, leave_one_out(dataset)).leaking_cases is None


@pytest.mark.parametrize(("q", "target"), [(0.0, "last"), (1.0, "last"), (0.9, "middle")])
def test_illegal_split_options_are_refused(q, target):
    with pytest.raises(ConfigError):
        global_temporal(dataset_of([(0, item, item) for item in range(10)]), q, target)
