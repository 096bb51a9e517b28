"""Items that share a code tuple, or its first digits: sorted arrays instead of dictionaries of lists.

Everything is O(N log N) in NumPy; nothing loops over items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.errors import InputError


def tuple_ids(codes: np.ndarray) -> np.ndarray:
    """(N,) int64 dense numbers: equal exactly where rows of `codes` (N, L) int are equal.

    Numbers follow the lexicographic order of the tuples, so they do not depend on the order of rows. L = 0 gives 0.
    """
    ids = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        column = codes[:, level].astype(np.int64)
        column -= column.min(initial=0)
        # dense ids of the prefix stay below N, so the product fits 63 bits for any codebook
        ids = np.unique(ids * (column.max(initial=0) + 1) + column, return_inverse=True)[1].reshape(-1)
    return ids


def canonical_rank(n: int, item_ids: Sequence[str] | None) -> np.ndarray:
    """(n,) int64 place of each row in the order that breaks ties: that of the item ids, else of the rows.

    Raises:
        InputError: another number of ids than rows, or an id that stands twice.
    """
    if item_ids is None:
        return np.arange(n)
    if len(item_ids) != n:
        raise InputError(f"{len(item_ids)} item ids for {n} rows of codes; give one id per row")
    names = np.asarray(item_ids, dtype=object)  # as fixed-width text, trailing NULs would be lost
    order = np.argsort(names, kind="stable")
    twice = np.flatnonzero(names[order[1:]] == names[order[:-1]])
    if len(twice):
        raise InputError(f"item id {names[order[twice[0]]]!r} stands twice; ids must be unique")
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    return rank


def sizes_of(ids: np.ndarray) -> np.ndarray:
    """(N,) int64 for each row how many rows have its id."""
    return np.bincount(ids)[ids] if len(ids) else np.zeros(0, dtype=np.int64)


def rank_in_group(ids: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(N,) int64 place of each row among the rows with its id, in the order of `rank`; 0 for the first."""
    order = np.lexsort((rank, ids))
    starts = np.flatnonzero(np.r_[True, ids[order][1:] != ids[order][:-1]]) if len(ids) else np.zeros(0, dtype=np.int64)
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    return place


@dataclass(frozen=True)
class Groups:
    """Disjoint groups of rows; `rows[bounds[g]:bounds[g + 1]]` are those of group g, in canonical order."""

    rows: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, rank: np.ndarray, chosen: np.ndarray) -> Groups:
        """The rows where `chosen` (N,) bool, grouped by `ids`."""
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort((rank[rows], ids[rows]))]
        new = np.flatnonzero(np.r_[True, ids[rows][1:] != ids[rows][:-1]]) if len(rows) else np.zeros(0, dtype=np.int64)
        return cls(rows, np.r_[new, len(rows)].astype(np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def blocks(self, most_rows: int) -> Iterator[tuple[np.ndarray, list[slice]]]:
        """Consecutive groups of about `most_rows` rows together: their rows, and each group's place among them."""
        first = 0
        while first < len(self):
            beyond = int(np.searchsorted(self.bounds, self.bounds[first] + most_rows, side="right")) - 1
            last = max(first + 1, min(beyond, len(self)))
            offset = self.bounds[first]
            places = [slice(int(self.bounds[g] - offset), int(self.bounds[g + 1] - offset)) for g in range(first, last)]
            yield self.rows[offset : self.bounds[last]], places
            first = last
