"""Diagnostics of experts against known truth: spec sd_moe oracles 8, 9 and 10."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recollect.continual.adapters.config import MoELoraConfig, SDLoraMoEConfig
from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear
from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.continual.spectral.convert import convert_moe
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.metrics import (
    effective_rank,
    gate_alignment,
    linear_cka,
    mean_over_pairs,
    overlap_ranks,
    pairwise_overlap,
    routing_information,
    singular_directions,
)
from recollect.continual.spectral.projections import common_part, leading_basis, unique_part
from recollect.continual.spectral.projector import SpectralProjector
from recollect.continual.spectral.report import expert_gradients, spectral_report, swap_losses
from recollect.errors import ConfigError
from tests.support.tiny_moe import tiny_moe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def left_overlap(stack: Tensor, k: int) -> float:
    return mean_over_pairs(pairwise_overlap(singular_directions(stack, k).left))


# 8. Overlap


def test_identical_experts_overlap_fully() -> None:
    stack = normal(1, 20, 30).expand(4, -1, -1)
    torch.testing.assert_close(
        pairwise_overlap(singular_directions(stack, 5).right), torch.ones(4, 4, dtype=torch.float64)
    )


def test_independent_gaussians_overlap_by_chance() -> None:
    overlaps = torch.tensor([left_overlap(normal(2, 40, 60, seed=seed), 4) for seed in range(100)])
    standard_error = float(overlaps.std()) / math.sqrt(len(overlaps))
    assert abs(float(overlaps.mean()) - 4 / 40) < 3 * standard_error


def test_overlap_ignores_scale_and_maps_of_the_unused_side() -> None:
    stack = normal(3, 20, 30)
    expected = pairwise_overlap(singular_directions(stack, 4).left)
    scales = torch.tensor([2.0, -0.5, 9.0], dtype=torch.float64)[:, None, None]
    turns = torch.stack([orthogonal(30, seed) for seed in range(3)])
    torch.testing.assert_close(pairwise_overlap(singular_directions(stack * scales @ turns, 4).left), expected)


def test_large_matrices_get_the_directions_of_the_full_decomposition() -> None:
    strong = normal(2, 600, 4, seed=1) @ normal(2, 4, 520, seed=2)
    stack = strong + 0.01 * normal(2, 600, 520, seed=3)
    exact = torch.linalg.svd(stack, full_matrices=False).U[..., :4]
    ours = singular_directions(stack, 4).left
    assert float(torch.linalg.svdvals(exact.transpose(1, 2) @ ours).min()) > 1 - 1e-8


# 9. Known truth


def test_shared_directions_are_found_and_gone_after_the_split() -> None:
    before, after = [], []
    for seed in range(5):
        left, right = orthogonal(24, 10 + seed)[:, :4], orthogonal(32, 30 + seed)[:, :4]
        shared = left @ torch.diag(torch.tensor([10.0, 8.0, 6.0, 5.0]).double()) @ right.T
        experts = shared + 0.3 * normal(6, 24, 32, seed=seed)
        before.append(left_overlap(experts, 4))
        after.append(left_overlap(unique_part(experts, leading_basis(experts.mean(0), 4)), 4))
    assert min(before) > 0.85
    assert max(after) < 0.3
    assert sum(before) / 5 == pytest.approx(0.92, abs=0.04)
    assert sum(after) / 5 == pytest.approx(0.21, abs=0.04)


# 10. Specialisation recovery


def test_training_separates_what_domains_share_from_what_is_their_own() -> None:
    n_experts, width, rank = 4, 24, 3
    shared = 3.0 * orthogonal(width, 1)[:, :rank] @ orthogonal(width, 2)[:, :rank].T
    own = 0.08 * normal(n_experts, width, width, seed=3)
    split = SpectralDecoupledLinear(n_experts, width, width, rank, dtype=torch.float64)
    plain = torch.nn.Parameter(split.merge())
    optimizers = [torch.optim.Adam(split.parameters(), lr=2e-2), torch.optim.Adam([plain], lr=2e-2)]
    SpectralProjector(split).attach(optimizers[0])
    generator = torch.Generator().manual_seed(4)
    for step in range(600):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (1 - step / 600)
        x = torch.randn(64, width, generator=generator, dtype=torch.float64)
        domain = torch.randint(n_experts, (64, 1), generator=generator)
        y = torch.einsum("nmi,ni->nm", (shared + own)[domain[:, 0]], x)
        outputs = (split(x, domain, torch.ones(64, 1)), torch.einsum("nmi,ni->nm", plain[domain[:, 0]], x))
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - y).square().sum(1).mean().backward()
            optimizer.step()
    unique, wanted = split.unique.detach(), unique_part(own, split.basis)
    cosines = torch.nn.functional.cosine_similarity(unique.flatten(1), wanted.flatten(1))
    assert float(cosines.min()) > 0.9
    found, truth = leading_basis(split.common.detach(), rank), leading_basis(shared, rank)
    for ours, theirs in zip(found, truth, strict=True):
        angles = torch.rad2deg(torch.acos(torch.linalg.svdvals(ours.T @ theirs).clamp(max=1)))
        assert float(angles.max()) < 15
    assert left_overlap(plain.detach(), rank) > 0.8
    assert left_overlap(unique, rank) < 0.4


# The other measures


def test_effective_rank_of_equal_singular_values_is_their_number() -> None:
    stack = torch.stack([orthogonal(10, 1), orthogonal(10, 2)[:, :3] @ orthogonal(10, 3)[:, :3].T])
    torch.testing.assert_close(effective_rank(stack), torch.tensor([10.0, 3.0], dtype=torch.float64))


def test_router_rows_along_an_expert_s_directions_are_fully_aligned() -> None:
    stack = normal(3, 16, 20)
    right = singular_directions(stack, 2).right
    score, specificity = gate_alignment(right[:, :, 0] * 7, right)
    torch.testing.assert_close(score.diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(specificity.min()) > 1


def test_random_router_is_aligned_by_chance() -> None:
    scores = [
        float(
            gate_alignment(normal(4, 50, seed=seed), singular_directions(normal(4, 30, 50, seed=seed + 99), 5).right)[
                0
            ].mean()
        )
        for seed in range(30)
    ]
    assert sum(scores) / 30 == pytest.approx(5 / 50, rel=0.1)


@pytest.mark.parametrize("n_tokens", [12, 80])
def test_cka_is_one_for_rotated_outputs_and_small_for_unrelated_ones(n_tokens: int) -> None:
    outputs = normal(n_tokens, 30)
    turned = outputs @ orthogonal(30, 4) * 3
    table = linear_cka(torch.stack([outputs, turned]))
    torch.testing.assert_close(table, torch.ones(2, 2, dtype=torch.float64))
    assert float(linear_cka(normal(2, 4000, 3, seed=5))[0, 1]) < 0.01


def test_routing_information_is_the_entropy_of_domains_that_own_experts() -> None:
    labels = torch.arange(400) % 4
    assert routing_information(labels[:, None], labels, 4) == pytest.approx(math.log(4))
    assert routing_information((labels[:, None] // 4) % 4, torch.arange(400) // 100, 4) < 1e-9


def test_one_percent_rule_and_fixed_ranks() -> None:
    assert overlap_ranks(512, 2048) == (1, 4, 6, 8)
    assert overlap_ranks(6, 30) == (1, 4)


# A whole layer


def test_report_of_a_stock_block_and_of_its_lossless_conversion_agree_on_the_weights() -> None:
    model = tiny_moe("qwen3_moe")
    inputs = normal(40, 32).float()
    labels = torch.arange(40) % 2
    stock = spectral_report(model.model.layers[0].mlp, inputs, labels=labels)
    convert_moe(model, 3)
    split = spectral_report(model.model.layers[0].mlp, inputs, labels=labels)
    for name, value in stock.metrics.items():
        if "common_energy" not in name:  # of the mean's 8 directions there, of the layer's 3 here
            assert split.metrics[name] == pytest.approx(value, abs=2e-4), name
    assert split.metrics["gate_proj/leak_left"] < 1e-6
    assert {"gate_proj/overlap_left@1", "outputs/cka", "routing/information", "down_proj/effective_rank"} <= set(
        stock.metrics
    )
    assert stock.random["gate_proj/overlap_left@4"] == 4 / 16
    assert set(stock.to_dict()) == {"metrics", "random", "pairs"}


def test_expert_gradients_are_those_of_the_weights_converted_or_not() -> None:
    model = tiny_moe("deepseek_v3")
    tokens = torch.arange(24).reshape(2, 12)
    block = model.model.layers[1].mlp
    losses = [lambda: model(tokens, labels=tokens).loss] * 2
    stock = expert_gradients(block, losses, fewest=2)
    convert_moe(model, 3, project="both")
    split = expert_gradients(block, losses, fewest=2)
    assert set(stock) == {"gate_proj", "up_proj", "down_proj"}
    for name, gradient in stock.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-5, rtol=1e-4)
    assert all(weight.grad is None for weight in model.parameters())
    report = spectral_report(block, gradients=split)
    assert 0 <= report.metrics["up_proj/gradient/common_energy"] <= 1
    assert "up_proj/gradient/overlap_right@1" in report.metrics
    with pytest.raises(ConfigError, match="give 32 or more"):
        expert_gradients(block, losses)


def test_swapping_experts_changes_the_loss_and_leaves_the_model_as_it_was() -> None:
    model = tiny_moe("qwen3_moe")
    tokens = torch.arange(24).reshape(2, 12)
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    changes = swap_losses(model.model.layers[0].mlp, lambda: model(tokens, labels=tokens).loss, [(0, 1), (2, 2)])
    assert changes["0-1"] != 0
    assert changes["2-2"] == 0
    assert torch.equal(experts.gate_up_proj, before)


def test_bare_matrices_of_any_experts_can_be_reported() -> None:
    towers = {"tower": normal(3, 12, 20)}
    report = spectral_report(towers, normal(50, 20), router=normal(3, 20))
    basis = leading_basis(towers["tower"].mean(0), 8)
    share = common_part(towers["tower"], basis).square().sum((1, 2)) / towers["tower"].square().sum((1, 2))
    assert report.metrics["tower/common_energy"] == pytest.approx(float(share.mean()))
    assert "outputs/cka" in report.metrics
    assert "router/input_alignment@8" in report.metrics


@pytest.mark.parametrize("heads", [1, 4])
def test_lora_experts_are_reported_slice_by_slice(heads: int) -> None:
    config = SDLoraMoEConfig(experts=3, rank=2, heads=heads, common_rank=2, common_rank_max=4, absorb_rank=1)
    layer = SDLoraMoELinear(torch.nn.Linear(32, 20), config)
    with torch.no_grad():
        layer.bank.lora_B[0].copy_(normal(heads, 3, 2, 20).float())
    report = spectral_report(layer, normal(30, 32).float())
    for number in range(heads):
        assert 0 <= report.metrics[f"slice_{number}/overlap_left@2"] <= 1
        assert (
            f"slice_{number}/gate_alignment@1" in report.metrics or f"slice_{number}/gate_alignment@2" in report.metrics
        )
        assert report.metrics[f"slice_{number}/effective_rank"] <= 2 + 1e-3
    assert ("outputs/cka" in report.metrics) == (heads == 1)


def test_split_lora_experts_overlap_less_than_plain_ones_on_a_shared_task() -> None:
    """Domains share a strong map; two mixtures of LoRA experts of equal options learn it, one with the split."""
    shared = 2.0 * orthogonal(24, 1)[:, :3] @ orthogonal(32, 2)[:, :3].T
    own = 0.15 * normal(3, 24, 32, seed=3)
    base = torch.nn.Linear(32, 24, bias=False)
    torch.nn.init.zeros_(base.weight)
    options = {"experts": 3, "rank": 3, "alpha": 3.0, "gate": "topk_renorm", "balance": 0.0}
    layers = [
        AdapterLinear(base, MoELoraConfig(**options)),
        SDLoraMoELinear(base, SDLoraMoEConfig(**options, common_rank=3, common_rank_max=3)),
    ]
    overlaps = []
    for layer in layers:
        router = layer.router
        assert router is not None
        router.requires_grad_(False)
        optimizer = torch.optim.Adam([weight for weight in layer.parameters() if weight.requires_grad], lr=1e-2)
        if isinstance(layer, SDLoraMoELinear):
            SpectralProjector(layer).attach(optimizer)
        generator = torch.Generator().manual_seed(4)
        for _ in range(300):
            x = torch.randn(96, 32, generator=generator)
            domain = router.weight()[0].mm(x.T).argmax(0)
            y = torch.einsum("nmi,ni->nm", (shared + own)[domain].float(), x)
            optimizer.zero_grad()
            (layer(x) - y).square().sum(1).mean().backward()
            optimizer.step()
        overlaps.append(spectral_report(layer, ks=(3,)).metrics["slice_0/overlap_left@3"])
    assert overlaps[0] > 0.6
    assert overlaps[1] < 0.5 * overlaps[0]
