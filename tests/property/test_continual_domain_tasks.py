"""How a log becomes a stream of tasks: every training event is predicted once, nothing held out is ever read."""

import datetime
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.domain_worlds import DAY, START, make_log, random_log, titles_of

from recollect.continual.domain_tasks import cut_stream
from recollect.errors import InputError

KINDS = st.sampled_from([None, "month", "quarter", "3"])


def cut_all(dataset, period, **more):
    """Tasks with the item of every event translated back to the data set's numbers."""
    names = None
    while True:  # parts too small for a row or a test are left out, as the error says
        try:
            return cut_stream(dataset, period=period, tasks=names or (), **more)
        except InputError as error:
            if "has no " not in str(error) or "tasks" not in str(error):
                raise
            lost = str(error).split("'")[1]
            names = [name for name in (names or part_names(dataset, period)) if name != lost]


def part_names(dataset, period):
    with pytest.raises(InputError) as refused:
        cut_stream(dataset, period=period, tasks=["no such task"])
    return str(refused.value).split("known: ")[1].split(", ")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), period=KINDS, holdout=st.sampled_from(["last", "time"]), length=st.integers(1, 9))
def test_every_training_event_is_predicted_once_and_nothing_held_out_is_read(seed, period, holdout, length):
    dataset = random_log(seed, unique_items=True)
    found = cut_all(dataset, period, holdout=holdout, max_history=length)
    log = dataset.interactions
    row_of = {int(item): row for row, item in enumerate(log.item)}
    held = {row_of[int(found.items[case.target])] for task in found.tasks for case in task.cases}
    predicted = Counter()
    for task in found.tasks:
        assert set(task.catalogue.tolist()) >= {case.target for case in task.cases}
        for row in task.rows:
            rows = [row_of[int(item)] for item in found.items[row.items]]
            assert rows == sorted(rows)
            assert len({int(log.user[at]) for at in rows}) == 1
            assert not set(rows) & held
            assert 2 <= len(rows) <= length + 1
            predicted.update(rows[row.first_target :])
            assert set(task.catalogue.tolist()) >= set(row.items.tolist())
        assert sum(len(row.items) - row.first_target for row in task.rows) == task.facts.targets
    assert not predicted or max(predicted.values()) == 1
    if holdout == "last" and period is None:
        for number, domain in enumerate(dataset.domains):
            for user in range(dataset.n_users):
                own = np.flatnonzero((log.user == user) & (log.domain == number))
                tested = [row for row in own.tolist() if row in held]
                if domain in [task.name for task in found.tasks]:
                    assert tested == (own[-1:].tolist() if len(own) > 2 else [])
                    learnt = [row for row in own.tolist() if row not in tested]
                    assert [row for row in own.tolist() if predicted[row]] == learnt[1:]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), period=st.sampled_from(["month", "4"]))
def test_histories_are_what_the_user_did_before_and_catalogues_hold_no_later_item(seed, period):
    dataset = random_log(seed, unique_items=True)
    found = cut_all(dataset, period)
    log = dataset.interactions
    row_of = {int(item): row for row, item in enumerate(log.item)}
    for task in found.tasks:
        targets = [row_of[int(found.items[case.target])] for case in task.cases]
        last = max(int(log.time[row_of[int(item)]]) for item in found.items[task.catalogue])
        assert last >= max(int(log.time[row]) for row in targets)
        for case, row in zip(task.cases, targets, strict=True):
            before = np.flatnonzero((log.user == log.user[row]) & (np.arange(len(log)) < row))
            assert [row_of[int(item)] for item in found.items[case.history]] == before.tolist()
            assert case.answer == f"i{int(log.item[row])}"


def test_holding_out_by_time_learns_nothing_later_than_a_test():
    dataset = random_log(3, n_users=6, n_events=300, unique_items=True)
    found = cut_stream(dataset, period="quarter", holdout="time")
    log = dataset.interactions
    row_of = {int(item): row for row, item in enumerate(log.item)}
    for task in found.tasks:
        targets = [int(log.time[row_of[int(found.items[case.target])]]) for case in task.cases]
        learnt = [
            int(log.time[row_of[int(item)]]) for row in task.rows for item in found.items[row.items[row.first_target :]]
        ]
        assert max(learnt) <= min(targets)
        assert task.facts.later_training == 0
        assert len({case.user for case in task.cases}) == len(task.cases)
    assert any(task.facts.later_training for task in cut_stream(dataset, period="quarter").tasks)


def test_months_and_quarters_are_those_of_the_calendar_in_utc():
    times = [
        datetime.datetime(*when, tzinfo=datetime.UTC) for when in ((2023, 12, 31, 23, 59, 59), (2024, 1, 1, 0, 0, 0))
    ]
    seconds = [int(time.timestamp()) for time in times]
    user, item, time = [], [], []
    for who in range(2):
        for second in (seconds[0] - 2, seconds[0] - 1, seconds[0], seconds[1], seconds[1] + 1, seconds[1] + 2):
            user.append(who)
            item.append(len(item) % 7)
            time.append(second)
    dataset = make_log(user, item, time, titles=titles_of(7))
    months = cut_stream(dataset, period="month")
    assert [task.name for task in months.tasks] == ["2023-12", "2024-01"]
    assert [task.facts.events for task in months.tasks] == [6, 6]
    assert [task.name for task in cut_stream(dataset, period="quarter").tasks] == ["2023-q4", "2024-q1"]
    # The second month's rows begin with what was learnt in the first: its held-out third event is not among it.
    for row in months.tasks[1].rows:
        assert row.n_context == 2
        assert len(row.items) == 4


def test_slices_are_of_equal_time():
    user = [0, 0, 0, 0, 0, 0, 0, 0]
    time = [START + day * DAY for day in (0, 1, 2, 3, 96, 97, 98, 99)]
    dataset = make_log(user, list(range(8)), time, titles=titles_of(8))
    assert [task.facts.events for task in cut_stream(dataset, period="2").tasks] == [4, 4]
    found = cut_stream(dataset, period="10")
    assert [task.name for task in found.tasks] == ["slice-1", "slice-10"]  # a slice without events is no task


def test_a_smaller_draw_of_rows_and_cases_is_part_of_a_larger_one():
    dataset = random_log(5, n_users=20, n_events=400)
    small = cut_stream(dataset, train_rows=5, test_cases=4, seed=1)
    large = cut_stream(dataset, train_rows=9, test_cases=8, seed=1)
    for one, other in zip(small.tasks, large.tasks, strict=True):
        assert (len(one.rows), len(one.cases)) == (5, 4)
        texts = [row.items.tolist() for row in other.rows]
        assert all(row.items.tolist() in texts for row in one.rows)
        assert {case.user for case in one.cases} <= {case.user for case in other.cases}
    moved = cut_stream(dataset, train_rows=5, test_cases=4, seed=2)
    assert [case.user for case in moved.tasks[0].cases] != [case.user for case in small.tasks[0].cases]


@pytest.mark.parametrize("period", [None, "quarter"])
def test_the_order_of_tasks_changes_no_task(period):
    dataset = random_log(7, n_users=20, n_events=400)
    forward = cut_stream(dataset, period=period)
    names = [task.name for task in forward.tasks]
    backward = cut_stream(dataset, period=period, tasks=names[::-1])
    for one, other in zip(forward.tasks, reversed(backward.tasks), strict=True):
        assert one.name == other.name
        assert np.array_equal(forward.items[one.catalogue], backward.items[other.catalogue])
        assert [case.answer for case in one.cases] == [case.answer for case in other.cases]
        pairs = zip(one.rows, other.rows, strict=True)
        assert all(np.array_equal(forward.items[a.items], backward.items[b.items]) for a, b in pairs)
