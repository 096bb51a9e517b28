"""LoRAMoE with a loop over its experts, as it is usually written; what the batched layers are compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.attach import adapters
from recollect.continual.adapters.wrapped import AdapterLinear

Style = Literal["all tokens", "own tokens"]
"""all tokens = every expert reads every token and a gate, mostly zero, weighs what it says, as for a dense gate;
own tokens = every expert reads the tokens that chose it."""


class LoopLinear(nn.Module):
    """The function of a top-1 LoRAMoE layer without dropout, expert after expert, with weights of its own."""

    def __init__(self, layer: AdapterLinear, style: Style) -> None:
        super().__init__()
        self.base, self.scaling, self.style = layer.base, layer.scaling, style
        down, up = layer.bank.weights()  # (1, E, r, d_in), (1, E, r, d_out)
        assert layer.router is not None
        self.router = nn.Parameter(layer.router.weight()[0].detach().clone())
        self.down = nn.ParameterList(nn.Parameter(part.detach().clone()) for part in down[0])
        self.up = nn.ParameterList(nn.Parameter(part.detach().clone()) for part in up[0])

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        return self.add_delta(self.base(x), x)

    def add_delta(self, output: Tensor, x: Tensor) -> Tensor:
        """As `AdapterLinear.add_delta`."""
        tokens, flat = x.flatten(0, -2), output.flatten(0, -2)
        probabilities = functional.linear(tokens, self.router).softmax(-1)
        weight, winner = probabilities.max(-1)
        if self.style == "own tokens":
            added = torch.zeros_like(flat)
            for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
                token = (winner == expert).nonzero().squeeze(1)
                part = (functional.linear(tokens[token], down) @ up) * (weight[token] * self.scaling)[:, None]
                added.index_add_(0, token, part)
            return (flat + added).view(output.shape)
        gates = torch.zeros_like(probabilities).scatter(-1, winner[:, None], weight[:, None])
        for expert, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            flat = flat + gates[:, expert, None] * (functional.linear(tokens, down) @ up) * self.scaling
        return flat.view(output.shape)


def with_loops(model: nn.Module, style: Style) -> nn.Module:
    """The same model, each attached LoRAMoE linear replaced by its loop."""
    for name, layer in adapters(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoopLinear(layer, style))
    return model
