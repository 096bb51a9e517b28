"""Greedy k-means++: first means drawn by squared distance to those there are, the best of a few candidates each time.

Source: Arthur and Vassilvitskii 2007; the 2 + log K candidates per seed are scikit-learn's number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError

_FEWEST_ROWS = 16384
_ROWS_PER_SEED = 64


def positive_rows(weight: np.ndarray, k: int) -> np.ndarray:
    """Ascending positions of the rows of positive weight (n,).

    Raises:
        InputError: fewer than the K codes they are to fill.
    """
    rows = np.flatnonzero(weight > 0)
    if len(rows) < k:
        raise InputError(
            f"{len(rows)} items of positive weight cannot fill a codebook of {k} codes; "
            f"use --codebook-size {len(rows)} or fewer"
        )
    return rows


def seed_sample(n: int, k: int, weight: np.ndarray | None, generator: np.random.Generator) -> np.ndarray | None:
    """Ascending positions of the rows that K seeds are drawn from: of positive weight, at most max(16384, 64 K).

    Args:
        n: rows there are.
        weight: (n,) >= 0; None = all the same.

    Returns:
        the positions, or None for all n rows.

    Raises:
        InputError: see `positive_rows`.
    """
    rows = np.arange(n) if weight is None else positive_rows(weight, k)
    size = max(_FEWEST_ROWS, _ROWS_PER_SEED * k)
    if len(rows) > size:
        return rows[np.sort(generator.choice(len(rows), size=size, replace=False))]
    return None if len(rows) == n else rows


def greedy_seeds(points: Tensor, k: int, weight: np.ndarray | None, generator: np.random.Generator) -> np.ndarray:
    """(K,) positions of rows to begin from; rows repeat only where fewer than K differ.

    Args:
        points: (S, D) float32, S >= K, near the origin: squared distances are expanded into squares and products.
        weight: (S,) >= 0, how much a row counts; None = all the same.
        generator: all draws come from it.
    """
    counts = np.ones(len(points)) if weight is None else np.asarray(weight, dtype=np.float64)
    share = torch.from_numpy(counts).to(points.device)
    squares = points.square().sum(dim=1)  # (S,)
    trials = 2 + int(math.log(k))
    chosen = [_drawn(counts, generator.random(1))[0]]
    distance = _distances(points, squares, np.array(chosen))[:, 0]
    while len(chosen) < k:
        cost = (distance.double() * share).cpu().numpy()
        candidates = _drawn(cost if cost.sum() > 0 else counts, generator.random(trials))
        nearer = torch.minimum(_distances(points, squares, candidates), distance[:, None])  # (S, T)
        best = int((share @ nearer.double()).argmin())
        chosen.append(candidates[best])
        distance = nearer[:, best]
    return np.array(chosen)


def _drawn(chance: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Positions drawn in proportion to `chance` (S,) >= 0 by inverting its running sum at uniform numbers (T,)."""
    running = np.cumsum(chance)
    return np.minimum(np.searchsorted(running, uniform * running[-1], side="right"), np.flatnonzero(chance)[-1])


def _distances(points: Tensor, squares: Tensor, positions: np.ndarray) -> Tensor:
    """(S, T) float32 squared distances of all points (S, D) to those at positions (T,)."""
    chosen = torch.from_numpy(positions).to(points.device)
    found = torch.addmm(squares[:, None], points, points[chosen].T, alpha=-2).add_(squares[chosen]).clamp_min_(0)
    return found.index_put_((chosen, torch.arange(len(chosen), device=points.device)), found.new_zeros(()))
