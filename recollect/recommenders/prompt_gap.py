"""How much of the accuracy gap between mainstream and niche users a method closes, at what price (fairlrm 10, goal 3).

The gap is NDCG@k of the mainstream group minus that of the niche group. The goal: the prompted, calibrated list closes
at least half of the generator's gap at a loss of at most 2 % of the NDCG over all users. Every setting of the knob is
printed and none is chosen: these are test users, so the best of several settings flatters itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recollect.eval.statistics import Interval, entry
from recollect.recommenders.prompt_curves import Sweep
from recollect.recommenders.prompt_metrics import Judge, Lists

CLOSED, LOSS = 0.5, 0.02


def niche_gap(
    judge: Judge, generator: Lists, sweeps: Sequence[Sweep], *, resamples: int, seed: int
) -> dict[str, Any] | None:
    """The gap of the generator and of every setting of calibrated popularity, on shared resamples of the users.

    Returns:
        {"metric", "reference": generator's name, "gap", "rows": [{"method", "value", "ndcg", "change": relative to the
        generator, "gap", "closed": 1 - gap / generator's gap, None where that is not above 0, "within": both bounds
        of the goal hold for the values, "supported": and the gap's reduction has its interval above 0}]}, or None
        where a group is empty or nothing was calibrated.
    """
    groups = judge.cases.groups
    outer = [np.asarray(groups == name) for name in ("mainstream", "niche")]
    chosen = [sweep for sweep in sweeps if sweep.method.endswith(" + cp")]
    if not all(inside.any() for inside in outer) or not chosen:
        return None
    draws = judge.draws(resamples, seed)
    ndcg = judge.name("ndcg")

    def measured(lists: Lists) -> tuple[np.ndarray, float, np.ndarray]:
        column = judge.accuracy(lists.items)[ndcg]
        means = [column[inside].mean() for inside in outer]
        drawn = [draws.group_mean(column, inside) for inside in outer]
        return column, float(means[0] - means[1]), drawn[0] - drawn[1]

    base, base_gap, base_draws = measured(generator)
    rows = []
    for sweep in chosen:
        for value, lists in zip(sweep.values, sweep.lists, strict=True):
            column, gap, gap_draws = measured(lists)
            closed = 1 - gap / base_gap if base_gap > 0 else None
            change = float(column.mean() / base.mean() - 1) if base.mean() > 0 else None
            reduction = draws.interval(base_gap - gap, base_draws - gap_draws)
            within = closed is not None and change is not None and closed >= CLOSED and change >= -LOSS
            rows.append(
                {
                    "method": sweep.method,
                    "value": value,
                    "ndcg": entry(draws.interval(float(column.mean()), draws.mean(column))),
                    "change": change,
                    "gap": entry(draws.interval(gap, gap_draws)),
                    "reduction": entry(reduction),
                    "closed": closed,
                    "within": within,
                    "supported": bool(within and reduction.low > 0),
                }
            )
    return {
        "metric": ndcg,
        "reference": generator.name,
        "gap": entry(_with_n(draws.interval(base_gap, base_draws), outer)),
        "n": {name: int(inside.sum()) for name, inside in zip(("mainstream", "niche"), outer, strict=True)},
        "rows": rows,
    }


def _with_n(interval: Interval, outer: Sequence[np.ndarray]) -> Interval:
    return interval._replace(n=int(sum(inside.sum() for inside in outer)))
