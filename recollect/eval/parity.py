"""RecBole 1.2.1's list metrics, with its peculiarities, to compare with tables made by it. Not for new results.

What differs from `list_metrics`: the padding item counts as an item (n + 1); popularity is counted on augmented
sequences, so a user's first training event does not count; entropy is divided by the number of distinct recommended
items; items without a training event are not in the tail; values are rounded to 4 decimals.

Not covered: its order of tied scores, which is that of a device's top-k routine.
Source: recsys_evaluation 4.4 [paper: code].
"""

from __future__ import annotations

import numpy as np

from recollect.data.splits import user_starts
from recollect.errors import ConfigError
from recollect.eval.case_table import CaseTable
from recollect.eval.list_metrics import coverage, entropy, gini, recommendation_counts
from recollect.eval.popularity import list_means
from recollect.types import Dataset, Split

SUFFIX = "~recbole"
DIGITS = 4


def augmented_popularity(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """(n_items,) how often an item is the target of an augmented training sequence: events but each user's first."""
    first = np.zeros(len(dataset.interactions), dtype=bool)
    starts = user_starts(dataset)
    has_events = starts[1:] > starts[:-1]
    first[starts[:-1][has_events]] = True
    return np.bincount(dataset.interactions.item[rows & ~first], minlength=dataset.n_items)


def recbole_totals(
    table: CaseTable, dataset: Dataset, split: Split, *, k: int = 10, tail_ratio: float = 0.1
) -> dict[str, float]:
    """{"coverage@k~recbole", "gini@k~recbole", "entropy@k~recbole", "arp@k~recbole", "tail_share@k~recbole"}.

    Args:
        tail_ratio: share of the items with a training event that are tail, least counted first; RecBole's default .1.
    """
    if not 0 < tail_ratio < 1:
        raise ConfigError(f"tail_ratio must lie between 0 and 1, got {tail_ratio!r}")
    lists = table.top(k)
    counts = np.r_[0, recommendation_counts(lists, table.n_items)]  # item 0 is the padding
    popularity = augmented_popularity(dataset, split.train)
    counted = np.flatnonzero(popularity)
    tail = np.zeros(table.n_items, dtype=bool)
    order = counted[np.argsort(popularity[counted], kind="stable")]
    tail[order[: max(int(len(counted) * tail_ratio), 1)]] = True
    values = {
        "coverage": coverage(counts),
        "gini": gini(counts),
        "entropy": entropy(counts) / max(int((counts > 0).sum()), 1),
        "arp": float(list_means(lists, popularity.astype(np.float64)).mean()),
        "tail_share": float(list_means(lists, tail.astype(np.float64)).mean()),
    }
    return {f"{name}@{k}{SUFFIX}": round(value, DIGITS) for name, value in values.items()}
