"""Popularity: every user is shown what was bought most. Not a strong model, but the one every other must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from recollect.eval.protocol import data_fingerprint
from recollect.recommenders.closed_form import (
    check_question,
    fitted_rows,
    load_folder,
    save_folder,
)
from recollect.types import Dataset, Split


@dataclass(frozen=True)
class PopularityConfig:
    """Popularity has no options."""


class Popularity:
    """Scores an item by how many training events it has, repeated ones included."""

    name = "pop"

    def __init__(self, config: PopularityConfig = PopularityConfig()) -> None:
        self.config = config
        self.n_items = 0
        self.data = ""

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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (counts (n_items,))."""
        save_folder(
            folder,
            kind=self.name,
            options=self.config,
            n_items=self.n_items,
            data=self.data,
            arrays={"counts": self.counts} if self.n_items else {},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Inverse of `save_pretrained`."""
        config, content, arrays = load_folder(folder, cls.name, PopularityConfig)
        model = cls(config)
        model.counts = arrays["counts"]
        model.n_items, model.data = int(content["n_items"]), content["data_fingerprint"]
        return model
