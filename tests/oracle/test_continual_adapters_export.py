"""A route leaves as an ordinary LoRA folder: PEFT's logits on it are those of the routed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapter_worlds import randomize, tiny_decoder, tokens
from torch import nn

from recollect.continual.adapters.attach import adapters, attach, routers
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig, MoELoraConfig, PlainLoraConfig
from recollect.continual.adapters.export import Route, RouteObserver, chosen_route, export_route, forced_route


def _in_peft(folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_decoder(), folder).eval()


@pytest.mark.parametrize("config", [
    PlainLoraConfig(rank=3),
    LoRAMoEConfig(rank=2, experts=4, gate="topk_full"),
    LoRAMoEConfig(rank=2, experts=4),
    MHMoEConfig(rank=3, top_k=2, rslora=True),
    MHMoEConfig(rank=3, placement="block_shared"),
], ids=lambda config: f"{config.kind}-{config.gate}-{config.placement}")  # fmt: skip
def test_peft_gives_the_logits_of_the_forced_route(config: MoELoraConfig, tmp_path: Path) -> None:
    model, ids = randomize(attach(tiny_decoder(), config)), tokens()
    observer = RouteObserver(model)
    model(input_ids=ids)
    observer.observe()
    route = observer.route() if routers(model) else Route({})
    export_route(model, route, tmp_path)
    with torch.no_grad(), forced_route(model, route):
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(_in_peft(tmp_path)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert all(router.forced is None for router in routers(model).values())


def test_tokens_that_follow_a_renormalised_route_need_no_forcing(tmp_path: Path) -> None:
    model, ids = randomize(attach(tiny_decoder(), MHMoEConfig(gate="topk_renorm", rank=3))), tokens()
    for router in routers(model).values():
        router.rows[0].data.zero_()  # ties: every token takes the first expert of each slice
    route = chosen_route(model, [0, 0, 0, 0])
    expected = model(input_ids=ids).logits
    assert all((router.last_routing.indices == 0).all() for router in routers(model).values())
    export_route(model, route, tmp_path)
    torch.testing.assert_close(_in_peft(tmp_path)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_observed_route_is_the_commonest_with_its_mean_weights() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(heads=2)))
    observer = RouteObserver(model)
    seen = []
    for seed in range(3):
        model(input_ids=tokens(seed=seed))
        observer.observe()
        seen.append({name: router.last_routing.detached() for name, router in routers(model).items()})
    route = observer.route()
    name = "model.layers.1.mlp.up_proj"
    indices = torch.cat([one[name].indices[..., 0] for one in seen])
    weights = torch.cat([one[name].weights[..., 0] for one in seen])
    for head in range(2):
        best = int(torch.bincount(indices[:, head], minlength=4).argmax())
        mean = weights[indices[:, head] == best, head].mean()
        assert float(route.gates[name][head, best]) == pytest.approx(float(mean), rel=1e-5)
        assert int((route.gates[name][head] > 0).sum()) == 1
    assert 0 < route.share < 1


def test_exported_rank_is_the_experts_on_the_route(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = randomize(attach(tiny_decoder(), MHMoEConfig(rank=3)))
    export_route(model, chosen_route(model, [0, 1, 2, 3]), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {4 * 3}
    assert len(tensors) == 2 * len(adapters(model))
