"""What the recommended lists are like beside being right: coverage, evenness, popularity, calibration, variety.

Per-case columns join the `CaseTable`, and with it the intervals and paired tests. What only the lists of all users
together have (coverage, Gini, entropy, exposure of groups) comes as one value with an interval; that of the first three
is of shifted draws, because a bootstrap of users sees fewer items by construction.

Names: "coverage@10", "tail_share@10:items20", "mrmc@10:head/tail": the cut-off, then the convention.
Source: recsys_evaluation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from recollect.data.examples import Cases, held_out_cases
from recollect.errors import InputError
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.class_calibration import calibration_columns
from recollect.eval.popularity import (
    HEAD_RULES,
    average_popularity,
    exposure_counts,
    head_items,
    list_means,
    log_popularity_difference,
    probabilities,
    profile_means,
    tail_columns,
)
from recollect.eval.statistics import (
    Interval,
    bootstrap_histogram,
    bootstrap_ratios,
    cluster_codes,
    entry,
    interval_of_draws,
    resample_weights,
)
from recollect.eval.topk import NO_ITEM
from recollect.types import Dataset, Split

EXPOSURE_RESAMPLES = 2_000
"""At most so many resamples for what all lists have together: each one counts the lists of everybody again."""


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


def _shares_shown_of(chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _shares_shown(counts[..., chosen])


def _ginis(counts: np.ndarray) -> np.ndarray:
    n, total = counts.shape[-1], counts.sum(axis=-1)
    weighted = ((2 * np.arange(1, n + 1) - n - 1) * np.sort(counts, axis=-1)).sum(axis=-1)
    return np.where(total > 0, weighted / np.maximum(n * total, 1), math.nan)


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy in nats of the shares of counts (n,); NaN for no counts."""
    return float(_entropies(counts))


def _entropies(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=-1, keepdims=True)
    share = counts / np.maximum(total, 1)
    found = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return np.where(total[..., 0] > 0, found, math.nan)


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
        coverage@k, gini@k, entropy@k (nats), entropy_share@k (of ln n), dgap@k (GAP of the lists over GAP of the
        profiles, minus 1), ltc@k:RULE, rsp@k:RULE and reo@k:RULE, each with an interval over users; bounds are null
        where nothing can be resampled (one user) or the value is undefined.
    """
    cases, lists = cases_of(table, dataset, split), table.top(k)
    heads = {rule: head_items(table.popularity, rule, table.candidate) for rule in HEAD_RULES}
    tails = {f":{rule}": table.candidate & ~head for rule, head in heads.items()}
    exposure = exposure_intervals(lists, table.user, table.candidate, tails=tails, resamples=resamples, seed=seed)
    entries = {
        f"{name}@{k}{rest}": entry(interval)
        for (name, rest), interval in ((_cut(name), interval) for name, interval in exposure.items())
    }
    target = np.concatenate(cases.targets())
    target_case = np.repeat(np.arange(len(cases)), cases.last - cases.first)
    for rule, head in heads.items():
        group = np.where(table.candidate, np.where(head, 0, 1), -1)
        shown = {
            "rsp": exposure_counts(lists, cases, group),
            "reo": exposure_counts(lists, cases, group, target=target, target_case=target_case),
        }
        for name, counts in shown.items():
            interval = spread_interval(*counts, table.user, resamples=resamples, seed=seed)
            entries[f"{name}@{k}:{rule}"] = entry(interval)
    profile = profile_means(cases, table.popularity.astype(np.float64))
    lift = popularity_lift(table.user, average_popularity(lists, table.popularity), profile, resamples, seed)
    return entries | {f"dgap@{k}": entry(lift)}


def _cut(name: str) -> tuple[str, str]:
    """ "ltc:items20" as ("ltc", ":items20"): the cut-off stands between."""
    metric, colon, rule = name.partition(":")
    return metric, colon + rule


def exposure_intervals(
    lists: np.ndarray,
    user: np.ndarray,
    candidate: np.ndarray,
    *,
    tails: Mapping[str, np.ndarray] | None = None,
    resamples: int = EXPOSURE_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """{"coverage", "gini", "entropy", "entropy_share", "ltc" + name: Interval} of lists (C, K), intervals over users.

    Args:
        user: (C,).
        candidate: (n_items,) bool, the items that count.
        tails: {name: (n_items,) bool} whose long-tail coverage is wanted.
        resamples: at most `EXPOSURE_RESAMPLES` of them are made.
    """
    case, place = np.nonzero(lists != NO_ITEM)
    item = lists[case, place]
    counted = candidate[item]
    code = (np.cumsum(candidate) - 1)[item[counted]]
    n_items = int(candidate.sum())
    statistics: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "coverage": _shares_shown,
        "gini": _ginis,
        "entropy": _entropies,
    }
    for name, tail in (tails or {}).items():
        if (tail & candidate).any():
            statistics[f"ltc{name}"] = partial(_shares_shown_of, tail[candidate])
    found = bootstrap_histogram(
        statistics, code, user[case[counted]], n_items, n=min(resamples, EXPOSURE_RESAMPLES), seed=seed
    )
    highest = {"entropy": math.log(n_items) if n_items else math.nan}
    result = {  # moved draws may not leave what the metric can be
        name: Interval(value, low, float(np.minimum(high, highest.get(name, 1.0))), len(lists))
        for name, (value, low, high, _) in found.items()
    }
    for name in tails or {}:
        result.setdefault(f"ltc{name}", Interval(math.nan, math.nan, math.nan, len(lists)))
    value, low, high, n = result["entropy"]
    scale = 1 / math.log(n_items) if n_items > 1 else math.nan
    return result | {"entropy_share": Interval(value * scale, low * scale, high * scale, n)}


def spread_interval(
    shown: np.ndarray, possible: np.ndarray, user: np.ndarray, *, resamples: int = EXPOSURE_RESAMPLES, seed: int = 0
) -> Interval:
    """RSP or REO of two groups from `exposure_counts` (C, 2), with an interval over users (C,).

    Of two groups the spread is |p0 - p1| / (p0 + p1). The signed ratio is what is resampled, at most
    `EXPOSURE_RESAMPLES` times, and its interval then folded at 0: two equal groups are apart in every resample.
    """
    codes, n_users = cluster_codes(user)
    of_user = np.zeros((n_users, 2, 2))
    np.add.at(of_user, codes, np.stack([shown, possible], axis=1))
    signed = float(_signed_spreads(of_user.sum(axis=0)))
    draws = [np.zeros(0)]
    if n_users > 1 and math.isfinite(signed):
        flat = of_user.reshape(n_users, 4)
        for weights in resample_weights(n_users, min(resamples, EXPOSURE_RESAMPLES), seed):
            draws.append(_signed_spreads((weights @ flat).reshape(-1, 2, 2)))
    low, high = interval_of_draws(signed, np.concatenate(draws), n_users)[1:3]
    if low < 0 < high:
        return Interval(abs(signed), 0.0, max(-low, high), len(user))
    low, high = sorted((abs(low), abs(high)))  # two NaN stay what they are
    return Interval(abs(signed), low, high, len(user))


def _signed_spreads(counts: np.ndarray) -> np.ndarray:
    """(p0 - p1) / (p0 + p1) of counts (…, 2 shown and possible, 2 groups); NaN where undefined."""
    first, second = np.moveaxis(probabilities(counts[..., 0, :], counts[..., 1, :]), -1, 0)
    total = first + second
    usable = total > 0  # a NaN is not
    return np.where(usable, (first - second) / np.where(usable, total, 1.0), math.nan)


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
