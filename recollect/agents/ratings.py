"""M4: what agents would rate, from the model's stars and the user's and item's habits, through ordinal thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recollect.agents.observed import Acts, Observed
from recollect.agents.plan import Plan
from recollect.errors import InputError
from recollect.eval.rating_layer import RatingLayer
from recollect.eval.slates import Slates
from recollect.rng import stream
from recollect.types import Dataset

SHRINKAGE = 5.0


@dataclass(frozen=True)
class Ratings:
    """Ratings of the rated test rows.

    drawn: (T,) simulated ratings.  predicted: (T,) their expectation.  actual, users: (T,).  baselines: {name: (T,)}.
    """

    drawn: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    users: np.ndarray
    baselines: Mapping[str, np.ndarray]


def bias_prediction(dataset: Dataset, rows: np.ndarray, users: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
    """(mean, user mean, bias model) per asked (user, item): shrunken deviations of users, then items, from `rows`."""
    log = dataset.interactions
    assert log.rating is not None
    rated = rows[~np.isnan(log.rating[rows])]
    rating, user, item = log.rating[rated].astype(float), log.user[rated], log.item[rated]
    mean = rating.mean()

    def shrunken(who: np.ndarray, residual: np.ndarray, size: int) -> np.ndarray:
        return np.bincount(who, residual, minlength=size) / (np.bincount(who, minlength=size) + SHRINKAGE)

    of_user = shrunken(user, rating - mean, dataset.n_users)
    of_item = shrunken(item, rating - mean - of_user[user], dataset.n_items)
    flat = np.full(len(users), mean)
    return flat, mean + of_user[users], mean + of_user[users] + of_item[items]


def simulate_ratings(dataset: Dataset, plan: Plan, observed: Observed, *, seed: int) -> Ratings | str:
    """Simulated ratings of the test rows, or the reason why there are none."""
    log = dataset.interactions
    if log.rating is None:
        return "this log has no ratings"
    rows = np.flatnonzero(plan.training_rows)
    if np.isnan(log.rating[rows]).all():
        return "no training row is rated"

    def part(slates: Slates, acts: Acts) -> tuple[np.ndarray, ...]:
        kept = np.flatnonzero(~np.isnan(acts.stars[:, 0]))
        flat, habit, bias = bias_prediction(dataset, rows, slates.user[kept], slates.positive[kept])
        stars = acts.stars[kept] @ np.arange(1, 6)
        return log.rating[slates.row[kept]].astype(float), slates.user[kept], flat, habit, bias, stars  # type: ignore[index]

    actual, users, _, _, bias, stars = part(plan.calibration, observed.calibration)
    if len(actual) == 0:
        return "no calibration row is rated"
    design = np.column_stack([np.ones(len(actual)), bias, stars - stars.mean()])
    # A weak pull to "the bias model as it is": the model's stars must earn their weight.
    pull = np.diag([1e-3, 10.0, 10.0])
    prior = np.array([0.0, 1.0, 0.0])
    weights = np.linalg.solve(design.T @ design + pull, design.T @ actual + pull @ prior)
    try:
        layer = RatingLayer.fit(design @ weights, actual, users)
    except InputError as error:
        return str(error)
    real, test_users, flat, habit, test_bias, test_stars = part(plan.test, observed.test)
    score = np.column_stack([np.ones(len(real)), test_bias, test_stars - stars.mean()]) @ weights
    return Ratings(
        drawn=layer.draw(score, stream(seed, "simulated-ratings")),
        predicted=layer.expected(score),
        actual=real,
        users=test_users,
        baselines={
            "global-mean": flat,
            "user-mean": habit,
            "user-item-bias": test_bias,
            "language-model-stars": test_stars,
        },
    )
