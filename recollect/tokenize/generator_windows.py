"""Windows of training sequences for a generator: every training event is a target once per epoch.

A user's sequence is cut from its end into windows of at most H items. An epoch shuffles the windows, sorts them by
length inside pools of a few batches, so that little is computed on padding, and shuffles the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recollect.data.examples import Sequences
from recollect.errors import InputError
from recollect.rng import stream

POOL = 32
"""Batches that are sorted by length together."""


def cut_windows(sequences: Sequences, length: int) -> np.ndarray:
    """(W, H) int32: sequences cut from their end into windows of at most H = `length` items, -1 on the right.

    Sequences, and windows, of a single item are left out: nothing precedes their target.

    Raises:
        InputError: no sequence has two items.
    """
    lengths = sequences.lengths
    counts = -(-lengths // length)  # windows of each sequence
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0 = the user's last window
    end = sequences.starts[owner + 1] - number * length
    begin = np.maximum(sequences.starts[owner], end - length)
    usable = end - begin > 1
    if not usable.any():
        raise InputError("no training sequence has two items; a generator needs histories")
    begin, end = begin[usable], end[usable]
    column = np.arange(length)
    inside = column < (end - begin)[:, None]
    rows = np.minimum(begin[:, None] + column, len(sequences.items) - 1)
    return np.where(inside, sequences.items[rows], -1).astype(np.int32)


class WindowBatches:
    """Epoch -> its batches, (b, n) int64 each, a pure function of (windows, batch size, seed, epoch)."""

    def __init__(self, windows: np.ndarray, batch_size: int, seed: int) -> None:
        """windows: (W, H), -1 on the right."""
        self._windows = windows
        self._lengths = (windows >= 0).sum(axis=1)
        self._batch_size = batch_size
        self._seed = seed

    def __call__(self, epoch: int) -> Sequence[Tensor]:
        generator = stream(self._seed, "generative", "order", epoch)
        order = generator.permutation(len(self._windows))
        pool = POOL * self._batch_size
        sorted_pools = [
            part[np.argsort(self._lengths[part], kind="stable")]
            for part in (order[start : start + pool] for start in range(0, len(order), pool))
        ]
        batches = [
            part[start : start + self._batch_size]
            for part in sorted_pools
            for start in range(0, len(part), self._batch_size)
        ]
        return [self._batch(batches[index]) for index in generator.permutation(len(batches)).tolist()]

    def _batch(self, rows: np.ndarray) -> Tensor:
        longest = int(self._lengths[rows].max())
        return torch.from_numpy(self._windows[rows, :longest].astype(np.int64))
