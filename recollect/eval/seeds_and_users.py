"""Uncertainty of a mean over seeds and users: one value per (seed, user), the same users under every seed.

The mean varies with the seeds that happened to be drawn and with the users that happened to be asked. Its variance is
taken as

    V = V_users + s^2 / S,

V_users the bootstrap variance, over users, of the mean over seeds; s^2 the variance of the S per-seed means. Resampling
three seeds from three instead gives intervals that hold the truth in some three of four cases: two thirds of the
variance is lost, and percentiles know nothing of a variance that was estimated from three numbers. Here the interval
and the two-sided p-value are those of Student's t with Satterthwaite's degrees of freedom,

    V^2 / (V_users^2 / (C - 1) + (s^2 / S)^2 / (S - 1)).

With three seeds and 100 users it holds the truth in 94 to 95 of 100 made cases where either part dominates, and in no
fewer than 92 between the two. Noise of single (seed, user) cells is in both terms: where it dominates, the interval is
too wide.
With one seed nothing is known of other seeds: V = V_users, and the interval is of these codes over users only.

Source: [our design] of two textbook parts, the sum of variance components and Satterthwaite (1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recollect.errors import InputError
from recollect.eval.statistics import resample_weights


class SeedsAndUsers(NamedTuple):
    """Mean, 95 % interval, two-sided p-value of a mean of 0, degrees of freedom and number of users.

    low, high, p_value, freedom: NaN where there are fewer than two users.  p_value: 1 where every value is 0.
    """

    value: float
    low: float
    high: float
    p_value: float
    freedom: float
    n: int


def over_seeds_and_users(
    values: Sequence[np.ndarray],
    *,
    resamples: int,
    seed: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> SeedsAndUsers:
    """The mean of values (S) x (C,) with its uncertainty over users and, from two seeds on, over seeds.

    Args:
        values: per seed, a value per user; users in the same order.
        resamples: of users, behind V_users.
        seed: of the resamples.
        bounds: what the mean cannot leave, e.g. 0 and 1 of a rate; the interval is cut there.

    Raises:
        InputError: no seed, or seeds with other numbers of users.
    """
    from scipy.stats import t

    if not len(values) or len({len(column) for column in values}) != 1:
        raise InputError(f"one column per seed of equal length is needed, got lengths {[len(c) for c in values]!r}")
    table = np.stack(values).astype(np.float64)  # (S, C)
    n_seeds, n_users = table.shape
    value = float(table.mean()) if n_users else math.nan
    if n_users < 2:
        return SeedsAndUsers(value, math.nan, math.nan, math.nan, math.nan, n_users)
    by_user = table.mean(axis=0)  # (C,)
    draws = [weights @ by_user / n_users for weights in resample_weights(n_users, resamples, seed, name="users")]
    of_users = float(np.concatenate(draws).var())
    of_seeds = float(table.mean(axis=1).var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    error = math.sqrt(of_users + of_seeds)
    # The same numbers summed in another order differ in their last bits; that is no variance.
    if error <= 1e-12 * float(np.abs(table).max()):
        return SeedsAndUsers(value, value, value, 1.0 if value == 0 else 0.0, math.inf, n_users)
    half, freedom = student_half_width(of_users, n_users - 1, of_seeds, n_seeds)
    low, high = (float(np.clip(end, *bounds)) for end in (value - half, value + half))
    return SeedsAndUsers(value, low, high, float(2 * t.sf(abs(value) / error, freedom)), freedom, n_users)


def student_half_width(of_units: float, unit_freedom: int, of_seeds: float, n_seeds: int) -> tuple[float, float]:
    """Half of the 95 % interval of a mean, and its degrees of freedom by Satterthwaite.

    Args:
        of_units: variance of the mean over users (or test examples), positive if `of_seeds` is 0; unit_freedom: its
            degrees of freedom.
        of_seeds: variance of the mean over seeds, 0 for one seed.
    """
    from scipy.stats import t

    variance = of_units + of_seeds
    terms = of_units**2 / unit_freedom + (of_seeds**2 / (n_seeds - 1) if n_seeds > 1 else 0.0)
    freedom = variance**2 / terms
    return float(t.ppf(0.975, freedom)) * math.sqrt(variance), freedom
