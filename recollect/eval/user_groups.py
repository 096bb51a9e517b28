"""Does a recommender serve some users worse? Groups of users, gaps between them, and stability of their lists.

Groups come from training events (or an attribute) only. Users without a training event are in no group (-1); how many
there are is reported.

Source: recsys_evaluation 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.errors import ConfigError, InputError, UnknownName
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.popularity import HeadRule, head_items
from recollect.eval.statistics import centred, entry, interval_of_draws, resample_weights
from recollect.eval.topk import NO_ITEM
from recollect.types import Dataset


@dataclass(frozen=True)
class UserGroups:
    """code: (n_users,) int64 group of each user, -1 = none.  names: (G,) of str, in the order of the codes."""

    code: np.ndarray
    names: tuple[str, ...]


def _by_quantile(value: np.ndarray, known: np.ndarray, cuts: Sequence[float], names: Sequence[str]) -> UserGroups:
    """Groups by rank of `value` among known users, equal values by user index, so that sizes are what `cuts` say."""
    if any(not 0 < cut < 1 for cut in cuts) or list(cuts) != sorted(set(cuts)) or len(names) != len(cuts) + 1:
        raise ConfigError(f"cuts must be ascending numbers between 0 and 1, got {tuple(cuts)!r}")
    users = np.flatnonzero(known)
    order = users[np.argsort(value[users], kind="stable")]
    code = np.full(len(value), -1, dtype=np.int64)
    bounds = np.round(np.asarray(cuts) * len(users))
    code[order] = np.searchsorted(bounds, np.arange(len(users)), side="right")
    return UserGroups(code, tuple(names))


def activity_groups(dataset: Dataset, rows: np.ndarray, cuts: Sequence[float] = (1 / 3, 2 / 3)) -> UserGroups:
    """Quantiles of the number of training events, "q1" the least active; `rows` (N,) bool are the training rows."""
    count = np.bincount(dataset.interactions.user[rows], minlength=dataset.n_users)
    return _by_quantile(count, count > 0, cuts, [f"q{index + 1}" for index in range(len(cuts) + 1)])


def head_share_groups(
    dataset: Dataset, rows: np.ndarray, rule: HeadRule = "items20", cuts: tuple[float, float] = (0.2, 0.8)
) -> UserGroups:
    """niche, balanced and mainstream: 20/60/20 % of users by the share of head items among their training events."""
    log = dataset.interactions
    user, item = log.user[rows], log.item[rows]
    candidate = np.bincount(log.item, minlength=dataset.n_items) > 0
    head = head_items(np.bincount(item, minlength=dataset.n_items), rule, candidate)
    count = np.bincount(user, minlength=dataset.n_users)
    share = np.bincount(user, head[item], minlength=dataset.n_users) / np.maximum(count, 1)
    return _by_quantile(share, count > 0, cuts, ("niche", "balanced", "mainstream"))


def attribute_groups(dataset: Dataset, attribute: str) -> UserGroups:
    """One group per value of a user attribute; missing values (None, NaN, "") are in no group.

    Raises:
        UnknownName: the data set has no such attribute.
    """
    if attribute not in dataset.users.attributes:
        raise UnknownName("user attribute", attribute, list(dataset.users.attributes))
    values = [
        "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
        for value in dataset.users.attributes[attribute].tolist()
    ]
    names = sorted({value for value in values if value})
    number = {name: index for index, name in enumerate(names)}
    return UserGroups(np.array([number.get(value, -1) for value in values], dtype=np.int64), tuple(names))


def group_fairness(
    table: CaseTable, metric: str, groups: UserGroups, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """A metric per user group and how far the groups are apart.

    Args:
        table: of any evaluation; a user's cases are averaged inside the user.
        metric: a column of it, higher is better.
        groups: over all users of the data set.

    Returns:
        {"metric", "groups": {name: {"value", "ci95", "n": users}}, "gap": entry of max - min, "worst": {"group",
        "value"}, "ratio": min / max or null, "n_ungrouped": users in no group}. Groups without an evaluated user are
        left out. The gap of noisy means is positive by construction, and larger still in a resample, so its draws are
        moved until their mean is the gap, and cut at 0. The noise in the gap itself stays.

    Raises:
        InputError: the groups are over other users, no evaluated user is in one, or a value is not finite.
    """
    users, values = table.per_user(metric)
    if not np.isfinite(values).all():
        raise InputError(f"{metric!r} of {table.model!r} holds {int((~np.isfinite(values)).sum())} non-finite values")
    code, present = _members(users, groups, table.model)
    grouped = code >= 0
    member = (code[grouped][:, None] == present[None, :]).astype(np.float64)  # (U, G)
    names = [groups.names[index] for index in present]
    size = member.sum(axis=0)
    means, drawn = _group_ratios(member * values[grouped][:, None], member, resamples, seed)
    n_users = len(member)
    gap = float(means.max() - means.min())
    worst = int(means.argmin())
    return {
        "metric": metric,
        "groups": {
            name: entry(interval_of_draws(float(means[column]), drawn[:, column], int(size[column])))
            for column, name in enumerate(names)
        },
        "gap": entry(interval_of_draws(gap, centred(gap, drawn.max(axis=1) - drawn.min(axis=1)), n_users)),
        "worst": {"group": names[worst], "value": float(means[worst])},
        "ratio": float(means.min() / means.max()) if means.max() > 0 else None,
        "n_ungrouped": int((~grouped).sum()),
    }


def group_lift(
    table: CaseTable, groups: UserGroups, *, k: int = 10, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """dGAP of each user group: mean popularity of its lists over that of its profiles, minus 1; 0 = as popular.

    Args:
        table: with the columns arp@k and gap_profile of `list_metrics.list_columns`.

    Returns:
        {"metric", "groups": {name: {"value", "ci95", "n": users}}, "gap": entry of largest - smallest, "furthest":
        {"group", "value"} from 0, "n_ungrouped"}. A group whose profiles hold no training event has no value, and is in
        neither gap nor furthest. Draws of the gap are moved as in `group_fairness`.

    Raises:
        InputError: the table lacks a column, the groups are over other users, or no evaluated user is in one.
    """
    users, of_list = table.per_user(f"arp@{k}")
    of_profile = table.per_user("gap_profile")[1]
    code, present = _members(users, groups, table.model)
    grouped = code >= 0
    member = (code[grouped][:, None] == present[None, :]).astype(np.float64)  # (U, G)
    tops, bottoms = (member * column[grouped][:, None] for column in (of_list, of_profile))
    lift, drawn = (ratio - 1.0 for ratio in _group_ratios(tops, bottoms, resamples, seed))
    size = member.sum(axis=0)
    names = [groups.names[index] for index in present]
    known = np.flatnonzero(np.isfinite(lift))
    gap, draws = math.nan, np.zeros(0)
    if len(known):
        gap = float(lift[known].max() - lift[known].min())
        draws = centred(gap, drawn[:, known].max(axis=1) - drawn[:, known].min(axis=1))
    furthest = int(known[np.abs(lift[known]).argmax()]) if len(known) else None
    return {
        "metric": f"dgap@{k}",
        "groups": {
            name: entry(interval_of_draws(float(lift[column]), drawn[:, column], int(size[column])))
            for column, name in enumerate(names)
        },
        "gap": entry(interval_of_draws(gap, draws, len(member))),
        "furthest": None if furthest is None else {"group": names[furthest], "value": float(lift[furthest])},
        "n_ungrouped": int((~grouped).sum()),
    }


def _members(users: np.ndarray, groups: UserGroups, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Group (U,) of each evaluated user, -1 = none, and the groups (G,) that any of them is in."""
    if len(users) and users.max() >= len(groups.code):
        raise InputError(f"the groups cover {len(groups.code)} users, but user {int(users.max())} was evaluated")
    code = groups.code[users]
    present = np.unique(code[code >= 0])
    if not len(present):
        raise InputError(f"no evaluated user of {model!r} is in any of the groups {', '.join(groups.names)}")
    return code, present


def _group_ratios(tops: np.ndarray, bottoms: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """sum(tops) / sum(bottoms) of every group (G,), from (U, G), and over resamples of the users (B, G); 0/0 is NaN."""
    drawn = np.full((resamples, tops.shape[1]), np.nan)
    start = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        if len(tops) > 1:
            for weights in resample_weights(len(tops), resamples, seed):
                drawn[start : start + len(weights)] = (weights @ tops) / (weights @ bottoms)
                start += len(weights)
        return tops.sum(axis=0) / bottoms.sum(axis=0), drawn


def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(C,) Jaccard similarity of two lists (C, K) of the same cases, each without repeats; 1 for two empty ones."""
    _same_cases(first, second)
    both = ((first[:, :, None] == second[:, None, :]) & (first != NO_ITEM)[:, :, None]).sum(axis=(1, 2))
    union = (first != NO_ITEM).sum(axis=1) + (second != NO_ITEM).sum(axis=1) - both
    return np.where(union > 0, both / np.maximum(union, 1), 1.0)


def rank_agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(C,) PRAG*: share of ordered pairs (i before j) of the first list that the second keeps; 1 for equal lists.

    An item the second list lacks stands behind all it has; a pair it lacks altogether is not kept. Lists of one item
    agree when they name the same item; an empty first list agrees with an empty second one only.

    Source: recsys_evaluation 5 names the measure; the formula and its edge cases are ours.
    """
    _same_cases(first, second)
    k = second.shape[1]
    match = (first[:, :, None] == second[:, None, :]) & (first != NO_ITEM)[:, :, None]  # (C, K, K2)
    place = np.where(match.any(axis=2), match.argmax(axis=2), k)
    length = (first != NO_ITEM).sum(axis=1)
    before, after = np.triu_indices(first.shape[1], 1)
    kept = ((place[:, before] < place[:, after]) & (first[:, after] != NO_ITEM) & (first[:, before] != NO_ITEM)).sum(
        axis=1
    )
    pairs = length * (length - 1) // 2
    few = np.where(length == 1, match.any(axis=(1, 2)), (second == NO_ITEM).all(axis=1)).astype(np.float64)
    return np.where(pairs > 0, kept / np.maximum(pairs, 1), few)


def _same_cases(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise InputError(f"two lists per case are needed, got shapes {first.shape} and {second.shape}")
