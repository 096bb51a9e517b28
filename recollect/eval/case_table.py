"""One row per case, one column per metric: what every evaluation gives, and its aggregates.

A case is a user's history and what came next. Where a user has several cases (global temporal split, "successive") they
are averaged inside the user before anything else, and users are what is resampled.

Source: recsys_evaluation 2, 3.3 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recollect.data.splits import LeakReport
from recollect.errors import InputError
from recollect.eval.metrics import hit_rate, mrr, ndcg
from recollect.eval.statistics import bootstrap_ratios, cluster_codes, entry

RESAMPLES = 10_000


@dataclass(frozen=True)
class CaseTable:
    """What one model did on every case.

    model: its name.  user: (C,) int64.  metrics: {name: (C,) float64}, e.g. "hr@10", "ndcg@10", "mrr@10", "mrr"
    (several targets per case: "hr@k", "recall@k", "precision@k", "ndcg@k", "map@k", "mrr").
    lists: (C, L) int64, best first, -1 where no (valid) item stands; never holds a masked item. L is 0 for counts that
    came without lists.
    greater, equal: (T,) int64, candidates above each target and tied with it; `target_case` (T,) says whose target it
    is (arange(C) for next-item cases).  A target that a ranked list does not name has greater = n_items.
    popularity: (n_items,) int64, events of each item in the training rows.  candidate: (n_items,) bool, has an event in
    the log and so could be ranked.
    protocol: see `recollect.eval.protocol`.  leak, tied_target_share: of test cases; None for validation,
    the second also without a clock.  warnings: sentences for a report.  invalid_rate, duplicate_rate: share of the
    entries of ranked lists that were no item, or named before; None for other inputs.
    """

    model: str
    user: np.ndarray
    metrics: Mapping[str, np.ndarray]
    lists: np.ndarray
    greater: np.ndarray
    equal: np.ndarray
    target_case: np.ndarray
    popularity: np.ndarray
    candidate: np.ndarray
    protocol: Mapping[str, Any]
    leak: LeakReport | None = None
    tied_target_share: float | None = None
    warnings: tuple[str, ...] = ()
    invalid_rate: float | None = None
    duplicate_rate: float | None = None

    def __post_init__(self) -> None:
        for name, column in self.metrics.items():
            if len(column) != len(self.user):
                raise InputError(f"the column {name!r} has {len(column)} rows where there are {len(self.user)} cases")

    def __len__(self) -> int:
        return len(self.user)

    def top(self, k: int) -> np.ndarray:
        """The lists cut at k, (C, k).

        Raises:
            InputError: fewer than k places were kept.
        """
        if not 1 <= k <= self.lists.shape[1]:
            raise InputError(
                f"{self.model!r} keeps lists of {self.lists.shape[1]} items where {k} are asked for; "
                "evaluate with a larger list_length"
            )
        return self.lists[:, :k]

    @property
    def n_items(self) -> int:
        return len(self.popularity)

    @property
    def n_candidates(self) -> int:
        return int(self.candidate.sum())

    def column(self, metric: str) -> np.ndarray:
        """(C,) of one metric.

        Raises:
            InputError: there is none of this name.
        """
        if metric not in self.metrics:
            raise InputError(f"{self.model!r} has no metric {metric!r}; it has: {', '.join(self.metrics)}")
        return self.metrics[metric]

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> CaseTable:
        """The same table with more per-case metrics."""
        return replace(self, metrics={**self.metrics, **columns})

    def mean(self, metric: str) -> float:
        """Mean over users of the user's mean over cases; NaN without a case."""
        _, values = self.per_user(metric)
        return float(values.mean()) if len(values) else float("nan")

    def per_user(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Distinct users (U,) ascending, and the mean (U,) of the metric over each one's cases."""
        users = np.unique(self.user)
        codes, n_users = cluster_codes(self.user)
        count = np.bincount(codes, minlength=n_users)
        return users, np.bincount(codes, self.column(metric), minlength=n_users) / np.maximum(count, 1)

    def aggregate(
        self, metrics: Sequence[str] | None = None, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """{metric: {"value", "ci95": [low, high], "n": cases}}, intervals by bootstrap over users.

        Args:
            metrics: which columns; default all.
            resamples: 0 gives null bounds.
        """
        names = list(self.metrics) if metrics is None else list(metrics)
        codes, n_users = cluster_codes(self.user)
        weight = 1.0 / np.bincount(codes, minlength=n_users)[codes] if len(codes) else np.zeros(0)
        ratios = {name: (self.column(name) * weight, weight) for name in names}
        return {
            name: entry(interval)
            for name, interval in bootstrap_ratios(ratios, self.user, n=resamples, seed=seed).items()
        }


def next_item_metrics(
    greater: np.ndarray, equal: np.ndarray, ks: Sequence[int], listed: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """{"hr@k", "ndcg@k", "mrr@k" per k, "mrr": (C,) float64} of cases with one target.

    Args:
        greater, equal: (C,) counts, see `recollect.eval.metrics.rank_counts`.
        listed: (C,) bool, False where a ranked list does not name the target, which then scores 0; None = all.
    """
    table: dict[str, np.ndarray] = {}
    for k in ks:
        table[f"hr@{k}"] = hit_rate(greater, equal, k)
        table[f"ndcg@{k}"] = ndcg(greater, equal, k)
        table[f"mrr@{k}"] = mrr(greater, equal, k)
    table["mrr"] = mrr(greater, equal)
    return table if listed is None else {name: np.where(listed, column, 0.0) for name, column in table.items()}
