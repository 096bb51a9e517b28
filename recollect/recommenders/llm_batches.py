"""Batches of an LLM recommender: histories padded on the left, and which positions predict what.

A sample is the position of its target in `Sequences.items`, as everywhere in distillation. Under dense supervision a
window of T items gives T samples in one pass; under last-position supervision each sample is a row of its own.
Rows of like length are put together, so that little is computed on padding; the order is a function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recollect.data.examples import Sequences
from recollect.errors import ConfigError, InputError
from recollect.recommenders.llm_config import Supervision
from recollect.rng import stream

POOL_BATCHES = 16  # rows are sorted by length inside pools of so many batches, which keeps batches random


class Windows(NamedTuple):
    """Windows over sequences, each (W,) int64 positions in `Sequences.items`.

    begin, end: the input items [begin, end).  scored: first input whose next item is a sample of this window; the last
    one is the input end - 1, whose target is the item at `end`.
    """

    begin: np.ndarray
    scored: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class LlmBatch:
    """Rows of items with padding on the left.

    items: (B, T) int64, 0 in padding.  real: (B, T) bool.  flat: (M,) int64, the cell (row-major) each sample is read
    from under dense supervision; None where the last position of every row is read.  targets: (M,) int64 or None.
    position: (M,) int64, the samples' positions in `Sequences.items`, or None outside training.
    """

    items: Tensor
    real: Tensor
    flat: Tensor | None
    targets: Tensor | None
    position: np.ndarray | None

    def __len__(self) -> int:
        return len(self.items) if self.flat is None else len(self.flat)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LlmBatch:
        """The same batch on another device."""
        return replace(
            self,
            items=self.items.to(device),
            real=self.real.to(device),
            flat=None if self.flat is None else self.flat.to(device),
            targets=None if self.targets is None else self.targets.to(device),
        )


def windows_of(sequences: Sequences, max_length: int, stride: int) -> Windows:
    """Windows that score every sample of the sequences once.

    The last window of a sequence ends at its last input; each earlier one ends `stride` inputs before. A sample is
    read in the window that shows it most, so with stride = max_length / 2 it sees at least half a window (or all there
    is), and with stride = max_length nothing is read twice.

    Raises:
        ConfigError: lengths are out of range.
        InputError: no sequence has two items.
    """
    if not 1 <= stride <= max_length:
        raise ConfigError(f"the stride must be in 1..{max_length}, got {stride!r}")
    begins, scored, ends = [], [], []
    for start, stop in zip(sequences.starts[:-1].tolist(), (sequences.starts[1:] - 1).tolist(), strict=True):
        end = stop  # the last item is a target only
        while end > start:
            begin = max(start, end - max_length)
            ends.append(end)
            begins.append(begin)
            scored.append(start if begin == start else end - stride)
            if begin == start:
                break
            end -= stride
    if not ends:
        raise InputError("no training sequence has 2 items; a sequence model needs longer histories")
    return Windows(*(np.array(column, dtype=np.int64) for column in (begins, scored, ends)))


def prefixes_of(sequences: Sequences, max_length: int) -> Windows:
    """One window per sample, for last-position supervision: the `max_length` items before its target."""
    first = np.repeat(sequences.starts[:-1], sequences.lengths)
    position = np.arange(len(sequences.items))
    has_history = position > first
    if not has_history.any():
        raise InputError("no training sequence has 2 items; a sequence model needs longer histories")
    end = position[has_history]
    return Windows(np.maximum(first[has_history], end - max_length), end - 1, end)


def left_padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Items (B, T) int64 and their mask (B, T) bool; T is the longest row, at least 1."""
    width = max(1, max((len(row) for row in rows), default=1))
    items = np.zeros((len(rows), width), dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    for number, row in enumerate(rows):
        if len(row):
            items[number, width - len(row) :] = row
            real[number, width - len(row) :] = True
    return torch.from_numpy(items), torch.from_numpy(real)


class WindowBatches(Sequence[LlmBatch]):
    """Some windows as batches, made when asked for.

    Args:
        sequences: where the items are.
        windows: over them.
        order: (W,) the windows in the order they are batched.
        batch_size: windows in a batch.
        supervision: what the windows were made for.
        wanted: (E,) bool over positions of targets; samples outside it are not scored.
    """

    def __init__(
        self,
        sequences: Sequences,
        windows: Windows,
        order: np.ndarray,
        batch_size: int,
        supervision: Supervision,
        wanted: np.ndarray | None = None,
    ) -> None:
        self._sequences, self._windows, self._order = sequences, windows, order
        self._batch_size, self._supervision, self._wanted = batch_size, supervision, wanted

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        begin, scored, end = (column[chosen] for column in self._windows)
        catalogue = self._sequences.items
        items, real = left_padded([catalogue[low:high] for low, high in zip(begin, end, strict=True)])
        if self._supervision == "last":
            return LlmBatch(items, real, None, torch.from_numpy(catalogue[end].astype(np.int64)), end)
        width = items.shape[1]
        cells, positions = [], []
        for row, (first, stop) in enumerate(zip(scored, end, strict=True)):
            position = np.arange(first + 1, stop + 1)  # of the targets
            if self._wanted is not None:
                position = position[self._wanted[position]]
            cells.append(row * width + width - (stop + 1 - position))
            positions.append(position)
        position = np.concatenate(positions)
        targets = torch.from_numpy(catalogue[position].astype(np.int64))
        return LlmBatch(items, real, torch.from_numpy(np.concatenate(cells)), targets, position)


class LlmTrainingBatches:
    """epoch -> batches that hold every sample of the sequences once.

    Args:
        sequences: what to train on.
        max_length: history items a row shows.
        batch_size: windows (dense) or samples (last) in a batch.
    """

    def __init__(
        self, sequences: Sequences, *, supervision: Supervision, max_length: int, batch_size: int, seed: int
    ) -> None:
        if max_length < 1 or batch_size < 1:
            raise ConfigError(f"max_length and batch_size must be at least 1, got {max_length!r} and {batch_size!r}")
        self._sequences, self._supervision = sequences, supervision
        self._batch_size, self._seed = batch_size, seed
        dense = supervision == "dense"
        self.windows = windows_of(sequences, max_length, max_length) if dense else prefixes_of(sequences, max_length)

    def __call__(self, epoch: int) -> WindowBatches:
        """The batches of an epoch, in an order drawn from (seed, epoch)."""
        generator = stream(self._seed, "llm-batches", epoch)
        order = generator.permutation(len(self.windows.begin))
        length = (self.windows.end - self.windows.begin)[order]
        pool = np.arange(len(order)) // (self._batch_size * POOL_BATCHES)
        order = order[np.lexsort((length, pool))]
        n_batches = -(-len(order) // self._batch_size)
        full = np.arange(len(order) // self._batch_size)
        shuffled = generator.permutation(full)
        rows = (shuffled[:, None] * self._batch_size + np.arange(self._batch_size)).ravel()
        rest = np.arange(len(full) * self._batch_size, len(order)) if n_batches > len(full) else rows[:0]
        return WindowBatches(
            self._sequences, self.windows, order[np.r_[rows, rest]], self._batch_size, self._supervision
        )


def reading_batches(
    sequences: Sequences, wanted: np.ndarray, *, supervision: Supervision, max_length: int, batch_size: int
) -> WindowBatches:
    """Batches that read every wanted sample once, without training: dense windows overlap by half.

    Args:
        wanted: (E,) bool over `sequences.items`; only positions with an earlier item of the same sequence are samples.
    """
    if supervision == "last":
        windows = prefixes_of(sequences, max_length)
        keep = wanted[windows.end]
    else:
        windows = windows_of(sequences, max_length, max(1, max_length // 2))
        total = np.r_[0, np.cumsum(wanted)]
        keep = total[windows.end + 1] > total[windows.scored + 1]
    windows = Windows(*(column[keep] for column in windows))
    order = np.argsort(windows.begin - windows.end, kind="stable")
    return WindowBatches(sequences, windows, order, batch_size, supervision, wanted)
