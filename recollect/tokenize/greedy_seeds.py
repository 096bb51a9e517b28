"""Greedy k-means++: first means drawn by squared distance to those there are, the best of a few candidates each time.

Source: Arthur and Vassilvitskii 2007; the 2 + log K candidates per seed are scikit-learn's number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_FEWEST_ROWS = 16384
_ROWS_PER_SEED = 64


def seed_sample(n: int, k: int, generator: np.random.Generator) -> np.ndarray | None:
    """Ascending positions of the rows that K seeds are drawn from, at most max(16384, 64 K); None = all n of them."""
    size = max(_FEWEST_ROWS, _ROWS_PER_SEED * k)
    return None if n <= size else np.sort(generator.choice(n, size=size, replace=False))


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
