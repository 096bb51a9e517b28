"""EASE: the linear item-item model with a closed form (arXiv 1905.03375).

With X the binary training matrix and P = (X'X + lambda I)^-1, the weights are B_ij = -P_ij / P_jj, B_jj = 0
(eq. 8 of the paper), and an item's score is the sum of its column of B over the distinct items of the history.

Memory is 8 n^2 bytes while fitting in float64 (4 n^2 in float32) and 4 n^2 afterwards: 1.2 GB at 12,000 items; time
grows with n^3. Not covered: catalogues beyond what memory takes; use `itemknn` there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.protocol import data_fingerprint
from recollect.recommenders.closed_form import (
    ClosedForm,
    check_question,
    distinct_rows,
    fitted_rows,
    of_candidates,
    train_matrix,
)
from recollect.types import Dataset, Split


@dataclass(frozen=True)
class EaseConfig:
    """Options of EASE."""

    regularization: float = 250.0
    """Lambda: ridge on the item-item matrix; larger for sparser or longer logs (choose it on validation)."""

    precision: Literal["float32", "float64"] = "float64"
    """Arithmetic of the inverse; float32 halves memory and time and loses digits when lambda is small."""

    def __post_init__(self) -> None:
        if not 0 < self.regularization < float("inf"):
            raise ConfigError(f"regularization must be a positive number, got {self.regularization!r}")


def ease_weights(gram: np.ndarray, regularization: float) -> np.ndarray:
    """B (n, n) float32 from the Gram matrix X'X.

    Args:
        gram: (n, n) float32 or float64, symmetric, Fortran order; overwritten.
        regularization: lambda > 0.

    Source: eq. 8 of the paper; inverted by Cholesky in place.
    """
    from scipy.linalg import lapack

    gram[np.diag_indices_from(gram)] += regularization
    factorise, invert = (lapack.spotrf, lapack.spotri) if gram.dtype == np.float32 else (lapack.dpotrf, lapack.dpotri)
    factor, failed = factorise(gram, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise InputError(
            f"EASE: the Gram matrix is not positive definite with regularization {regularization!r}; raise it"
        )
    inverse, _ = invert(factor, lower=1, overwrite_c=1)
    diagonal = np.diagonal(inverse).copy()
    weights = np.empty(gram.shape, dtype=np.float32)
    for j in range(len(weights)):  # only the lower triangle of the inverse is filled; a row at a time needs no copy
        weights[j, j:] = inverse[j:, j]
        weights[j:, j] = inverse[j:, j]
    weights /= -diagonal.astype(np.float32)
    weights[np.diag_indices_from(weights)] = 0.0
    return weights


class Ease(ClosedForm):
    """EASE; see the module's text."""

    name = "ease"
    config_class = EaseConfig

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Solve for B on the training rows.

        Raises:
            InputError: the matrices would not fit this machine's memory.
        """
        refuse_if_too_large(dataset.n_items, self.config.precision)
        matrix = train_matrix(dataset, fitted_rows(dataset, split, rows), np.dtype(self.config.precision))
        gram = (matrix.T @ matrix).toarray(order="F")
        self.weights = ease_weights(gram, self.config.regularization)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        items, starts = check_question(self.name, self.n_items, histories, candidates)
        return of_candidates(distinct_rows(items, starts, self.n_items) @ self.weights, candidates)

    def arrays(self) -> dict[str, np.ndarray]:
        """Weights (n_items, n_items)."""
        return {"weights": self.weights}

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`."""
        self.weights = arrays["weights"]


def refuse_if_too_large(n_items: int, precision: str) -> None:
    """Say so before the allocation fails (or the machine swaps).

    Raises:
        InputError: the Gram matrix and B need more than the machine's memory.
    """
    needed = n_items**2 * (np.dtype(precision).itemsize + 4)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        raise InputError(
            f"EASE on {n_items} items needs {needed / 1e9:.1f} GB where this machine has {installed / 1e9:.1f} GB; "
            "use itemknn, or a larger --core"
        )
