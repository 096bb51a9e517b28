"""What a recommender is fitted on and asked: training sequences and held-out cases, as views of the sorted log.

Not covered: packing into batches (`recollect.recommenders`), metrics (`recollect.eval`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from recollect.data.splits import history_bounds
from recollect.errors import DataError
from recollect.types import Dataset, Split

Part = Literal["valid", "test"]
History = Literal["train+val", "train"]


@dataclass(frozen=True)
class Sequences:
    """Items of each user, oldest first, in one array.

    items: (E,) int64 in 0..n_items-1.  starts: (S + 1,) int64; sequence s is items[starts[s]:starts[s + 1]].
    user: (S,) int64, whose sequence it is; users without an event have none.  n_items: size of the catalogue.
    time: (E,) int64 of each item, as in the log; None where nobody asked for it.
    """

    items: np.ndarray
    starts: np.ndarray
    user: np.ndarray
    n_items: int
    time: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, index: int) -> np.ndarray:
        """The items (T,) of one sequence."""
        return self.items[self.starts[index] : self.starts[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(S,) int64 events of each sequence."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Cases:
    """Held-out cases: who, what came before, what is to be predicted; bounds are rows of the sorted log.

    item: (N,) int64, the log's item column.  user: (C,) int64.  start, end: (C,) the history's rows [start, end).
    first, last: (C,) the target rows [first, last).  part, history: how they were made.  time: (N,) int64, the log's;
    None in cases without times.
    """

    item: np.ndarray
    user: np.ndarray
    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray
    part: Part
    history: History
    time: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)

    def histories(self, index: np.ndarray | slice = slice(None)) -> list[np.ndarray]:
        """The history (T,) of each chosen case, oldest first."""
        bounds = zip(self.start[index], self.end[index], strict=True)
        return [self.item[begin:stop] for begin, stop in bounds]

    def times(self, index: np.ndarray | slice = slice(None)) -> list[np.ndarray]:
        """When each event of `histories` was, (T,) each; nothing of the target.

        Raises:
            DataError: these cases hold no times.
        """
        if self.time is None:
            raise DataError("these cases hold no times, which the model reads")
        bounds = zip(self.start[index], self.end[index], strict=True)
        return [self.time[begin:stop] for begin, stop in bounds]

    def targets(self, index: np.ndarray | slice = slice(None)) -> list[np.ndarray]:
        """The target items (m,) of each chosen case, m >= 1."""
        bounds = zip(self.first[index], self.last[index], strict=True)
        return [self.item[begin:stop] for begin, stop in bounds]

    @property
    def target(self) -> np.ndarray:
        """(C,) the target item of next-item cases.

        Raises:
            DataError: a case has several targets.
        """
        if (self.last - self.first != 1).any():
            raise DataError("these cases have several targets each; use targets()")
        return self.item[self.first]

    def take(self, index: np.ndarray) -> Cases:
        """The chosen cases (positions or a mask), in that order."""
        return replace(
            self,
            user=self.user[index],
            start=self.start[index],
            end=self.end[index],
            first=self.first[index],
            last=self.last[index],
        )


def training_sequences(dataset: Dataset, rows: np.ndarray | None = None) -> Sequences:
    """The sequences of the rows a model may be fitted on.

    Args:
        dataset: any log.
        rows: (N,) bool, e.g. `split.train` or `refit_mask(dataset, split)`; None takes every row.

    Raises:
        DataError: the mask has another length, or keeps nothing.
    """
    log = dataset.interactions
    if rows is None:
        rows = np.ones(len(log), dtype=bool)
    if rows.shape != (len(log),):
        raise DataError(f"the row mask has shape {rows.shape} where {dataset.name!r} has {len(log)} interactions")
    if not rows.any():
        raise DataError(f"no training interaction is left of {dataset.name!r}; check the split")
    counts = np.bincount(log.user[rows], minlength=dataset.n_users)
    user = np.flatnonzero(counts)
    starts = np.r_[0, np.cumsum(counts[user])].astype(np.int64)
    return Sequences(log.item[rows], starts, user, dataset.n_items, log.time[rows])


def held_out_cases(dataset: Dataset, split: Split, part: Part = "test", history: History = "train+val") -> Cases:
    """The cases of one part of a split (see `recollect.data.splits.history_bounds` for `history`)."""
    start, end = history_bounds(dataset, split, part, history)
    first, last = (split.test_row, split.test_end) if part == "test" else (split.valid_row, split.valid_end)
    assert last is not None  # Split fills it
    log = dataset.interactions
    return Cases(log.item, log.user[first], start, end, first, last, part, history, log.time)
