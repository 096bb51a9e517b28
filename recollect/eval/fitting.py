"""What the fitted layers share: refusing data that cannot carry a fit, and intervals of the coefficients."""

from __future__ import annotations

import numpy as np

from recollect.errors import InputError
from recollect.eval.statistics import RESAMPLES, Interval, interval_of_draws, resample_weights

MINIMUM_CASES = 30
MINIMUM_CASES_PER_FEATURE = 5
MINIMUM_USERS = 10


def require_enough(what: str, n_cases: int, n_users: int, n_features: int) -> None:
    """Refuse a fit that the data cannot carry.

    Raises:
        InputError: fewer than 30 cases, 5 cases a feature or 10 users; the message holds the numbers.
    """
    needed = max(MINIMUM_CASES, MINIMUM_CASES_PER_FEATURE * n_features)
    if n_cases < needed or n_users < MINIMUM_USERS:
        raise InputError(
            f"{what} on {n_features} features needs at least {needed} cases from {MINIMUM_USERS} users, "
            f"got {n_cases} cases from {n_users} users; simulate more users or leave the layer out"
        )


def sums_by_cluster(codes: np.ndarray, n_clusters: int, rows: np.ndarray) -> np.ndarray:
    """(G, …) sums of `rows` (N, …) over cluster codes (N,)."""
    from scipy import sparse

    indicator = sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_clusters, len(codes)))
    return np.asarray(indicator @ rows.reshape(len(codes), -1)).reshape(n_clusters, *rows.shape[1:])


def one_step_bootstrap(
    estimate: np.ndarray,
    gradient: np.ndarray,
    curvature: np.ndarray,
    penalty: np.ndarray,
    *,
    n_rows: int,
    n: int = RESAMPLES,
    seed: int,
) -> list[Interval]:
    """Cluster-bootstrap intervals of a penalised maximum-likelihood estimate, one Newton step per resample.

    A step from the estimate of all the data is first-order equal to refitting and costs one small linear solve.

    Args:
        estimate: (P,) where the penalised negative log-likelihood is least.
        gradient: (G, P) and curvature: (G, P, P) of each cluster's negative log-likelihood there.
        penalty: (P,) diagonal of the quadratic penalty.
    """
    n_clusters, size = gradient.shape
    flat = curvature.reshape(n_clusters, size * size)
    draws = []
    for weights in resample_weights(n_clusters, n, seed):
        slope = weights @ gradient + penalty * estimate
        bend = (weights @ flat).reshape(-1, size, size) + np.diag(penalty + 1e-9)
        draws.append(estimate - np.linalg.solve(bend, slope[:, :, None])[:, :, 0])
    table = np.concatenate(draws)
    return [interval_of_draws(float(estimate[p]), table[:, p], n_rows) for p in range(size)]


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-log_odds)), without overflow."""
    from scipy.special import expit

    return expit(log_odds)
