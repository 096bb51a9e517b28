"""Training and scoring batches in which nothing is computed on padding.

A batch is jagged: the positions of its sequences one after another, (M,), and everything that works on single
positions (embeddings, projections, norms, the output layer) sees those only.  What mixes positions of a sequence
(attention, recurrences) runs on a few rectangles: sequences stand in order of falling length and are cut into groups
in which the shortest has more than half the longest's length (the last group, when small, takes all that is left).
Their padding is on the right, where a causal operation cannot see it.

Random batches are kept random: sequences are drawn without regard to length and only sorted inside their batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.data.examples import Sequences
from recollect.errors import ConfigError, InputError
from recollect.rng import stream

MIN_GROUP_POSITIONS = 512  # a rectangle smaller than this costs more in calls than its padding would


@dataclass(frozen=True)
class Group:
    """One rectangle of a batch: its sequences have the given lengths (G,) int64; row r is valid up to lengths[r]."""

    size: int
    width: int
    lengths: Tensor

    @property
    def valid(self) -> Tensor:
        """(G, T) bool, False on padding."""
        return torch.arange(self.width, device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True)
class Batch:
    """Sequences in order of falling length, their positions one after another.

    items: (M,) int64 input items in 0..n_items-1.  place: (M,) int64, 0 = first position of its sequence.
    targets: (M,) int64, the item that follows; None when scoring or where the model masks its own inputs.
    starts: (B + 1,) int64.  groups: the rectangles that cover the batch, K cells in all, row-major one after another.
    source: (K,) int64, the position each cell shows (padding shows some other one).  cell: (M,) int64, its inverse.
    times: (M,) int64 of the input items; None for models that do not read them.
    """

    items: Tensor
    place: Tensor
    targets: Tensor | None
    starts: Tensor
    groups: tuple[Group, ...]
    source: Tensor
    cell: Tensor
    times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def last(self) -> Tensor:
        """(B,) int64, the last position of each sequence."""
        return self.starts[1:] - 1

    @property
    def sequence(self) -> Tensor:
        """(M,) int64, which sequence a position belongs to."""
        return torch.repeat_interleave(self.starts.diff())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        if self.items.device == torch.device(device):
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            move(self.items),
            move(self.place),
            None if self.targets is None else move(self.targets),
            move(self.starts),
            tuple(replace(group, lengths=move(group.lengths)) for group in self.groups),
            move(self.source),
            move(self.cell),
            None if self.times is None else move(self.times),
        )


class _ToCells(torch.autograd.Function):
    """Positions to cells; both directions are gathers, where autograd's index_add would be serial on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, cell: Tensor) -> Tensor:
        ctx.save_for_backward(cell)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (cell,) = ctx.saved_tensors
        return gradient.index_select(0, cell), None, None  # what reached padding is dropped


def over_groups(batch: Batch, x: Tensor, function: Callable[[Tensor, Group], Tensor]) -> Tensor:
    """Apply a function of rectangles to jagged positions.

    Args:
        x: (M, D) of the batch's positions.
        function: (cells (G, T, D), group) -> (G, T, D'); what it finds in padding cells is arbitrary and what it
            leaves there is dropped, so it must not let them reach valid cells.

    Returns:
        (M, D').
    """
    cells = x if len(batch.source) == len(x) else _ToCells.apply(x, batch.source, batch.cell)
    parts = cells.split([group.size * group.width for group in batch.groups])
    results = [
        function(part.view(group.size, group.width, -1), group).flatten(0, 1)
        for part, group in zip(parts, batch.groups, strict=True)
    ]
    joined = results[0] if len(results) == 1 else torch.cat(results)
    return joined if len(batch.source) == len(x) else joined.index_select(0, batch.cell)


def over_sequences(batch: Batch, x: Tensor, function: Callable[[Tensor, slice, Group], Tensor]) -> Tensor:
    """Reduce each sequence of a batch to one row; for scoring, since it has no gradient of its own.

    Args:
        x: (M, D) of the batch's positions.
        function: (cells (G, T, D), which sequences of the batch they are, group) -> (G, D').

    Returns:
        (B, D').
    """
    cells = x if len(batch.source) == len(x) else x.index_select(0, batch.source)
    rows, low, first = [], 0, 0
    for group in batch.groups:
        part = cells[low : low + group.size * group.width].view(group.size, group.width, -1)
        rows.append(function(part, slice(first, first + group.size), group))
        low, first = low + group.size * group.width, first + group.size
    return torch.cat(rows)


def in_groups(batch: Batch, x: Tensor) -> list[Tensor]:
    """What the batch's positions (M,) hold, as one (G, T) rectangle per group; padding cells hold anything."""
    cells = x if len(batch.source) == len(x) else x.index_select(0, batch.source)
    parts = cells.split([group.size * group.width for group in batch.groups])
    return [part.view(group.size, group.width) for part, group in zip(parts, batch.groups, strict=True)]


def make_batch(
    items: np.ndarray, lengths: np.ndarray, targets: np.ndarray | None = None, times: np.ndarray | None = None
) -> Batch:
    """A batch of sequences that stand one after another in `items` (M,) in order of falling length.

    Args:
        items: (M,) int64.
        lengths: (B,) int64, each at least 1, not rising.
        targets, times: (M,) int64 or None.
    """
    starts = np.r_[0, np.cumsum(lengths)]
    place = np.arange(len(items)) - np.repeat(starts[:-1], lengths)
    cuts = _cuts(lengths)
    sources = [_cells(starts, lengths, low, high) for low, high in cuts]
    valid = np.concatenate([(np.arange(lengths[low]) < lengths[low:high, None]).ravel() for low, high in cuts])
    return Batch(
        torch.from_numpy(items),
        torch.from_numpy(place),
        None if targets is None else torch.from_numpy(targets),
        torch.from_numpy(starts),
        tuple(Group(high - low, int(lengths[low]), torch.from_numpy(lengths[low:high])) for low, high in cuts),
        torch.from_numpy(np.concatenate(sources)),
        torch.from_numpy(np.flatnonzero(valid)),
        None if times is None else torch.from_numpy(times),
    )


def _cuts(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Sequences [low, high) of each group; `lengths` does not rise."""
    cuts, low = [], 0
    while low < len(lengths):
        high = int(np.searchsorted(-lengths, -(int(lengths[low]) // 2), side="left"))
        if lengths[high:].sum() < MIN_GROUP_POSITIONS:
            high = len(lengths)
        cuts.append((low, high))
        low = high
    return cuts


def _cells(starts: np.ndarray, lengths: np.ndarray, low: int, high: int) -> np.ndarray:
    """(G T,) position of each cell of sequences [low, high); padding repeats the sequence's last position."""
    column = np.minimum(np.arange(lengths[low]), lengths[low:high, None] - 1)  # (G, T)
    return (starts[low:high, None] + column).ravel()


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch, built when they are asked for: a pure function of (sequences, seed, epoch)."""

    items: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    order: np.ndarray
    batch_size: int
    with_targets: bool
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        lengths = self.end[chosen] - self.begin[chosen]
        falling = np.argsort(-lengths, kind="stable")
        lengths, begin = lengths[falling], self.begin[chosen][falling]
        rows = _ranges(begin, lengths)
        return make_batch(
            self.items[rows],
            lengths,
            self.items[rows + 1] if self.with_targets else None,
            None if self.times is None else self.times[rows],
        )


class TrainingBatches:
    """Batches of training windows: the last `max_length` inputs of every sequence, and the item after each.

    Args:
        sequences: what to train on; sequences that leave no (input, target) pair are not used.
        max_length: inputs of a window.
        batch_size: sequences in a batch; the last batch of an epoch may have fewer.
        seed: of the order, which differs by epoch.
        with_targets: False makes windows of the last `max_length` items themselves, for models that mask inputs or
            draw pairs from the window.
        min_items: items a sequence needs to be used.
        with_times: batches carry the times of their inputs, which `sequences` must have.

    Raises:
        ConfigError: `max_length` or `batch_size` is below 1.
        InputError: no sequence is long enough.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        with_targets: bool = True,
        min_items: int = 2,
        with_times: bool = False,
    ) -> None:
        if max_length < 1 or batch_size < 1:
            raise ConfigError(f"max_length and batch_size must be at least 1, got {max_length!r} and {batch_size!r}")
        usable = sequences.lengths >= max(min_items, 2 if with_targets else 1)
        if not usable.any():
            raise InputError(f"no training sequence has {min_items} items; a sequence model needs longer histories")
        if with_times and sequences.time is None:
            raise InputError("these training sequences hold no times, which the model reads")
        self._items = np.ascontiguousarray(sequences.items, dtype=np.int64)
        self._times = np.ascontiguousarray(sequences.time, dtype=np.int64) if with_times else None
        self._end = sequences.starts[1:][usable] - (1 if with_targets else 0)
        self._begin = np.maximum(sequences.starts[:-1][usable], self._end - max_length)
        self._batch_size = batch_size
        self._seed = seed
        self._with_targets = with_targets

    @property
    def n_positions(self) -> int:
        """Input positions of an epoch."""
        return int((self._end - self._begin).sum())

    def __call__(self, epoch: int) -> EpochBatches:
        """The batches of an epoch, in an order drawn from (seed, epoch)."""
        order = stream(self._seed, "batches", epoch).permutation(len(self._begin))
        return EpochBatches(
            self._items, self._begin, self._end, order, self._batch_size, self._with_targets, self._times
        )


def history_batches(
    histories: Sequence[np.ndarray],
    max_length: int,
    max_positions: int,
    times: Sequence[np.ndarray] | None = None,
) -> list[tuple[np.ndarray, Batch]]:
    """Batches that cover all non-empty histories, each cut to its last `max_length` items.

    Args:
        histories: (T,) int64 each.
        max_positions: most positions of a batch.
        times: (T,) int64 each, of the histories' items; None = batches without times.

    Returns:
        (rows (B,) of `histories`, batch) pairs; empty histories are in none.
    """
    full = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    lengths = np.minimum(full, max_length)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    batches = []
    low = 0
    while low < len(order):
        high = low + max(1, max_positions // int(lengths[order[low]]))
        rows = order[low:high]
        items = _tails(histories, rows, max_length)
        clock = None if times is None else _tails(times, rows, max_length)
        batches.append((rows, make_batch(items, lengths[rows], times=clock)))
        low = high
    return batches


def _tails(columns: Sequence[np.ndarray], rows: np.ndarray, length: int) -> np.ndarray:
    """The last `length` entries of the chosen columns, one after another, int64."""
    return np.concatenate([columns[row][-length:] for row in rows]).astype(np.int64, copy=False)


def _ranges(begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, … (lengths[0] of them), begin[1], …"""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(begin - (ends - lengths), lengths)
