"""Rows that are read a block at a time: an array on disk, a part of it, or what earlier levels left of it.

Nothing here holds more than a block, so an array larger than memory can be fitted on. A source gives the same bits
for a row whatever the block it is asked in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError


class RowSource(Protocol):
    """n rows of `dimension` numbers, read block by block."""

    dimension: int

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 as a fresh tensor (stop - start, dimension), float32, that the caller may change."""
        ...


class ArrayRows:
    """Rows of a NumPy array, memory-mapped or not.

    Args:
        embeddings: (N, D) float array; never modified.
        rows: (n,) int positions to read, in this order; None = all.
        preprocess: what is done to a block (B, D) float32 before anybody sees it; must treat each row on its own.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        rows: np.ndarray | None = None,
        preprocess: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._embeddings = embeddings
        self._rows = None if rows is not None and len(rows) == len(embeddings) and _is_range(rows) else rows
        self._preprocess = preprocess
        self._n = len(embeddings) if self._rows is None else len(self._rows)
        self.dimension = int(embeddings.shape[1] if preprocess is None or not self._n else self.block(0, 1).shape[1])

    def __len__(self) -> int:
        return self._n

    def block(self, start: int, stop: int) -> Tensor:
        """See `RowSource.block`.

        Raises:
            InputError: a value is NaN or infinite, or does not fit float32; the message names the item.
        """
        chosen = slice(start, stop) if self._rows is None else self._rows[start:stop]
        block = finite_block(
            self._embeddings[chosen], lambda row: start + row if self._rows is None else int(self._rows[start + row])
        )
        if self._preprocess is not None:
            block = np.ascontiguousarray(self._preprocess(block), dtype=np.float32)
        return torch.from_numpy(block)


def finite_block(values: np.ndarray, item: Callable[[int], object]) -> np.ndarray:
    """A float32 copy (B, D) of rows.

    Args:
        item: row of `values` -> what messages call it.

    Raises:
        InputError: a value is NaN or infinite, or does not fit float32.
    """
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused below
        block = np.array(values, dtype=np.float32, order="C")
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise InputError(
            f"embedding of item {item(int(np.flatnonzero(~finite)[0]))} holds NaN, infinity or a value beyond float32; "
            "re-embed that item or leave it out"
        )
    return block


class TensorRows:
    """Rows of a tensor (n, D) in memory, on any device."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.dimension = int(values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def block(self, start: int, stop: int) -> Tensor:
        """See `RowSource.block`."""
        return self.values[start:stop].clone()


def _is_range(rows: np.ndarray) -> bool:
    return bool((rows == np.arange(len(rows))).all())


def spans(n: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of at most `block_rows` rows that cover 0..n-1."""
    for start in range(0, n, block_rows):
        yield start, min(n, start + block_rows)
