"""Mean and variance of rows read a block at a time, and the change of units that makes them 0 and 1."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recollect.tokenize.rows import ArrayRows, spans

BLOCK_ROWS = 8192  # rows read at a time, at most


class Scaling(NamedTuple):
    """Rows x are learned from as (x - mean) / size; mean (D,) float64, size > 0.

    One size for all dimensions: squared errors keep their proportions, and a dimension without variance does no harm.
    """

    mean: Tensor
    size: float

    def apply(self, rows: Tensor) -> Tensor:
        """(B, D) float32 of rows (B, D); the arithmetic is float64."""
        return ((rows.double() - self.mean) / self.size).float()


class Moments:
    """Weighted sums of rows and of their squares about the first row, which keeps digits."""

    def __init__(self, source: ArrayRows) -> None:
        self._origin = source.block(0, 1).double()[0]
        self.mass, self._sums, self._squares = 0.0, torch.zeros_like(self._origin), 0.0

    def add(self, block: Tensor, share: Tensor) -> None:
        """Take in rows (B, D) with weights (B,), float64."""
        centred = block - self._origin
        self.mass += float(share.sum())
        self._sums += share @ centred
        self._squares += float(share @ centred.square().sum(1))

    def mean(self) -> Tensor:
        """(D,) weighted mean."""
        return self._origin + self._sums / self.mass

    def total_variance(self) -> float:
        """Weighted sum of squared distances to the mean."""
        return self._squares - float(self._sums @ self._sums) / self.mass


def scaling_of(source: ArrayRows, weights: np.ndarray | None, unit: Literal["total", "mean"]) -> Scaling:
    """To mean 0 and variance 1 of the rows with weights (n,): in total or on average over the dimensions.

    Where all rows are equal their size is left as it is.
    """
    moments = Moments(source)
    for start, stop in spans(len(source), BLOCK_ROWS):
        share = np.ones(stop - start) if weights is None else weights[start:stop]
        moments.add(source.block(start, stop).double(), torch.from_numpy(share).double())
    variance = moments.total_variance() / moments.mass / (source.dimension if unit == "mean" else 1)
    return Scaling(moments.mean(), math.sqrt(variance) if variance > 0 else 1.0)
