"""Are stated probabilities met? Reliability bins and the expected calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np

from recollect.errors import InputError
from recollect.eval.statistics import (
    RESAMPLES,
    bootstrap_ratios,
    cluster_codes,
    entry,
    interval_of_draws,
    resample_weights,
)


def reliability(
    probabilities: np.ndarray,
    outcomes: np.ndarray,
    users: np.ndarray | None = None,
    *,
    bins: int = 10,
    resamples: int = RESAMPLES,
    seed: int,
) -> dict[str, Any]:
    """Bins of equal width over 0..1 and the expected calibration error.

    Args:
        probabilities: (T,) stated; outcomes: (T,) bool; users: (T,) or None where decisions are independent.

    Returns:
        {"predicted", "observed", "counts", "low", "high": one number per non-empty bin (low and high bound `observed`),
        "ece": entry}. The ECE is the mean gap |observed - predicted| weighted by counts; it is positive by noise alone.

    Raises:
        InputError: a probability is outside 0..1 or there are none.
    """
    probabilities, outcomes = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if not len(probabilities) or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise InputError(f"reliability needs probabilities between 0 and 1, got {len(probabilities)} values")
    users = np.arange(len(probabilities)) if users is None else np.asarray(users)
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    used, place = np.unique(place, return_inverse=True)
    members = (place[:, None] == np.arange(len(used))).astype(np.float64)  # (T, bins used)
    observed = bootstrap_ratios(
        {str(b): (members[:, b] * outcomes, members[:, b]) for b in range(len(used))}, users, n=resamples, seed=seed
    )
    counts = members.sum(axis=0)
    codes, n_users = cluster_codes(users)
    gaps = np.zeros((n_users, len(used)))
    np.add.at(gaps, (codes, place), outcomes - probabilities)
    size = np.bincount(codes, minlength=n_users).astype(np.float64)
    value = float(np.abs(gaps.sum(axis=0)).sum() / len(place))
    draws = [
        np.abs(weights @ gaps).sum(axis=1) / (weights @ size)
        for weights in (resample_weights(n_users, resamples, seed) if n_users > 1 else ())
    ]
    spread = np.concatenate(draws) if draws else np.zeros(0)
    rows = [entry(observed[str(b)]) for b in range(len(used))]
    return {
        "predicted": ((members * probabilities[:, None]).sum(axis=0) / counts).tolist(),
        "observed": [row["value"] for row in rows],
        "counts": counts.astype(int).tolist(),
        "low": [row["ci95"][0] for row in rows],
        "high": [row["ci95"][1] for row in rows],
        "ece": entry(interval_of_draws(value, spread, len(place))),
    }
