"""Routing losses, budgets and the effective number of compositions against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.adapter_worlds import tiny_decoder
from torch import Tensor, nn

from recollect.continual.adapters.attach import attach
from recollect.continual.adapters.budget import bank_parameters, match_budget, trainable_report
from recollect.continual.adapters.collision import mean_n_eff, n_eff, repeat_probability
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig, PlainLoraConfig
from recollect.continual.adapters.routing import (
    Routing,
    choose,
    load_balance_loss,
    localized_balancing,
    localized_balancing_loss,
    weigh_losses,
    z_loss,
)


def _routing(logits: Tensor, gate: str = "topk_full", mask: Tensor | None = None, shape: tuple = ()) -> Routing:
    weights, indices, probabilities = choose(logits, gate, 1)
    return Routing(logits, probabilities, weights, indices, mask, shape or (len(logits),))


def test_load_balance_is_one_when_uniform_and_e_when_all_choose_one_expert() -> None:
    even = torch.zeros(12, 2, 4)
    weights, _, probabilities = choose(even, "topk_full", 1)
    spread = (torch.arange(12) % 4)[:, None, None].expand(12, 2, 1)
    assert load_balance_loss(Routing(even, probabilities, weights, spread, None, (12,))) == pytest.approx(1.0)
    one = torch.zeros(12, 2, 4)
    one[..., 3] = 1e4
    assert load_balance_loss(_routing(one)) == pytest.approx(4.0)


def test_padding_counts_in_no_routing_loss() -> None:
    logits = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits.view(2, 4, 2, 4), 100 * torch.ones(2, 3, 2, 4)], dim=1).view(-1, 2, 4)
    mask = torch.tensor([True] * 4 + [False] * 3).repeat(2)
    plain, masked = _routing(logits, shape=(2, 4)), _routing(padded, mask=mask, shape=(2, 7))
    assert torch.equal(plain.usage(), masked.usage())
    torch.testing.assert_close(load_balance_loss(plain), load_balance_loss(masked))
    torch.testing.assert_close(z_loss(plain), z_loss(masked))
    types = torch.tensor([0, 1])
    values = [localized_balancing_loss(one, types, 0.1, True) for one in (plain, masked)]
    torch.testing.assert_close(*values)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(z_loss(_routing(logits)), expected)


def test_constraint_without_delta_is_the_squared_coefficient_of_variation() -> None:
    q = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    value = localized_balancing(q, torch.ones(6, 4))
    assert float(value) == pytest.approx(float(q.std() / q.mean()) ** 2, rel=1e-5)
    assert float(localized_balancing(1_000 * q, torch.ones(6, 4))) == pytest.approx(float(value), rel=1e-5)


def test_constraint_drives_unmatched_over_matched_to_its_ratio() -> None:
    free = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))  # (samples, experts)
    types = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(400):
        routing = _routing(free[:, None], gate="dense", shape=(4, 1))
        loss = localized_balancing_loss(routing, types, 0.1, True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = free.detach().softmax(-1)
    expert_types = torch.tensor([1, 1, 1, 0, 0, 0])
    matched = p[expert_types[None] == types[:, None]].mean()
    unmatched = p[expert_types[None] != types[:, None]].mean()
    assert float(unmatched / matched) == pytest.approx(1.1 / 0.9, rel=0.01)


def test_published_constraint_sums_over_padding_and_ours_averages_real_tokens() -> None:
    logits = torch.randn(10, 1, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True] * 5 + [True] * 2 + [False] * 3)
    routing = _routing(logits, gate="dense", mask=mask, shape=(2, 5))
    types = torch.tensor([1, 0])
    p = logits[:, 0].softmax(-1).view(2, 5, 4)
    importance = torch.tensor([[1.1, 1.1, 0.9, 0.9], [0.9, 0.9, 1.1, 1.1]])
    summed = importance * p.sum(1)
    averaged = importance * torch.stack([p[0].mean(0), p[1, :2].mean(0)])
    for length_normalize, expected in ((False, summed), (True, averaged)):
        value = localized_balancing_loss(routing, types, 0.1, length_normalize)
        assert float(value) == pytest.approx(float(expected.var() / expected.mean() ** 2), rel=1e-5)


def test_banks_add_up_for_the_constraint_and_average_for_the_rest() -> None:
    config = LoRAMoEConfig(lbc=0.5, balance=0.1, z_loss=0.2)
    banks = [
        {name: torch.tensor(value * scale) for name, value in (("lbc", 1.0), ("balance", 2.0), ("z", 3.0))}
        for scale in (1.0, 3.0)
    ]
    assert float(weigh_losses(banks, config)) == pytest.approx(0.5 * 4.0 + 0.1 * 4.0 + 0.2 * 6.0)


def test_budgets_match_the_worked_example() -> None:
    reference = LoRAMoEConfig(experts=4, rank=13, gate="topk_full")
    found = match_budget(reference, MHMoEConfig(heads=4, experts=4), [(1024, 3072)])
    assert (found.reference.rank, found.matched.rank) == (13, 4)
    assert found.activated == (53_248, 53_248)
    assert found.total_mismatch == found.activated_mismatch == 0
    assert found.router == (4 * 1024, 4 * 1024)


@pytest.mark.parametrize("rslora", [False, True])
def test_budget_search_raises_both_ranks_and_keeps_the_scale(rslora: bool) -> None:
    reference = LoRAMoEConfig(experts=4, rank=8, alpha=32.0, gate="topk_full", rslora=rslora)
    matched = MHMoEConfig(rank=2, alpha=6.0, rslora=rslora)
    found = match_budget(reference, matched, [(1024, 3072)])
    assert found.reference.rank > 8
    assert found.matched.rank > 2
    assert abs(found.total_mismatch) <= 0.05
    assert found.reference.scaling == pytest.approx(reference.scaling)
    assert found.matched.scaling == pytest.approx(matched.scaling)


@pytest.mark.parametrize("config", [
    PlainLoraConfig(rank=3),
    LoRAMoEConfig(experts=4, rank=2),
    MHMoEConfig(heads=4, experts=3, rank=2),
    MHMoEConfig(heads=2, experts=3, rank=2, top_k=2),
])  # fmt: skip
def test_report_equals_a_count_by_hand(config) -> None:
    bare = sum(parameter.numel() for parameter in tiny_decoder().parameters())
    report = trainable_report(attach(tiny_decoder(), config))
    parts = np.array([bank_parameters(config, *shape) for shape in 2 * [(32, 48), (32, 48), (48, 32)]]).sum(0)
    width = {PlainLoraConfig: 0}.get(type(config), config.experts * (32 + 32 + 48) * 2)
    by_hand = 2 * sum(
        config.heads * config.experts * config.rank * (d_in // config.heads + d_out)
        for d_in, d_out in ((32, 48), (32, 48), (48, 32))
    )
    assert (report.experts, report.router) == (parts[0], parts[2]) == (by_hand, width)
    assert report.base == bare
    assert report.trainable == by_hand + width
    assert report.total == bare + report.trainable
    assert report.activated == parts[1] + parts[2]


def test_n_eff_of_one_and_of_equiprobable_compositions() -> None:
    assert n_eff(np.array([700]), unbiased=False) == n_eff(np.array([700])) == 1.0
    assert n_eff(np.full(7, 50), unbiased=False) == pytest.approx(7.0)
    assert n_eff(np.ones(9)) == math.inf


def test_n_eff_is_bounded_and_bounds_the_mass_of_any_set() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        size = int(generator.integers(2, 30))
        counts = generator.multinomial(1_000, generator.dirichlet(np.full(size, generator.uniform(0.05, 2))))
        p, effective = counts / counts.sum(), n_eff(counts, unbiased=False)
        assert 1 - 1e-9 <= effective <= (counts > 0).sum() + 1e-9
        some = generator.random(size) < generator.random()
        assert p[some].sum() <= math.sqrt(some.sum() / effective) + 1e-12


def test_unbiased_n_eff_is_right_on_average_where_the_plug_in_is_not() -> None:
    generator = np.random.default_rng(1)
    p = generator.dirichlet(np.full(100, 5.0))
    truth = np.square(p).sum()
    draws = generator.multinomial(200, p, size=3_000)
    unbiased = np.mean([repeat_probability(counts) for counts in draws])
    plug_in = np.mean([repeat_probability(counts, unbiased=False) for counts in draws])
    assert unbiased == pytest.approx(truth, rel=0.02)
    assert plug_in > 1.2 * truth


def test_mean_n_eff_weighs_routes_by_tokens_and_leaves_rare_ones_out() -> None:
    routes = np.repeat([5, 2, 9], [300, 100, 3])
    compositions = np.concatenate([np.arange(300) % 2, np.zeros(100, int), np.arange(3)])
    value, share = mean_n_eff(routes, compositions, least_tokens=100)
    assert share == pytest.approx(400 / 403)
    halves = 300 * 299 / (2 * 150 * 149)  # pairs of tokens over pairs that share their composition
    assert value == pytest.approx((300 * halves + 100 * 1) / 400)
    assert math.isnan(mean_n_eff(routes, compositions, least_tokens=1_000)[0])
