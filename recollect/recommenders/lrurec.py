"""LRURec: linear recurrent units with a feed-forward layer (arXiv 2310.02367).

A unit keeps a complex state, h_t = Lambda h_{t-1} + gamma B x_t with diagonal Lambda inside the unit circle, and gives
Re(C h_t).  The recurrence is linear, so a window of T items takes log2 T parallel steps: neighbouring stretches are
joined by carrying the left one's last state into the right one.  Post-norm residual blocks, no positions (the
recurrence knows the order), item vectors shared.  Difference from the published code: no output bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.recommenders.configs import LRURecConfig
from recollect.recommenders.layers import Dropout, FeedForward
from recollect.recommenders.neural import CausalModule, NeuralRecommender
from recollect.recommenders.packing import Batch, Group, over_groups


def linear_scan(x: Tensor, log_eigenvalues: Tensor) -> Tensor:
    """h_t = Lambda h_{t-1} + x_t with h_{-1} = 0, in log2 T parallel steps.

    Args:
        x: (G, T, C) complex.
        log_eigenvalues: (C,) complex logarithm of the diagonal of Lambda.

    Returns:
        (G, T, C) complex.
    """
    size, length, channels = x.shape
    full = 1 << (length - 1).bit_length()
    state = functional.pad(x, (0, 0, 0, full - length))
    stretch = 1
    while stretch < full:
        halves = state.view(size, full // (2 * stretch), 2, stretch, channels)
        left, right = halves.unbind(2)
        ahead = torch.arange(1, stretch + 1, device=x.device)[:, None] * log_eigenvalues  # (stretch, C)
        state = torch.stack([left, right + left[:, :, -1:] * ahead.exp()], 2).view(size, full, channels)
        stretch *= 2
    return state[:, :length]


class LinearRecurrentUnit(nn.Module):
    """(M, D) -> (M, D), each sequence by itself, with 2 D complex channels.

    Eigenvalues are exp(-exp(nu) + i exp(theta)), so they stay inside the unit circle; gamma normalises the input.
    """

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        channels = 2 * config.hidden
        modulus, phase = torch.rand(channels), torch.rand(channels)
        low, high = config.min_radius**2, config.max_radius**2
        self.log_decay = nn.Parameter((-0.5 * (modulus * (high - low) + low).clamp_min(1e-12).log()).log())  # nu
        self.log_phase = nn.Parameter((2 * math.pi * phase).clamp_min(1e-6).log())  # theta
        self.log_scale = nn.Parameter((1 - (-2 * self.log_decay.detach().exp()).exp()).sqrt().log())  # gamma
        self.input = nn.Linear(config.hidden, 2 * channels)  # real and imaginary parts of B x
        self.output = nn.Linear(2 * channels, config.hidden)  # Re(C h) from the parts of h

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""
        log_eigenvalues = torch.complex(-self.log_decay.exp(), self.log_phase.exp())

        def of_group(cells: Tensor, group: Group) -> Tensor:
            real, imaginary = cells.float().chunk(2, -1)
            state = linear_scan(torch.complex(real, imaginary), log_eigenvalues)
            return torch.cat([state.real, state.imag], -1)

        scale = self.log_scale.exp().repeat(2)
        return self.output(over_groups(batch, self.input(x) * scale, of_group))


class LRURecBlock(nn.Module):
    """norm(x + unit(x)), then norm(x + feed-forward(x)); (M, D) -> (M, D)."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.unit = LinearRecurrentUnit(config)
        self.unit_dropout = Dropout(config.dropout)
        self.unit_norm = nn.LayerNorm(config.hidden)
        self.feedforward = FeedForward(config.hidden, 4 * config.hidden, config.dropout, nn.GELU())
        self.feedforward_norm = nn.LayerNorm(config.hidden)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""
        x = self.unit_norm(x + self.unit_dropout(self.unit(x, batch)))
        return self.feedforward_norm(x + self.feedforward(x))


class LRURecModule(CausalModule):
    """Jagged batch -> hidden state of every position."""

    def __init__(self, config: LRURecConfig, n_items: int) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(n_items, config.hidden)
        self.norm = nn.LayerNorm(config.hidden)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(LRURecBlock(config) for _ in range(config.blocks))
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, batch: Batch) -> Tensor:
        """(M, D): the state after items 0..t of the sequence."""
        x = self.dropout(self.norm(self.items(batch.items)))
        for block in self.blocks:
            x = block(x, batch)
        return x


class LRURec(NeuralRecommender):
    """LRURec as a recommender; see the module's text and `LRURecConfig`."""

    name = "lrurec"
    config_class = LRURecConfig
    module_class = LRURecModule
