"""Does a row of an evaluation serve some users worse? Two partitions of users by their training events only.

"activity": thirds by number of training events.  "head share": the fifth with the smallest share of head items (the
fifth of the items with most events) among their training events, the 60 % between, and the fifth with the largest.
Attributes of the users make further partitions where they are asked for.

Source: recsys_evaluation 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.errors import InputError
from recollect.eval.case_table import CaseTable
from recollect.eval.user_groups import (
    UserGroups,
    activity_groups,
    attribute_groups,
    group_fairness,
    group_lift,
    head_share_groups,
)
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.types import Dataset, Split

GROUP_RESAMPLES = 2_000
MOST_GROUPS = 30


def groups_by_attribute(dataset: Dataset, attributes: Sequence[str]) -> dict[str, UserGroups]:
    """The partition of the users by each attribute.

    Raises:
        UnknownName: the data set has no such attribute.
        InputError: it has too many values, or none.
    """
    found = {}
    for name in attributes:
        found[name] = attribute_groups(dataset, name)
        if not 1 <= len(found[name].names) <= MOST_GROUPS:
            raise InputError(
                f"the user attribute {name!r} of {dataset.name!r} has {len(found[name].names)} values where 1 to "
                f"{MOST_GROUPS} groups can be compared; leave it out, or give the users a coarser one"
            )
    return found


def user_groups(
    tables: Mapping[str, Sequence[CaseTable]],
    dataset: Dataset,
    split: Split,
    metric: str,
    seed: int,
    attributes: Sequence[str] = (),
) -> dict[str, dict[str, dict[str, Any]]]:
    """{partition: {label: `group_fairness` of a metric, mean over seeds}}.

    Args:
        tables: {label: one table per seed, over the same cases}.
        attributes: of the users, further partitions under their own names.

    Returns:
        The same groups for every label, also for one refitted on validation events. Without a partition in which some
        evaluated user has a training event: {}.
    """
    partitions = _partitions(dataset, split, attributes)
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


def lift_by_group(
    tables: Mapping[str, Sequence[CaseTable]], dataset: Dataset, split: Split, config: EvaluateConfig
) -> dict[str, dict[str, dict[str, Any]]]:
    """{partition: {label: `group_lift` of the mean list over seeds}}, the groups of `user_groups`."""
    cut = config.primary_cut
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, groups in _partitions(dataset, split, config.attributes).items():
        for label, runs in tables.items():
            if not (groups.code[runs[0].user] >= 0).any():
                continue
            shown = np.mean([run.column(f"arp@{cut}") for run in runs], axis=0)
            whole = runs[0].with_columns({f"arp@{cut}": shown})
            of_row = group_lift(whole, groups, k=cut, resamples=GROUP_RESAMPLES, seed=config.seed)
            found.setdefault(name, {})[label] = of_row
    return found


def _partitions(dataset: Dataset, split: Split, attributes: Sequence[str]) -> dict[str, UserGroups]:
    return {
        "activity": activity_groups(dataset, split.train),
        "head share": head_share_groups(dataset, split.train),
        **groups_by_attribute(dataset, attributes),
    }
