"""Grouped products and projections hold for any shapes and any routing, empty experts included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.continual.spectral.grouped import group_by_expert, grouped_linear
from recollect.continual.spectral.metrics import pairwise_overlap, singular_directions
from recollect.continual.spectral.projections import (
    common_part,
    project_unique_,
    random_basis,
    split_experts,
    unique_part,
)

sizes = st.integers(1, 12)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 6),
    tokens=sizes,
    slots=st.integers(1, 3),
    out_features=st.sampled_from([3, 4, 8, 16]),
    in_features=st.sampled_from([5, 8, 12, 32]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_grouped_product_and_its_gradients_equal_a_loop(
    experts: int, tokens: int, slots: int, out_features: int, in_features: int, double: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    selected = torch.randint(experts, (tokens, slots), generator=generator)
    x = torch.randn(tokens, in_features, generator=generator, dtype=dtype)
    weights = torch.randn(experts, out_features, in_features, generator=generator, dtype=dtype)
    grouping = group_by_expert(selected, experts)
    results = []
    for looped in (False, True):
        rows, used = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if looped:
            y = torch.stack(
                [
                    used[expert] @ rows[token]
                    for token, expert in zip(range(tokens * slots), selected.flatten().tolist(), strict=True)
                    for token in [token // slots]
                ]
            )
        else:
            y = grouped_linear(rows[grouping.token], used, grouping)[grouping.place]
        y.square().sum().backward()
        results.append((y.detach(), rows.grad, used.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert int(grouping.counts.sum()) == tokens * slots
    assert torch.equal(grouping.token[grouping.place], torch.arange(tokens * slots) // slots)
    assert torch.equal(grouping.expert[grouping.place], selected.flatten())


@settings(max_examples=40, deadline=None)
@given(
    n_matrices=st.integers(1, 4),
    out_features=st.integers(2, 12),
    in_features=st.integers(2, 12),
    data=st.data(),
)
def test_split_is_exact_idempotent_and_orthogonal(
    n_matrices: int, out_features: int, in_features: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, min(out_features, in_features) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    stack = torch.randn(n_matrices, out_features, in_features, generator=generator, dtype=torch.float64)
    basis = random_basis(out_features, in_features, rank, generator)
    common, unique = common_part(stack, basis), unique_part(stack, basis)
    torch.testing.assert_close(common + unique, stack, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unique_part(unique, basis), unique, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(common_part(common, basis), common, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(project_unique_(stack.clone(), basis), unique)
    split = split_experts(stack, rank)
    rebuilt = split.common + split.unique + split.dropped_left @ split.dropped_right
    torch.testing.assert_close(rebuilt, stack, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 5), side=st.integers(2, 10), seed=st.integers(0, 1000), data=st.data())
def test_overlap_is_symmetric_and_between_zero_and_one(experts: int, side: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, side))
    stack = torch.randn(experts, side, side + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = pairwise_overlap(singular_directions(stack, k).right)
    torch.testing.assert_close(table, table.T)
    torch.testing.assert_close(table.diagonal(), torch.ones(experts, dtype=torch.float64))
    assert float(table.min()) >= 0
    assert float(table.max()) <= 1 + 1e-9
