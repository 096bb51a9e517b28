"""Do routes that collect more compositions lose more?  N_eff before a task against what its training cost old tokens.

Source: moe_lora 5.3; interval, within-router form and p-value are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.continual.adapters.collision import LEAST_TOKENS, route_n_eff
from recollect.continual.diagnostics.n_eff_report import finite
from recollect.eval.statistics import bootstrap_statistic
from recollect.rng import stream

LEAST_COUNTED = 10
RESAMPLES = 500
PERMUTATIONS = 999
FEWEST_ROUTES = 5


@dataclass(frozen=True)
class RoutePoints:
    """Routes of several routers.

    n_eff: (p,) before the task.  increase: (p,) mean rise of the loss on the route's old tokens, nats.  router, layer:
    (p,) int64 labels.
    """

    n_eff: np.ndarray
    increase: np.ndarray
    router: np.ndarray
    layer: np.ndarray

    def __len__(self) -> int:
        return len(self.n_eff)


def route_points(
    routes: np.ndarray,
    compositions: np.ndarray,
    increase: np.ndarray,
    *,
    router: int = 0,
    layer: int = 0,
    least_tokens: int = LEAST_TOKENS,
    least_counted: int = LEAST_COUNTED,
) -> RoutePoints:
    """The routes of one router with enough tokens.

    Args:
        routes, compositions: (n,) int64 of the old tokens, before the task.
        increase: (n,) loss after minus before; NaN where a token does not count.
        least_tokens: of a route, for its N_eff.
        least_counted: tokens of a route whose increase is known.
    """
    values, sizes = route_n_eff(routes, compositions)
    counts = np.isfinite(increase)
    totals = np.bincount(routes[counts], increase[counts], minlength=len(sizes))
    numbers = np.bincount(routes[counts], minlength=len(sizes))
    kept = (sizes >= least_tokens) & (numbers >= least_counted)
    n_kept = int(kept.sum())
    return RoutePoints(
        values[kept], totals[kept] / numbers[kept], np.full(n_kept, router), np.full(n_kept, layer, dtype=np.int64)
    )


def joined(parts: Sequence[RoutePoints]) -> RoutePoints:
    """All points of several sets whose labels are already apart."""
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in RoutePoints.__dataclass_fields__]
    return RoutePoints(*columns)


def collision_vs_forgetting(points: RoutePoints, *, seed: int = 0) -> dict[str, Any]:
    """Spearman's ρ between a route's N_eff and its increase.

    Returns:
        {"rho": over all routes, "ci95": resampling layers (None below three), "within": ρ of ranks taken inside each
        router, "p": two-sided, of `within` under shuffling inside routers, "routes", "layers"}; None where fewer than
        five routes or no variation make a number meaningless.
    """
    layers = len(np.unique(points.layer))
    found: dict[str, Any] = {
        "rho": None,
        "ci95": [None, None],
        "within": None,
        "p": None,
        "routes": len(points),
        "layers": layers,
    }
    if len(points) < FEWEST_ROUTES:
        return found
    found["rho"] = finite(spearman(points.n_eff, points.increase))
    if layers >= 3:
        interval = bootstrap_statistic(
            lambda weights: _weighted_spearman(points, weights.astype(np.int64)), points.layer, n=RESAMPLES, seed=seed
        )
        found["ci95"] = [finite(interval.low), finite(interval.high)]
    first, second = (_ranks_within(values, points.router) for values in (points.n_eff, points.increase))
    within = _correlation(first, second)
    found["within"] = finite(within)
    if found["within"] is not None:
        found["p"] = _shuffled_p(within, first, second, points.router, seed)
    return found


def by_fifths(points: RoutePoints, parts: int = 5) -> dict[str, list[float | None]]:
    """Routes in order of N_eff, cut into fifths: mean N_eff and increase of each, and twice the latter's error."""
    known = np.isfinite(points.n_eff)
    order = np.argsort(points.n_eff[known], kind="stable")
    values, increase = points.n_eff[known][order], points.increase[known][order]
    found: dict[str, list[float | None]] = {"n_eff": [], "increase": [], "low": [], "high": []}
    for part in np.array_split(np.arange(len(order)), parts):
        if not len(part):
            for column in found.values():
                column.append(None)
            continue
        mean = float(increase[part].mean())
        error = 2 * float(increase[part].std(ddof=1)) / len(part) ** 0.5 if len(part) > 1 else 0.0
        found["n_eff"].append(float(values[part].mean()))
        found["increase"].append(mean)
        found["low"].append(mean - error)
        found["high"].append(mean + error)
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation with ties at their mean rank; NaN where one side does not vary."""
    from scipy.stats import rankdata

    return _correlation(rankdata(first), rankdata(second))


def _weighted_spearman(points: RoutePoints, weights: np.ndarray) -> float:
    return spearman(np.repeat(points.n_eff, weights), np.repeat(points.increase, weights))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / scale) if scale > 1e-12 else float("nan")


def _ranks_within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks inside each group, from -1/2 to 1/2 around 0."""
    from scipy.stats import rankdata

    found = np.zeros(len(values))
    for label in np.unique(group):
        members = group == label
        n = int(members.sum())
        found[members] = (rankdata(values[members]) - (n + 1) / 2) / n
    return found


def _shuffled_p(value: float, first: np.ndarray, second: np.ndarray, group: np.ndarray, seed: int) -> float:
    """Two-sided p-value of a correlation of within-group ranks: the second side shuffled inside groups."""
    draws = stream(seed, "collision permutations", len(first))
    order = np.argsort(group, kind="stable")
    first, second, group = first[order], second[order], group[order]
    larger = 0
    for _ in range(PERMUTATIONS):
        shuffled = second[np.lexsort((draws.random(len(group)), group))]
        larger += abs(_correlation(first, shuffled)) >= abs(value) - 1e-12
    return (1 + larger) / (PERMUTATIONS + 1)
