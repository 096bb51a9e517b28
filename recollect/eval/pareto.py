"""Accuracy against a cost over a method's whole curve: frontier, hyper-volume, paired intervals.

A point is (gain, cost): gain higher is better (NDCG@10), cost lower is better and in 0..1 (MRMC@10, or 1 - LtC@10).
The hyper-volume is the area between the points and the reference (0, 1): what the curve dominates. All methods are
resampled with the same draws of users, so their differences are paired.

Source: fairlrm 7 [our design].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recollect.eval.statistics import Interval, interval_of_draws, resample_weights


def frontier(gain: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """(P,) bool: points that no other point beats in one coordinate without losing in the other."""
    better = (gain[None, :] >= gain[:, None]) & (cost[None, :] <= cost[:, None])
    strictly = (gain[None, :] > gain[:, None]) | (cost[None, :] < cost[:, None])
    return np.logical_not(np.any(better & strictly, axis=1))


def hyper_volume(gain: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Area dominated by the points of each column, against the reference (0, 1).

    Args:
        gain, cost: (P,) or (P, B), P points of one curve, B draws; gain >= 0, cost <= 1 where a point counts.

    Returns:
        () or (B,).
    """
    order = np.argsort(-gain, axis=0, kind="stable")
    gain, cost = np.take_along_axis(gain, order, axis=0), np.take_along_axis(cost, order, axis=0)
    height = 1 - np.minimum.accumulate(np.minimum(cost, 1.0), axis=0)
    width = np.maximum(gain, 0) - np.maximum(np.concatenate([gain[1:], np.zeros_like(gain[:1])]), 0)
    return (width * height).sum(axis=0)


class PairedDraws:
    """Resampled means and coverages over one set of users.

    Args:
        n_users: U.
        n_draws: B.
        seed: of the draws; equal (U, B, seed) give equal draws.
    """

    def __init__(self, n_users: int, n_draws: int, seed: int) -> None:
        self.weights = np.concatenate(list(resample_weights(n_users, n_draws, seed)))  # (B, U)
        self._n_users = n_users

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(B,) means of values (U,)."""
        return self.weights @ values / self._n_users

    def group_mean(self, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """(B,) means of values (U,) over the drawn users of a group (U,) bool; NaN where a draw holds none."""
        weights = self.weights[:, inside]
        total = weights.sum(axis=1)
        return np.where(total > 0, weights @ values[inside] / np.maximum(total, 1), np.nan)

    def coverage(self, lists: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """(B,) share of the counted items that some drawn user's list holds, shifted to be centred on the sample's.

        A resample holds fewer distinct users, so its coverage is too low; the shift takes the bias out and keeps the
        spread.

        Args:
            lists: (U, K) items, negative = none.
            counted: (n_items,) bool.
        """
        if not counted.any():
            return np.zeros(len(self.weights))
        held = np.zeros((len(lists), len(counted)), dtype=np.float32)
        row, place = np.nonzero(lists >= 0)
        held[row, lists[row, place]] = 1
        held = held[:, counted]
        held = held[:, held.any(axis=0)]
        draws = ((self.weights > 0).astype(np.float32) @ held > 0).sum(axis=1) / int(counted.sum())
        return draws - draws.mean() + held.shape[1] / int(counted.sum())

    def interval(self, value: float, draws: np.ndarray) -> Interval:
        """The value with the percentile interval of its draws."""
        return interval_of_draws(value, draws, self._n_users)


@dataclass(frozen=True)
class Curve:
    """One method over the values of its knob: gain and cost (P,), and their draws (P, B)."""

    method: str
    knob: str
    values: tuple[float, ...]
    gain: np.ndarray
    cost: np.ndarray
    gain_draws: np.ndarray
    cost_draws: np.ndarray

    def volume(self, draws: PairedDraws) -> Interval:
        """Hyper-volume with its interval."""
        return draws.interval(float(hyper_volume(self.gain, self.cost)), self.volume_draws())

    def volume_draws(self) -> np.ndarray:
        """(B,)."""
        return hyper_volume(self.gain_draws, self.cost_draws)


def joint_frontier(curves: Sequence[Curve]) -> list[np.ndarray]:
    """For each curve, which of its points (P,) are on the frontier of all curves together."""
    gain = np.concatenate([curve.gain for curve in curves])
    cost = np.concatenate([curve.cost for curve in curves])
    flags = frontier(gain, cost)
    ends = np.cumsum([len(curve.gain) for curve in curves])
    return [flags[end - len(curve.gain) : end] for curve, end in zip(curves, ends, strict=True)]
