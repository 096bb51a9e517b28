"""The batches the trained tokenizers learn from: items in shuffled passes, read by position, in rounds of steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recollect.progress import Progress, SilentProgress
from recollect.rng import stream
from recollect.tokenize.neural_config import ROUND_STEPS
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.rows import ArrayRows
from recollect.tokenize.scaling import Scaling


class Batch(NamedTuple):
    """A training batch: rows (B, D), weight (B,) of mean 1 over all items, behaviour (B, d) or None."""

    rows: Tensor
    weight: Tensor
    behaviour: Tensor | None


class TrainingRows:
    """The items to fit on, read by position: rows, weights of mean 1 and behaviour vectors.

    Args:
        embeddings: (N, D), may be memory-mapped.
        rows: (n,) positions of the items.
        weights: (n,) or None for equal ones.
        collaborative: (N, d) or None.
        preprocess: fitted.
        scaling: of the preprocessed rows; None = as they are.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        rows: np.ndarray,
        weights: np.ndarray | None,
        collaborative: np.ndarray | None,
        preprocess: Preprocess,
        scaling: Scaling | None = None,
    ) -> None:
        self.dimension = preprocess.output_dimension or embeddings.shape[1]
        self._preprocess = preprocess
        self._scaling = scaling
        self._embeddings = embeddings
        self._rows = rows
        self.weights = None if weights is None else weights / weights.mean()
        self._collaborative = collaborative
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, positions: np.ndarray) -> Batch:
        """The items at `positions` (B,) among the items to fit on."""
        chosen = self._rows[positions]
        weight = np.ones(len(chosen)) if self.weights is None else self.weights[positions]
        behaviour = None if self._collaborative is None else np.asarray(self._collaborative[chosen], dtype=np.float32)
        block = ArrayRows(self._embeddings, chosen, self._preprocess.apply).block(0, len(chosen))
        if self._scaling is not None:
            block = self._scaling.apply(block)
        return Batch(
            rows=block,
            weight=torch.from_numpy(weight.astype(np.float32)),
            behaviour=None if behaviour is None else torch.from_numpy(behaviour),
        )

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the items in pass `epoch`; the last one asked for is kept."""
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = ((seed, epoch), stream(seed, "order of items", epoch).permutation(len(self)))
        return self._order[1]


class TrainingRound:
    """The batches of steps index x ROUND_STEPS … of a run of `steps`; every pass sees each item once, shuffled."""

    def __init__(self, data: TrainingRows, batch_size: int, seed: int, steps: int, index: int) -> None:
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._first = index * ROUND_STEPS
        self._count = min(ROUND_STEPS, steps - self._first)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        per_pass = -(-len(self._data) // self._batch_size)
        epoch, position = divmod(self._first + index, per_pass)
        order = self._data.order(self._seed, epoch)
        return self._data.take(order[position * self._batch_size : (position + 1) * self._batch_size])


class StepsOf(SilentProgress):
    """Passes steps on and leaves out the loop's rounds, which mean nothing to people."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.advance(steps, note)
