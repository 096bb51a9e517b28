"""Post-hoc re-rankers of a candidate list, the baselines that prompting has to beat (fairlrm 6).

All take (U, C) candidates and any model's scores and give a whole order; lambda or beta 0 is the order given.

- `cp`: calibrated popularity (Steck 2018 on popularity classes): greedily argmax (1-l) rel - l D(p_u || q of the list).
- `poppen`: score - beta ln pop.  - `xquad`: greedily argmax (1-l) rel + l sum_c p_u(c) [i in c] (share of the list not
  in c), the smooth form over popularity classes (arXiv 1901.07555).  - `mmr`: greedily (1-l) rel - l max similarity.
- `quota`: exactly round(K rho~) popular items in the first K where the set allows, best first within each class.
- `softmax`: an order drawn place by place from softmax(score / T) of what is left (Plackett-Luce).

rel is the score scaled to 0..1 per user; for `poppen` and `softmax` it is standardised per user, so that one grid of
beta or T serves any scorer [our design]. Equal values keep the order given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from recollect.errors import ConfigError, InputError

Divergence = Literal["kl", "js"]
SMOOTHING = 0.01
_MINIMUM = 1e-12


def order_by(scores: np.ndarray) -> np.ndarray:
    """(U, C) positions by score descending, equal scores in the order given."""
    return np.argsort(-scores, axis=1, kind="stable")


def unit_relevance(scores: np.ndarray) -> np.ndarray:
    """(U, C) float64 scaled to 0..1 per row; a constant row is 0."""
    scores = _checked(scores)
    low = scores.min(axis=1, keepdims=True)
    width = scores.max(axis=1, keepdims=True) - low
    return (scores - low) / np.where(width > 0, width, 1.0)


def standard_relevance(scores: np.ndarray) -> np.ndarray:
    """(U, C) float64 with mean 0 and standard deviation 1 per row; a constant row is 0."""
    scores = _checked(scores)
    spread = scores.std(axis=1, keepdims=True)
    return (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)


def divergence(target: np.ndarray, shares: np.ndarray, kind: Divergence = "kl") -> np.ndarray:
    """How far class shares of lists are from target shares, along the last axis.

    "kl": KL(p || q~), q~ = .99 q + .01 p; "js": Jensen-Shannon in nats. Broadcasts.
    """
    if kind == "kl":
        smooth = (1 - SMOOTHING) * shares + SMOOTHING * target
        return _kl(target, smooth)
    middle = (target + shares) / 2
    return (_kl(target, middle) + _kl(shares, middle)) / 2


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(np.maximum(p, _MINIMUM) / np.maximum(q, _MINIMUM))).sum(axis=-1)


def calibrated_popularity(
    scores: np.ndarray, classes: np.ndarray, target: np.ndarray, strength: float, kind: Divergence = "kl"
) -> np.ndarray:
    """`cp`.

    Args:
        scores: (U, C).
        classes: (U, C) int, the popularity class of each candidate.
        target: (U, K) class shares of each user's history.
        strength: lambda in 0..1.

    Returns:
        (U, C) int64 positions, best first.

    Raises:
        ConfigError: lambda outside 0..1.
    """
    relevance, member = unit_relevance(scores), _members(classes, target.shape[1])
    strength = _share("lambda", strength)

    def gain(step: int, held: np.ndarray) -> np.ndarray:
        shares = (held[:, None, :] + member) / (step + 1)  # (U, C, K) after adding each candidate
        return (1 - strength) * relevance - strength * divergence(target[:, None, :], shares, kind)

    return _greedy(scores, member, gain) if strength > 0 else order_by(scores)


def popularity_penalty(scores: np.ndarray, counts: np.ndarray, strength: float) -> np.ndarray:
    """`poppen`: (U, C) positions by standardised score - beta ln(count), counts (U, C) floored at 1.

    Raises:
        ConfigError: beta is negative or not finite.
    """
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"beta must be a finite number, 0 or more, got {strength!r}")
    return order_by(standard_relevance(scores) - strength * np.log(np.maximum(counts, 1)))


def softmax_order(scores: np.ndarray, temperature: float, noise: np.ndarray) -> np.ndarray:
    """`softmax`: (U, C) positions by standardised score + T noise, which draws from Plackett-Luce.

    Args:
        temperature: T; 0 is the order given, and a large one a random order.
        noise: (U, C) standard Gumbel draws; the same for every T, so that a curve over T is smooth.

    Raises:
        ConfigError: T is negative or not finite.
    """
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"the temperature must be a finite number, 0 or more, got {temperature!r}")
    return order_by(standard_relevance(scores) + temperature * noise)


def xquad(scores: np.ndarray, classes: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """`xquad` over popularity classes; arguments as `calibrated_popularity`."""
    relevance, member = unit_relevance(scores), _members(classes, target.shape[1])
    strength = _share("lambda", strength)

    def gain(step: int, held: np.ndarray) -> np.ndarray:
        uncovered = 1 - held / max(step, 1)  # (U, K)
        return (1 - strength) * relevance + strength * (member * (target * uncovered)[:, None, :]).sum(axis=-1)

    return _greedy(scores, member, gain) if strength > 0 else order_by(scores)


def maximal_marginal_relevance(scores: np.ndarray, features: np.ndarray, strength: float) -> np.ndarray:
    """`mmr` with the Jaccard similarity of binary features (U, C, F); two items without features are unlike."""
    relevance = unit_relevance(scores)
    strength = _share("lambda", strength)
    if strength == 0:
        return order_by(scores)
    features = features.astype(np.float64)
    shared = features @ features.transpose(0, 2, 1)
    size = features.sum(axis=-1)
    either = size[:, :, None] + size[:, None, :] - shared
    similarity = shared / np.where(either > 0, either, 1.0)  # (U, C, C)
    closest = np.zeros_like(relevance)
    rows = np.arange(len(scores))

    def gain(step: int, held: np.ndarray) -> np.ndarray:
        if step:
            np.maximum(closest, similarity[rows, held[:, 0].astype(np.int64)], out=closest)
        return (1 - strength) * relevance - strength * closest

    return _greedy(scores, None, gain)


def quota(scores: np.ndarray, is_popular: np.ndarray, wanted: np.ndarray, k: int) -> np.ndarray:
    """`quota`, the ideal follower of component U2.

    Args:
        scores: (U, C).
        is_popular: (U, C) bool.
        wanted: (U,) popular items among the first k; what the set cannot give is filled by the other class.
        k: length of the list.

    Returns:
        (U, C) int64 positions: the chosen k by score, then the rest by score.

    Raises:
        ConfigError: a quota outside 0..k.
    """
    if len(wanted) and (wanted.min() < 0 or wanted.max() > k):
        raise ConfigError(f"quotas must be between 0 and {k}, got {wanted.min()}..{wanted.max()}")
    order = order_by(_checked(scores))
    popular = np.take_along_axis(is_popular, order, axis=1)
    taken_popular, taken_niche = np.cumsum(popular, axis=1), np.cumsum(~popular, axis=1)
    n_popular, n_niche = taken_popular[:, -1], taken_niche[:, -1]
    length = min(k, scores.shape[1])
    most = np.minimum(np.maximum(wanted, length - n_niche), n_popular)  # popular items in the first k
    chosen = np.where(popular, taken_popular <= most[:, None], taken_niche <= (length - most)[:, None])
    return np.take_along_axis(order, np.argsort(~chosen, axis=1, kind="stable"), axis=1)


def _greedy(scores: np.ndarray, member: np.ndarray | None, gain: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Pick the best remaining candidate C times.

    `gain(step, held)` gives (U, C) values; `held` is (U, K) the class counts of the list so far, or without classes
    (U, 1) the position picked last.
    """
    n_users, n_candidates = scores.shape
    given = order_by(scores)
    place = np.empty_like(given)
    np.put_along_axis(place, given, np.arange(n_candidates)[None, :], axis=1)
    free = np.ones((n_users, n_candidates), dtype=bool)
    held = np.zeros((n_users, 1 if member is None else member.shape[2]))
    picked = np.empty((n_users, n_candidates), dtype=np.int64)
    rows = np.arange(n_users)
    for step in range(n_candidates):
        value = np.where(free, gain(step, held), -np.inf)
        best = value.max(axis=1, keepdims=True)
        tied = value >= best - 1e-12
        choice = np.where(tied & free, place, n_candidates).argmin(axis=1)
        picked[:, step] = choice
        free[rows, choice] = False
        if member is None:
            held[:, 0] = choice
        else:
            held += member[rows, choice]
    return picked


def _members(classes: np.ndarray, n_classes: int) -> np.ndarray:
    return (classes[..., None] == np.arange(n_classes)).astype(np.float64)  # (U, C, K)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise InputError(f"scores to re-rank must be a finite (U, C) array, got shape {scores.shape}")
    return scores
