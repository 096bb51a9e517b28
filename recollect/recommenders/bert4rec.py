"""BERT4Rec: bidirectional self-attention that fills in hidden items (arXiv 1904.06690), with the full softmax.

Training hides a random share of a window's items and predicts each from both sides; scoring appends the mask after
the history and reads the prediction there.  So an empty history is scored from the mask alone.  Post-norm blocks with
GELU, a projection before the output, item vectors shared.  Differences from the original: no output bias, a hidden
item is always replaced by the mask, and every window hides at least one item (the last, where the draw hid none).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recollect.recommenders.configs import BERT4RecConfig
from recollect.recommenders.layers import Dropout, FeedForward, SelfAttention
from recollect.recommenders.losses import cross_entropy
from recollect.recommenders.neural import NeuralRecommender
from recollect.recommenders.packing import Batch


class BERT4RecBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed-forward(x)); (M, D) -> (M, D)."""

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.hidden, config.heads, config.dropout, causal=False)
        self.attention_dropout = Dropout(config.dropout)
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.feedforward = FeedForward(config.hidden, 4 * config.hidden, config.dropout, nn.GELU())
        self.feedforward_norm = nn.LayerNorm(config.hidden)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, batch)))
        return self.feedforward_norm(x + self.feedforward(x))


class BERT4RecModule(nn.Module):
    """Jagged batch, in which item n_items is the mask -> hidden state of every position."""

    def __init__(self, config: BERT4RecConfig, n_items: int) -> None:
        super().__init__()
        self.config = config
        self.n_items = n_items
        self.items = nn.Embedding(n_items + 1, config.hidden)  # the last row is the mask, never a column of scores
        self.positions = nn.Embedding(config.max_length, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(BERT4RecBlock(config) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.Linear(config.hidden, config.hidden), nn.GELU(), nn.LayerNorm(config.hidden))
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.positions.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, batch: Batch, items: Tensor | None = None) -> Tensor:
        """(M, D): every position has seen its whole sequence; `items` (M,) stands in for the batch's own."""
        x = self.items(batch.items if items is None else items) + self.positions(batch.place)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, batch)
        return x

    def training_loss(self, batch: Batch) -> Tensor:
        """() mean cross-entropy over the hidden positions."""
        is_hidden = self.hidden_positions(batch)
        states = self(batch, batch.items.masked_fill(is_hidden, self.n_items))
        return cross_entropy(self.head(states[is_hidden]), self.item_vectors(), batch.items[is_hidden])

    def hidden_positions(self, batch: Batch) -> Tensor:
        """(M,) bool, drawn anew at each call: each position with the mask probability, at least one per sequence."""
        drawn = torch.rand(len(batch.items), device=batch.items.device) < self.config.mask_probability
        count = torch.zeros(len(batch), device=drawn.device).index_add_(0, batch.sequence, drawn.float())
        drawn[batch.last[count == 0]] = True
        return drawn

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, D) prediction at the last position, which holds the mask."""
        return self.head(self(batch)[batch.last])

    def item_vectors(self) -> Tensor:
        """(n_items, D)."""
        return self.items.weight[: self.n_items]


class BERT4Rec(NeuralRecommender):
    """BERT4Rec as a recommender; see the module's text and `BERT4RecConfig`."""

    name = "bert4rec"
    config_class = BERT4RecConfig
    module_class = BERT4RecModule
    windows_with_targets = False

    def read(self, histories: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The histories with the mask after their last item."""
        return [np.append(history, self.n_items) for history in histories]
