"""A fitted link from scores to ratings: ordinal thresholds shared by a group of users (proportional odds).

P(rating <= level k) = sigmoid(threshold[group, k] - slope * score): the agent supplies the score, the group its habit
of rating. Fitted on the training log alone; report ratings with and without.

Source: sim_validation 7 (our design).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.errors import InputError
from recollect.eval.fitting import require_enough, sigmoid
from recollect.eval.statistics import cluster_codes

_POOLED_PENALTY = 1e-3


@dataclass(frozen=True)
class RatingLayer:
    """levels: (K,) ascending rating values.  thresholds: {group label: (K - 1,) ascending}, plus `pooled` (K - 1,) for
    groups never seen.  slope: log-odds per standard deviation of the score.
    """

    levels: np.ndarray
    slope: float
    mean: float
    scale: float
    pooled: np.ndarray
    thresholds: Mapping[Any, np.ndarray]
    n_cases: int

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        ratings: np.ndarray,
        users: np.ndarray,
        groups: np.ndarray | None = None,
        *,
        l2: float = 1.0,
    ) -> RatingLayer:
        """Penalised maximum likelihood.

        Args:
            scores: (T,) what the agent expects; higher is better.
            ratings: (T,) what people gave; every value that occurs is a level.
            users: (T,) who rated, to refuse a fit on too few people.
            groups: (T,) group of each rating's user; None puts all in one.
            l2: how strongly a group's thresholds are drawn to the common ones.

        Raises:
            InputError: too few ratings or users, fewer than two levels, or a score that is not finite.
        """
        from scipy.optimize import minimize

        scores = np.asarray(scores, dtype=np.float64)
        levels, level = np.unique(np.asarray(ratings, dtype=np.float64), return_inverse=True)
        groups = np.zeros(len(scores), dtype=np.int64) if groups is None else np.asarray(groups)
        labels = np.unique(groups)
        codes, n_groups = cluster_codes(groups)
        n_cuts = len(levels) - 1
        require_enough("a rating layer", len(scores), cluster_codes(users)[1], 1 + n_cuts * n_groups)
        if n_cuts < 1 or not np.isfinite(scores).all() or not np.isfinite(levels).all():
            raise InputError(
                f"a rating layer needs finite scores and at least two rating levels, got levels {levels.tolist()!r} "
                f"and {int((~np.isfinite(scores)).sum())} scores that are not finite"
            )
        mean = float(scores.mean())
        scale = float(scores.std()) or 1.0
        standard = (scores - mean) / scale
        share = np.clip(np.cumsum(np.bincount(level))[:-1] / len(level), 1e-3, 1 - 1e-3)
        cuts = np.log(share / (1.0 - share))
        start_pooled = np.concatenate([cuts[:1], np.log(np.maximum(np.diff(cuts), 1e-2))])
        start = np.concatenate([[0.0], start_pooled, np.zeros(n_groups * n_cuts)])

        def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            slope, pooled = parameters[0], parameters[1 : 1 + n_cuts]
            deviation = parameters[1 + n_cuts :].reshape(n_groups, n_cuts)
            thresholds = _ascending(pooled + deviation)  # (G, K - 1)
            loss, of_threshold, of_slope = _negative_log_likelihood(thresholds, slope, standard, level, codes)
            of_raw = _through_ascending(of_threshold, pooled + deviation)
            away = pooled - start_pooled
            value = loss + 0.5 * l2 * float((deviation**2).sum()) + 0.5 * _POOLED_PENALTY * float(away @ away)
            slope_of_pooled = of_raw.sum(axis=0) + _POOLED_PENALTY * away
            gradient = np.concatenate([[of_slope], slope_of_pooled, (of_raw + l2 * deviation).ravel()])
            return value / len(scores), gradient / len(scores)

        options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-8}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
        pooled = found[1 : 1 + n_cuts]
        thresholds = _ascending(pooled + found[1 + n_cuts :].reshape(n_groups, n_cuts))
        return cls(
            levels=levels,
            slope=float(found[0]),
            mean=mean,
            scale=scale,
            pooled=_ascending(pooled[None])[0],
            thresholds=dict(zip(labels.tolist(), thresholds, strict=True)),
            n_cases=len(scores),
        )

    def probabilities(self, scores: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """(T, K) probability of each level; groups never seen, and None, use the pooled thresholds."""
        scores = np.asarray(scores, dtype=np.float64)
        labels = [None] * len(scores) if groups is None else np.asarray(groups).tolist()
        only = self.thresholds if len(self.thresholds) > 1 else {}
        table = np.stack([only.get(label, self._default()) for label in labels]) if labels else np.zeros((0, 1))
        standard = (scores - self.mean) / self.scale
        below = sigmoid(table - self.slope * standard[:, None])
        edges = np.column_stack([np.zeros(len(scores)), below, np.ones(len(scores))])
        return np.maximum(np.diff(edges, axis=1), 0.0)

    def _default(self) -> np.ndarray:
        return self.pooled if len(self.thresholds) > 1 else next(iter(self.thresholds.values()))

    def expected(self, scores: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """(T,) expected rating: the best guess under squared error."""
        return self.probabilities(scores, groups) @ self.levels

    def draw(self, scores: np.ndarray, generator: np.random.Generator, groups: np.ndarray | None = None) -> np.ndarray:
        """(T,) ratings drawn from the probabilities: what a simulated distribution should be made of."""
        cumulative = np.cumsum(self.probabilities(scores, groups), axis=1)
        level = (generator.random(len(cumulative))[:, None] > cumulative).sum(axis=1)
        return self.levels[np.minimum(level, len(self.levels) - 1)]

    def to_json(self) -> dict[str, Any]:
        """JSON values; floats survive exactly."""
        return {
            "levels": self.levels.tolist(),
            "slope": self.slope,
            "mean": self.mean,
            "scale": self.scale,
            "pooled": self.pooled.tolist(),
            "thresholds": [[label, cuts.tolist()] for label, cuts in self.thresholds.items()],
            "n_cases": self.n_cases,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RatingLayer:
        """Inverse of `to_json`."""
        return cls(
            levels=np.array(value["levels"], dtype=np.float64),
            slope=float(value["slope"]),
            mean=float(value["mean"]),
            scale=float(value["scale"]),
            pooled=np.array(value["pooled"], dtype=np.float64),
            thresholds={label: np.array(cuts, dtype=np.float64) for label, cuts in value["thresholds"]},
            n_cases=int(value["n_cases"]),
        )


def _ascending(raw: np.ndarray) -> np.ndarray:
    """(G, K - 1) thresholds: the first as it is, then steps of exp(raw)."""
    return np.cumsum(np.column_stack([raw[:, :1], np.exp(np.clip(raw[:, 1:], -30.0, 30.0))]), axis=1)


def _through_ascending(of_threshold: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Gradient in the raw parameters from the gradient in the thresholds."""
    from_here = np.cumsum(of_threshold[:, ::-1], axis=1)[:, ::-1]
    return np.column_stack([from_here[:, :1], from_here[:, 1:] * np.exp(np.clip(raw[:, 1:], -30.0, 30.0))])


def _negative_log_likelihood(
    thresholds: np.ndarray, slope: float, standard: np.ndarray, level: np.ndarray, codes: np.ndarray
) -> tuple[float, np.ndarray, float]:
    """Loss, its gradient in the thresholds (G, K - 1) and in the slope."""
    n_cuts = thresholds.shape[1]
    log_odds = thresholds[codes] - slope * standard[:, None]  # (T, K - 1)
    below = np.column_stack([np.zeros(len(level)), sigmoid(log_odds), np.ones(len(level))])
    rows = np.arange(len(level))
    probability = np.maximum(below[rows, level + 1] - below[rows, level], 1e-300)
    density = below * (1.0 - below)  # 0 at both ends
    upper = density[rows, level + 1] / probability
    lower = density[rows, level] / probability
    of_threshold = np.zeros_like(thresholds)
    has_upper, has_lower = level < n_cuts, level > 0
    np.add.at(of_threshold, (codes[has_upper], level[has_upper]), -upper[has_upper])
    np.add.at(of_threshold, (codes[has_lower], level[has_lower] - 1), lower[has_lower])
    of_slope = float((standard * (upper - lower)).sum())
    return -float(np.log(probability).sum()), of_threshold, of_slope
