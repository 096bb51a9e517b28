"""Matrix factorisation trained by Bayesian personalised ranking (arXiv 1205.2618), for histories in place of user ids.

A user is the mean of input factors of the items they have, as in factored item models, so any history can be scored
and none needs folding in; while an item is trained on, it is left out of its user's mean.  Scores are products with
separate output factors plus an item bias; the order of a history does not matter.  Negatives are uniform over all
items but the positive.  An empty history is scored by the bias alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.recommenders.configs import BPRConfig
from recollect.recommenders.losses import draw_negatives, sampled_loss
from recollect.recommenders.neural import NeuralRecommender
from recollect.recommenders.packing import Batch


class BPRModule(nn.Module):
    """Jagged batch -> one vector per user; the last component is 1 and meets the items' bias."""

    def __init__(self, config: BPRConfig, n_items: int) -> None:
        super().__init__()
        self.config = config
        self.inputs = nn.Embedding(n_items, config.hidden)
        self.outputs = nn.Embedding(n_items, config.hidden)
        self.bias = nn.Parameter(torch.zeros(n_items))
        nn.init.normal_(self.inputs.weight, std=0.1)
        nn.init.normal_(self.outputs.weight, std=0.1)

    def training_loss(self, batch: Batch) -> Tensor:
        """() mean over all items of the batch, each against its negatives."""
        others = batch.starts.diff()[batch.sequence] - 1
        user = (self._sums(batch)[batch.sequence] - self.inputs(batch.items)) / others.clamp_min(1)[:, None]
        negatives = draw_negatives(batch.items, self.config.negatives, len(self.bias))
        return sampled_loss("bpr", _with_one(user), self.item_vectors(), batch.items, negatives)

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, D + 1)."""
        return _with_one(self._sums(batch) / batch.starts.diff()[:, None])

    def item_vectors(self) -> Tensor:
        """(n_items, D + 1): output factors and bias."""
        return torch.cat([self.outputs.weight, self.bias[:, None]], 1)

    def _sums(self, batch: Batch) -> Tensor:
        """(B, D) sum of input factors of each sequence."""
        return functional.embedding_bag(batch.items, self.inputs.weight, batch.starts[:-1], mode="sum")


def _with_one(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 1), value=1.0)


class BPR(NeuralRecommender):
    """BPR matrix factorisation as a recommender; see the module's text and `BPRConfig`."""

    name = "bpr"
    config_class = BPRConfig
    module_class = BPRModule
    windows_with_targets = False

    def empty_user(self, items: Tensor) -> Tensor:
        """The user without history: no factors, only the one that meets the bias."""
        return _with_one(items.new_zeros(items.shape[1] - 1))
