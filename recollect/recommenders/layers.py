"""Layers the sequence models share: dropout that is cheap on a CPU, and causal attention over jagged batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.recommenders.packing import Batch, Group, over_groups, over_sequences


class Dropout(nn.Module):
    """Dropout by random bytes: one draw of 64 bits decides eight elements.

    torch draws one number per element on a CPU, which costs more than the layer it follows.  The rate is rounded to
    a multiple of 1/256 and the rest scaled by the rounded rate, so the expectation is exact.  On other devices this
    is torch's own dropout.

    Args:
        rate: probability in [0, 1) of an element to become 0.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._threshold = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; the identity in eval mode."""
        if not self.training or self._threshold == 0:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.rate)
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= self._threshold
        return x * kept.to(x.dtype).mul_(256 / (256 - self._threshold))


def attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: Dropout) -> Tensor:
    """Scaled dot-product attention of (G, H, T, C) heads.

    Args:
        allowed: (T, T) or (G, 1, 1, T) bool, True where a query may look; None = causal.
        dropout: of the attention weights.
    """
    if not (dropout.training and dropout.rate):
        return functional.scaled_dot_product_attention(query, key, value, allowed, is_causal=allowed is None)
    if allowed is None:
        length = query.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)  # (G, H, T, T)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return dropout(weights) @ value


class SelfAttention(nn.Module):
    """Multi-head self-attention of the positions (M, D) of a batch, each sequence by itself.

    Args:
        hidden: D, a multiple of `heads`.
        heads: number of heads.
        dropout: rate on the attention weights.
        causal: whether a position sees only itself and what came before; otherwise the whole sequence.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.projection = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""

        def of_group(cells: Tensor, group: Group) -> Tensor:
            size, length, width = cells.shape
            heads = cells.view(size, length, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4)
            # Right padding: a causal position never sees it; a whole-sequence one must be told.
            allowed = None if self.causal else group.valid[:, None, None]
            mixed = attention(heads[0], heads[1], heads[2], allowed, self.dropout)  # (G, H, T, C)
            return mixed.transpose(1, 2).reshape(size, length, width // 3)

        return self.output(over_groups(batch, self.projection(x), of_group))

    def at_last(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (B, D): `forward` at the last position of each sequence, without the work for the others."""
        width = x.shape[1]
        weight, bias = self.projection.weight, self.projection.bias
        queries = functional.linear(x[batch.last], weight[:width], bias[:width])  # (B, D)
        pairs = functional.linear(x, weight[width:], bias[width:])  # (M, 2 D)

        def of_group(cells: Tensor, rows: slice, group: Group) -> Tensor:
            size, length, _ = cells.shape
            heads = cells.view(size, length, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            query = queries[rows].view(size, 1, self.heads, width // self.heads).transpose(1, 2)  # (G, H, 1, C)
            # The last position looks at all there are, so all it must be told is where the padding is.
            mixed = attention(query, heads[0], heads[1], group.valid[:, None, None], self.dropout)
            return mixed.reshape(size, width)

        return self.output(over_sequences(batch, pairs, of_group))


class FeedForward(nn.Module):
    """Two layers on each position, (M, D) -> (M, D), with dropout after each."""

    def __init__(self, hidden: int, inner: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden, inner), activation, Dropout(dropout), nn.Linear(inner, hidden), Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(M, D)."""
        return self.layers(x)
