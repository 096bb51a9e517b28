"""Training samples of next-item recommenders: (prefix, target) pairs as positions in the users' sequences.

A sample is known by the position of its target in `Sequences.items`, so a packed pass that predicts every position and
a pass that takes one prefix at a time speak of the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recollect.data.examples import Sequences
from recollect.errors import DataError


@dataclass(frozen=True)
class Samples:
    """Every event with at least one event before it, in sequence order.

    sequences: where the events are.  position: (M,) int64 into `sequences.items`, the target of each sample.
    sequence: (M,) int64, which sequence it is in.
    """

    sequences: Sequences
    position: np.ndarray
    sequence: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    @property
    def user(self) -> np.ndarray:
        """(M,) int64 whose sample it is."""
        return self.sequences.user[self.sequence]

    @property
    def target(self) -> np.ndarray:
        """(M,) int64 the true next item."""
        return self.sequences.items[self.position]

    def histories(self, index: np.ndarray) -> list[np.ndarray]:
        """The prefix (T,) of each chosen sample, oldest first, T >= 1."""
        begins, ends = self.sequences.starts[self.sequence[index]], self.position[index]
        return [self.sequences.items[begin:end] for begin, end in zip(begins, ends, strict=True)]


def training_samples(sequences: Sequences) -> Samples:
    """The samples of some sequences: one per event but the first of each.

    Raises:
        DataError: no sequence has two events.
    """
    sequence = np.repeat(np.arange(len(sequences)), sequences.lengths)
    is_first = np.zeros(len(sequences.items), dtype=bool)
    is_first[sequences.starts[:-1]] = True
    position = np.flatnonzero(~is_first)
    if not len(position):
        raise DataError("no sequence has two events, so there is no next item to learn; check the split")
    return Samples(sequences, position, sequence[position])
