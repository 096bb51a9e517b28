"""Native mixtures of experts split and merged back: the function of the stock model (spec sd_moe oracles 2, 11)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recollect.continual.spectral.convert import SpectralExperts, convert_moe, expert_stacks, merge_moe
from recollect.continual.spectral.projections import unique_part
from recollect.continual.spectral.projector import SpectralProjector, parameter_groups
from tests.support.tiny_moe import MODELS, tiny_moe

TOKENS = torch.arange(24).reshape(2, 12) % 50


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def perplexity(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(TOKENS, labels=TOKENS).loss.exp())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("forward_common", ["shared", "merged"])
def test_lossless_conversion_keeps_the_logits(kind: str, forward_common: str) -> None:
    model = tiny_moe(kind)
    before = logits(model)
    report = convert_moe(model, 3, forward_common=forward_common)
    assert any(isinstance(module, SpectralExperts) for module in model.modules())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert len(report.common_energy) % 3 == 0
    assert all(0 < share < 1 for share in [*report.common_energy.values(), *report.dropped_energy.values()])


def trained(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)
    SpectralProjector(model).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", MODELS)
def test_trained_model_merges_into_a_checkpoint_the_stock_class_loads(kind: str, tmp_path: Path) -> None:
    model = tiny_moe(kind)
    start, stock_keys = logits(model), set(model.state_dict())
    convert_moe(model, 3, refresh_every=2)
    trained(model)
    split = logits(model)
    assert not torch.allclose(split, start, atol=1e-3)
    assert set(merge_moe(model).state_dict()) == stock_keys
    torch.testing.assert_close(logits(model), split, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), split, atol=1e-5, rtol=0)
    assert torch.equal(loaded.generate(TOKENS[:1], max_new_tokens=4), model.generate(TOKENS[:1], max_new_tokens=4))


def test_experts_stay_in_the_complement_through_training_and_refreshes() -> None:
    model = tiny_moe("qwen3_moe")
    convert_moe(model, 3, refresh_every=2)
    trained(model, 5)
    for module in model.modules():
        if isinstance(module, SpectralExperts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                assert max(module.linear(name).leak()) <= 1e-6


def test_lossy_conversion_drops_what_it_reports_and_measures_the_perplexity() -> None:
    model = tiny_moe("qwen3_moe")
    before = expert_stacks(model.model.layers[0].mlp.experts)
    report = convert_moe(model, 3, lossless=False, perplexity=perplexity)
    after = expert_stacks(model.model.layers[0].mlp.experts)
    assert report.perplexity_before != report.perplexity_after == pytest.approx(perplexity(model))
    for name, stack in before.items():
        share = float((stack - after[name]).square().sum() / stack.square().sum())
        assert report.dropped_energy[f"model.layers.0.mlp.experts.{name}"] == pytest.approx(share, rel=1e-4)


def test_router_of_the_complement_ignores_the_common_directions_and_merges_exactly() -> None:
    model = tiny_moe("qwen3_moe")
    convert_moe(model, 3, gate_input="complement", perplexity=perplexity)
    block = model.model.layers[0].mlp
    right = block.experts.linear("gate_proj").right
    x = torch.randn(6, right.shape[0], generator=torch.Generator().manual_seed(1))
    shifted = x + torch.randn(6, right.shape[1], generator=torch.Generator().manual_seed(2)) @ right.T
    torch.testing.assert_close(block.gate(x)[0], block.gate(shifted)[0], atol=1e-5, rtol=0)
    split = logits(model)
    torch.testing.assert_close(logits(merge_moe(model)), split, atol=1e-5, rtol=0)
    assert not block.gate._forward_pre_hooks


def test_frozen_experts_stay_frozen_and_gradient_checkpointing_changes_nothing() -> None:
    model = tiny_moe("qwen3_moe")
    model.model.layers[0].mlp.experts.requires_grad_(False)
    convert_moe(model, 3, project="both")
    assert not any(weight.requires_grad for weight in model.model.layers[0].mlp.experts.parameters())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        linear = model.model.layers[1].mlp.experts.linear("up_proj")
        gradients.append(linear.unique.grad.clone())
        torch.testing.assert_close(unique_part(gradients[-1], linear.basis), gradients[-1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_model_converts_and_merges() -> None:
    model = tiny_moe("qwen3_moe").to(torch.bfloat16)
    before = expert_stacks(model.model.layers[0].mlp.experts)
    convert_moe(model, 3)
    for name, stack in expert_stacks(model.model.layers[0].mlp.experts).items():
        torch.testing.assert_close(stack, before[name], atol=0.02, rtol=0.02)
    assert model.model.layers[0].mlp.experts.linear("up_proj").unique.dtype == torch.bfloat16
    trained(model, 2)
    assert logits(merge_moe(model)).isfinite().all()
