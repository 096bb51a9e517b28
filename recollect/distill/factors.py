"""Logits as a product of two factors, read block by block, so that [B, N] is never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.errors import ConfigError, InputError


class Factors(NamedTuple):
    """Logits = state @ items.T (+ bias).

    state: (B, D) one vector per sample.  items: (N, D) output embedding.  bias: (N,) or None.
    """

    state: Tensor
    items: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N) of the logits."""
        return len(self.state), len(self.items)

    def detach(self) -> Factors:
        """The same factors, cut from the graph."""
        return Factors(self.state.detach(), self.items.detach(), None if self.bias is None else self.bias.detach())

    def block(self, rows: slice, columns: slice) -> Tensor:
        """The logits of some samples and items, float32 or wider."""
        logits = wide(self.state[rows]) @ wide(self.items[columns]).T
        return logits if self.bias is None else logits + wide(self.bias[columns])

    def of_items(self, item: Tensor) -> Tensor:
        """(B,) the logit of one item per sample, detached."""
        logit = (wide(self.state.detach()) * wide(self.items.detach()[item])).sum(1)
        return logit if self.bias is None else logit + wide(self.bias.detach()[item])


class Shares(NamedTuple):
    """A teacher's distributions at one temperature, for samples that are gone through many times.

    share: (B, N) float32, rows sum to 1.  log_mass: (B,) sum_j share log share, the negative entropy.
    """

    share: Tensor
    log_mass: Tensor
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        return len(self.share), self.share.shape[1]

    @classmethod
    def of(cls, logits: Tensor, temperature: float) -> Shares:
        """Of logits (B, N); -inf excludes an item."""
        log_share = (logits / temperature).log_softmax(1)
        share = log_share.exp()
        # The logarithm of what is excluded is made finite: it counts 0 times.
        return cls(share, row_products(share, log_share.clamp_(min=torch.finfo(log_share.dtype).min)), temperature)

    def detach(self) -> Shares:
        """Itself: it has no graph."""
        return self


def row_products(one: Tensor, two: Tensor) -> Tensor:
    """(B,) inner products of the rows of two (B, N), without a (B, N) between."""
    return torch.bmm(one[:, None], two[:, :, None]).flatten()


def wide(values: Tensor) -> Tensor:
    """`values` in float32, or float64 where they are: half-precision logits of a large catalogue tie."""
    return values if values.dtype == torch.float64 else values.float()


def blocks(n_rows: int, n_columns: int, max_elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices that cover an (n_rows, n_columns) matrix row by row, none larger than `max_elements`.

    Raises:
        ConfigError: `max_elements` is below 1.
        InputError: there is no column.
    """
    if max_elements < 1:
        raise ConfigError(f"max_elements must be at least 1, got {max_elements!r}")
    if n_columns < 1:
        raise InputError("there is no item to score")
    width = min(n_columns, max_elements)
    height = max(1, max_elements // width)
    for top in range(0, n_rows, height):
        for left in range(0, n_columns, width):
            yield slice(top, min(top + height, n_rows)), slice(left, min(left + width, n_columns))
