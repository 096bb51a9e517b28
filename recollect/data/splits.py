"""Splits of a log into training rows and cases, tie handling and the leak check (evaluation spec 3.2, 3.3).

Because the log is sorted by (user, time, row), a case is a target row and its history the rows of the same user
above it.  Not covered: sampling of negatives, metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.errors import ConfigError, DataError
from recollect.rng import stream
from recollect.types import Dataset, Interactions, Split

Target = Literal["last", "first", "random", "successive", "all"]
TARGETS = ("last", "first", "random", "successive", "all")


def user_starts(dataset: Dataset) -> np.ndarray:
    """First row (n_users + 1,) of each user in the sorted log; the last entry is N."""
    counts = np.bincount(dataset.interactions.user, minlength=dataset.n_users)
    return np.r_[0, np.cumsum(counts)].astype(np.int64)


def leave_one_out(dataset: Dataset) -> Split:
    """Per user: last event = test, second last = validation, rest = train; fewer than 3 events = train only.

    Source: evaluation spec 3.3 (paper).
    """
    starts = user_starts(dataset)
    ends = starts[1:][np.diff(starts) >= 3]
    train = np.ones(len(dataset.interactions), dtype=bool)
    train[ends - 1] = train[ends - 2] = False
    return Split(train=train, valid_row=ends - 2, test_row=ends - 1, rule="leave_one_out")


def global_temporal(dataset: Dataset, q: float = 0.9, target: Target = "successive", seed: int = 0) -> Split:
    """Cut the whole log at one moment; what users did after it is to be predicted.

    The test moment is the q-quantile of all times (the largest time with at most that share of events up to it, so
    "after" is strict); validation cuts the events up to it the same way, and train is what remains.

    Args:
        dataset: with a real clock.
        q: quantile in (0, 1).
        target: which held-out events of a user are targets: last, first, a random one, each one as a case of its
            own (successive), or all as one case with several targets.  Users without an earlier event have no case.
        seed: of the stream that draws the "random" target.

    Raises:
        ConfigError: `q` or `target` is illegal, or the data set has no clock.
        DataError: one of the parts is empty.

    Source: evaluation spec 3.3 (arXiv 2507.16289).
    """
    if not 0 < q < 1:
        raise ConfigError(f"q must lie between 0 and 1, got {q!r}")
    if target not in TARGETS:
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if dataset.clock != "unix":
        raise ConfigError(
            f"{dataset.name!r} has no clock (its timestamps are positions), so it cannot be cut in time; "
            "use leave_one_out"
        )
    time = dataset.interactions.time
    t_cut = int(np.quantile(time, q, method="lower"))
    before = time <= t_cut
    t_cut_valid = int(np.quantile(time[before], q, method="lower"))
    train = time <= t_cut_valid
    if before.all() or not (before & ~train).any():
        raise DataError(f"{dataset.name!r} has too few distinct times to be cut at its {q:g}-quantile; lower q")
    valid_row, valid_end = _held_out(dataset, before & ~train, target, stream(seed, "global_temporal", "valid"))
    test_row, test_end = _held_out(dataset, ~before, target, stream(seed, "global_temporal", "test"))
    suffix = f",seed={seed}" if target == "random" else ""
    return Split(
        train=train,
        valid_row=valid_row,
        valid_end=valid_end,
        test_row=test_row,
        test_end=test_end,
        rule=f"global_temporal(q={q:g},target={target}{suffix})",
        t_cut=t_cut,
        t_cut_valid=t_cut_valid,
    )


def _held_out(
    dataset: Dataset, held: np.ndarray, target: Target, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Target rows [row, end) of each case among the `held` rows, which are contiguous within a user."""
    starts = user_starts(dataset)[:-1]
    rows = np.flatnonzero(held)
    user = dataset.interactions.user[rows]
    distinct, first, count = np.unique(user, return_index=True, return_counts=True)
    begin = rows[first]
    usable = begin > starts[distinct]  # a case needs a history
    begin, count, distinct = begin[usable], count[usable], distinct[usable]
    if target == "all":
        return begin, begin + count
    if target == "successive":
        row = rows[np.isin(user, distinct)]
    elif target == "first":
        row = begin
    elif target == "last":
        row = begin + count - 1
    else:
        row = begin + np.floor(generator.random(len(begin)) * count).astype(np.int64)
    return row, row + 1


def history_bounds(
    dataset: Dataset,
    split: Split,
    part: Literal["valid", "test"] = "test",
    history: Literal["train+val", "train"] = "train+val",
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [start, end) of each case's history.

    "train+val" is every earlier row of the user; "train" only those a model is fitted on (some published
    leave-one-out rows hide the validation event).

    Returns:
        (start (C,), end (C,)), int64.

    Raises:
        ConfigError: another value of `part` or `history`.
    """
    if part not in ("valid", "test"):
        raise ConfigError(f"part must be 'valid' or 'test', got {part!r}")
    if history not in ("train+val", "train"):
        raise ConfigError(f"history must be 'train+val' or 'train', got {history!r}")
    row = split.test_row if part == "test" else split.valid_row
    start = user_starts(dataset)[dataset.interactions.user[row]]
    if history == "train+val":
        return start, row.copy()
    fitted = np.r_[0, np.cumsum(split.train)]
    return start, start + fitted[row] - fitted[start]  # training rows are a user's first rows


def refit_mask(dataset: Dataset, split: Split) -> np.ndarray:
    """Rows (N,) bool for a model refitted after selection: train and validation, never a test target or later."""
    if split.t_cut is not None:
        return dataset.interactions.time <= split.t_cut
    mask = split.train.copy()
    mask[split.valid_row] = True
    return mask


def tied_event_share(dataset: Dataset) -> float:
    """Share of events that share their timestamp with another event of the same user."""
    return float(_tied(dataset.interactions).mean())


def tied_target_share(dataset: Dataset, split: Split) -> float:
    """Share of test cases whose last target has the timestamp of the user's event just before it: the order of the
    two, and with it the target, is arbitrary.  NaN without a case."""
    if len(split.test_row) == 0:
        return float("nan")
    return float(_same_as_previous(dataset.interactions)[_ends(split) - 1].mean())


def _ends(split: Split) -> np.ndarray:
    return split.test_row + 1 if split.test_end is None else split.test_end


def _same_as_previous(log: Interactions) -> np.ndarray:
    same = np.zeros(len(log), dtype=bool)
    same[1:] = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1])
    return same


def _tied(log: Interactions) -> np.ndarray:
    same = _same_as_previous(log)
    return same | np.r_[same[1:], False]


def tie_shuffle(dataset: Dataset, seed: int) -> Dataset:
    """Permute events at random within each group of equal (user, time); `row` is renumbered so the order stays.

    The triples do not change; the rule is recorded, so the fingerprint tells the shuffles apart.

    Raises:
        ConfigError: the data set has no clock, so it has no ties to speak of.

    Source: evaluation spec 3.2.
    """
    if dataset.clock != "unix":
        raise ConfigError(f"{dataset.name!r} has no clock: its order cannot be tied; tie_shuffle does not apply")
    log = dataset.interactions
    order = np.lexsort((stream(seed, "tie_shuffle").random(len(log)), log.time, log.user))
    shuffled = log.take(order)
    shuffled = Interactions(
        user=log.user,
        item=shuffled.item,
        time=log.time,
        rating=shuffled.rating,
        domain=shuffled.domain,
        row=log.row,
        context=shuffled.context,
    )
    meta = {key: value for key, value in dataset.meta.items() if key != "fingerprint"}
    meta["rules"] = [*dataset.meta.get("rules", []), f"tie_shuffle({seed})"]
    return Dataset(dataset.name, shuffled, dataset.catalog, dataset.users, dataset.domains, meta)


@dataclass(frozen=True)
class LeakReport:
    """What a leak check found.

    n_cases: test cases.  leaking_cases: those for which the model was trained on an event later than the case's
    cut; None without a clock.  future_share: share of recommended items whose first event is later than the case's
    cut; None without a clock or without recommendations.
    """

    n_cases: int
    leaking_cases: int | None
    future_share: float | None


def leak_check(
    dataset: Dataset, split: Split, *, trained: np.ndarray | None = None, recommended: np.ndarray | None = None
) -> LeakReport:
    """Count test cases whose model knew the future, and recommended items that did not exist yet.

    Args:
        dataset: the log of the split.
        split: any split; a case's cut is `split.t_cut`, or the time of its own target.
        trained: (N,) bool, the rows the model was fitted on; default `split.train`.
        recommended: (C, K) item indices per test case; negative = no item.

    Raises:
        DataError: `recommended` has another number of rows than there are test cases.

    Source: evaluation spec 3.3; "future items" from arXiv 2010.11060.
    """
    n = len(split.test_row)
    if recommended is not None and len(recommended) != n:
        raise DataError(f"recommended has {len(recommended)} rows where the split has {n} test cases")
    if dataset.clock != "unix" or n == 0:
        return LeakReport(n, None if n else 0, None)
    log = dataset.interactions
    cut = log.time[split.test_row] if split.t_cut is None else np.full(n, split.t_cut, dtype=np.int64)
    fitted = split.train if trained is None else trained
    latest = int(log.time[fitted].max()) if fitted.any() else int(log.time.min()) - 1
    leaking = int((latest > cut).sum())
    if recommended is None:
        return LeakReport(n, leaking, None)
    first = np.full(dataset.n_items, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(first, log.item, log.time)
    valid = recommended >= 0
    future = (first[np.where(valid, recommended, 0)] > cut[:, None]) & valid
    return LeakReport(n, leaking, float(future.sum() / valid.sum()) if valid.any() else None)
