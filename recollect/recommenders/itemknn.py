"""Item-based nearest neighbours by cosine similarity (Deshpande & Karypis, TOIS 2004), kept sparse.

sim(i, j) = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrinkage) over the training users; each history item votes for its
k most similar items, and an item's score is the sum of the votes of the distinct history items.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from recollect.errors import ConfigError
from recollect.eval.protocol import data_fingerprint
from recollect.recommenders.closed_form import (
    ClosedForm,
    check_question,
    distinct_rows,
    fitted_rows,
    of_candidates,
    sparse_arrays,
    square_of_arrays,
    train_matrix,
)
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    import scipy.sparse

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ItemKNNConfig:
    """Options of item-based neighbours."""

    neighbours: int = 100
    """Most similar items each item votes for; equal similarities are cut by item index."""

    shrinkage: float = 10.0
    """Added to the denominator: pulls similarities that rest on few users towards 0."""

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"neighbours must be at least 1, got {self.neighbours!r}")
        if not 0 <= self.shrinkage < float("inf"):
            raise ConfigError(f"shrinkage must be 0 or more, got {self.shrinkage!r}")


def nearest_items(matrix: scipy.sparse.csr_array, neighbours: int, shrinkage: float) -> scipy.sparse.csr_array:
    """Similarity of each item to its nearest ones.

    Args:
        matrix: (n_users, n_items) binary.
        neighbours: entries kept in a row.
        shrinkage: see the module's text; 0 gives plain cosine.

    Returns:
        (n_items, n_items) float32, row i = the neighbours of i, without i itself.
    """
    import scipy.sparse

    of_item = matrix.T.tocsr().astype(np.float64)
    norm = np.sqrt(np.diff(of_item.indptr))
    n_items = of_item.shape[0]
    values, columns = [], []
    for first in range(0, n_items, _ROWS_AT_ONCE):
        block = (of_item[first : first + _ROWS_AT_ONCE] @ matrix).tocsr()
        block.sort_indices()  # so that a stable sort cuts equal similarities by item index
        for row, (begin, end) in enumerate(itertools.pairwise(block.indptr), start=first):
            column, common = block.indices[begin:end], block.data[begin:end]
            is_other = column != row
            column, common = column[is_other], common[is_other]
            similarity = common / (norm[row] * norm[column] + shrinkage)
            nearest = np.argsort(-similarity, kind="stable")[:neighbours]
            values.append(similarity[nearest].astype(np.float32))
            columns.append(column[nearest])
    starts = np.r_[0, np.cumsum([len(column) for column in columns])]
    result = scipy.sparse.csr_array((np.concatenate(values), np.concatenate(columns), starts), shape=(n_items, n_items))
    result.sort_indices()
    return result


class ItemKNN(ClosedForm):
    """Item-based neighbours; see the module's text."""

    name = "itemknn"
    config_class = ItemKNNConfig

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Find the neighbours on the training rows."""
        matrix = train_matrix(dataset, fitted_rows(dataset, split, rows), np.float64)
        self.similarity = nearest_items(matrix, self.config.neighbours, self.config.shrinkage)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        items, starts = check_question(self.name, self.n_items, histories, candidates)
        scores = (distinct_rows(items, starts, self.n_items) @ self.similarity).toarray()
        return of_candidates(scores, candidates)

    def arrays(self) -> dict[str, np.ndarray]:
        """The sparse similarities."""
        return sparse_arrays(self.similarity)

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`."""
        self.similarity = square_of_arrays(arrays, self.n_items)
