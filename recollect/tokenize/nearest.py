"""The best code of a row, the same whoever its batch mates are.

A float32 matrix product proposes scores; its last bits depend on the shape of the batch and on the machine. Where the
best two are nearer than the product's rounding bound, the rivals are scored again one by one in float64 from the
definition, so the winner is a function of the row and the codebook alone. Equal scores go to the lower code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PAIRS = 16384  # (row, code) pairs scored again at a time
UNIT_ROUNDOFF = 2.0**-24  # of float32


def product_bound(terms: int, dtype: torch.dtype) -> float:
    """Relative error to expect of a sum of `terms` rounded products, against the sum of their absolute values.

    The square root of the number of terms is the size of accumulated rounding; 4 of it is generous, as sums in a
    matrix product are split over registers. The worst case (terms x roundoff) never occurs in practice.
    """
    return (4 * math.sqrt(terms) + 8) * torch.finfo(dtype).eps / 2


def settled_argmax(scores: Tensor, slack: Tensor, exact: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The code of the highest score in each row, close calls decided by `exact`.

    Args:
        scores: (B, K) proposed scores.
        slack: (B,) >= 0; a code whose score is within it of the best may be the true best.
        exact: (rows (P,), codes (P,)) -> (P,) float64 scores, each a function of its row and code alone.

    Returns:
        (B,) int64.
    """
    best, codes = scores.max(dim=1)
    rivals = scores >= (best - slack)[:, None]  # (B, K)
    contested = torch.nonzero(rivals.sum(dim=1) > 1)[:, 0]  # (C,)
    if not len(contested):
        return codes
    pairs = torch.nonzero(rivals[contested])  # (P, 2)
    table = torch.full((len(contested), scores.shape[1]), -torch.inf, dtype=torch.float64, device=scores.device)
    for part in pairs.split(_PAIRS):
        table[part[:, 0], part[:, 1]] = exact(contested[part[:, 0]], part[:, 1])
    numbers = torch.arange(scores.shape[1], device=scores.device)
    is_best = table == table.max(dim=1, keepdim=True).values
    codes[contested] = torch.where(is_best, numbers, scores.shape[1]).min(dim=1).values
    return codes


def ranked(scores: Tensor, first: Tensor, m: int) -> Tensor:
    """(B, m) codes, best first: `first` (B,), then those of the highest other scores (B, K)."""
    return scores.scatter(1, first[:, None], torch.inf).topk(m, dim=1).indices


class NearestMeans:
    """Search of the nearest codebook row (squared Euclidean distance).

    Args:
        means: (K, D) float32.
    """

    def __init__(self, means: Tensor) -> None:
        self.means = means
        self._centre = means.double().mean(dim=0).float()  # distances do not change, cancellation shrinks
        centred = means - self._centre
        self._products = centred.T.contiguous()  # (D, K)
        self._half_squares = 0.5 * centred.double().square().sum(dim=1)  # (K,)
        self._longest = float(centred.double().norm(dim=1).max())

    def __call__(self, rows: Tensor, m: int = 1) -> Tensor:
        """(B, m) int64 nearest codes of rows (B, D) float32, nearest first; where m > 1 all is scored in float64."""
        if m == 1:
            centred = rows - self._centre
            scores = torch.addmm(-self._half_squares.float(), centred, self._products)  # (B, K)
            bound = 2 * product_bound(self.means.shape[1], torch.float32) * self._longest
        else:
            exact_means = self.means.double() - self._centre.double()
            centred = rows.double() - self._centre.double()
            scores = centred @ exact_means.T - 0.5 * exact_means.square().sum(dim=1)
            bound = 2 * product_bound(self.means.shape[1], torch.float64) * self._longest
        slack = bound * (centred.norm(dim=1) + self._longest)
        first = settled_argmax(scores, slack, lambda row, code: -0.5 * self.squared_distance(rows[row], code))
        return first[:, None] if m == 1 else ranked(scores, first, m)

    def squared_distance(self, rows: Tensor, codes: Tensor) -> Tensor:
        """(B,) float64 squared distances of rows (B, D) to the means of codes (B,)."""
        return (rows.double() - self.means[codes].double()).square().sum(dim=1)
