"""The first K items of every row by (score descending, item index ascending), without sorting whole rows.

A lower bound of each row's K-th score comes from the maxima of disjoint blocks of columns: K different blocks have a
maximum at or above the K-th largest maximum, so at least K scores do. Only scores that reach it are then sorted.

Source: the cut rule is recsys_evaluation 5 [our design].
"""

from __future__ import annotations

import numpy as np

from recollect.errors import ConfigError

NO_ITEM = -1
_BLOCK = 32
_MANY = 8  # times k scores that reach the bound: then it is tied, and its equals are not worth sorting


def top_items(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best items of each row.

    Args:
        scores: (B, N) float, no NaN; an item at -inf is never listed.
        k: length of the list, at least 1.

    Returns:
        (B, k) int64 item indices by score descending, equal scores by index ascending; -1 where a row has fewer than k
        items above -inf.

    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"the list length must be at least 1, got {k!r}")
    n_rows, n_items = scores.shape
    lists = np.full((n_rows, k), NO_ITEM, dtype=np.int64)
    if n_rows == 0 or n_items == 0:
        return lists
    bound = _lower_bound(scores, k)
    reaching = scores >= bound[:, None]
    if not (bound > -np.inf).all() or np.count_nonzero(reaching) > _MANY * k * n_rows:
        reaching = scores > bound[:, None]
    flat = np.flatnonzero(reaching)
    row, item = np.divmod(flat, n_items)
    value = scores.ravel()[flat] if scores.flags.c_contiguous else scores[row, item]
    # `flat` ascends, so a stable sort by (row, -value) leaves equal scores in the order of their index.
    order = np.lexsort((-value, row))
    row, item = row[order], item[order]
    above = np.bincount(row, minlength=n_rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(above) - above, above)
    inside = place < k
    lists[row[inside], place[inside]] = item[inside]
    short = np.flatnonzero((above < k) & (bound > -np.inf))
    if len(short):
        _append_equals(lists, scores, short, above[short], bound[short])
    return lists


def _lower_bound(scores: np.ndarray, k: int) -> np.ndarray:
    """(B,) a score that at least k columns of the row reach; -inf where the row is not longer than k."""
    n_rows, n_items = scores.shape
    if n_items <= k:
        return np.full(n_rows, -np.inf, dtype=scores.dtype)
    n_blocks = n_items // _BLOCK
    if n_blocks < 2 * k:  # too few blocks to bound well
        return np.partition(scores, n_items - k, axis=1)[:, n_items - k]
    # Column j is in block j mod n_blocks: the maximum then runs along contiguous memory.
    head = scores[:, : n_blocks * _BLOCK].reshape(n_rows, _BLOCK, n_blocks)
    maxima = head.max(axis=1)
    return np.partition(maxima, n_blocks - k, axis=1)[:, n_blocks - k]


def _append_equals(
    lists: np.ndarray, scores: np.ndarray, rows: np.ndarray, filled: np.ndarray, bound: np.ndarray
) -> None:
    """Fill rows that have fewer than k scores above their bound, which then is their k-th score, with its equals."""
    k = lists.shape[1]
    for row, done, value in zip(rows.tolist(), filled.tolist(), bound.tolist(), strict=True):
        equals = np.flatnonzero(scores[row] == scores.dtype.type(value))[: k - done]
        lists[row, done : done + len(equals)] = equals
