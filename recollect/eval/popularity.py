"""How popular the recommended items are: averages, lift against the profile, head and tail, equality between groups.

pop(i) is the number of training events of item i, raw. Lists are (C, K) item indices, -1 = no item. A case with an
empty list counts 0 everywhere; it is never dropped.

Head and tail have two incompatible conventions; a metric's name says which: "items20" takes the fifth of the items
with most events as head, "mass80" the fewest items that cover 80 % of the events.
Source: recsys_evaluation 5 (1907.13286, 2103.06364; LPD after 2406.01285 [abstract], the formula ours).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from recollect.data.examples import Cases
from recollect.errors import ConfigError, InputError
from recollect.eval.topk import NO_ITEM

HeadRule = Literal["items20", "mass80"]
HEAD_RULES: tuple[HeadRule, ...] = ("items20", "mass80")
HEAD_ITEMS = 0.2
HEAD_MASS = 0.8


def head_items(popularity: np.ndarray, rule: HeadRule, candidate: np.ndarray | None = None) -> np.ndarray:
    """(n_items,) bool, the head; equal counts are taken by item index.

    Args:
        popularity: (n_items,) training events.
        rule: "items20" = the ceil(.2 n) most counted items; "mass80" = the smallest prefix of them that covers 80 % of
            the events.
        candidate: (n_items,) bool, the items that count; None = all.

    Raises:
        ConfigError: another rule.
        InputError: "mass80" without any event.
    """
    if rule not in HEAD_RULES:
        raise ConfigError(f"the head rule must be one of {', '.join(HEAD_RULES)}, got {rule!r}")
    items = np.arange(len(popularity)) if candidate is None else np.flatnonzero(candidate)
    order = items[np.argsort(-popularity[items], kind="stable")]
    if rule == "items20":
        # 0.2 is not a binary fraction; the slack keeps e.g. 5 items at one head item.
        size = int(np.ceil(HEAD_ITEMS * len(items) - 1e-9))
    else:
        mass = np.cumsum(popularity[order])
        if not len(mass) or mass[-1] == 0:
            raise InputError("mass80 needs training events; none are left of the candidates")
        size = int(np.searchsorted(mass, HEAD_MASS * mass[-1] - 1e-9)) + 1
    head = np.zeros(len(popularity), dtype=bool)
    head[order[:size]] = True
    return head


def list_means(lists: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(C,) mean of a per-item value (n_items,) over the items listed; 0 for an empty list."""
    named = lists != NO_ITEM
    total = np.where(named, value[np.where(named, lists, 0)], 0.0).sum(axis=1)
    return total / np.maximum(named.sum(axis=1), 1)


def profile_means(cases: Cases, value: np.ndarray) -> np.ndarray:
    """(C,) mean of a per-item value (n_items,) over the events of each case's history; 0 for an empty history."""
    running = np.r_[0.0, np.cumsum(value[cases.item], dtype=np.float64)]
    return (running[cases.end] - running[cases.start]) / np.maximum(cases.end - cases.start, 1)


def average_popularity(lists: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """(C,) ARP: mean pop(i) over the list, in events."""
    return list_means(lists, popularity.astype(np.float64))


def log_popularity(popularity: np.ndarray) -> np.ndarray:
    """(n_items,) ln pop(i), pop floored at 1, so an item without a training event counts like one with a single."""
    return np.log(np.maximum(popularity, 1))


def log_popularity_difference(lists: np.ndarray, cases: Cases, popularity: np.ndarray) -> np.ndarray:
    """(C,) LPD: mean ln pop over the list minus that over the history; 0 for an empty list or history."""
    value = log_popularity(popularity)
    both = (lists != NO_ITEM).any(axis=1) & (cases.end > cases.start)
    return np.where(both, list_means(lists, value) - profile_means(cases, value), 0.0)


def tail_columns(lists: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) share and (C,) number of list items that are tail (n_items,) bool: the rows of APLT and ACLT."""
    share = list_means(lists, tail.astype(np.float64))
    named = lists != NO_ITEM
    return share, (named & tail[np.where(named, lists, 0)]).sum(axis=1).astype(np.float64)


def long_tail_coverage(lists: np.ndarray, tail: np.ndarray) -> float:
    """LtC: share of the tail's items that are recommended to anyone; NaN without a tail."""
    shown = np.zeros(len(tail), dtype=bool)
    shown[lists[lists != NO_ITEM]] = True
    return float((shown & tail).sum() / tail.sum()) if tail.any() else float("nan")


def history_pairs(cases: Cases, n_items: int) -> np.ndarray:
    """Distinct `case * n_items + item` of all histories, ascending."""
    length = cases.end - cases.start
    case = np.repeat(np.arange(len(cases)), length)
    within = np.arange(len(case)) - np.repeat(np.cumsum(length) - length, length)
    return np.unique(case * n_items + cases.item[np.repeat(cases.start, length) + within])


def exposure_by_group(
    lists: np.ndarray,
    cases: Cases,
    group: np.ndarray,
    *,
    target: np.ndarray | None = None,
    target_case: np.ndarray | None = None,
) -> np.ndarray:
    """P(recommended | group), or P(recommended | group, relevant) where targets are given; arguments as
    `exposure_counts`.

    Returns:
        (A,) probabilities over (case, item) pairs. NaN for a group without such a pair.

    Source: recsys_evaluation 5, as in Elliot.
    """
    shown, possible = exposure_counts(lists, cases, group, target=target, target_case=target_case)
    return probabilities(shown.sum(axis=0), possible.sum(axis=0))


def probabilities(shown: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """shown / possible, NaN where nothing was possible."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(possible > 0, shown / possible, np.nan)


def exposure_counts(
    lists: np.ndarray,
    cases: Cases,
    group: np.ndarray,
    *,
    target: np.ndarray | None = None,
    target_case: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How many items of each group every case is shown, and how many it could have been.

    Args:
        group: (n_items,) int64 group of each item, 0..A-1; -1 = not a candidate.
        target, target_case: (T,) distinct relevant items and their cases; then only those count.

    Returns:
        shown, possible: (C, A) int64. Items of the case's own history are in neither.
    """
    n_items, n_groups, n_cases = len(group), int(group.max()) + 1, len(cases)
    seen = history_pairs(cases, n_items)
    case, _ = np.nonzero(lists != NO_ITEM)
    shown = np.unique(case * n_items + lists[lists != NO_ITEM])
    shown = shown[~np.isin(shown, seen, assume_unique=True)]
    if target is not None and target_case is not None:
        relevant = np.unique(target_case * n_items + target)
        relevant = relevant[~np.isin(relevant, seen, assume_unique=True)]
        shown = shown[np.isin(shown, relevant, assume_unique=True)]
        possible = _per_group(relevant, group, n_groups, n_cases)
    else:
        whole = np.bincount(group[group >= 0], minlength=n_groups)
        possible = whole - _per_group(seen, group, n_groups, n_cases)
    return _per_group(shown, group, n_groups, n_cases), possible


def _per_group(pairs: np.ndarray, group: np.ndarray, n_groups: int, n_cases: int) -> np.ndarray:
    """(C, A) how many (case, item) pairs fall on items of each group; items in none are not counted."""
    case, item = np.divmod(pairs, len(group))
    counted = group[item] >= 0
    cell = case[counted] * n_groups + group[item[counted]]
    return np.bincount(cell, minlength=n_cases * n_groups).reshape(n_cases, n_groups)


def relative_spread(probability: np.ndarray) -> float:
    """Population standard deviation over mean: RSP or REO of `exposure_by_group`; NaN where undefined."""
    mean = probability.mean()
    return float(probability.std(ddof=0) / mean) if mean > 0 else float("nan")
