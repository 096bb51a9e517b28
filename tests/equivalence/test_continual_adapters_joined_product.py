"""Router and experts that read their input in one product decide and answer as with a product each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import (
    HydraLoraConfig,
    LoRAMoEConfig,
    MHMoEConfig,
    MoELoraConfig,
)
from recollect.continual.adapters.experts import ExpertBank
from recollect.continual.adapters.hydra_lora import HydraLoraLinear
from recollect.continual.adapters.mh_moe import AdapterFFN, MHMoELinear
from recollect.continual.adapters.routing import MaskHolder
from recollect.continual.adapters.wrapped import AdapterLinear

WIDTH, OUT = 24, 20


def _layer(config: MoELoraConfig) -> nn.Module:
    torch.manual_seed(0)
    if config.placement == "parallel_ffn":
        layer: nn.Module = AdapterFFN(nn.Linear(WIDTH, OUT), config, WIDTH, OUT, name="ffn", mask=MaskHolder())
    else:
        layer = MHMoELinear(nn.Linear(WIDTH, OUT), config)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return layer.train()


def _passed(layer: nn.Module, tokens: int) -> list[Tensor]:
    """Output, winners, and gradients of the input and of every trained weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens // 2, WIDTH, generator=generator).requires_grad_()
    output = layer(x)
    loss = (output * torch.randn(output.shape, generator=generator)).sum() + layer.last_routing.logits.square().mean()
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [output, layer.last_routing.indices, *torch.autograd.grad(loss, [x, *weights])]


@pytest.mark.parametrize("config", [
    LoRAMoEConfig(experts=3, rank=4, dropout=0.0),
    LoRAMoEConfig(experts=3, rank=4, dropout=0.0, gate="topk_full", top_k=1),
    MHMoEConfig(experts=3, rank=2, heads=4, gate="topk_renorm", top_k=2),
    MHMoEConfig(experts=3, rank=2, heads=4, placement="parallel_ffn"),
], ids=lambda config: f"{config.kind}-{config.gate}-{config.placement}")  # fmt: skip
def test_one_product_equals_two(config: MoELoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(config)
    assert layer.bank.rows_beside(layer.own_router, torch.zeros(60, WIDTH)) is not None
    joined = _passed(layer, 60)
    monkeypatch.setattr(ExpertBank, "rows_beside", lambda self, router, x: None)
    for one, other in zip(joined, _passed(layer, 60), strict=True):
        rounding = 2e-6 * float(other.detach().abs().max())  # of sums, whichever order a machine takes
        torch.testing.assert_close(one, other, rtol=1e-5, atol=rounding)


def test_what_a_router_keeps_does_not_hold_the_products() -> None:
    layer = _layer(LoRAMoEConfig(experts=3, rank=4, dropout=0.0))
    with torch.no_grad():
        layer(torch.randn(60, WIDTH))
    kept = layer.last_routing
    assert kept.products is None
    assert kept.logits.untyped_storage().nbytes() == 60 * 3 * 4


def test_products_stay_apart_where_they_would_differ_or_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor | None] = []
    whole = AdapterLinear.route
    monkeypatch.setattr(
        AdapterLinear, "route", lambda self, x, rows=None: (asked.append(rows), whole(self, x, rows))[1]
    )
    x = torch.randn(60, WIDTH)
    dropping = _layer(LoRAMoEConfig(experts=3, rank=4, dropout=0.5))
    dropping(x)
    few = _layer(LoRAMoEConfig(experts=3, rank=4, dropout=0.0))
    few(x[:8])
    grouped = _layer(LoRAMoEConfig(experts=64, rank=4, dropout=0.0, gate="topk_full", top_k=1))
    grouped(x.repeat(10, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        few(x)
    few.to(torch.bfloat16)(x.bfloat16())
    HydraLoraLinear(nn.Linear(WIDTH, OUT), HydraLoraConfig(experts=3, rank=4))(x)
    assert asked == [None] * 6
    dropping.eval()(x)
    assert asked[-1] is not None
