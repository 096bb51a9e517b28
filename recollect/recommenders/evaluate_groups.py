"""Does a row of an evaluation serve some users worse? Two partitions of users, each on its training events only.

"activity": thirds by number of training events.  "head share": the fifth with the smallest share of head items (the
fifth of the items with most events) among their training events, the 60 % between, and the fifth with the largest.

Source: recsys_evaluation 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.eval.case_table import CaseTable
from recollect.eval.user_groups import activity_groups, group_fairness, head_share_groups
from recollect.types import Dataset, Split

GROUP_RESAMPLES = 2_000


def user_groups(
    tables: Mapping[str, Sequence[CaseTable]], dataset: Dataset, split: Split, metric: str, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """{partition: {label: `group_fairness` of a metric, mean over seeds}}.

    Args:
        tables: {label: one table per seed, over the same cases}.

    Returns:
        The same groups for every label, also for one refitted on validation events. Without a partition in which some
        evaluated user has a training event: {}.
    """
    partitions = {
        "activity": activity_groups(dataset, split.train),
        "head share": head_share_groups(dataset, split.train),
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, groups in partitions.items():
        for label, runs in tables.items():
            if not (groups.code[runs[0].user] >= 0).any():
                continue
            column = np.mean([run.column(metric) for run in runs], axis=0)
            whole = runs[0].with_columns({metric: column})
            of_row = group_fairness(whole, metric, groups, resamples=GROUP_RESAMPLES, seed=seed)
            found.setdefault(name, {})[label] = of_row
    return found
