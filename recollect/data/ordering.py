"""Orders and numbers in a log, each a few passes over numpy columns."""

from __future__ import annotations

import numpy as np


def sort_order(user: np.ndarray, time: np.ndarray, row: np.ndarray | None) -> np.ndarray:
    """Stable order (N,) by (user, time, row); `row=None` means the rows are already in source order."""
    if row is not None:
        return np.lexsort((row, time, user))
    low = int(time.min())
    span = int(time.max()) - low + 1
    if (int(user.max()) + 1) * span < 2**63:  # one integer key sorts much faster than three
        return np.argsort(user * span + (time - low), kind="stable")
    return np.lexsort((time, user))


def first_appearance(item: np.ndarray, n_items: int) -> np.ndarray:
    """New number (n_items,) of each item: first appearance in `item`, then those that never appear, in order."""
    first = np.full(n_items, len(item), dtype=np.int64)
    first[item[::-1]] = np.arange(len(item) - 1, -1, -1)
    new_of_old = np.empty(n_items, dtype=np.int64)
    new_of_old[np.argsort(first, kind="stable")] = np.arange(n_items)
    return new_of_old


def item_numbers(item: np.ndarray, time: np.ndarray, row: np.ndarray, n_items: int) -> np.ndarray:
    """New number (n_items,) of each item: by (time, row) of its first event, then those without an event, in order."""
    first_time = np.full(n_items, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(first_time, item, time)
    at_first = time == first_time[item]
    first_row = np.full(n_items, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(first_row, item[at_first], row[at_first])
    new_of_old = np.empty(n_items, dtype=np.int64)
    new_of_old[np.lexsort((first_row, first_time))] = np.arange(n_items)
    return new_of_old


def positions(user: np.ndarray) -> np.ndarray:
    """Position (N,) of each event in its user's history, in file order, from 0."""
    order = np.argsort(user, kind="stable")
    sorted_user = user[order]
    starts = np.flatnonzero(np.r_[True, sorted_user[1:] != sorted_user[:-1]])
    lengths = np.diff(np.r_[starts, len(user)])
    result = np.empty(len(user), dtype=np.int64)
    result[order] = np.arange(len(user)) - np.repeat(starts, lengths)
    return result
