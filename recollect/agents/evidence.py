"""What speaks for each candidate of a slate, by name: the columns the choice layer is fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recollect.agents.memory import Weights, cosine

LANGUAGE = ("lm_pmi", "lm_pairwise", "lm_listwise", "lm_likelihood")
"""Columns that come from the language model; the first one present is its own ranking."""

GROUP = ("group_view", "group_popularity")
FUSION = ("fused_memory",)
DIGITS = 6


class Evidence:
    """Named columns of (C,) floats for one slate, rounded so that the event log is the evidence."""

    def __init__(self, n_candidates: int) -> None:
        self._n = n_candidates
        self._columns: dict[str, list[float]] = {}

    def put(self, name: str, values: Iterable[float]) -> None:
        """Add a column.

        Raises:
            ValueError: it has another length than the slate or holds NaN or infinity.
        """
        column = [round(float(value), DIGITS) for value in values]
        if len(column) != self._n or not np.isfinite(column).all():
            raise ValueError(f"evidence {name!r} must be {self._n} finite numbers, got {column!r}")
        self._columns[name] = column

    @staticmethod
    def audience(taste: Weights, audience: Weights) -> float:
        """How much a user's taste resembles that of the item's takers: cosine of the two weightings."""
        return cosine(taste, audience)

    def language_scores(self) -> list[float]:
        """The language model's own ranking scores."""
        return next(self._columns[name] for name in LANGUAGE if name in self._columns)

    def to_json(self) -> Mapping[str, Any]:
        """{name: [C floats]} in name order."""
        return {name: self._columns[name] for name in sorted(self._columns)}


def bradley_terry(log_odds: np.ndarray, *, iterations: int = 200) -> np.ndarray:
    """(C,) strengths (log scale, mean 0) that explain soft pairwise wins sigmoid(log_odds[a, b]) of a over b.

    Minorisation-maximisation on the expected wins with half a virtual tie per pair, which keeps strengths finite.
    """
    n = len(log_odds)
    wins = 1 / (1 + np.exp(-np.clip(log_odds, -50, 50)))
    np.fill_diagonal(wins, 0.0)
    wins = wins + 0.25 * (1 - np.eye(n))
    games = wins + wins.T
    total = wins.sum(axis=1)
    strength = np.ones(n)
    for _ in range(iterations):
        denominator = (games / (strength[:, None] + strength[None, :])).sum(axis=1)
        strength = total / denominator
        strength /= np.exp(np.log(strength).mean())
    return np.log(strength)
