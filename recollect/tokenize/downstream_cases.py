"""The clicks and non-clicks on which item codes are tried as features, one after the other in time.

Leave-one-out in time: a user's last event is the test, the one before it validation, earlier ones train. Each event is
paired with items the user never touched that are as popular as it is, so popularity alone says nothing. Cases depend on
the log, the number of negatives and a seed, never on the codes: every method is tried on the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recollect.data.splits import user_starts
from recollect.errors import InputError
from recollect.rng import stream
from recollect.types import Dataset, Split

NEIGHBOURS = 20
"""Items on either side, by popularity, among which a negative is drawn (at most a quarter of the catalogue)."""

_DRAWS = 256


@dataclass(frozen=True)
class Cases:
    """C clicks with M non-clicks each.

    user: (C,) int64.  history: (C, H) int32, the items before the click, oldest first, -1 = none.  clicked: (C,) int64.
    skipped: (C, M) int64, items the user never touched.
    """

    user: np.ndarray
    history: np.ndarray
    clicked: np.ndarray
    skipped: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class CaseSets:
    """Cases to fit on, to choose the epoch by, and to report; `popularity` (n_items,) counts training events."""

    train: Cases
    valid: Cases
    test: Cases
    popularity: np.ndarray


def make_cases(
    dataset: Dataset,
    split: Split,
    *,
    history: int = 20,
    train_cases: int = 100_000,
    test_negatives: int = 5,
    seed: int = 0,
) -> CaseSets:
    """Cases of a leave-one-out split.

    Args:
        history: most recent items before a click.
        train_cases: at most so many training clicks, drawn by seed.
        test_negatives: non-clicks per validation and test click; a training click has one.
        seed: of every draw.

    Raises:
        InputError: no user is long enough, or a user has touched every item.
    """
    log = dataset.interactions
    starts = user_starts(dataset)
    rows = np.flatnonzero(split.train)
    rows = rows[rows > starts[log.user[rows]]]  # a click needs a history
    if not len(rows) or not len(split.test_row):
        raise InputError(
            f"{dataset.name!r} has no user with enough events to try codes on later clicks; use a longer log, or leave "
            "the downstream measure out"
        )
    if len(rows) > train_cases:
        chosen = stream(seed, "downstream", "training clicks").choice(len(rows), train_cases, replace=False)
        rows = rows[np.sort(chosen)]
    popularity = np.bincount(log.item[split.train], minlength=dataset.n_items)
    draw = _Negatives(dataset, popularity, seed)

    def cases(part: str, targets: np.ndarray, negatives: int) -> Cases:
        user = log.user[targets]
        return Cases(
            user=user,
            history=_histories(log.item, targets, starts[user], history),
            clicked=log.item[targets],
            skipped=draw(part, user, log.item[targets], negatives),
        )

    return CaseSets(
        train=cases("train", rows, 1),
        valid=cases("valid", split.valid_row, test_negatives),
        test=cases("test", split.test_row, test_negatives),
        popularity=popularity,
    )


def _histories(item: np.ndarray, targets: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(C, H) int32: the items of the rows before each target row, -1 before the user's first."""
    rows = targets[:, None] + np.arange(-length, 0)
    found = np.full(rows.shape, -1, dtype=np.int32)
    inside = rows >= starts[:, None]
    found[inside] = item[rows[inside]]
    return found


class _Negatives:
    """Draws items the user never touched from the neighbours in popularity of the one they clicked.

    Within such a neighbourhood clicks fall on an item in proportion to its count, so negatives are drawn in that
    proportion too.
    """

    def __init__(self, dataset: Dataset, popularity: np.ndarray, seed: int) -> None:
        n = dataset.n_items
        shuffled = stream(seed, "downstream", "order of equals").permutation(n)
        self._ranked = shuffled[np.argsort(popularity[shuffled], kind="stable")]  # (n_items,) items by popularity
        self._rank = np.empty(n, dtype=np.int64)
        self._rank[self._ranked] = np.arange(n)
        self._n = n
        self._weight = popularity.astype(np.float64) + 1.0
        self._seed = seed
        self._reach = max(1, min(NEIGHBOURS, n // 4))
        log = dataset.interactions
        self._touched = np.unique(log.user * n + log.item)
        self._distinct = np.bincount(self._touched // n, minlength=dataset.n_users)

    def __call__(self, part: str, user: np.ndarray, clicked: np.ndarray, count: int) -> np.ndarray:
        full = np.flatnonzero(self._distinct[user] >= self._n)
        if len(full):
            raise InputError(f"user {int(user[full[0]])} touched every item, so none is left as a non-click")
        generator = stream(self._seed, "downstream", "negatives", part)
        owner = np.repeat(user, count)
        centre = np.repeat(self._rank[clicked], count)
        # A window over the edge is moved inside, so that every item has the same number of neighbours.
        low = np.clip(centre - self._reach, 0, max(0, self._n - 1 - 2 * self._reach))
        wide = np.minimum(2 * self._reach + 1, self._n)
        top = self._weight[self._ranked[np.minimum(low + wide, self._n) - 1]]  # the largest of each neighbourhood
        found = np.empty(len(owner), dtype=np.int64)
        left = np.arange(len(owner))
        for attempt in range(_DRAWS):
            place = generator.random(len(left))
            accept = generator.random(len(left))
            if attempt >= _DRAWS // 2:  # a heavy user may have touched the whole neighbourhood: any item will do
                place, accept = place * self._n, np.zeros(len(left))
            else:
                place = low[left] + place * wide
            found[left] = self._ranked[np.minimum(place.astype(np.int64), self._n - 1)]
            refused = self._is_touched(owner[left], found[left]) | (accept * top[left] > self._weight[found[left]])
            left = left[refused]
            if not len(left):
                break
        for row in left.tolist():  # nearly everything touched: look through the rest in order
            own = self._touched[self._touched // self._n == owner[row]] % self._n
            free = np.setdiff1d(np.arange(self._n), own)
            found[row] = free[int(generator.integers(len(free)))]
        return found.reshape(len(user), count)

    def _is_touched(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        keys = user * self._n + item
        at = np.minimum(np.searchsorted(self._touched, keys), len(self._touched) - 1)
        return self._touched[at] == keys
