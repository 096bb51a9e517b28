"""The balanced plan against POT, its marginals, and what it can and cannot tell apart."""

import math

import numpy as np
import pytest
import torch
from support.additive_tokenizer import GivenCodebooks

from recollect.tokenize import sinkhorn
from recollect.tokenize.collisions import CollisionConfig, resolve_collisions
from recollect.tokenize.sinkhorn import balanced_assignment, centred, log_transport_plan


def uniform_costs(rows, codes, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((rows, codes)))


def test_the_plan_equals_the_transport_plan_of_pot():
    ot = pytest.importorskip("ot", reason="POT is not installed")
    rows, codes, epsilon = 40, 16, 0.1
    costs = centred(uniform_costs(rows, codes))
    ours = log_transport_plan(costs, epsilon, 2000).exp().numpy() / rows
    uniform = (np.full(rows, 1 / rows), np.full(codes, 1 / codes))
    theirs = ot.sinkhorn(*uniform, costs.numpy(), epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-14)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


def test_rows_sum_to_one_and_columns_to_their_share():
    rows, codes = 2048, 256
    plan = log_transport_plan(centred(uniform_costs(rows, codes)), 0.003, 100).exp()
    assert float((plan.sum(0) - rows / codes).abs().max()) < 1e-4
    assert float((plan.sum(1) - 1).abs().max()) < 1e-4


def test_balanced_assignment_evens_out_uniform_random_costs():
    costs = uniform_costs(2048, 256)
    balanced = torch.bincount(balanced_assignment(costs, 0.003, 100), minlength=256)
    greedy = torch.bincount(costs.argmin(1), minlength=256)
    assert balanced.min() >= 6
    assert balanced.max() <= 11
    assert greedy.min() <= 2
    assert greedy.max() >= 17


def test_a_large_epsilon_gives_the_uniform_plan():
    plan = log_transport_plan(centred(uniform_costs(64, 8)), 1e6, 10).exp()
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 8), atol=1e-5, rtol=0)


def test_a_small_epsilon_does_not_underflow():
    plan = log_transport_plan(centred(uniform_costs(32, 8)), 1e-4, 50)
    assert bool(torch.isfinite(plan).all())


def test_problems_in_a_batch_are_solved_as_if_alone():
    costs = torch.stack([uniform_costs(6, 9, seed) for seed in range(4)])
    alone = torch.stack([balanced_assignment(cost) for cost in costs])
    assert torch.equal(balanced_assignment(costs), alone)


def test_the_plan_is_the_product_form_recipe_of_the_source():
    """LC-Rec normalises Q itself; in float64 and at a mild epsilon that can be done literally."""
    costs, epsilon = centred(uniform_costs(12, 5)), 0.2
    q = (-costs / epsilon).exp()
    q = q / q.sum()
    for _ in range(7):
        q = q / q.sum(1, keepdim=True) / 12
        q = q / q.sum(0, keepdim=True) / 5
    torch.testing.assert_close(log_transport_plan(costs, epsilon, 7).exp(), q * 12, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("shape", [(2, 256), (100, 256), (40, 8)])
def test_products_and_logarithms_give_one_plan(shape, monkeypatch):
    costs = centred(uniform_costs(*shape))
    quick = log_transport_plan(costs, 0.003, 100)
    monkeypatch.setattr(sinkhorn, "_LARGEST_RANGE", 0.0)
    torch.testing.assert_close(log_transport_plan(costs, 0.003, 100), quick, atol=1e-8, rtol=0)


def near_identical_groups(sizes, seed=0):
    """Items in tight bunches round codes of level 0, level 1 a cloud of 256 codes."""
    generator = np.random.default_rng(seed)
    tokenizer = GivenCodebooks(10 * np.eye(8)[: len(sizes)], generator.normal(size=(256, 8)))
    group = np.repeat(np.arange(len(sizes)), sizes)
    bunch = tokenizer.codebooks[0] + generator.normal(size=(len(sizes), 8)).astype(np.float32)
    items = bunch[group] + 1e-3 * generator.normal(size=(len(group), 8))
    return tokenizer, items.astype(np.float32), group


def test_sinkhorn_leaves_part_of_large_near_identical_groups_together_and_zcr_does_not():
    sizes = [2, 5, 20, 100]
    tokenizer, items, group = near_identical_groups(sizes)
    codes = tokenizer.encode(items).codes
    once = CollisionConfig(rounds=1)
    balanced = resolve_collisions(codes, "sinkhorn", tokenizer=tokenizer, embeddings=items, config=once)
    zcr = resolve_collisions(codes, "zcr", tokenizer=tokenizer, embeddings=items)
    apart = [len(np.unique(balanced.codes[group == number], axis=0)) for number in range(len(sizes))]
    assert apart[:2] == [2, 5]  # the counts measured for the method: 2, 5, 19 and 58 of 2, 5, 20 and 100
    assert abs(apart[2] - 19) <= 3
    assert abs(apart[3] - 58) <= 12
    assert [len(np.unique(zcr.codes[group == number], axis=0)) for number in range(len(sizes))] == sizes
    assert zcr.unresolved == 0
    assert balanced.unresolved > 0


def test_true_duplicates_stay_together_under_sinkhorn():
    tokenizer, items, _ = near_identical_groups([3])
    items[:] = items[0]
    found = resolve_collisions(tokenizer.encode(items).codes, "sinkhorn", tokenizer=tokenizer, embeddings=items)
    assert found.unresolved == 3


def test_each_round_assigns_the_colliding_groups_alone_by_the_balanced_plan():
    tokenizer, items, group = near_identical_groups([3, 1])
    codes = tokenizer.encode(items).codes
    found = resolve_collisions(
        codes, "sinkhorn", tokenizer=tokenizer, embeddings=items, config=CollisionConfig(rounds=1)
    )
    residual = items[group == 0].astype(np.float64) - tokenizer.codebooks[0][0]
    distances = ((residual[:, None] - tokenizer.codebooks[1][None]) ** 2).sum(-1)
    expected = balanced_assignment(torch.from_numpy(distances)).numpy()
    np.testing.assert_array_equal(found.codes[group == 0, 1], expected)
    np.testing.assert_array_equal(found.codes[group == 1], codes[group == 1])


def test_distances_are_centred_by_mid_range_and_half_range_per_problem():
    distances = torch.tensor([[[0.0, 3.0], [4.0, 1.0]], [[7.0, 7.0], [7.0, 9.0]]])
    expected = torch.tensor([[[-2.0, 1.0], [2.0, -1.0]], [[-1.0, -1.0], [-1.0, 1.0]]], dtype=torch.float64)
    half_range = torch.tensor([2.0, 1.0], dtype=torch.float64)[:, None, None] + 1e-5
    torch.testing.assert_close(centred(distances), expected / half_range, atol=1e-12, rtol=0)


def test_scale_and_shift_of_distances_change_nothing():
    costs = uniform_costs(20, 10)
    scaled = centred(costs * 1000 + math.pi)
    torch.testing.assert_close(scaled, centred(costs), atol=5e-5, rtol=0)  # but for the constant added to the range
