"""Filters of a log: k-core, one-pass counts, duplicates, consecutive repeats.

Each returns a new data set whose ids are dense again and whose catalogue and users hold exactly what the log
still mentions; each is recorded in `meta["rules"]`, which is part of the fingerprint.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from recollect.data.ordering import item_numbers
from recollect.errors import ConfigError, DataError
from recollect.types import Catalog, Dataset, Interactions, Users


def k_core(dataset: Dataset, k: int) -> Dataset:
    """Drop users and items with fewer than `k` events until none is left; the fixed point is unique.

    Raises:
        ConfigError: `k` < 1.
        DataError: nothing remains.

    Source: evaluation spec 3.1 (our design).
    """
    _positive("k", k)
    log = dataset.interactions
    keep = np.ones(len(log), dtype=bool)
    user, item = log.user, log.item
    while True:
        few_users = np.bincount(user[keep], minlength=dataset.n_users) < k
        few_items = np.bincount(item[keep], minlength=dataset.n_items) < k
        next_keep = keep & ~few_users[user] & ~few_items[item]
        if next_keep.sum() == keep.sum():
            return subset(dataset, keep, f"k_core({k})")
        keep = next_keep


def min_counts(dataset: Dataset, min_user: int = 1, min_item: int = 1) -> Dataset:
    """One pass, not iterated: drop users and items with few events, both counted on the log as given.

    Raises:
        ConfigError: a minimum < 1.
        DataError: nothing remains.
    """
    _positive("min_user", min_user)
    _positive("min_item", min_item)
    log = dataset.interactions
    enough_user = np.bincount(log.user, minlength=dataset.n_users) >= min_user
    enough_item = np.bincount(log.item, minlength=dataset.n_items) >= min_item
    return subset(dataset, enough_user[log.user] & enough_item[log.item], f"min_counts({min_user},{min_item})")


def deduplicate(dataset: Dataset, keep: Literal["all", "first", "last"] = "all") -> Dataset:
    """Keep all, the first or the last event of each (user, item) pair, in the order (time, row).

    Raises:
        ConfigError: another value of `keep`.
    """
    if keep not in ("all", "first", "last"):
        raise ConfigError(f"keep must be 'all', 'first' or 'last', got {keep!r}")
    if keep == "all":
        return dataset
    log = dataset.interactions
    pair = log.user * dataset.n_items + log.item
    if keep == "first":
        index = np.unique(pair, return_index=True)[1]
    else:
        index = len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]
    mask = np.zeros(len(pair), dtype=bool)
    mask[index] = True
    return subset(dataset, mask, f"duplicates({keep})")


def drop_consecutive_repeats(dataset: Dataset) -> Dataset:
    """Of a run of events of one user with one item, keep the first."""
    log = dataset.interactions
    repeat = np.zeros(len(log), dtype=bool)
    repeat[1:] = (log.user[1:] == log.user[:-1]) & (log.item[1:] == log.item[:-1])
    return subset(dataset, ~repeat, "no_consecutive_repeats")


def subset(dataset: Dataset, mask: np.ndarray, rule: str) -> Dataset:
    """The data set of the rows where `mask` (N,) is true.

    Users keep their order; items are numbered by (time, row) of their first event in what remains (ranking ties
    are cut by item index); users and items without an event are dropped.  `rule` names the filter in the fingerprint.

    Raises:
        DataError: no row remains.
    """
    if not mask.any():
        raise DataError(f"{rule} leaves nothing of {dataset.name!r}; use a weaker filter")
    log = dataset.interactions if mask.all() else dataset.interactions.take(mask)
    users = np.unique(log.user)
    row = np.arange(len(log), dtype=np.int64) if log.row is None else log.row
    items = np.argsort(item_numbers(log.item, log.time, row, dataset.n_items))[: len(np.unique(log.item))]
    user_of = np.full(dataset.n_users, -1, dtype=np.int64)
    user_of[users] = np.arange(len(users))
    item_of = np.full(dataset.n_items, -1, dtype=np.int64)
    item_of[items] = np.arange(len(items))
    meta = {key: value for key, value in dataset.meta.items() if key != "fingerprint"}
    meta["rules"] = [*dataset.meta.get("rules", []), rule]
    return Dataset(
        name=dataset.name,
        interactions=Interactions(
            user=user_of[log.user],
            item=item_of[log.item],
            time=log.time,
            rating=log.rating,
            domain=log.domain,
            row=log.row,
            context=log.context,
        ),
        catalog=take_items(dataset.catalog, items),
        users=Users(
            dataset.users.user_ids[users], {name: column[users] for name, column in dataset.users.attributes.items()}
        ),
        domains=dataset.domains,
        meta=meta,
    )


def take_items(catalog: Catalog, items: np.ndarray) -> Catalog:
    """The catalogue rows `items`, in that order."""
    return Catalog(
        item_ids=catalog.item_ids[items],
        titles=catalog.titles[items],
        domain=catalog.domain[items],
        categories=tuple(catalog.categories[index] for index in items),
        texts=catalog.texts[items],
        extra={name: column[items] for name, column in catalog.extra.items()},
    )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value!r}")
