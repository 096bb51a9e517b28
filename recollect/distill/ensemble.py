"""Logit ensemble of two stand-alone models: the ceiling a distilled student is held against (spec 4.4 g).

Each model's scores are standardised within the case over the whole catalogue, seen items included, then mixed, then
masked; the mixing weight is chosen on validation cases, of the same mixture, never on test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.metrics import ndcg, rank_counts
from recollect.recommenders.protocol import Recommender

WEIGHTS = np.linspace(0.0, 1.0, 21)
"""Shares of the second model that are tried."""


def case_z_scores(scores: np.ndarray) -> np.ndarray:
    """Scores of each case at mean 0 and variance 1 over its finite entries.

    Args:
        scores: (B, N); masked items are -inf and stay so.

    Returns:
        (B, N) float64; a case whose scores are all equal becomes 0.

    Raises:
        InputError: a score is NaN or +inf, or a case is masked throughout.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise InputError("scores must be finite, or -inf where masked; NaN or +inf was given")
    known = np.isfinite(scores)
    count = known.sum(1, keepdims=True)
    if not count.all():
        raise InputError(f"case {int((count[:, 0] == 0).argmax())} has no item that is not masked")
    mean = np.where(known, scores, 0.0).sum(1, keepdims=True) / count
    centred = np.where(known, scores - mean, 0.0)
    deviation = np.sqrt((centred**2).sum(1, keepdims=True) / count)
    flat = deviation <= 1e-12 * np.maximum(np.abs(mean), 1.0)  # nothing but rounding: the model is indifferent
    z = np.where(flat, 0.0, centred / np.where(flat, 1.0, deviation))
    return np.where(known, z, -np.inf)


def mixed_scores(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """(1 - weight) * z(first) + weight * z(second), (B, N) float64; an item masked in either stays masked.

    Raises:
        ConfigError: the weight is outside [0, 1].
        InputError: the models score other items or cases.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"the ensemble weight must be between 0 and 1, got {weight!r}")
    if np.shape(first) != np.shape(second):
        raise InputError(f"the two models' scores are {np.shape(first)} and {np.shape(second)}")
    one, two = case_z_scores(first), case_z_scores(second)
    masked = np.isneginf(one) | np.isneginf(two)
    one[masked] = two[masked] = 0.0
    return np.where(masked, -np.inf, (1.0 - weight) * one + weight * two)


class WeightChoice:
    """Chooses the weight on validation cases, batch by batch, by mean NDCG@k with exact ties.

    Args:
        k: cut-off.
        weights: shares of the second model to try; of equally good ones the smallest wins.
    """

    def __init__(self, k: int = 10, weights: np.ndarray = WEIGHTS) -> None:
        self.weights = np.asarray(weights, dtype=np.float64)
        self._k = k
        self._sum = np.zeros(len(self.weights))
        self._total = 0.0

    def add(
        self,
        first: np.ndarray,
        second: np.ndarray,
        target: np.ndarray,
        *,
        masked: np.ndarray | None = None,
        share: np.ndarray | None = None,
    ) -> None:
        """Take in validation cases.

        Args:
            first, second: scores (B, N) of both models, unmasked, as `EnsembleScores` mixes them.
            target: (B,) the true items.
            masked: (B, N) bool, items that are not ranked; never the target.
            share: (B,) what each case counts for; default 1.
        """
        share = np.ones(len(target)) if share is None else share
        one, two = case_z_scores(first), case_z_scores(second)
        for number, weight in enumerate(self.weights.tolist()):
            mixed = (1.0 - weight) * one + weight * two
            if masked is not None:
                mixed[masked] = -np.inf
            self._sum[number] += (ndcg(*rank_counts(mixed, target), self._k) * share).sum()
        self._total += float(share.sum())

    @property
    def curve(self) -> np.ndarray:
        """(W,) mean NDCG@k per weight.

        Raises:
            InputError: no case was added.
        """
        if not self._total:
            raise InputError("the ensemble weight cannot be chosen without validation cases")
        return self._sum / self._total

    @property
    def best(self) -> float:
        """The weight with the highest mean."""
        curve = self.curve
        return float(self.weights[int((curve >= curve.max() - 1e-12).argmax())])


class EnsembleScores:
    """Two fitted recommenders as one ranker.

    Args:
        first, second: over the same items.
        weight: share of the second, from `WeightChoice`.
    """

    def __init__(self, first: Recommender, second: Recommender, weight: float) -> None:
        if first.n_items != second.n_items:
            raise InputError(f"{first.name!r} scores {first.n_items} items, {second.name!r} {second.n_items}")
        self.name = f"{first.name}+{second.name}"
        self.n_items = first.n_items
        self.weight = weight
        self._models = first, second

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, C) float32, or (B, n_items); standardised over all items, so candidates change no score."""
        first, second = (model.score(histories) for model in self._models)
        mixed = mixed_scores(first, second, self.weight).astype(np.float32)
        return mixed if candidates is None else np.take_along_axis(mixed, candidates, axis=1)
