"""First-order Markov chain: what followed the last item in training.

Source: evaluation spec 7 ("Markov1"); on Amazon Beauty and Toys it beats several published generative rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from recollect.data.examples import training_sequences
from recollect.eval.protocol import data_fingerprint
from recollect.recommenders.closed_form import (
    ClosedForm,
    check_question,
    fitted_rows,
    of_candidates,
    sparse_arrays,
    square_of_arrays,
)
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    import scipy.sparse


@dataclass(frozen=True)
class MarkovConfig:
    """The Markov chain has no options."""


def transition_counts(items: np.ndarray, starts: np.ndarray, n_items: int) -> scipy.sparse.csr_array:
    """How often item j directly follows item i within a sequence.

    Args:
        items: (E,) int64, the sequences one after the other.
        starts: (S + 1,) int64, where each begins.

    Returns:
        (n_items, n_items) float32, row = the item before; no pair spans two sequences.
    """
    import scipy.sparse

    is_last = np.zeros(len(items), dtype=bool)
    is_last[starts[1:] - 1] = True
    before = np.flatnonzero(~is_last)
    counts = scipy.sparse.coo_array(
        (np.ones(len(before), dtype=np.float32), (items[before], items[before + 1])), shape=(n_items, n_items)
    ).tocsr()
    counts.sum_duplicates()
    return counts


class Markov(ClosedForm):
    """Scores item j by the training count of the pair (last history item, j); an empty history gives zeros."""

    name = "markov"
    config_class = MarkovConfig

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Count adjacent pairs of the training sequences."""
        sequences = training_sequences(dataset, fitted_rows(dataset, split, rows))
        self.counts = transition_counts(sequences.items, sequences.starts, dataset.n_items)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        items, starts = check_question(self.name, self.n_items, histories, candidates)
        scores = np.zeros((len(histories), self.n_items), dtype=np.float32)
        known = np.flatnonzero(np.diff(starts))
        scores[known] = self.counts[items[starts[known + 1] - 1]].toarray()
        return of_candidates(scores, candidates)

    def arrays(self) -> dict[str, np.ndarray]:
        """The sparse counts."""
        return sparse_arrays(self.counts)

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`."""
        self.counts = square_of_arrays(arrays, self.n_items)
