"""How many compositions of token factors one route collects: N_eff = 1 / Σ_c P(c | route)².

Source: name and role from arXiv 2602.12587; the unbiased estimate is ours.  A diagnostic, never a guarantee: for any
set S of compositions p(S) ≤ √(|S| / N_eff) holds, but that does not bound how much an old task's loss rises.
"""

from __future__ import annotations

import math

import numpy as np

LEAST_TOKENS = 200  # a route with fewer tells too little about its compositions


def repeat_probability(counts: np.ndarray, *, unbiased: bool = True) -> float:
    """Σ_c p(c)², the probability that two tokens of a route share their composition, from its counts (C,).

    Unbiased: Σ n_c(n_c−1) / (n(n−1)), the share of pairs that do; otherwise the plug-in Σ (n_c/n)², which is too large.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum()
    if unbiased:
        return float((counts * (counts - 1)).sum() / (total * (total - 1))) if total > 1 else math.nan
    return float(np.square(counts / total).sum()) if total else math.nan


def n_eff(counts: np.ndarray, *, unbiased: bool = True) -> float:
    """Effective number of compositions of one route from its counts (C,); inf where no composition occurs twice.

    The plug-in is at most the number of compositions; the unbiased estimate may pass it by chance.
    """
    probability = repeat_probability(counts, unbiased=unbiased)
    return math.inf if probability == 0 else 1 / probability


def mean_n_eff(
    routes: np.ndarray, compositions: np.ndarray, *, least_tokens: int = LEAST_TOKENS, unbiased: bool = True
) -> tuple[float, int]:
    """Token-weighted mean N_eff over the routes with enough tokens, and how many routes these are.

    Args:
        routes: (n,) int64 route of each token (e.g. `mh_moe.route_numbers`).
        compositions: (n,) int64 composition of each token.
        least_tokens: routes with fewer are left out; NaN and 0 where all are.
        unbiased: see `repeat_probability`.
    """
    order = np.argsort(routes, kind="stable")
    sorted_routes, sorted_compositions = routes[order], compositions[order]
    starts = np.flatnonzero(np.r_[True, sorted_routes[1:] != sorted_routes[:-1]])
    values, weights = [], []
    for part in np.split(sorted_compositions, starts[1:]):
        if len(part) >= least_tokens:
            values.append(n_eff(np.unique(part, return_counts=True)[1], unbiased=unbiased))
            weights.append(len(part))
    if not values:
        return math.nan, 0
    return float(np.average(values, weights=weights)), len(values)
