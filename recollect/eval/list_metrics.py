"""What the recommended lists are like beside being right: coverage, evenness, popularity, calibration, variety.

Per-case columns join the `CaseTable`, and with it the intervals and paired tests. What only the lists of all users
together have comes as one value: coverage and Gini with an interval of shifted draws, because a bootstrap of users sees
fewer items by construction; entropy and group exposure without.

Names: "coverage@10", "tail_share@10:items20", "mrmc@10:head/tail": the cut-off, then the convention.
Source: recsys_evaluation 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.data.examples import Cases, held_out_cases
from recollect.errors import InputError
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.class_calibration import calibration_columns
from recollect.eval.popularity import (
    HEAD_RULES,
    average_popularity,
    exposure_by_group,
    head_items,
    list_means,
    log_popularity_difference,
    long_tail_coverage,
    profile_means,
    relative_spread,
    tail_columns,
)
from recollect.eval.statistics import Interval, bootstrap_histogram, bootstrap_ratios, cluster_codes, entry
from recollect.eval.topk import NO_ITEM
from recollect.types import Dataset, Split

EXPOSURE_RESAMPLES = 2_000
"""At most so many resamples for coverage and Gini: each one counts the lists of everybody again."""


def recommendation_counts(lists: np.ndarray, n_items: int) -> np.ndarray:
    """(n_items,) int64, how often each item is recommended."""
    return np.bincount(lists[lists != NO_ITEM], minlength=n_items)


def coverage(counts: np.ndarray) -> float:
    """Share of items recommended to anyone; counts (n,) over all candidates."""
    return float(_shares_shown(counts))


def gini(counts: np.ndarray) -> float:
    """Gini index of counts (n,), zeros included: 0 = all items alike, 1 - 1/n = one item takes all; NaN for no counts.

    Elliot reports 1 - Gini n/(n-1) instead, where higher is more even.
    """
    return float(_ginis(counts))


def _shares_shown(counts: np.ndarray) -> np.ndarray:
    return (counts > 0).mean(axis=-1)


def _ginis(counts: np.ndarray) -> np.ndarray:
    n, total = counts.shape[-1], counts.sum(axis=-1)
    weighted = ((2 * np.arange(1, n + 1) - n - 1) * np.sort(counts, axis=-1)).sum(axis=-1)
    return np.where(total > 0, weighted / np.maximum(n * total, 1), math.nan)


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy in nats of the shares of counts (n,); NaN for no counts."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum()) if len(share) else math.nan


def novelty(lists: np.ndarray, popularity: np.ndarray, n_train_users: int) -> np.ndarray:
    """(C,) mean of -log2(pop / training users) over the list, in bits; pop is floored at 1 [our design]."""
    return list_means(lists, -np.log2(np.maximum(popularity, 1) / max(n_train_users, 1)))


def intra_list_distance(lists: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """(C,) mean cosine distance between the items of a list, in 0..2; 0 for fewer than two items.

    Args:
        embeddings: (n_items, D); a zero vector is at distance 1 from everything.
    """
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = np.divide(embeddings, norm, out=np.zeros_like(embeddings, dtype=np.float64), where=norm > 0)
    unit = np.concatenate([unit, np.zeros((1, unit.shape[1]))])
    distance = np.zeros(len(lists))
    for start in range(0, len(lists), 1024):
        part = lists[start : start + 1024]
        chosen = unit[np.where(part == NO_ITEM, len(unit) - 1, part)]  # (B, K, D)
        n = (part != NO_ITEM).sum(axis=1)
        of_pairs = (chosen.sum(axis=1) ** 2).sum(axis=1) - (chosen**2).sum(axis=(1, 2))  # twice the sum of cosines
        pairs = np.maximum(n * (n - 1), 1)
        distance[start : start + 1024] = np.where(n > 1, 1.0 - of_pairs / pairs, 0.0)
    return distance


def cases_of(table: CaseTable, dataset: Dataset, split: Split) -> Cases:
    """The cases a table was made from.

    Raises:
        InputError: the table is about other cases.
    """
    cases = held_out_cases(dataset, split, table.protocol["part"], table.protocol["history"])
    if table.protocol["split"] != split.rule or not np.array_equal(cases.user, table.user):
        raise InputError(
            f"{table.model!r} was evaluated on {len(table)} cases of {table.protocol['split']!r}, which are not the "
            f"{len(cases)} cases of {split.rule!r} of {dataset.name!r}"
        )
    return cases


def list_columns(
    table: CaseTable,
    dataset: Dataset,
    split: Split,
    *,
    k: int = 10,
    classes: Mapping[str, np.ndarray] | None = None,
    embeddings: Mapping[str, np.ndarray] | None = None,
    n_train_users: int | None = None,
) -> dict[str, np.ndarray]:
    """Per-case list metrics {name: (C,) float64}.

    Args:
        classes: {name: (n_items, G) p(c|i)} for calibration, beside "head/tail" (items20), which is always there.
        embeddings: {name: (n_items, D)} for "ild@k:name".
        n_train_users: for novelty; default the users with an event in `split.train`.

    Returns:
        arp@k (events), arp_share@k (of the training users), gap_profile (mean popularity of the history),
        lpd@k (nats), tail_share@k:RULE, tail_count@k:RULE, novelty@k (bits), calibration_kl@k:CLASS (nats),
        calibration_js@k:CLASS (bits), mrmc@k:CLASS, ild@k:NAME.
    """
    cases, lists, popularity = cases_of(table, dataset, split), table.top(k), table.popularity
    if n_train_users is None:
        n_train_users = len(np.unique(dataset.interactions.user[split.train]))
    columns = {
        f"arp@{k}": average_popularity(lists, popularity),
        f"arp_share@{k}": average_popularity(lists, popularity) / max(n_train_users, 1),
        "gap_profile": profile_means(cases, popularity.astype(np.float64)),
        f"lpd@{k}": log_popularity_difference(lists, cases, popularity),
        f"novelty@{k}": novelty(lists, popularity, n_train_users),
    }
    for rule in HEAD_RULES:
        tail = table.candidate & ~head_items(popularity, rule, table.candidate)
        columns[f"tail_share@{k}:{rule}"], columns[f"tail_count@{k}:{rule}"] = tail_columns(lists, tail)
    head = head_items(popularity, "items20", table.candidate)
    every = {"head/tail": np.stack([head, ~head], axis=1).astype(np.float64), **(classes or {})}
    for name, of_item in every.items():
        for metric, column in calibration_columns(lists, cases, of_item).items():
            columns[f"{metric}@{k}:{name}" if metric == "mrmc" else f"calibration_{metric}@{k}:{name}"] = column
    for name, vectors in (embeddings or {}).items():
        columns[f"ild@{k}:{name}"] = intra_list_distance(lists, vectors)
    return columns


def list_totals(
    table: CaseTable,
    dataset: Dataset,
    split: Split,
    *,
    k: int = 10,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Report entries of what the lists of all users have together.

    Returns:
        coverage@k, gini@k and dgap@k (GAP of the lists over GAP of the profiles, minus 1) with an interval over users;
        entropy@k (nats), entropy_share@k (of ln n), ltc@k:RULE, rsp@k:RULE, reo@k:RULE with null bounds.
    """
    cases, lists = cases_of(table, dataset, split), table.top(k)
    counts = recommendation_counts(lists, table.n_items)[table.candidate]
    evenness = entropy(counts)
    values = {
        f"entropy@{k}": evenness,
        f"entropy_share@{k}": evenness / math.log(len(counts)) if len(counts) > 1 else math.nan,
    }
    target = np.concatenate(cases.targets())
    target_case = np.repeat(np.arange(len(cases)), cases.last - cases.first)
    for rule in HEAD_RULES:
        head = head_items(table.popularity, rule, table.candidate)
        values[f"ltc@{k}:{rule}"] = long_tail_coverage(lists, table.candidate & ~head)
        group = np.where(table.candidate, np.where(head, 0, 1), -1)
        values[f"rsp@{k}:{rule}"] = relative_spread(exposure_by_group(lists, cases, group))
        relevant = exposure_by_group(lists, cases, group, target=target, target_case=target_case)
        values[f"reo@{k}:{rule}"] = relative_spread(relevant)
    exposure = exposure_intervals(lists, table.user, table.candidate, resamples=resamples, seed=seed)
    entries = {f"{name}@{k}": entry(interval) for name, interval in exposure.items()}
    entries |= {name: entry(Interval(value, math.nan, math.nan, len(table))) for name, value in values.items()}
    profile = profile_means(cases, table.popularity.astype(np.float64))
    lift = popularity_lift(table.user, average_popularity(lists, table.popularity), profile, resamples, seed)
    return entries | {f"dgap@{k}": entry(lift)}


def exposure_intervals(
    lists: np.ndarray, user: np.ndarray, candidate: np.ndarray, *, resamples: int = EXPOSURE_RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """{"coverage", "gini"} of lists (C, K) with intervals over users (C,), at most `EXPOSURE_RESAMPLES` of them.

    Args:
        candidate: (n_items,) bool, the items that count.
    """
    case, place = np.nonzero(lists != NO_ITEM)
    item = lists[case, place]
    counted = candidate[item]
    code = (np.cumsum(candidate) - 1)[item[counted]]
    found = bootstrap_histogram(
        {"coverage": _shares_shown, "gini": _ginis},
        code,
        user[case[counted]],
        int(candidate.sum()),
        n=min(resamples, EXPOSURE_RESAMPLES),
        seed=seed,
    )
    return {  # shares: moved draws may not leave 0..1
        name: Interval(value, low, float(np.minimum(high, 1.0)), len(lists))
        for name, (value, low, high, _) in found.items()
    }


def popularity_lift(
    user: np.ndarray, of_list: np.ndarray, of_profile: np.ndarray, resamples: int, seed: int
) -> Interval:
    """dGAP = mean list popularity / mean profile popularity - 1 over users (cases averaged inside them first).

    Args:
        user: (C,).  of_list, of_profile: (C,) mean popularity of each case's list and history.
    """
    codes, n_users = cluster_codes(user)
    weight = 1.0 / np.bincount(codes, minlength=n_users)[codes]
    found = bootstrap_ratios({"lift": (of_list * weight, of_profile * weight)}, user, n=resamples, seed=seed)["lift"]
    return Interval(found.value - 1.0, found.low - 1.0, found.high - 1.0, found.n)


def with_list_metrics(
    table: CaseTable,
    dataset: Dataset,
    split: Split,
    *,
    ks: Sequence[int] = (10,),
    classes: Mapping[str, np.ndarray] | None = None,
    embeddings: Mapping[str, np.ndarray] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[CaseTable, dict[str, dict[str, Any]]]:
    """The table with `list_columns` for each cut-off, and the `list_totals` of all of them."""
    totals: dict[str, dict[str, Any]] = {}
    for k in ks:
        table = table.with_columns(list_columns(table, dataset, split, k=k, classes=classes, embeddings=embeddings))
        totals |= list_totals(table, dataset, split, k=k, resamples=resamples, seed=seed)
    return table, totals
