"""Facts about a data set that a reader of results should know: counts, ties, ratings, coverage, fingerprint."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from recollect.data.fingerprints import fingerprint
from recollect.data.splits import leave_one_out, tied_event_share, tied_target_share
from recollect.types import Dataset


def describe(dataset: Dataset) -> dict[str, Any]:
    """JSON-ready description.

    Keys: name, source, licence, clock, counts, density (events per user-item pair, repeats counted), per_user
    (minimum, median, maximum events), domains (users, items, interactions each), ties (share of tied events and of
    users whose last two events are tied; null without a clock), ratings (histogram or null), time (first, last),
    coverage (share of items with title, text, categories), rules, fingerprint, warnings.
    """
    log, catalog = dataset.interactions, dataset.catalog
    per_user = np.bincount(log.user, minlength=dataset.n_users)
    per_item = np.bincount(log.item, minlength=dataset.n_items)
    active_users, active_items = int((per_user > 0).sum()), int((per_item > 0).sum())
    found = fingerprint(dataset)
    warnings = [str(warning) for warning in dataset.meta.get("warnings", [])]
    recorded = dataset.meta.get("fingerprint")
    if recorded is not None and recorded != found:
        warnings.append(f"the recorded fingerprint {str(recorded)[:12]}… is not that of the data: the files changed")
    return {
        "name": dataset.name,
        "source": dataset.meta.get("source"),
        "licence": dataset.meta.get("licence"),
        "clock": dataset.clock,
        "counts": {
            "users": dataset.n_users,
            "items": dataset.n_items,
            "interactions": len(log),
            "users_with_events": active_users,
            "items_with_events": active_items,
        },
        "density": len(log) / (active_users * active_items) if len(log) else 0.0,
        "per_user": _spread(per_user),
        "domains": _domains(dataset),
        "ties": _ties(dataset),
        "ratings": _histogram(log.rating),
        "time": {"first": int(log.time.min()), "last": int(log.time.max())} if len(log) else None,
        "coverage": {
            "title": float(np.mean(catalog.titles != "")),
            "text": float(np.mean([bool(text) for text in catalog.texts])),
            "categories": float(np.mean([bool(names) for names in catalog.categories])),
        },
        "rules": list(dataset.meta.get("rules", [])),
        "fingerprint": found,
        "warnings": warnings,
    }


def _spread(counts: np.ndarray) -> dict[str, float]:
    active = counts[counts > 0]
    if len(active) == 0:
        return {"minimum": 0, "median": 0.0, "maximum": 0}
    return {"minimum": int(active.min()), "median": float(np.median(active)), "maximum": int(active.max())}


def _domains(dataset: Dataset) -> dict[str, dict[str, int]]:
    log = dataset.interactions
    of_event = dataset.catalog.domain[log.item] if log.domain is None else log.domain
    return {
        name: {
            "users": len(np.unique(log.user[of_event == index])),
            "items": int((dataset.catalog.domain == index).sum()),
            "interactions": int((of_event == index).sum()),
        }
        for index, name in enumerate(dataset.domains)
    }


def _ties(dataset: Dataset) -> dict[str, float | None]:
    if dataset.clock != "unix" or len(dataset.interactions) == 0:
        return {"events": None, "last_pair": None}
    share = tied_target_share(dataset, leave_one_out(dataset))
    return {"events": tied_event_share(dataset), "last_pair": None if np.isnan(share) else share}


def _histogram(rating: np.ndarray | None) -> dict[str, int] | None:
    """Counts per rating value (at most 20 distinct, else per bin of a tenth of the range); missing ones apart."""
    if rating is None:
        return None
    known = rating[~np.isnan(rating)]
    values, counts = np.unique(known, return_counts=True)
    if len(values) > 20:
        counts, edges = np.histogram(known, bins=10)
        labels = [f"{low:g}..{high:g}" for low, high in pairwise(edges)]
    else:
        labels = [f"{value:g}" for value in values]
    result = {label: int(count) for label, count in zip(labels, counts, strict=True)}
    return result | {"missing": int(np.isnan(rating).sum())}
