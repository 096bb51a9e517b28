"""Logistic regression with a Gaussian effect per user: the numerics under `AcceptLayer`.

The users' block of the Hessian is diagonal, so it is eliminated and a Newton step costs one solve in the few shared
coefficients, whatever the number of users. Posterior modes stand in for the integral over effects, which draws
coefficients slightly to zero where users have few decisions.
"""

from __future__ import annotations

import numpy as np

from recollect.eval.fitting import one_step_bootstrap, sigmoid, sums_by_cluster
from recollect.eval.statistics import Interval


def fit_with_user_effects(
    design: np.ndarray, accepted: np.ndarray, codes: np.ndarray, n_users: int, penalty: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients (P,), user effects (G,) and their variance.

    Newton steps eliminate the users first (their block is diagonal); between them the variance becomes the mean of
    effect^2 plus its posterior variance.
    """
    beta, effect, variance = np.zeros(design.shape[1]), np.zeros(n_users), 0.5
    sign = np.where(accepted > 0, -1.0, 1.0)

    def objective(beta: np.ndarray, effect: np.ndarray) -> float:
        loss = np.logaddexp(0.0, sign * (design @ beta + effect[codes])).sum()
        return float(loss + 0.5 * (penalty * beta**2).sum() + 0.5 * (effect**2).sum() / variance)

    for _ in range(60):
        current = objective(beta, effect)
        for _ in range(25):
            probability = sigmoid(design @ beta + effect[codes])
            weight = probability * (1.0 - probability)
            weighted = design * weight[:, None]
            slope = design.T @ (probability - accepted) + penalty * beta
            user_slope = np.bincount(codes, probability - accepted, minlength=n_users) + effect / variance
            user_bend = np.bincount(codes, weight, minlength=n_users) + 1.0 / variance
            cross = sums_by_cluster(codes, n_users, weighted)  # (G, P)
            bend = design.T @ weighted + np.diag(penalty + 1e-9) - cross.T @ (cross / user_bend[:, None])
            step = np.linalg.solve(bend, slope - cross.T @ (user_slope / user_bend))
            user_step = (user_slope - cross @ step) / user_bend
            length = 1.0
            while (trial := objective(beta - length * step, effect - length * user_step)) > current and length > 1e-6:
                length *= 0.5
            beta, effect = beta - length * step, effect - length * user_step
            gained, current = current - trial, trial
            if gained < 1e-10 * max(1.0, abs(current)):
                break
        updated = max(float((effect**2 + 1.0 / user_bend).mean()), 1e-6)
        settled = abs(updated - variance) < 1e-3 * variance
        variance = updated
        if settled:
            break
    return beta, effect, variance


def user_effect_intervals(
    design: np.ndarray,
    accepted: np.ndarray,
    codes: np.ndarray,
    beta: np.ndarray,
    effect: np.ndarray,
    variance: float,
    penalty: np.ndarray,
    resamples: int,
    seed: int,
) -> list[Interval]:
    n_users = len(effect)
    probability = sigmoid(design @ beta + effect[codes])
    weight = probability * (1.0 - probability)
    gradient = sums_by_cluster(codes, n_users, design * (probability - accepted)[:, None])
    cross = sums_by_cluster(codes, n_users, design * weight[:, None])
    user_bend = np.bincount(codes, weight, minlength=n_users) + 1.0 / variance
    outer = design[:, :, None] * design[:, None, :] * weight[:, None, None]
    curvature = sums_by_cluster(codes, n_users, outer)
    curvature -= cross[:, :, None] * cross[:, None, :] / user_bend[:, None, None]
    return one_step_bootstrap(beta, gradient, curvature, penalty, n_rows=len(accepted), n=resamples, seed=seed)
