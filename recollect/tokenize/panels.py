"""Panels about one set of codes: usage of the codebooks, a map of the first level, collisions by title.

They exist so that a person can judge: titles of a cluster's most typical items, and of the items that share a code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.eval.formats import one_line
from recollect.rng import stream
from recollect.tokenize.embeddings import Items
from recollect.tokenize.groups import tuple_ids
from recollect.tokenize.text_form import texts_of

MAP_POINTS = 1500
MAP_LABELS = 24
CLUSTERS_SHOWN = 40
GROUPS_SHOWN = 30
TITLES_SHOWN = 4
TITLES_OF_GROUP = 12
CURVE_POINTS = 256
_BLOCK = 16384


def names_of(items: Items) -> list[str]:
    """A title per item, its id where it has none."""
    return [one_line(title, 70) or one_line(name, 70) for title, name in zip(items.titles, items.item_ids, strict=True)]


def usage_curve(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Items per code, most used first, a line per level."""
    largest = max(sizes)
    ranks = np.unique(np.linspace(0, largest - 1, min(largest, CURVE_POINTS)).astype(np.int64))
    series = {}
    for level, size in enumerate(sizes):
        column = codes[:, level]
        counts = np.sort(np.bincount(column[column >= 0], minlength=size))[::-1]
        series[f"level {level + 1}"] = [int(counts[rank]) if rank < size else None for rank in ranks]
    return {
        "kind": "lines",
        "title": "How evenly codes are used",
        "note": "Items per code, most used code first; a flat line is an even codebook, a line at 0 is dead codes.",
        "x": [int(rank) + 1 for rank in ranks],
        "series": series,
        "x_label": "rank of the code",
        "y_label": "items",
    }


def first_level_means(items: Items, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes used at level 1 (U,), their mean embedding (U, D) float64 and items (U,)."""
    used, inverse, count = np.unique(codes[:, 0], return_inverse=True, return_counts=True)
    total = np.zeros((len(used), items.embeddings.shape[1]))
    for start in range(0, len(items), _BLOCK):
        block = np.asarray(items.embeddings[start : start + _BLOCK], dtype=np.float64)
        np.add.at(total, inverse.reshape(-1)[start : start + _BLOCK], block)
    return used, total / count[:, None], count


def cluster_panels(items: Items, codes: np.ndarray, *, label: str = "", seed: int = 0) -> list[dict[str, Any]]:
    """The map of level 1 and the table of its clusters."""
    used, means, count = first_level_means(items, codes)
    names = names_of(items)
    order = np.argsort(-count, kind="stable")
    of = f", {label}" if label else ""
    shown = []
    if len(used) > 2:
        shown.append(_map(items, codes, used, means, count, order, of, seed))
    rows = []
    for place in order[:CLUSTERS_SHOWN]:
        members = np.flatnonzero(codes[:, 0] == used[place])
        distance = ((np.asarray(items.embeddings[members], dtype=np.float64) - means[place]) ** 2).sum(axis=1)
        nearest = members[np.argsort(distance, kind="stable")]
        typical = list(dict.fromkeys(names[row] for row in nearest.tolist()))[:TITLES_SHOWN]
        edge = names[int(nearest[-1])] if len(nearest) > TITLES_SHOWN else ""
        rows.append([f"<a_{int(used[place])}>", int(count[place]), "; ".join(typical), edge])
    shown.append(
        {
            "kind": "table",
            "title": f"Clusters of the first level{of}",
            "note": (
                f"The {min(len(used), CLUSTERS_SHOWN)} largest of {len(used)}. Examples are the items nearest to the "
                "mean of a cluster; the last column is the item furthest from it."
            ),
            "columns": ["code", "items", "typical", "furthest"],
            "rows": rows,
        }
    )
    return shown


def _map(
    items: Items,
    codes: np.ndarray,
    used: np.ndarray,
    means: np.ndarray,
    count: np.ndarray,
    order: np.ndarray,
    of: str,
    seed: int,
) -> dict[str, Any]:
    """Items on the two directions along which the clusters' means differ most."""
    centre = (means * count[:, None]).sum(axis=0) / count.sum()
    spread = (means - centre) * np.sqrt(count)[:, None]
    _, values, directions = np.linalg.svd(spread, full_matrices=False)
    directions = np.pad(directions, ((0, max(0, 2 - len(directions))), (0, 0)))  # one cluster or one dimension: a line
    directions = directions[:2] * np.sign(directions[np.arange(2), np.abs(directions[:2]).argmax(axis=1)])[:, None]
    rows = np.arange(len(items))
    if len(rows) > MAP_POINTS:
        rows = np.sort(stream(seed, "map of the first level").choice(len(rows), MAP_POINTS, replace=False))
    points = (np.asarray(items.embeddings[rows], dtype=np.float64) - centre) @ directions.T
    places = (means - centre) @ directions.T
    share = float((values[:2] ** 2).sum() / max((values**2).sum(), 1e-300))
    sample = f" A draw of {len(rows):,} of {len(items):,} items." if len(rows) < len(items) else ""
    return {
        "kind": "map",
        "title": f"Map of the first level{of}",
        "note": (
            f"The two directions along which the means of the clusters differ most; they hold {share:.0%} of that "
            f"difference, so clusters that overlap here may be far apart. Colours repeat.{sample} Names: the "
            f"{min(len(used), MAP_LABELS)} largest clusters."
        ),
        "x": [round(float(value), 5) for value in points[:, 0]],
        "y": [round(float(value), 5) for value in points[:, 1]],
        "group": np.searchsorted(used, codes[rows, 0]).tolist(),
        "labels": [
            {
                "x": float(places[place, 0]),
                "y": float(places[place, 1]),
                "text": f"a_{int(used[place])}",
            }
            for place in order[:MAP_LABELS]
        ],
        "x_label": "first direction",
        "y_label": "second direction",
    }


def collision_panels(items: Items, codes: np.ndarray, *, label: str = "") -> list[dict[str, Any]]:
    """How many items share a code, and who they are."""
    groups = tuple_ids(codes)
    sizes = np.bincount(groups)
    of = f", {label}" if label else ""
    held = np.bincount(sizes)  # groups of each size
    present = [int(size) for size in np.flatnonzero(held) if size > 0]
    edges = [size for size in present if size <= 8]
    labels = [str(size) for size in edges] + (["9 or more"] if any(size > 8 for size in present) else [])
    counted = [int(size * held[size]) for size in edges]
    if len(labels) > len(edges):
        counted.append(int(sum(size * held[size] for size in present if size > 8)))
    shown: list[dict[str, Any]] = [
        {
            "kind": "bars",
            "title": f"Items by the size of the group that shares their code{of}",
            "note": "1 = a code of one's own.",
            "labels": labels,
            "series": {"items": counted},
            "axis": "items",
        }
    ]
    crowded = np.flatnonzero(sizes > 1)
    if not len(crowded):
        return shown
    names, written = names_of(items), texts_of(codes)
    order = crowded[np.argsort(-sizes[crowded], kind="stable")][:GROUPS_SHOWN]
    rows = []
    for group in order:
        members = np.flatnonzero(groups == group)
        distinct = len(_distinct_rows(items, members))
        listed = "; ".join(names[row] for row in members[:TITLES_OF_GROUP].tolist())
        more = f"; and {len(members) - TITLES_OF_GROUP} more" if len(members) > TITLES_OF_GROUP else ""
        rows.append([str(written[members[0]]), len(members), distinct, listed + more])
    shown.append(
        {
            "kind": "table",
            "title": f"Items that share a code{of}",
            "note": (
                f"The {len(order)} largest of {len(crowded):,} groups. Items with equal vectors cannot be told apart "
                "by any codebook: a group of one distinct vector is the catalogue's doing, not the tokenizer's."
            ),
            "columns": ["code", "items", "distinct vectors", "titles"],
            "rows": rows,
        }
    )
    return shown


def _distinct_rows(items: Items, members: np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(items.embeddings[members]), axis=0)


def uncertain_panel(items: Items, codes: np.ndarray, confidence: np.ndarray) -> list[dict[str, Any]]:
    """Items whose first code is the least certain, for review; empty where all are certain."""
    doubtful = np.flatnonzero(confidence[:, 0] < 0.5)
    if not len(doubtful):
        return []
    names, written = names_of(items), texts_of(codes)
    order = doubtful[np.argsort(confidence[doubtful, 0], kind="stable")][:GROUPS_SHOWN]
    return [
        {
            "kind": "table",
            "title": "Items to review",
            "note": f"Posterior of the first code below one half: {len(doubtful):,} items, the least sure first.",
            "columns": ["item", "code", "probability"],
            "rows": [[names[row], str(written[row]), float(confidence[row, 0])] for row in order.tolist()],
        }
    ]


def level_table(
    sizes: Sequence[int], metrics: Mapping[str, float], levels: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One line per level: what is used, what is left of the vectors, how the fit went."""
    columns = [
        ("codes used", "utilization/level_{}"),
        ("perplexity / K", "perplexity/level_{}"),
        ("prefixes used", "prefix_utilization/level_{}"),
        ("relative squared error", "reconstruction/relative_mse/level_{}"),
        ("posterior entropy (nats)", "posterior_entropy/level_{}"),
    ]
    present = [(name, key) for name, key in columns if any(key.format(level) in metrics for level in range(len(sizes)))]
    extras = [name for name in ("iterations", "dead_codes", "reseeded") if any(name in found for found in levels)]
    rows = []
    for level, size in enumerate(sizes):
        found = levels[level] if level < len(levels) else {}
        cells = [{"value": metrics.get(key.format(level)), "digits": 4} for _, key in present]
        rows.append([f"{level + 1}", size, *cells, *(_count(found.get(name)) for name in extras)])
    return {
        "kind": "table",
        "title": "Levels",
        "note": (
            "Codes used and perplexity as shares of K, prefixes as a share of all there could be; the error is what is "
            "left after this many levels."
        ),
        "columns": ["level", "K", *(name for name, _ in present), *(name.replace("_", " ") for name in extras)],
        "rows": rows,
        "terminal": True,
    }


def _count(value: Any) -> Any:
    """A number of the fit report; a list has one per round."""
    return sum(value) if isinstance(value, list) else value
