"""What a baseline must satisfy before anybody compares with it; a comparison in which one fails is not reported.

- additive methods whose levels are nearest-mean (`rq-kmeans`): relative squared error does not grow with depth, where
  no step before them changes distances and the fit took all items alike;
- `random`: distinct codes and used codes per level are what independent uniform draws give;
- every method: equal rows have equal codes, and encoding again gives the same codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from recollect.errors import BaselineFailed
from recollect.tokenize.methods import Entry

GROWTH = 1e-6
"""Relative error may grow by so much from level to level: rounding."""

DEVIATIONS = 6.0
"""How far random codes may be from their expectation, in standard deviations."""

MONOTONE = ("rq-kmeans", "vq")


def check_depths(entry: Entry, by_depth: Sequence[float]) -> None:
    """Refuse a k-means chain whose relative squared error grows with depth.

    Raises:
        BaselineFailed: it does.
    """
    if entry.spec.name not in MONOTONE or not _keeps_distances(entry):
        return
    chain = [1.0, *by_depth]
    for depth, (before, after) in enumerate(itertools.pairwise(chain), start=1):
        if after > before + GROWTH:
            raise BaselineFailed(
                f"{entry.label}: relative squared error grows from {before:.6g} to {after:.6g} at level {depth}, which "
                "k-means on residuals cannot do; the fit is broken, so nothing may be compared with it"
            )


def _keeps_distances(entry: Entry) -> bool:
    """Whether the error a row is fitted on is that of its input, up to a constant."""
    steps = set(getattr(entry.options, "preprocess", None) or ())
    return not steps & {"l2", "direction"} and not getattr(entry.options, "whiten", False)


def check_random(entry: Entry, codes: np.ndarray, sizes: Sequence[int], distinct_rows: int) -> None:
    """Refuse random codes that are not uniform: distinct tuples and used codes per level against their expectation.

    Args:
        distinct_rows: how many different embeddings there are; equal ones share their draw.

    Raises:
        BaselineFailed: further away than `DEVIATIONS` standard deviations.
    """
    if entry.spec.name != "random":
        return
    n = distinct_rows
    counted = {f"codes used at level {level}": (len(np.unique(codes[:, level])), k) for level, k in enumerate(sizes)}
    counted["distinct codes"] = (len(np.unique(codes, axis=0)), math.prod(sizes))
    for what, (found, cells) in counted.items():
        mean, deviation = occupied_cells(n, cells)
        if abs(found - mean) > DEVIATIONS * deviation + 1.0:
            raise BaselineFailed(
                f"{entry.label}: {found} {what} where {n} uniform draws of {cells} give {mean:.1f} +- {deviation:.1f}; "
                "these codes are not random"
            )


def occupied_cells(n: int, cells: int) -> tuple[float, float]:
    """Mean and standard deviation of the number of cells that n uniform draws hit."""
    if cells <= 1:
        return 1.0, 0.0
    mean = -cells * math.expm1(n * math.log1p(-1.0 / cells))
    load = n / cells
    # The limit for many cells; the exact variance is a difference of squares that cancels for 256^4 of them.
    variance = cells * math.exp(-load) * (-math.expm1(-load) - load * math.exp(-load))
    return mean, math.sqrt(max(0.0, variance))


def check_codes(entry: Entry, embeddings: np.ndarray, codes: np.ndarray, again: np.ndarray) -> int:
    """Refuse codes that differ from one encoding to the next, or between equal rows; how many rows are distinct.

    Args:
        codes, again: (N, L), from two calls.

    Raises:
        BaselineFailed: they differ.
    """
    if not np.array_equal(codes, again):
        rows = int((codes != again).any(axis=1).sum())
        raise BaselineFailed(f"{entry.label}: encoding the same rows again changes the codes of {rows} items")
    _, first, inverse = np.unique(_row_bytes(embeddings), return_index=True, return_inverse=True)
    differing = (codes != codes[first[inverse.reshape(-1)]]).any(axis=1)
    if differing.any():
        item = int(np.flatnonzero(differing)[0])
        other = int(first[inverse.reshape(-1)[item]])
        raise BaselineFailed(
            f"{entry.label}: items {other} and {item} have the same embedding and the codes {codes[other].tolist()} "
            f"and {codes[item].tolist()}"
        )
    return len(first)


def _row_bytes(embeddings: np.ndarray) -> np.ndarray:
    """(N,) hashes of the rows' values, -0 as 0; 128 bits, so that equal means the same row."""
    import hashlib

    found = np.empty(len(embeddings), dtype="S16")
    for row in range(len(embeddings)):
        values = np.asarray(embeddings[row], dtype=np.float64) + 0.0
        found[row] = hashlib.blake2b(values.tobytes(), digest_size=15).digest() + b"\x01"  # S drops trailing zeros
    return found


def check_unit(
    entry: Entry,
    embeddings: np.ndarray,
    codes: np.ndarray,
    again: np.ndarray,
    sizes: Sequence[int],
    found: Mapping[str, float],
    *,
    is_fitted_on_all: bool,
) -> None:
    """Every check of this module on one fitted method; `found` holds its metrics.

    is_fitted_on_all: all items, all alike. Else the error that falls with depth is that of the items and weights of the
    fit, and the one in `found`, of every item once, may grow.

    Raises:
        BaselineFailed: one does not hold.
    """
    distinct = check_codes(entry, embeddings, codes, again)
    check_random(entry, codes, sizes, distinct)
    if is_fitted_on_all:
        keys = [f"reconstruction/relative_mse/level_{level}" for level in range(len(sizes))]
        check_depths(entry, [found[key] for key in keys if key in found])
