"""A6: can a classifier tell simulated rows from real ones? AUC .5 is ideal; the top features say what gives it away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recollect.errors import InputError
from recollect.eval.distances import area_under_curve_of_counts, common_support
from recollect.eval.statistics import RESAMPLES, bootstrap_two_histograms, entry
from recollect.rng import stream

FOLDS = 5


def detectability(
    simulated: np.ndarray, real: np.ndarray, names: Sequence[str], *, resamples: int = RESAMPLES, seed: int
) -> dict[str, Any]:
    """Cross-validated logistic regression of simulated against real.

    Args:
        simulated, real: (A, F), (B, F) one row of features per session or user; rows are independent.
        names: of the F features.

    Returns:
        {"auc": entry, held-out scores of five folds; "top_features": [[name, weight per standard deviation]], largest
        first; positive = higher in the simulation}.

    Raises:
        InputError: fewer than 10 rows on a side, shapes that disagree, or a value that is not finite.
    """
    from sklearn.linear_model import LogisticRegression

    simulated, real = np.asarray(simulated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    rows = np.concatenate([simulated, real]) if simulated.shape[1:] == real.shape[1:] == (len(names),) else None
    if rows is None or min(len(simulated), len(real)) < 2 * FOLDS or not np.isfinite(rows).all():
        raise InputError(
            f"detectability needs at least {2 * FOLDS} finite rows of {len(names)} features on each side, got "
            f"{simulated.shape} and {real.shape}"
        )
    label = np.concatenate([np.ones(len(simulated), dtype=bool), np.zeros(len(real), dtype=bool)])
    spread = rows.std(axis=0)
    standard = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    generator = stream(seed, "detectability")
    fold = np.concatenate([generator.permutation(len(side)) % FOLDS for side in (simulated, real)])
    score = np.empty(len(rows))
    for held_out in range(FOLDS):
        inside = fold != held_out
        model = LogisticRegression(max_iter=1000).fit(standard[inside], label[inside])
        score[~inside] = model.decision_function(standard[~inside])
    _, code_simulated, code_real = common_support(score[label], score[~label])
    n_codes = int(max(code_simulated.max(), code_real.max())) + 1
    area = bootstrap_two_histograms(
        {"auc": area_under_curve_of_counts},
        (code_simulated, np.arange(len(simulated))),
        (code_real, np.arange(len(real))),
        n_codes,
        n=resamples,
        seed=seed,
    )["auc"]
    weights = LogisticRegression(max_iter=1000).fit(standard, label).coef_[0]
    order = np.argsort(-np.abs(weights), kind="stable")
    return {"auc": entry(area), "top_features": [[names[f], float(weights[f])] for f in order]}
