"""How many compositions of token factors one route collects: N_eff = 1 / Σ_c P(c | route)².

Source: name and role from arXiv 2602.12587, its formula at second hand; the unbiased estimate and the least number of
tokens are ours.  A diagnostic, never a guarantee: for any set S of compositions p(S) ≤ √(|S| / N_eff) holds, but that
does not bound how much an old task's loss rises.
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


def route_n_eff(routes: np.ndarray, compositions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased N_eff (R,) and tokens (R,) of every route 0..R-1 from (n,) routes and compositions.

    N_eff is inf where no composition occurs twice, NaN for a route of one token.
    """
    n_routes = int(routes.max()) + 1
    n_compositions = int(compositions.max()) + 1
    cells, counts = np.unique(routes.astype(np.int64) * n_compositions + compositions, return_counts=True)
    pairs = np.bincount(cells // n_compositions, counts * (counts - 1.0), minlength=n_routes)
    sizes = np.bincount(routes, minlength=n_routes)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = sizes * (sizes - 1.0) / pairs
    return np.where(sizes > 1, values, np.nan), sizes


def mean_n_eff(
    routes: np.ndarray, compositions: np.ndarray, *, least_tokens: int = LEAST_TOKENS
) -> tuple[float, float]:
    """Token-weighted mean of `route_n_eff` over the routes with enough tokens, and the share of tokens in these.

    Args:
        routes: (n,) int64 route of each token (e.g. `mh_moe.route_numbers`).
        compositions: (n,) int64 composition of each token.
        least_tokens: routes with fewer are left out; NaN and 0 where all are.
    """
    values, sizes = route_n_eff(routes, compositions)
    enough = sizes >= least_tokens
    if not enough.any():
        return math.nan, 0.0
    return float(np.average(values[enough], weights=sizes[enough])), float(sizes[enough].sum() / len(routes))
