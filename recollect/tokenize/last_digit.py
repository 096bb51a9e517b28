"""Exact and greedy re-assignment of the last digit inside groups of items that share c_1..c_{L-1}.

Three ways, each on the squared error of every last digit (n, K):
- `zcr`: all digits distinct, as few items moved as possible, then least total cost (Hungarian method).
- `constrained`: least total cost with every digit used between n//K - 1 and n//K + 1 times, the sizes of
  constrained k-means in MiniOneRec, applied inside each prefix group with frozen codebooks [our design].
- `capacity`: nearest pairs first, with a limit on the uses of a digit.

Groups without a collision are left alone. Tuples of `existing` items never move; their digits count as used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from recollect.errors import InputError
from recollect.tokenize.digit_costs import LastDigitCosts
from recollect.tokenize.groups import Groups, sizes_of, tuple_ids

MAX_BOUNDED = 4096
"""Items of one prefix group that `constrained` assigns exactly; the time grows with the cube."""


def fewest_moves(cost: np.ndarray, own: np.ndarray, is_free: np.ndarray) -> np.ndarray:
    """Distinct digits for a group: the most items keep theirs, and among those plans the cheapest.

    Args:
        cost: (n, K) finite, >= 0.
        own: (n,) digits now, with repetitions.
        is_free: (K,) digits this group may use, n of them at least; a digit of `own` may be out of reach.

    Returns:
        (n,) digits, all different.
    """
    columns = np.flatnonzero(is_free)
    offered = cost[:, columns] - cost[:, columns].min(axis=1, keepdims=True)  # a row's constant decides nothing
    # one move more must outweigh any saving: a plan's total is below n x the largest entry
    move = len(cost) * float(offered.max()) + 1.0
    offered = offered + move * (columns != own[:, None])
    rows, chosen = linear_sum_assignment(offered)
    digits = np.empty(len(cost), dtype=np.int64)
    digits[rows] = columns[chosen]
    return digits


def bounded_assignment(cost: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """(n,) digits of least total cost (n, K) in which digit k is used between lower[k] and upper[k] times.

    A digit becomes upper[k] columns of an assignment problem. Spare columns are taken by idle rows, which cost nothing
    but may not take one of the lower[k] mandatory ones.

    Raises:
        InputError: bounds that n items cannot keep.
    """
    n = len(cost)
    if not lower.sum() <= n <= upper.sum() or (lower > upper).any():
        raise InputError(f"{n} items cannot be spread with {lower.sum()}..{upper.sum()} places; widen the bounds")
    columns = np.repeat(np.arange(cost.shape[1]), upper)
    is_mandatory = np.arange(len(columns)) - np.repeat(np.cumsum(upper) - upper, upper) < np.repeat(lower, upper)
    offered = cost[:, columns]
    if is_mandatory.any():
        idle = np.where(is_mandatory, np.inf, 0.0)
        offered = np.concatenate([offered, np.broadcast_to(idle, (len(columns) - n, len(columns)))])
    rows, chosen = linear_sum_assignment(offered)
    digits = np.empty(len(offered), dtype=np.int64)
    digits[rows] = columns[chosen]
    return digits[:n]


def nearest_pairs_first(cost: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n,) digits of the greedy that goes through all pairs by increasing cost and takes what is still possible.

    Args:
        cost: (n, K).
        places: (K,) how often each digit may be used, n together at least.

    Both sides rank by the same numbers, so the greedy is the stable matching, and items that propose to their nearest
    open digit and are turned away by nearer ones reach it without sorting the n x K pairs. Ties: lower row, then lower
    digit.
    """
    open_cost = np.where(places > 0, cost, np.inf)
    digits = np.zeros(len(cost), dtype=np.int64)
    asking = np.arange(len(cost))
    while len(asking):
        digits[asking] = open_cost[asking].argmin(axis=1)
        own = cost[np.arange(len(cost)), digits]
        order = np.lexsort((own, digits))  # stable: equal costs keep the order of rows
        first = np.searchsorted(digits[order], digits[order])
        asking = order[np.arange(len(cost)) - first >= places[digits[order]]]
        open_cost[asking, digits[asking]] = np.inf
    return digits


GroupRule = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(cost (n, K), own digits (n,), uses of each digit by existing items (K,)) -> new digits (n,)."""


def _reassign(
    codes: np.ndarray,
    costs: LastDigitCosts,
    rank: np.ndarray,
    existing: np.ndarray,
    chosen: np.ndarray,
    rule: GroupRule,
) -> np.ndarray:
    """Codes (N, L) after `rule` on every prefix group of the `chosen` (N,) bool items."""
    codes = codes.copy()
    n = len(codes)
    prefixes = tuple_ids(np.concatenate([codes, existing])[:, :-1])
    size = costs.sizes[-1]
    order = np.argsort(prefixes[n:], kind="stable")
    existing_prefixes, existing_digits = prefixes[n:][order], existing[order, -1]
    for rows, places in Groups.of(prefixes[:n], rank, chosen).blocks(costs.most_rows):
        table = costs.table(rows, codes[rows])
        digits = codes[rows, -1]
        for place in places:
            here = prefixes[rows[place.start]]
            span = slice(*np.searchsorted(existing_prefixes, [here, here + 1]))
            used = np.bincount(existing_digits[span], minlength=size)
            digits[place] = rule(table[place], digits[place], used)
        codes[rows, -1] = digits
    return codes


def zcr_last_digits(
    codes: np.ndarray, costs: LastDigitCosts, rank: np.ndarray, existing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Zero collisions by the fewest moves, then the least cost.

    Items that have their digit to themselves keep it in every plan with the fewest moves, so only those that share
    one are assigned, to their own digits and the unused ones.

    Returns:
        codes (N, L); (N,) bool items of prefix groups that need more than K digits, left as they are.
    """
    n = len(codes)
    shares, _ = _collisions(codes, existing)
    prefixes = tuple_ids(np.concatenate([codes, existing])[:, :-1])
    distinct_existing = np.unique(np.stack([prefixes[n:], existing[:, -1]]), axis=1)[0]
    needed = np.bincount(np.r_[prefixes[:n], distinct_existing])
    is_full = needed[prefixes[:n]] > costs.sizes[-1]
    settled = np.concatenate([existing, codes[~shares]])

    def rule(cost: np.ndarray, own: np.ndarray, used: np.ndarray) -> np.ndarray:
        return fewest_moves(cost, own, used == 0)

    return _reassign(codes, costs, rank, settled, shares & ~is_full, rule), is_full


def constrained_last_digits(
    codes: np.ndarray, costs: LastDigitCosts, rank: np.ndarray, existing: np.ndarray
) -> np.ndarray:
    """Codes (N, L) after `bounded_assignment` in every prefix group with a collision.

    Beside existing items a group has no lower bound, which they may have made impossible.

    Raises:
        InputError: a prefix group with more than `MAX_BOUNDED` items.
    """
    _, in_group = _collisions(codes, existing)
    largest = np.bincount(tuple_ids(codes[in_group][:, :-1])).max(initial=0)
    if largest > MAX_BOUNDED:
        raise InputError(
            f"{largest} items share their first {codes.shape[1] - 1} digits; 'constrained' assigns at most "
            f"{MAX_BOUNDED} exactly. Use the collision strategy capacity or sinkhorn, or more levels"
        )

    def rule(cost: np.ndarray, own: np.ndarray, used: np.ndarray) -> np.ndarray:
        even = (len(cost) + int(used.sum())) // len(used)
        least = 0 if used.any() else max(0, even - 1)
        return bounded_assignment(cost, np.full(len(used), least), np.maximum(even + 1 - used, 0))

    return _reassign(codes, costs, rank, existing, in_group, rule)


def capacity_last_digits(
    codes: np.ndarray, costs: LastDigitCosts, rank: np.ndarray, existing: np.ndarray, *, capacity: int
) -> np.ndarray:
    """Codes (N, L) after `nearest_pairs_first` in every prefix group with a collision.

    capacity: uses of a digit inside a prefix group, >= 1; raised in groups that would not find a place otherwise.
    """
    _, in_group = _collisions(codes, existing)

    def rule(cost: np.ndarray, own: np.ndarray, used: np.ndarray) -> np.ndarray:
        most = capacity
        while np.maximum(most - used, 0).sum() < len(cost):
            most += 1
        return nearest_pairs_first(cost, np.maximum(most - used, 0))

    return _reassign(codes, costs, rank, existing, in_group, rule)


def _collisions(codes: np.ndarray, existing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each item (N,): whether it shares its tuple, and whether anyone of its prefix group does."""
    n = len(codes)
    whole = np.concatenate([codes, existing])
    shares = sizes_of(tuple_ids(whole))[:n] > 1
    prefixes = tuple_ids(whole[:, :-1])[:n]
    return shares, np.bincount(prefixes, weights=shares)[prefixes] > 0
