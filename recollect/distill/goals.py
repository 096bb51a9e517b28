"""Goals B and C of the specification (llmd4rec 6), each with what was measured and why it is met or not.

A goal is met if its interval over users supports it, there are enough seeds, and no single seed says the opposite. The
student alone is trained as the options say; nothing here tunes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.distill.results import SEEDS_FOR_A_CLAIM
from recollect.eval.case_table import CaseTable
from recollect.eval.statistics import cluster_bootstrap, entry

GAIN = 0.02
CEILING_SHARE = 0.9
CONTROLS = {
    "self_distilled": "the distilled student beats self-distillation, interval above 0",
    "labels-only/student": "the distilled student beats the same half-rounds without a teacher (labels-only), interval "
    "above 0",
}


def goals(
    tables: Mapping[str, Sequence[CaseTable]],
    differences: Sequence[Mapping[str, Any]],
    metric: str,
    seeds: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    """What was aimed at; none without a distilled student.

    Args:
        tables: {model: one per seed}.
        differences: rows of `recollect.eval.comparison.Comparison`.
        seeds: of the tables, in order.  seed: of the bootstrap.

    Returns:
        Per goal {"goal", "measured": a share or null, "difference": {"value", "ci95", "n"} or null, "per_seed", "sd",
        "met", "why_not": text, empty if met}.
    """
    if "student_distilled" not in tables:
        return []
    by_pair = {(row["model"], row["against"]): row for row in differences if row["metric"] == metric}
    gain = by_pair["student_distilled", "student_alone"]
    missing = [] if (gain["relative"] or 0) >= GAIN else [f"under {100 * GAIN:g} %"]
    text = f"the distilled student gains at least {100 * GAIN:g} % over the student alone (as configured, not tuned), "
    found = [_goal(text + "interval above 0", gain["relative"], gain, seeds, missing)]
    for control, words in CONTROLS.items():
        if ("student_distilled", control) in by_pair:
            own = by_pair["student_distilled", control]
            found.append(_goal(words, own["relative"], own, seeds, []))
    if len(found) == 1 + len(CONTROLS):
        failed = [str(number + 1) for number, goal in enumerate(found) if not goal["met"]]
        why_not = f"not met: {', '.join(failed)}" if failed else ""
        found.append({**_NOTHING, "goal": "goal B: the three above together", "met": not failed, "why_not": why_not})
    found.append(_of_the_ceiling(tables, by_pair, metric, seeds, seed))
    return found


_NOTHING: dict[str, Any] = {"measured": None, "difference": None, "per_seed": None, "sd": None}


def _of_the_ceiling(
    tables: Mapping[str, Sequence[CaseTable]],
    by_pair: Mapping[tuple[str, str], Mapping[str, Any]],
    metric: str,
    seeds: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The gain less its share of the ensemble's, both of the same users in every draw."""
    gain, ceiling = (by_pair[name, "student_alone"] for name in ("student_distilled", "ensemble"))
    text = f"goal C: the distilled student has {100 * CEILING_SHARE:g} % of the ensemble's gain or more, interval too"
    if not (ceiling["ci95"][0] or 0) > 0:  # a share of a gain that may be none says nothing
        return {**_NOTHING, "goal": text, "met": False, "why_not": "the ensemble's own gain may be none"}
    alone, best, student = (
        np.stack([table.per_user(metric)[1] for table in tables[name]])  # (S, U)
        for name in ("student_alone", "ensemble", "student_distilled")
    )
    margin = (student - alone) - CEILING_SHARE * (best - alone)
    per_seed = margin.mean(axis=1)
    row = entry(cluster_bootstrap(margin.mean(axis=0), np.arange(margin.shape[1]), seed=seed))
    row |= {
        "per_seed": per_seed.tolist(),
        "sd": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
    }
    return _goal(text, gain["value"] / ceiling["value"], row, seeds, [])


def _goal(
    text: str, measured: float | None, row: Mapping[str, Any], seeds: Sequence[int], missing: Sequence[str]
) -> dict[str, Any]:
    """A goal whose difference `row` must be above 0 in its interval and not below 0 in any seed."""
    reasons = list(missing)
    low = row["ci95"][0]
    if low is None or low <= 0:
        reasons.append("the interval is not above 0")
    below = [str(own) for own, value in zip(seeds, row["per_seed"], strict=True) if value is None or value < 0]
    if below:
        reasons.append(f"below 0 in seed {', '.join(below)}")
    if len(seeds) < SEEDS_FOR_A_CLAIM:
        reasons.append(f"fewer than {SEEDS_FOR_A_CLAIM} seeds")
    return {
        "goal": text,
        "measured": measured,
        "difference": {key: row[key] for key in ("value", "ci95", "n")},
        "per_seed": list(row["per_seed"]),
        "sd": row["sd"],
        "met": not reasons,
        "why_not": "; ".join(reasons),
    }
