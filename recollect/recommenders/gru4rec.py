"""GRU4Rec: a gated recurrent network over a user's last items (arXiv 1511.06939), with the full softmax.

Items are embedded, read by one or more GRU layers and projected back to the width of the item vectors, which input
and output share.  Differences from the original: whole windows in place of session-parallel mini-batches, and losses
over the catalogue or uniform negatives in place of negatives from the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from recollect.recommenders.configs import GRU4RecConfig
from recollect.recommenders.layers import Dropout
from recollect.recommenders.neural import CausalModule, NeuralRecommender
from recollect.recommenders.packing import Batch, over_groups


class GRU4RecModule(CausalModule):
    """Jagged batch -> projected recurrent state of every position."""

    def __init__(self, config: GRU4RecConfig, n_items: int) -> None:
        super().__init__(config, n_items)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            nn.GRU(config.hidden if layer == 0 else config.recurrent, config.recurrent, batch_first=True)
            for layer in range(config.blocks)
        )
        self.output = nn.Linear(config.recurrent, config.hidden)
        nn.init.xavier_normal_(self.items.weight)
        for name, weight in self.layers.named_parameters():
            if name.endswith("weight_ih_l0"):
                nn.init.xavier_uniform_(weight)
            elif name.endswith("weight_hh_l0"):
                nn.init.orthogonal_(weight)

    def forward(self, batch: Batch) -> Tensor:
        """(M, D): the state after items 0..t of the sequence."""
        x = self.items(batch.items)
        for layer in self.layers:
            x = over_groups(batch, self.dropout(x), lambda cells, _, layer=layer: layer(cells)[0])  # type: ignore[misc]
        return self.output(x)


class GRU4Rec(NeuralRecommender):
    """GRU4Rec as a recommender; see the module's text and `GRU4RecConfig`."""

    name = "gru4rec"
    config_class = GRU4RecConfig
    module_class = GRU4RecModule
