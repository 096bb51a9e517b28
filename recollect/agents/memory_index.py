"""Retrieval over agents' memories: the protocol, and the exact index that every other one must agree with.

A retrieval index is derived: it can be rebuilt from the journal at any time. Queries with a filter give the same hits
whichever index answers; without one an approximate store may miss a row (see its module). Similarities are cosines
rounded to six decimals and ties go to the smaller id, so that the last bits of a matrix product, or of a store that
renormalises vectors, cannot change an order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from recollect.errors import DataError

Scalar = str | int | float | bool
DECIMALS = 6
_MARGIN = 1e-5  # above the error of a float32 matrix product over some thousand dimensions of unit rows


class IndexRow(NamedTuple):
    """One text to find again. `vector`: (D,) any length but zero-safe; `metadata`: scalars to filter by."""

    id: str
    text: str
    vector: np.ndarray
    metadata: Mapping[str, Scalar]


class Hit(NamedTuple):
    """A row found, and its cosine similarity to the query, rounded to six decimals."""

    id: str
    similarity: float


class MemoryIndex(Protocol):
    """Collections of vectors. Rows are replaced by id; asking an unknown collection finds nothing."""

    def upsert(self, collection: str, rows: Sequence[IndexRow]) -> None:
        """Add rows or replace those with the same id. Raises DataError on a wrong dimension or a non-finite value."""
        ...

    def query(
        self, collection: str, vectors: np.ndarray, k: int, where: Mapping[str, Scalar] | None = None
    ) -> list[list[Hit]]:
        """For each of (B, D) vectors the k most similar rows whose metadata equal `where`, best first."""
        ...

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Forget rows; unknown ids are no error."""
        ...

    def count(self, collection: str) -> int:
        """Rows in a collection."""
        ...

    def close(self) -> None: ...


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """(B, D) float32 rows of length one; a zero row stays zero.

    Raises:
        DataError: not two-dimensional, or a value is not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError(f"vectors must be finite and two-dimensional, got shape {vectors.shape}")
    length = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def most_similar(ids: Sequence[str], rows: np.ndarray, query: np.ndarray, k: int) -> list[Hit]:
    """The k rows most similar to a query, exactly.

    Args:
        ids: N ids.
        rows: (N, D) float32 unit rows.
        query: (D,) float32 unit vector.
        k: at least 1; fewer hits when N is smaller.
    """
    rough = rows @ query
    least = np.partition(rough, -k)[-k] - _MARGIN if len(rough) > k else -np.inf
    kept = np.flatnonzero(rough >= least).tolist()
    # Summed row by row in float64, so equal rows get equal similarities wherever they stand.
    exact = (rows[kept].astype(np.float64) * query.astype(np.float64)).sum(axis=1).round(DECIMALS) + 0.0
    order = sorted(range(len(kept)), key=lambda place: (-exact[place], ids[kept[place]]))
    return [Hit(ids[kept[place]], float(exact[place])) for place in order[:k]]


def checked_k(k: int) -> int:
    """`k`, refused when below 1."""
    if k < 1:
        raise DataError(f"k must be at least 1, got {k!r}")
    return k


class _Collection:
    def __init__(self, dimension: int) -> None:
        self.ids: list[str] = []
        self.rows: list[IndexRow] = []
        self.place: dict[str, int] = {}
        self.vectors = np.zeros((0, dimension), dtype=np.float32)

    def put(self, rows: Sequence[IndexRow]) -> None:
        vectors = unit_rows(np.stack([np.asarray(row.vector) for row in rows]))
        if vectors.shape[1] != self.vectors.shape[1]:
            raise DataError(f"vectors must have {self.vectors.shape[1]} dimensions, got {vectors.shape[1]}")
        for row in rows:
            if row.id not in self.place:
                self.place[row.id] = len(self.ids)
                self.ids.append(row.id)
                self.rows.append(row)
        if len(self.ids) > len(self.vectors):
            grown = np.zeros((max(64, 2 * len(self.ids)), vectors.shape[1]), dtype=np.float32)
            grown[: len(self.vectors)] = self.vectors
            self.vectors = grown
        for row, vector in zip(rows, vectors, strict=True):
            self.rows[self.place[row.id]] = row
            self.vectors[self.place[row.id]] = vector

    def drop(self, ids: Sequence[str]) -> None:
        gone = set(ids)
        kept = [place for place, name in enumerate(self.ids) if name not in gone]
        self.vectors = self.vectors[kept]
        self.rows = [self.rows[place] for place in kept]
        self.ids = [self.ids[place] for place in kept]
        self.place = {name: place for place, name in enumerate(self.ids)}


class ExactIndex:
    """Brute force over float32 rows in memory; the reference. Comfortable below about 200,000 rows."""

    def __init__(self) -> None:
        self._collections: dict[str, _Collection] = {}

    def upsert(self, collection: str, rows: Sequence[IndexRow]) -> None:
        if not rows:
            return
        if collection not in self._collections:
            self._collections[collection] = _Collection(len(np.asarray(rows[0].vector)))
        self._collections[collection].put(rows)

    def query(
        self, collection: str, vectors: np.ndarray, k: int, where: Mapping[str, Scalar] | None = None
    ) -> list[list[Hit]]:
        queries = unit_rows(vectors)
        held = self._collections.get(collection)
        checked_k(k)
        if held is None:
            return [[] for _ in queries]
        if queries.shape[1] != held.vectors.shape[1]:
            raise DataError(f"queries must have {held.vectors.shape[1]} dimensions, got {queries.shape[1]}")
        ids, rows = held.ids, held.vectors[: len(held.ids)]
        if where:
            kept = [place for place, row in enumerate(held.rows) if matches(row.metadata, where)]
            ids, rows = [ids[place] for place in kept], rows[kept]
        return [most_similar(ids, rows, query, k) for query in queries]

    def best_of(self, collection: str, ids: Sequence[str], query: np.ndarray, k: int) -> list[Hit]:
        """The k best of some rows for one (D,) unit query.

        Raises:
            KeyError: an id is not in the collection.
        """
        held = self._collections[collection]
        return most_similar(ids, held.vectors[[held.place[name] for name in ids]], query, k)

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        if collection in self._collections:
            self._collections[collection].drop(ids)

    def count(self, collection: str) -> int:
        held = self._collections.get(collection)
        return 0 if held is None else len(held.ids)

    def close(self) -> None:
        self._collections.clear()

    def dimension(self, collection: str) -> int:
        """Length of the vectors of a collection that exists."""
        return self._collections[collection].vectors.shape[1]

    def contents(self) -> dict[str, list[IndexRow]]:
        """Every collection's rows, in the order they first came."""
        return {name: list(held.rows) for name, held in self._collections.items()}


def matches(metadata: Mapping[str, Scalar], where: Mapping[str, Scalar]) -> bool:
    """Whether every entry of `where` is in `metadata`, with the same value."""
    return all(name in metadata and metadata[name] == value for name, value in where.items())
