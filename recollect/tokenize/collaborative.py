"""Behaviour vectors of items in closed form, for tokenizers that align codes with behaviour (LETTER).

LETTER takes frozen SASRec item vectors. Here they are the leading right singular vectors of the training matrix:
with A (users, items) 1 where a user has an item, and every column divided by the square root of its count (so that
popular items do not fill the first directions), A = U S V^T and item i gets row i of V S, in unit length. Items without
a training event get zeros.

Source: [our design]; the paper's vectors come from a trained SASRec.
"""

from __future__ import annotations

import numpy as np

from recollect.errors import InputError
from recollect.rng import stream
from recollect.types import Dataset, Split


def collaborative_vectors(dataset: Dataset, split: Split, dimension: int, *, seed: int = 0) -> np.ndarray:
    """(n_items, dimension) float32 rows of unit length, zeros for items without a training event.

    Args:
        split: only its training rows are read.
        dimension: singular directions kept.
        seed: of the start vector of the iteration; the result depends on it to rounding only.

    Raises:
        InputError: fewer users or items than directions and one.
    """
    import scipy.sparse
    import scipy.sparse.linalg

    log = dataset.interactions.take(split.train)
    matrix = scipy.sparse.csr_array((np.ones(len(log)), (log.user, log.item)), shape=(dataset.n_users, dataset.n_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    if dimension >= min(matrix.shape):
        raise InputError(
            f"{dimension} behaviour directions need more than {dimension} users and items; {dataset.name!r} has "
            f"{dataset.n_users} users and {dataset.n_items} items"
        )
    count = np.asarray(matrix.sum(axis=0)).ravel()
    scaled = matrix @ scipy.sparse.diags_array(1.0 / np.sqrt(np.maximum(count, 1.0)))
    start = stream(seed, "collaborative", dimension).standard_normal(min(matrix.shape))
    _, values, directions = scipy.sparse.linalg.svds(scaled, k=dimension, v0=start)
    order = np.argsort(-values, kind="stable")
    values, directions = values[order], directions[order]
    # The sign of a singular vector is the library's whim; its largest entry is made positive.
    signs = np.sign(directions[np.arange(dimension), np.abs(directions).argmax(axis=1)])
    vectors = (directions * (signs * values)[:, None]).T
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    has_events = (count > 0)[:, None] & (length > 1e-12)
    return np.where(has_events, vectors / np.maximum(length, 1e-12), 0.0).astype(np.float32)
