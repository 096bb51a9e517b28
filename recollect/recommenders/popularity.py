"""Popularity: every user is shown what was bought most. Not a strong model, but the one every other must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from recollect.eval.protocol import data_fingerprint
from recollect.recommenders.closed_form import ClosedForm, check_question, fitted_rows
from recollect.types import Dataset, Split


@dataclass(frozen=True)
class PopularityConfig:
    """Popularity has no options."""


class Popularity(ClosedForm):
    """Scores an item by how many training events it has, repeated ones included."""

    name = "pop"
    config_class = PopularityConfig

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Count the events of the training rows."""
        rows = fitted_rows(dataset, split, rows)
        item = dataset.interactions.item if rows is None else dataset.interactions.item[rows]
        self.counts = np.bincount(item, minlength=dataset.n_items).astype(np.float32)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32; exact up to 2^24 events an item.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        check_question(self.name, self.n_items, histories, candidates)
        if candidates is not None:
            return self.counts[candidates]
        return np.tile(self.counts, (len(histories), 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Counts (n_items,)."""
        return {"counts": self.counts}

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`."""
        self.counts = arrays["counts"]
