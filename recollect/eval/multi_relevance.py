"""Metrics of cases with several relevant items, exact under ties.

Inputs are the counts of each relevant item j of a case: g_j candidates above it and e_j tied with it (other relevant
items included in both). Tied candidates come in uniformly random order and every metric is its expectation: hits and
discounted gain are sums over single items; average precision and the first hit need the tie groups, which the counts
give: relevant items of a case with equal g form one group of e + 1 candidates.

For one relevant item: recall = hit rate, average precision = reciprocal rank, ideal gain = 1.
Source: recsys_evaluation 4.2; the expectations are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.metrics import hit_rate, ndcg

Gain = Literal["linear", "exponential"]
MapDenominator = Literal["relevant", "min(relevant,k)"]


def several_relevant_metrics(
    case: np.ndarray,
    greater: np.ndarray,
    equal: np.ndarray,
    ks: Sequence[int],
    *,
    n_cases: int,
    listed: np.ndarray | None = None,
    grade: np.ndarray | None = None,
    gain: Gain = "linear",
    map_denominator: MapDenominator = "relevant",
) -> dict[str, np.ndarray]:
    """{"hr@k", "recall@k", "precision@k", "ndcg@k", "map@k" per k, "mrr": (C,) float64}.

    Args:
        case: (T,) int64 ascending, which case each relevant item belongs to; each case has at least one.
        greater, equal: (T,) int64 counts; every relevant item counts among the candidates of the others.
        ks: cut-offs; precision divides by k however short the list is.
        listed: (T,) bool, False where a ranked list does not name the item, which then scores 0; None = all.
        grade: (T,) non-negative relevance; None = 1 each. Only ndcg uses it.
        gain: of a grade r, r itself or 2^r - 1.
        map_denominator: the number of relevant items (trec_eval), or that number at most k (RecBole).

    Raises:
        ConfigError: `gain` or `map_denominator` is unknown.
        InputError: a case without a relevant item, or counts that no ranking has.
    """
    if gain not in ("linear", "exponential"):
        raise ConfigError(f"gain must be 'linear' or 'exponential', got {gain!r}")
    if map_denominator not in ("relevant", "min(relevant,k)"):
        raise ConfigError(f"map_denominator must be 'relevant' or 'min(relevant,k)', got {map_denominator!r}")
    listed = np.ones(len(case), dtype=bool) if listed is None else listed
    n_relevant = np.bincount(case, minlength=n_cases)
    if len(n_relevant) != n_cases or (n_relevant == 0).any():
        raise InputError(f"every case needs a relevant item; {int((n_relevant == 0).sum())} have none")
    weight = np.ones(len(case)) if grade is None else np.asarray(grade, dtype=np.float64)
    if gain == "exponential":
        weight = np.exp2(weight) - 1.0

    def per_case(values: np.ndarray) -> np.ndarray:
        return np.bincount(case, np.where(listed, values, 0.0), minlength=n_cases)

    groups = _TieGroups(case[listed], greater[listed], equal[listed], n_cases)
    table: dict[str, np.ndarray] = {}
    for k in ks:
        hits = per_case(hit_rate(greater, equal, k))
        table[f"hr@{k}"] = groups.any_within(k)
        table[f"recall@{k}"] = hits / n_relevant
        table[f"precision@{k}"] = hits / k
        table[f"ndcg@{k}"] = per_case(weight * ndcg(greater, equal, k)) / _ideal(case, weight, k, n_cases)
        share = n_relevant if map_denominator == "relevant" else np.minimum(n_relevant, k)
        table[f"map@{k}"] = groups.precision_sum(k) / share
    table["mrr"] = groups.first_hit()
    return table


def _ideal(case: np.ndarray, weight: np.ndarray, k: int, n_cases: int) -> np.ndarray:
    """(C,) discounted gain of the best order of the relevant items, cut at k; 1 where it is 0."""
    order = np.lexsort((-weight, case))
    count = np.bincount(case, minlength=n_cases)
    place = np.arange(len(case)) - np.repeat(np.cumsum(count) - count, count)
    discounted = np.where(place < k, weight[order] / np.log2(place + 2.0), 0.0)
    total = np.bincount(case[order], discounted, minlength=n_cases)
    return np.where(total > 0, total, 1.0)


class _TieGroups:
    """Groups of tied candidates that hold a relevant item, by (case, candidates above).

    case, above, size, relevant, before: (G,) int64; `size` candidates of which `relevant` are relevant stand below
    `above` others, `before` of which are relevant.
    """

    def __init__(self, case: np.ndarray, greater: np.ndarray, equal: np.ndarray, n_cases: int) -> None:
        self.n_cases = n_cases
        order = np.lexsort((greater, case))
        case, greater, equal = case[order], greater[order], equal[order]
        fresh = np.ones(len(case), dtype=bool)
        fresh[1:] = (case[1:] != case[:-1]) | (greater[1:] != greater[:-1])
        start = np.flatnonzero(fresh)
        self.case, self.above, self.size = case[start], greater[start], equal[start] + 1
        self.relevant = np.diff(np.r_[start, len(case)])
        first_of_case = np.searchsorted(case, self.case)
        self.before = start - first_of_case
        if (self.relevant > self.size).any() or (self.before > self.above).any():
            raise InputError("the counts belong to no ranking: more relevant items stand somewhere than candidates")

    def precision_sum(self, k: int) -> np.ndarray:
        """(C,) expected sum, over relevant items ranked within k, of the precision at their rank.

        At place i = 1..n of a group of n with r relevant, after N candidates of which R relevant, a relevant item
        stands with probability r/n, and then (i-1)(r-1)/(n-1) of those before it in the group are relevant on average.
        """
        depth = np.clip(k - self.above, 0, self.size)
        group = np.repeat(np.arange(len(self.case)), depth)
        place = np.arange(len(group)) - np.repeat(np.cumsum(depth) - depth, depth)  # i - 1
        size, relevant = self.size[group], self.relevant[group]
        ahead = self.before[group] + 1.0 + place * (relevant - 1) / np.maximum(size - 1, 1)
        precision = ahead / (self.above[group] + place + 1.0)
        return np.bincount(self.case[group], relevant / size * precision, minlength=self.n_cases)

    def any_within(self, k: int) -> np.ndarray:
        """(C,) probability that a relevant item is among the first k: only a case's first group can leave it open."""
        first = self.before == 0
        found = np.zeros(self.n_cases)
        found[self.case[first]] = 1.0 - self._none_among(first, np.clip(k - self.above[first], 0, self.size[first]))
        return found

    def _none_among(self, chosen: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Probability that the first `drawn` places of each chosen group hold no relevant item."""
        from scipy.special import gammaln

        size, relevant = self.size[chosen], self.relevant[chosen]
        others = size - relevant
        possible = drawn <= others
        drawn = np.minimum(drawn, others)
        # C(n - d, r) / C(n, r) = (n-d)! (n-r)! / ((n-d-r)! n!)
        log_ratio = gammaln(size - drawn + 1) + gammaln(others + 1) - gammaln(others - drawn + 1) - gammaln(size + 1)
        exact = np.where(relevant == 1, 1.0 - drawn / size, np.exp(log_ratio))
        return np.where(possible, np.where(drawn == 0, 1.0, exact), 0.0)

    def first_hit(self) -> np.ndarray:
        """(C,) expected reciprocal rank of the first relevant item; 0 where none is listed."""
        value = np.zeros(self.n_cases)
        index = np.flatnonzero(self.before == 0)
        deepest = self.size[index] - self.relevant[index]  # places that can precede the first relevant item
        group = np.repeat(index, deepest + 1)
        place = np.arange(len(group)) - np.repeat(np.cumsum(deepest + 1) - (deepest + 1), deepest + 1)
        here = self._none_among(group, place) - self._none_among(group, place + 1)
        np.add.at(value, self.case[group], here / (self.above[group] + place + 1.0))
        return value
