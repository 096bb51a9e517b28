"""Whom to simulate and on which rows: the plan of a run, fixed before any model is asked.

Every simulated user's rows are cut into four parts in their own order: plain history, training interactions (the agent
predicts and learns), calibration cases (ranked, then learned) and test cases (ranked only). One cut per user: every
scorer of a test case may use the same rows, those before the user's first test row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recollect.errors import InputError
from recollect.rng import stream
from recollect.types import Dataset

HELD_OUT_SHARE = 0.15
MIN_ROWS = 3
DEFAULT_USERS = {"harbor": 36}
DEFAULT_USERS_ELSEWHERE = 100


@dataclass(frozen=True)
class Population:
    """Rows of the log by their part; `users` in id order, row arrays in global time order.

    users: (U,) dense user indices.  history, training, calibration, test: row positions in the log.
    skipped: users with too few interactions to hold anything out.
    """

    users: np.ndarray
    history: np.ndarray
    training: np.ndarray
    calibration: np.ndarray
    test: np.ndarray
    skipped: int

    @property
    def held_out(self) -> np.ndarray:
        """Rows no scorer may count: calibration and test cases."""
        return np.concatenate([self.calibration, self.test])


def held_out_count(n_rows: int, most: int) -> int:
    """Test cases of a user with `n_rows` interactions: 15 % rounded up, at most `most`, leaving two other parts."""
    return max(1, min(most, int(np.ceil(HELD_OUT_SHARE * n_rows)), (n_rows - 1) // 2))


def choose_population(
    dataset: Dataset, *, users: int | None, interactions_per_user: int, held_out: int, seed: int
) -> Population:
    """Draw the users and cut their rows.

    Raises:
        InputError: nobody has the three interactions that one training, calibration and test row need.
    """
    log = dataset.interactions
    counts = np.bincount(log.user, minlength=dataset.n_users)
    eligible = np.flatnonzero(counts >= MIN_ROWS)
    if len(eligible) == 0:
        raise InputError(
            f"no user of {dataset.name!r} has {MIN_ROWS} interactions (the most any has is {counts.max(initial=0)}); "
            "a simulation needs one to learn from, one to calibrate on and one to test"
        )
    wanted = users if users is not None else DEFAULT_USERS.get(dataset.name, DEFAULT_USERS_ELSEWHERE)
    drawn = stream(seed, "population").permutation(eligible)[:wanted]
    chosen = np.sort(drawn)
    starts = np.searchsorted(log.user, chosen, side="left")
    stops = np.searchsorted(log.user, chosen, side="right")
    parts: dict[str, list[np.ndarray]] = {"history": [], "training": [], "calibration": [], "test": []}
    for start, stop in zip(starts, stops, strict=True):
        rows = np.arange(start, stop)
        cases = held_out_count(len(rows), held_out)
        learned = max(0, len(rows) - 2 * cases - interactions_per_user)
        edges = [learned, len(rows) - 2 * cases, len(rows) - cases]
        for name, part in zip(parts, np.split(rows, edges), strict=True):
            parts[name].append(part)
    return Population(
        users=chosen,
        **{name: in_time_order(dataset, np.concatenate(rows)) for name, rows in parts.items()},
        skipped=int(np.count_nonzero((counts > 0) & (counts < MIN_ROWS))),
    )


def in_time_order(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Rows in the one global order of the simulation: time, then user, then position in the log."""
    log = dataset.interactions
    return rows[np.lexsort((rows, log.user[rows], log.time[rows]))]
