"""HSTU: gated attention without softmax over a user's last items (arXiv 2402.17152).

A block computes U, V, Q, K = SiLU(linear(norm(x))), attends with weights SiLU(Q K' + bias(i - j)) / max_length, and
adds linear(norm(A V) * U) to x.  With `time_bias`, a second bias is learned for the time from event j to event i,
one number per bucket of its logarithm.  The full softmax over products is the default loss; `l2_normalise` with loss
"sampled" is the published training (cosine / temperature, softmax over 128 negatives).
Difference from the published code: it counts time from event j to the event after i, which at the last position is the
one to be predicted; here nothing of that event is read, so the model knows what every other model is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.errors import InputError
from recollect.recommenders.configs import HSTUConfig
from recollect.recommenders.layers import Dropout
from recollect.recommenders.losses import cross_entropy, draw_negatives, sampled_loss
from recollect.recommenders.neural import CausalModule, NeuralRecommender
from recollect.recommenders.packing import Batch, Group, in_groups, over_groups

TIME_BUCKETS, BUCKET_WIDTH = 128, 0.301
"""As published; the width is in natural logarithms of seconds, so ten years are 65 buckets wide."""


def time_buckets(times: Tensor) -> Tensor:
    """Bucket (G, T, T) int32 of the time from event j to event i; 0 = at most a second.

    Args:
        times: (G, T) int64 seconds, not falling; entries [.., i, j] with j > i mean nothing.
    """
    gap = (times[:, :, None] - times[:, None, :]).clamp_min(1)  # subtracted as integers: floats would lose seconds
    return gap.float().log_().div_(BUCKET_WIDTH).int().clamp_(max=TIME_BUCKETS - 1)


class HSTUBlock(nn.Module):
    """One block, (M, D) -> (M, D).

    `bias` holds one number per distance 0..max_length-1 and `time_bias`, where the config asks for it, one per bucket
    of time; both are shared by the heads.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.max_length = config.max_length
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.projection = nn.Linear(config.hidden, 4 * config.hidden, bias=False)
        self.bias = nn.Parameter(torch.empty(config.max_length).normal_(std=0.02))
        self.time_bias = nn.Embedding(TIME_BUCKETS, 1) if config.time_bias else None
        if self.time_bias is not None:
            nn.init.normal_(self.time_bias.weight, std=0.02)
        self.attended_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, batch: Batch, buckets: Sequence[Tensor]) -> Tensor:
        """(M, D) -> (M, D); `buckets` has one (G, T, T) per group of the batch, or is empty without a time bias."""
        width = x.shape[1]
        gate, mixed = functional.silu(self.projection(self.norm(x))).split([width, 3 * width], -1)
        of_group = iter(buckets)  # groups are gone through in their order
        attended = over_groups(batch, mixed, lambda cells, group: self._attend(cells, group, next(of_group, None)))
        return x + self.output(self.dropout(self.attended_norm(attended) * gate))

    def _attend(self, cells: Tensor, group: Group, buckets: Tensor | None) -> Tensor:
        size, length, width = cells.shape
        heads = cells.view(size, length, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        value, query, key = heads
        place = torch.arange(length, device=cells.device)
        distance = place[:, None] - place  # (T, T), negative towards the future
        bias = self.bias[distance.clamp_min(0)]  # (T, T)
        if self.time_bias is not None:
            assert buckets is not None  # the module refuses batches without times
            bias = bias + self.time_bias(buckets).squeeze(-1)[:, None]  # (G, 1, T, T)
        weights = functional.silu(query @ key.transpose(-2, -1) + bias) / self.max_length  # (G, H, T, T)
        weights = weights.masked_fill(distance < 0, 0.0)
        return (weights @ value).transpose(1, 2).reshape(size, length, width // 3)


class HSTUModule(CausalModule):
    """Jagged batch -> hidden state of every position."""

    def __init__(self, config: HSTUConfig, n_items: int) -> None:
        super().__init__(config, n_items)
        self.positions = nn.Embedding(config.max_length, config.hidden)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(HSTUBlock(config) for _ in range(config.blocks))
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.positions.weight, std=math.sqrt(1 / config.hidden))

    def forward(self, batch: Batch) -> Tensor:
        """(M, D): the state at position t has seen items 0..t; of length 1 / temperature under l2_normalise."""
        x = self.items(batch.items) * math.sqrt(self.config.hidden) + self.positions(batch.place)
        x = self.dropout(x)
        buckets = self._buckets(batch)
        for block in self.blocks:
            x = block(x, batch, buckets)
        return functional.normalize(x, dim=-1) / self.config.temperature if self.config.l2_normalise else x

    def _buckets(self, batch: Batch) -> list[Tensor]:
        """Per group, the bucket of the time between every two positions; the same for all blocks."""
        if not self.config.time_bias:
            return []
        if batch.times is None:
            raise InputError("HSTU with time_bias reads times, and this batch carries none")
        return [time_buckets(times) for times in in_groups(batch, batch.times)]

    def training_loss(self, batch: Batch) -> Tensor:
        """() mean loss over all positions."""
        assert batch.targets is not None  # this recommender builds its batches with targets
        hidden, items = self(batch), self.item_vectors()
        if self.config.loss == "ce":
            return cross_entropy(hidden, items, batch.targets)
        negatives = draw_negatives(batch.targets, self.config.negatives, len(items))
        return sampled_loss("softmax", hidden, items, batch.targets, negatives)

    def item_vectors(self) -> Tensor:
        """(n_items, D); of length 1 under l2_normalise."""
        return functional.normalize(self.items.weight, dim=-1) if self.config.l2_normalise else self.items.weight


class HSTU(NeuralRecommender):
    """HSTU as a recommender; see the module's text and `HSTUConfig`."""

    name = "hstu"
    config_class = HSTUConfig
    module_class = HSTUModule

    @property
    def reads_times(self) -> bool:
        """Whether it was configured with `time_bias`."""
        config: Any = self.config
        return bool(config.time_bias)
