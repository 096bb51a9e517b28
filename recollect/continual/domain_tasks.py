"""A stream of recommendation tasks from one interaction log: its domains one after another, or its months.

A task is a part of the log.  It holds training rows (stretches of users' histories; every position from the second on
predicts its item), one test case per held-out user (a history and the item to find) and a catalogue, all of which is
ranked.

    domains     the events of one domain; histories are of this domain alone; catalogue = items of the domain's events
    periods     the events of a month, a quarter or a slice of equal time (UTC); a history is all a user did before;
                catalogue = items whose first event in the log is not after the end of the period

Held out (`holdout`): "last" = each user's last event of the task, if the user has two training events before it
(leave-one-out without a validation event, since nothing is selected; other users' training events may be later than
a test).  "time" = per user the last event after the task's 0.9 quantile of time; nothing after it is learnt.

What was held out of a task is never learnt nor read in training, in this task or a later one; a test history may hold
held-out events of earlier periods, which lie in its past.
Source: trace_benchmark 6, 9; recsys_evaluation 3.3, 3.4; that tasks are domains or months is [our design].
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from recollect.continual.run_config import PERIODS
from recollect.data.splits import user_starts
from recollect.errors import ConfigError, DataError, UnknownName
from recollect.io import sha256_text
from recollect.rng import stream
from recollect.types import Dataset

Holdout = Literal["last", "time"]
TIME_CUT = 0.9  # share of a task's events up to the moment after which they are held out
LEAST_BEFORE = 2  # training events a user needs before the event that is held out


class TrainingRow(NamedTuple):
    """A stretch of one user's history, oldest first.

    items: (T,) int64.  n_context: how many of the first items are known from elsewhere; the others are new in this
    row, and all of these but a row's first item are predicted.
    """

    items: np.ndarray
    n_context: int

    @property
    def first_target(self) -> int:
        """Position of the first item that is predicted."""
        return max(1, self.n_context)


@dataclass(frozen=True)
class Case:
    """One test case. user: id.  history: (T,) int64 all the user did before, oldest first.  target: the item to find.

    item_ids: of the data set, for what is stored.
    """

    user: str
    history: np.ndarray
    target: int
    item_ids: np.ndarray

    @property
    def prompt_hash(self) -> str:
        """SHA-256 of the user and the history's item ids."""
        return sha256_text("\n".join([self.user, *map(str, self.item_ids[self.history])]))

    @property
    def answer(self) -> str:
        """Id of the item to find."""
        return str(self.item_ids[self.target])


@dataclass(frozen=True)
class DomainFacts:
    """What a task holds before rows and cases are drawn, and how many were drawn.

    events: of the log in this task.  held_out: events that training may not see.  targets: items that are predicted
    in an epoch of all rows.  new_items: of the catalogue, items that no earlier task's training held.  tied_tests: test
    events that share their time with the event before, whose order is arbitrary; None without a clock.
    repeated_tests: test items that the user's history holds.  later_training: test cases that are older than a
    training event of the task; None without a clock.
    """

    events: int
    users: int
    catalogue: int
    new_items: int
    rows: int
    targets: int
    cases: int
    held_out: int
    rows_used: int
    cases_used: int
    repeated_tests: int
    tied_tests: int | None
    later_training: int | None


@dataclass(frozen=True)
class DomainTask:
    """One task; item numbers are those of `DomainStream.item_ids`.

    catalogue: (K,) int64 ascending, what is ranked.  all_rows: the rows before `rows` were drawn from them.
    """

    name: str
    catalogue: np.ndarray
    rows: tuple[TrainingRow, ...]
    cases: tuple[Case, ...]
    all_rows: tuple[TrainingRow, ...]
    facts: DomainFacts


@dataclass(frozen=True)
class DomainStream:
    """The tasks of a run in order, and the items of all of them.

    items: (N,) int64 rows of the data set's catalogue.  item_ids: (N,) their ids.
    """

    dataset: Dataset
    tasks: tuple[DomainTask, ...]
    items: np.ndarray
    item_ids: np.ndarray


class _Part(NamedTuple):
    """The events of a task. inside: (N,) bool; seen: (N,) bool, events a history may hold; end: exclusive, seconds."""

    name: str
    inside: np.ndarray
    seen: np.ndarray
    end: int | None


def cut_stream(
    dataset: Dataset,
    *,
    period: str | None = None,
    tasks: Sequence[str] = (),
    holdout: Holdout = "last",
    max_history: int = 50,
    train_rows: int = 0,
    test_cases: int = 0,
    seed: int = 0,
) -> DomainStream:
    """Cut a log into tasks.

    Args:
        period: "month", "quarter" or a number of slices of equal time as text; None = domains.
        tasks: names in the order of training; empty = all of them, domains in the data set's order, periods in time's.
            Domains are called by their names, months "2024-01", quarters "2024-q1", slices "slice-1".
        max_history: items in a row beside its last target, and how much of a case's history a model will read.
        train_rows, test_cases: at most, per task, drawn by `seed`; a smaller draw is part of a larger one.  0 = all.

    Raises:
        ConfigError: the log has no clock, where one is needed, or one domain only.
        UnknownName: a task the log does not have.
        DataError: a task without training rows or test cases.
    """
    parts = _domain_parts(dataset) if period is None else _period_parts(dataset, period)
    names = [part.name for part in parts]
    unknown = [name for name in tasks if name not in names]
    if unknown:
        raise UnknownName(f"{'domain' if period is None else 'period'} of {dataset.name!r}", unknown[0], names)
    if holdout == "time" and dataset.clock != "unix":
        raise ConfigError(_no_clock(dataset, "nothing can be held out by time; use holdout last"))
    chosen = [parts[names.index(name)] for name in tasks] if tasks else parts
    if len(chosen) < 2 and not tasks:
        raise ConfigError(
            f"{dataset.name!r} has one domain only ({names[0]!r}), which is no stream; cut it in time with --period"
        )
    # Later periods build on what earlier ones hold out, whatever the order of training.
    held, tests = _held_out(dataset, parts, holdout)
    catalogues = [_catalogue(dataset, part) for part in chosen]
    items = np.unique(np.concatenate(catalogues))
    local = np.full(dataset.n_items, -1, dtype=np.int64)
    local[items] = np.arange(len(items))
    ids = np.array([str(name) for name in dataset.catalog.item_ids[items]], dtype=object)
    known = np.zeros(len(items), dtype=bool)
    found = []
    for part, catalogue in zip(chosen, catalogues, strict=True):
        all_rows = tuple(_training_rows(dataset, part, held, local, max_history))
        all_cases = tuple(_cases(dataset, part, tests[part.name], local, ids))
        if not all_rows or not all_cases:
            lacking = "training rows" if not all_rows else "test cases"
            raise DataError(
                f"task {part.name!r} of {dataset.name!r} has no {lacking} ({int(part.inside.sum())} events, held out "
                f"by {holdout}); leave it out with --tasks, or cut the log into longer periods"
            )
        rows = _drawn(all_rows, train_rows, seed, part.name, "train")
        cases = _drawn(all_cases, test_cases, seed, part.name, "test")
        facts = _facts(dataset, part, held, tests[part.name], all_rows, all_cases)
        facts = replace(
            facts,
            catalogue=len(catalogue),
            new_items=int(np.count_nonzero(~known[local[catalogue]])),
            rows_used=len(rows),
            cases_used=len(cases),
            repeated_tests=sum(bool((case.history == case.target).any()) for case in cases),
        )
        for row in all_rows:
            known[row.items] = True
        found.append(DomainTask(part.name, local[catalogue], rows, cases, all_rows, facts))
    return DomainStream(dataset, tuple(found), items, ids)


def _no_clock(dataset: Dataset, what: str) -> str:
    return f"{dataset.name!r} has no clock (its timestamps are positions), so {what}"


def _domain_parts(dataset: Dataset) -> list[_Part]:
    log = dataset.interactions
    code = log.domain if log.domain is not None else dataset.catalog.domain[log.item]
    present = [number for number in range(len(dataset.domains)) if (code == number).any()]
    return [_Part(dataset.domains[number], code == number, code == number, None) for number in present]


def _period_parts(dataset: Dataset, period: str) -> list[_Part]:
    if dataset.clock != "unix":
        raise ConfigError(_no_clock(dataset, "it cannot be cut into periods; leave --period out to learn its domains"))
    time = dataset.interactions.time
    bounds = list(_bounds(int(time.min()), int(time.max()), period))
    parts = [_Part(name, (time >= begin) & (time < end), time < end, end) for name, begin, end in bounds]
    return [part for part in parts if part.inside.any()]


def _bounds(first: int, last: int, period: str) -> Iterator[tuple[str, int, int]]:
    """(name, first second, first second after it) of every period from `first` to `last`."""
    if period not in PERIODS:
        edges = np.linspace(first, last + 1, int(period) + 1)
        edges = np.round(edges).astype(np.int64)
        for number, (begin, end) in enumerate(itertools.pairwise(edges), start=1):
            yield f"slice-{number}", int(begin), int(end)
        return
    months = 1 if period == "month" else 3
    start = datetime.datetime.fromtimestamp(first, tz=datetime.UTC)
    year, month = start.year, start.month - (start.month - 1) % months
    while (begin := _seconds(year, month)) <= last:
        name = f"{year}-{month:02d}" if period == "month" else f"{year}-q{(month + 2) // 3}"
        year, month = (year, month + months) if month + months <= 12 else (year + 1, 1)
        yield name, begin, _seconds(year, month)


def _seconds(year: int, month: int) -> int:
    return int(datetime.datetime(year, month, 1, tzinfo=datetime.UTC).timestamp())


def _held_out(dataset: Dataset, parts: Sequence[_Part], holdout: Holdout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Events training may not see (N,) bool, and the test rows of each task."""
    log = dataset.interactions
    held = np.zeros(len(log), dtype=bool)
    tests = {}
    for part in parts:
        rows = np.flatnonzero(part.inside)
        if holdout == "time":
            late = log.time > np.quantile(log.time[rows], TIME_CUT, method="lower")
            rows, least = np.flatnonzero(part.inside & late), 1
            held[rows] = True
        else:
            least = LEAST_BEFORE
        last = rows[np.r_[log.user[rows][1:] != log.user[rows][:-1], True]] if len(rows) else rows
        learnt_before = np.r_[0, np.cumsum(part.seen & ~held)]
        starts = user_starts(dataset)[log.user[last]]
        tests[part.name] = last[learnt_before[last] - learnt_before[starts] >= least]
        held[tests[part.name]] = True
    return held, tests


def _catalogue(dataset: Dataset, part: _Part) -> np.ndarray:
    return np.unique(dataset.interactions.item[part.seen])


def _training_rows(
    dataset: Dataset, part: _Part, held: np.ndarray, local: np.ndarray, max_history: int
) -> Iterator[TrainingRow]:
    """Every stretch that predicts each training event of the task once; the last of a user first."""
    log = dataset.interactions
    readable = np.flatnonzero(part.seen & ~held)
    new = part.inside[readable]
    user = log.user[readable]
    edges = np.flatnonzero(np.r_[True, user[1:] != user[:-1], True]) if len(user) else np.zeros(1, dtype=np.int64)
    for low, high in itertools.pairwise(edges):
        is_new = new[low:high]
        if not is_new.any():
            continue
        items = local[log.item[readable[low:high]]]
        n_context = int(np.argmax(is_new))  # a part's events are the last of what a history may hold
        first, end = max(1, n_context), len(items)
        while end > first:
            begin = max(0, end - max_history - 1)
            target = max(first, begin + 1)
            starts_here = begin < n_context or begin == 0
            yield TrainingRow(items[begin:end], n_context - begin if starts_here else target - begin)
            end = target


def _cases(dataset: Dataset, part: _Part, rows: np.ndarray, local: np.ndarray, ids: np.ndarray) -> Iterator[Case]:
    log = dataset.interactions
    starts = user_starts(dataset)
    for row in rows.tolist():
        history = local[log.item[_rows_before(part, starts, log.user, row)]]
        yield Case(str(dataset.users.user_ids[log.user[row]]), history, int(local[log.item[row]]), ids)


def _rows_before(part: _Part, starts: np.ndarray, user: np.ndarray, row: int) -> np.ndarray:
    """Rows of the log that the history of the test event at `row` holds."""
    before = np.arange(starts[user[row]], row)
    return before[part.seen[before]]


def _drawn(everything: tuple[Any, ...], size: int, seed: int, task: str, split: str) -> tuple[Any, ...]:
    if not size or size >= len(everything):
        return everything
    drawn = stream(seed, "domain subset", task, split).permutation(len(everything))[:size]
    return tuple(everything[at] for at in sorted(drawn.tolist()))


def _facts(
    dataset: Dataset,
    part: _Part,
    held: np.ndarray,
    tests: np.ndarray,
    rows: Sequence[TrainingRow],
    cases: Sequence[Case],
) -> DomainFacts:
    log, has_clock = dataset.interactions, dataset.clock == "unix"
    learnt = part.inside & ~held
    latest = log.time[learnt].max() if learnt.any() else 0
    starts = user_starts(dataset)
    previous = np.array([_rows_before(part, starts, log.user, row)[-1] for row in tests.tolist()], dtype=np.int64)
    return DomainFacts(
        events=int(part.inside.sum()),
        users=len(np.unique(log.user[part.inside])),
        catalogue=0,
        new_items=0,
        rows=len(rows),
        targets=sum(len(row.items) - row.first_target for row in rows),
        cases=len(cases),
        held_out=int((part.inside & held).sum()),
        rows_used=0,
        cases_used=0,
        repeated_tests=0,
        tied_tests=int((log.time[tests] == log.time[previous]).sum()) if has_clock else None,
        later_training=int((log.time[tests] < latest).sum()) if has_clock else None,
    )
