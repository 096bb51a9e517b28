"""LRURec: linear recurrent units with a feed-forward layer (arXiv 2310.02367).

A unit keeps a complex state, h_t = Lambda h_{t-1} + gamma B x_t with diagonal Lambda inside the unit circle, and gives
Re(C h_t).  The recurrence is linear, so a window is cut into sqrt(T) stretches that run side by side, and then each
takes in the last state of the one before.  Post-norm residual blocks, no positions (the recurrence knows the order),
item vectors shared.  Difference from the published code: no output bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.recommenders.configs import LRURecConfig
from recollect.recommenders.layers import Dropout, FeedForward
from recollect.recommenders.neural import CausalModule, NeuralRecommender
from recollect.recommenders.packing import Batch, Group, over_groups


class _Scan(torch.autograd.Function):
    """States of the recurrence in place of x; the gradient runs the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_eigenvalues: Tensor) -> Tensor:
        size, length, channels = x.shape
        stretch = max(1, math.isqrt(length))
        state = _whole_stretches(x, stretch)
        powers = _powers(log_eigenvalues, stretch)
        for place in range(1, stretch):
            state[:, :, place].addcmul_(state[:, :, place - 1], powers[0])
        for number in range(1, state.shape[1]):
            state[:, number].addcmul_(state[:, number - 1, -1:], powers)
        states = state.view(size, -1, channels)[:, :length]
        ctx.save_for_backward(states, log_eigenvalues)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        states, log_eigenvalues = ctx.saved_tensors
        size, length, channels = states.shape
        stretch = max(1, math.isqrt(length))
        flow = _whole_stretches(gradient, stretch)
        powers = _powers(log_eigenvalues.conj(), stretch).flip(0)
        for place in range(stretch - 2, -1, -1):
            flow[:, :, place].addcmul_(flow[:, :, place + 1], powers[-1])
        for number in range(flow.shape[1] - 2, -1, -1):
            flow[:, number].addcmul_(flow[:, number + 1, :1], powers)
        of_x = flow.view(size, -1, channels)[:, :length]
        of_eigenvalues = (of_x[:, 1:] * states[:, :-1].conj()).sum((0, 1))
        return of_x, of_eigenvalues * powers[-1]


def _whole_stretches(x: Tensor, stretch: int) -> Tensor:
    """A copy of (G, T, C) as (G, stretches, stretch, C), zero after T."""
    size, length, channels = x.shape
    copy = x.new_empty(size, length + -length % stretch, channels)
    copy[:, :length] = x
    copy[:, length:] = 0
    return copy.view(size, -1, stretch, channels)


def _powers(log_eigenvalues: Tensor, count: int) -> Tensor:
    """(count, C): Lambda, Lambda^2, ..."""
    return (torch.arange(1, count + 1, device=log_eigenvalues.device)[:, None] * log_eigenvalues).exp()


def linear_scan(x: Tensor, log_eigenvalues: Tensor) -> Tensor:
    """h_t = Lambda h_{t-1} + x_t with h_{-1} = 0, in about 2 sqrt(T) steps that are parallel in everything else.

    Args:
        x: (G, T, C) complex.
        log_eigenvalues: (C,) complex logarithm of the diagonal of Lambda.

    Returns:
        (G, T, C) complex; differentiable once.
    """
    states: Tensor = _Scan.apply(x, log_eigenvalues)
    return states


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
        self.input = nn.Linear(config.hidden, 2 * channels)  # B x, each channel's real and imaginary part
        self.output = nn.Linear(2 * channels, config.hidden)  # Re(C h) from the parts of h, likewise

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(M, D) -> (M, D)."""
        log_eigenvalues = torch.complex(-self.log_decay.exp(), self.log_phase.exp())
        scale = self.log_scale.exp().repeat_interleave(2)
        driven = functional.linear(x, self.input.weight * scale[:, None], self.input.bias * scale)

        def of_group(cells: Tensor, group: Group) -> Tensor:
            parts = cells.float().view(group.size, group.width, -1, 2)
            return torch.view_as_real(linear_scan(torch.view_as_complex(parts), log_eigenvalues)).flatten(2)

        return self.output(over_groups(batch, driven, of_group))


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
        super().__init__(config, n_items)
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
