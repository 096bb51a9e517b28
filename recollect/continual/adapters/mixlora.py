"""MixLoRA: an expert is the frozen FFN with low-rank updates of its own on gate, up and down; one router per FFN.

    expert_e(h) = D_e(act(G_e(h)) ∘ U_e(h)),   X_e = W_X + s·B_{X,e}·A_{X,e}   for X = G, U, D
    y = Σ_{e ∈ TopK} w_e·expert_e(h),   w = softmax over the winners

Unlike linears that mix experts one by one, the non-linearity sees one expert at a time.  The frozen products are made
once per token: W_D is linear, so it is applied to the mixture, and the mixture is written as the plain FFN's value plus
weighted differences, which makes the start exactly the bare model.  Routers and banks are those of "block_shared"
placement; only the FFN's forward differs.
Not covered: the plain LoRA on the attention's linears that the reference implementation trains beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.experts import Blocks, ExpertBank
from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.errors import ConfigError


class MixedExperts:
    """The forward of an FFN whose three linears are wrapped and share a router."""

    def __init__(self, ffn: nn.Module) -> None:
        self.ffn = ffn

    def __call__(self, h: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        ffn: Any = self.ffn
        gate, up, down = (getattr(ffn, name) for name in ("gate_proj", "up_proj", "down_proj"))
        if not gate.enabled:
            return type(ffn).forward(ffn, h)
        routing = gate.route(h)
        flat = h.flatten(0, -2)
        blocks = Blocks.of(routing.indices, routing.n_experts)
        token = blocks.token
        weight = routing.weights.reshape(-1)[blocks.assignment][:, None]
        gated, raised = gate.base(flat), up.base(flat)
        plain = ffn.act_fn(gated) * raised  # (n, d_ff)
        rows = _dropped(flat, gate)[token]  # (m, d), m = n·k, sorted by expert
        own = ffn.act_fn(gated[token] + _update(gate, blocks, rows)) * (raised[token] + _update(up, blocks, rows))
        mixed = plain.index_add(0, token, (weight * (own - plain[token])).to(plain.dtype))
        output = down.base(mixed)
        output = output.index_add(0, token, (weight * _update(down, blocks, _dropped(own, down))).to(output.dtype))
        return output.view(h.shape)


class Undo:
    """Gives an FFN its own forward back."""

    def __init__(self, ffn: nn.Module) -> None:
        self._ffn = ffn

    def remove(self) -> None:
        """As of a hook's handle."""
        del self._ffn.forward


def mix_experts(ffn: nn.Module, name: str) -> Undo:
    """Make an FFN with wrapped linears a MixLoRA block; the handle undoes it.

    Raises:
        ConfigError: it is not act(gate_proj) ∘ up_proj through down_proj.
    """
    absent = [part for part in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(ffn, part)]
    if absent:
        raise ConfigError(f"{name} has no {absent[0]!r}; MixLoRA needs an FFN of gate_proj, up_proj, down_proj, act_fn")
    ffn.forward = MixedExperts(ffn)  # type: ignore[method-assign]
    return Undo(ffn)


def _dropped(rows: Tensor, linear: AdapterLinear) -> Tensor:
    rate = linear.config.dropout
    return functional.dropout(rows, rate, linear.training) if rate else rows


def _update(linear: AdapterLinear, blocks: Blocks, rows: Tensor) -> Tensor:
    """s·B_e·A_e of every row (m, d_in), sorted by expert, to (m, d_out)."""
    bank: ExpertBank = linear.bank
    down, up = bank.weights()
    spread = blocks.spread(rows if torch.is_autocast_enabled(rows.device.type) else rows.to(down.dtype))
    hidden = torch.bmm(spread, down.flatten(0, 1)[blocks.expert].transpose(1, 2))
    return linear.scaling * torch.bmm(hidden, up.flatten(0, 1)[blocks.expert]).flatten(0, 1)[blocks.place]
