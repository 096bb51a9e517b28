"""What every recommender of the toolkit can do, and how it is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np

from recollect.types import Dataset, Split


@runtime_checkable
class Recommender(Protocol):
    """A fitted or fittable model that scores the whole catalogue for a history.

    Column j of `score` is item j of the data set it was fitted on (0..n_items-1; padding is never a column).
    """

    name: str
    n_items: int

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Fit on `rows` (N,) bool, default `split.train`, or every row without a split.

        A model that is selected on validation uses the validation cases of `split`, never its test cases; without a
        split it trains for its full number of epochs.  The same seed and input give the same model.
        """
        ...

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """Score candidates (B, C) int64, or every item where None, given histories (T,) oldest first.

        Returns:
            (B, C) or (B, n_items) float32, higher is better; seen items are not masked here.

        Raises:
            InputError: an item of a history or a candidate is not in 0..n_items-1, or the model is not fitted.
        """
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` (kind, options, fingerprint of the data) and `model.safetensors`, atomically."""
        ...

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The inverse of `save_pretrained`; scores are identical after the round trip."""
        ...
