"""SASRec: causal self-attention over a user's last items (arXiv 1808.09781), with the losses that made it strong again.

Pre-norm blocks, learned positions counted from the first item of the window, item vectors shared between input and
output.  Loss "ce" is the full softmax (arXiv 2309.07602), "bce" with one negative the original, "gbce" is gSASRec
(arXiv 2308.07192).  Differences from the original: negatives avoid only the position's own target, and all three of
query, key and value read the normalised states.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from recollect.recommenders.configs import SASRecConfig
from recollect.recommenders.layers import Dropout, FeedForward, SelfAttention
from recollect.recommenders.neural import CausalModule, NeuralRecommender
from recollect.recommenders.packing import Batch


class SASRecBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); (M, D) -> (M, D)."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.attention = SelfAttention(config.hidden, config.heads, config.dropout, causal=True)
        self.attention_dropout = Dropout(config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.hidden)
        self.feedforward = FeedForward(config.hidden, config.hidden, config.dropout, nn.ReLU())

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), batch))
        return x + self.feedforward(self.feedforward_norm(x))

    def at_last(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (B, D): `forward` at the last position of each sequence."""
        x = x[batch.last] + self.attention_dropout(self.attention.at_last(self.attention_norm(x), batch))
        return x + self.feedforward(self.feedforward_norm(x))


class SASRecModule(CausalModule):
    """Jagged batch -> hidden state of every position; scores are products with the item embedding."""

    def __init__(self, config: SASRecConfig, n_items: int) -> None:
        super().__init__(config, n_items)
        self.positions = nn.Embedding(config.max_length, config.hidden)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.hidden)
        nn.init.xavier_normal_(self.items.weight)
        nn.init.xavier_normal_(self.positions.weight)

    def forward(self, batch: Batch) -> Tensor:
        """(M, D): the state at position t has seen items 0..t of its sequence and nothing else."""
        x = self.read(batch)
        for block in self.blocks:
            x = block(x, batch)
        return self.norm(x)

    def read(self, batch: Batch) -> Tensor:
        """(M, D): items and positions, as they enter the first block."""
        vectors = self.items(batch.items)
        return self.dropout(vectors * math.sqrt(self.config.hidden) + self.positions(batch.place))

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, D) the state after the last item: the last block works for that position only."""
        x = self.read(batch)
        for block in self.blocks[:-1]:
            x = block(x, batch)
        last: Any = self.blocks[-1]
        return self.norm(last.at_last(x, batch))


class SASRec(NeuralRecommender):
    """SASRec as a recommender; see the module's text and `SASRecConfig`."""

    name = "sasrec"
    config_class = SASRecConfig
    module_class = SASRecModule
