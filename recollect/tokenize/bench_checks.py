"""What a baseline must satisfy before anybody compares with it; a comparison in which one fails is not reported.

- additive methods whose levels are nearest-mean (`rq-kmeans`): relative squared error does not grow with depth, where
  no step before them changes distances and the fit took all items alike;
- `random`: distinct codes and used codes per level are what independent uniform draws give;
- `opq`: the rotation is orthogonal;
- `prq-kmeans`: what a level leaves is orthogonal to the centroid it took out, and the nearest such vector;
- `balanced-rq-kmeans`, `constrained-rq-kmeans`: codes of the fitted items have the sizes they are named for;
- methods with a reconstruction: the distance they tell is that of the decoded row;
- every method: equal rows have equal codes, and encoding again gives the same codes.

Source: semantic_ids 3 and 8 (O5, O7, O8, O10).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.errors import BaselineFailed
from recollect.tokenize.methods import Entry
from recollect.tokenize.protocol import Encoding, ItemTokenizer

GROWTH = 1e-6
"""Relative error may grow by so much from level to level: rounding."""

DEVIATIONS = 6.0
"""How far random codes may be from their expectation, in standard deviations."""

MONOTONE = ("rq-kmeans", "vq")

CHECKED_ROWS = 4096
"""Items, evenly spaced, whose distances and residuals are looked at."""

ORTHOGONAL = 1e-5
"""How far products of vectors that are to be orthogonal may be from 0."""

DISTANCE = 1e-4
"""How far a distance may be from that of the decoded row, as a share of the lengths it is the difference of."""

BEYOND_SIZES = {"constrained": 0.01, "greedy": 0.25}
"""Share of the items that may be beyond the sizes of their codes. `constrained` keeps to these up to rounding; prices
of `greedy` balance approximately: on two real catalogues .01 of the items are beyond, by nearest centroids .2 to .9
[measured].
"""

ALIKE = 1e-4
"""Residuals that differ by less in every dimension, as a share of the largest number, are one to a price."""


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


def check_distances(entry: Entry, tokenizer: Any, embeddings: np.ndarray, encoding: Encoding) -> None:
    """Refuse distances that are not those of the decoded rows, where nothing but the quantiser stands between them.

    Preprocessing that cannot be undone, or that changes distances, and the padding of OPQ to a multiple of L do.

    Raises:
        BaselineFailed: one differs by more than rounding.
    """
    if encoding.distance is None or not _decodes_exactly(tokenizer):
        return
    rows = _checked_rows(len(embeddings))
    wanted = np.asarray(embeddings[rows], dtype=np.float64)
    told = np.sqrt(encoding.distance[rows].astype(np.float64))
    found = np.linalg.norm(wanted - tokenizer.decode(encoding.codes[rows]), axis=1)
    differs = ~(np.abs(told - found) <= DISTANCE * (np.linalg.norm(wanted, axis=1) + found))
    if differs.any():
        at = int(np.flatnonzero(differs)[0])
        raise BaselineFailed(
            f"{entry.label}: the squared distance told of item {int(rows[at])} is {told[at] ** 2:.6g} where its codes "
            f"decode to {found[at] ** 2:.6g}; one of encode and decode is broken"
        )


def _checked_rows(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, CHECKED_ROWS)).astype(np.int64))


def _decodes_exactly(tokenizer: Any) -> bool:
    steps = tokenizer.preprocess
    if steps.steps and (steps.whiten or not steps.is_invertible):
        return False
    rotation = getattr(tokenizer, "rotation", None)
    return rotation is None or rotation.shape[0] == rotation.shape[1]


def check_rotation(entry: Entry, tokenizer: Any) -> None:
    """Refuse an OPQ whose rotation changes distances.

    Raises:
        BaselineFailed: its columns are not orthonormal.
    """
    if entry.spec.name != "opq":
        return
    rotation = tokenizer.rotation.astype(np.float64)
    off = float(np.abs(rotation.T @ rotation - np.eye(rotation.shape[1])).max())
    if not off <= ORTHOGONAL:
        raise BaselineFailed(
            f"{entry.label}: the rotation is {off:.3g} away from an orthogonal one, so distances in the turned space "
            "are not those of the items"
        )


def check_projections(entry: Entry, tokenizer: Any, embeddings: np.ndarray, codes: np.ndarray) -> None:
    """Refuse a PRQ-KMeans that leaves something else than norm(r - proj_c r), the nearest unit vector orthogonal to c.

    Rows with nothing but rounding off their centroid have no direction left and are passed over.

    Raises:
        BaselineFailed: at some level it does.
    """
    if entry.spec.name != "prq-kmeans":
        return
    import torch

    rows = _checked_rows(len(embeddings))
    residual = torch.from_numpy(tokenizer.preprocess.apply(np.asarray(embeddings[rows]))).to(tokenizer.device)
    for level, fitted in enumerate(tokenizer.levels):
        chosen = torch.from_numpy(codes[rows, level].astype(np.int64)).to(tokenizer.device)
        left = fitted.remainder(residual, chosen)
        centre = torch.nn.functional.normalize(fitted.means[chosen].double(), dim=1)
        off = residual.double() - (residual.double() * centre).sum(dim=1, keepdim=True) * centre
        has_direction = off.norm(dim=1) > ORTHOGONAL
        along = (left.double() * centre).sum(dim=1).abs()
        astray = (left.double() - torch.nn.functional.normalize(off, dim=1)).norm(dim=1)
        wrong = has_direction & ~((along <= ORTHOGONAL) & (astray <= ORTHOGONAL))
        if wrong.any():
            at = int(torch.nonzero(wrong)[0, 0])
            raise BaselineFailed(
                f"{entry.label}: what level {level} leaves of item {int(rows[at])} has {float(along[at]):.3g} along "
                f"the centroid that was taken out and is {float(astray[at]):.3g} from its projection"
            )
        residual = left


def check_sizes(entry: Entry, tokenizer: Any, embeddings: np.ndarray, codes: np.ndarray) -> None:
    """Refuse balanced codes that are not: too many items above the largest or short of the smallest size of a code.

    Args:
        embeddings, codes: (N, D) and (N, L) of the items of the fit, which counted alike.

    Raises:
        BaselineFailed: more than `BEYOND_SIZES` and the items that no price tells from another one.
    """
    if entry.spec.name not in ("balanced-rq-kmeans", "constrained-rq-kmeans"):
        return
    from recollect.tokenize.balanced import size_bounds

    balancing, n = entry.options.balancing, len(codes)
    residual = tokenizer.preprocess.apply(np.asarray(embeddings, dtype=np.float32))
    for level, fitted in enumerate(tokenizer.levels):
        means = fitted.means.cpu().numpy()
        fewest, most = size_bounds(n, len(means), balancing)
        counts = np.bincount(codes[:, level], minlength=len(means))
        beyond = max(int(np.maximum(counts - most, 0).sum()), int(np.maximum(fewest - counts, 0).sum()))
        step = max(ALIKE * float(np.abs(residual).max()), np.finfo(np.float32).tiny)
        alike = n - len(np.unique(_row_bytes(np.round(residual / step))))
        if beyond > BEYOND_SIZES[balancing] * n + alike:
            raise BaselineFailed(
                f"{entry.label}: codes of level {level} have {counts.min()} to {counts.max()} items where balance is "
                f"{fewest} to {most}; {beyond} of {n} items are out of place"
            )
        residual = residual - means[codes[:, level]]


def check_unit(
    entry: Entry,
    tokenizer: ItemTokenizer,
    embeddings: np.ndarray,
    encoding: Encoding,
    again: np.ndarray,
    found: Mapping[str, float],
    *,
    is_fitted_on_all: bool,
) -> None:
    """Every check of this module on one fitted method.

    Args:
        encoding: of `embeddings` (N, D).
        again: (N, L) codes of a second call.
        found: its metrics.
        is_fitted_on_all: all items, all alike. Else balance and the error that falls with depth are those of the items
            and weights of the fit, and those of every item once may be others.

    Raises:
        BaselineFailed: one does not hold.
    """
    codes, sizes = encoding.codes, tokenizer.codebook_sizes
    distinct = check_codes(entry, embeddings, codes, again)
    check_random(entry, codes, sizes, distinct)
    check_rotation(entry, tokenizer)
    check_projections(entry, tokenizer, embeddings, codes)
    if is_fitted_on_all:
        keys = [f"reconstruction/relative_mse/level_{level}" for level in range(len(sizes))]
        check_depths(entry, [found[key] for key in keys if key in found])
        check_sizes(entry, tokenizer, embeddings, codes)
    check_distances(entry, tokenizer, embeddings, encoding)
