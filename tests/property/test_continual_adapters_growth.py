"""Growing, freezing and gating: what is frozen stays bit for bit, what is added changes nothing until it is trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_worlds import randomize, tiny_decoder, tokens
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapter_parameters, adapters, attach, routers, routing_loss
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig
from recollect.continual.adapters.experts import Blocks
from recollect.continual.adapters.growth import (
    generations,
    grow,
    open_experts,
    train_everything,
    train_new_experts,
    train_routers_only,
)
from recollect.continual.adapters.routing import choose
from recollect.continual.adapters.usage_gate import UsageGate, update_scale

CONFIGS = {
    "loramoe": LoRAMoEConfig(experts=2, dropout=0.0, balance=0.01),
    "loramoe sparse": LoRAMoEConfig(experts=1, gate="topk_full", dropout=0.0, balance=0.01),
    "mh_moe": MHMoEConfig(experts=2),
    "mh_moe shared": MHMoEConfig(experts=2, placement="block_shared"),
    "mh_moe beside": MHMoEConfig(experts=2, placement="parallel_ffn"),
}


def _train(model: nn.Module, trained: list[nn.Parameter], seed: int, gate: UsageGate | None = None) -> None:
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        ids = tokens(seed=10 * seed + step)
        optimizer.zero_grad()
        (model(input_ids=ids, labels=ids).loss + routing_loss(model)).backward()
        if gate is not None:
            gate.before_step()
        optimizer.step()
        if gate is not None:
            gate.after_step()


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", CONFIGS)
def test_growth_changes_no_logit_and_each_phase_only_its_own_part(method: str) -> None:
    model, ids = randomize(attach(tiny_decoder(), CONFIGS[method])), tokens()
    _train(model, train_everything(model), seed=0)
    before = model(input_ids=ids).logits
    grow(model, 1)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert generations(model) == ([CONFIGS[method].experts, 1], 1)

    start = _snapshot(model)
    trained = train_new_experts(model)
    assert generations(model)[1] == 2
    _train(model, trained, seed=1)
    phase_1 = _snapshot(model)
    allowed = {name for name in start if ".rows." in name or name.endswith(("lora_A.1", "lora_B.1"))}
    assert _changed(start, phase_1) <= allowed
    assert any("lora_B.1" in name for name in _changed(start, phase_1))
    assert any(".rows.0" in name for name in _changed(start, phase_1))

    _train(model, train_routers_only(model), seed=2)
    moved = _changed(phase_1, _snapshot(model))
    assert moved
    assert all(".rows." in name for name in moved)


def test_new_experts_of_several_growths_are_each_their_own() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(experts=1)))
    for size in (1, 3):
        grow(model, size)
    train_new_experts(model)
    assert generations(model) == ([1, 1, 3], 3)
    model(input_ids=tokens())
    assert all(router.last_routing.n_experts == 5 for router in routers(model).values())
    banks = [module.bank for module in adapters(model).values()]
    assert not torch.equal(banks[0].lora_A[0], banks[0].lora_A[1])
    assert not torch.equal(banks[0].lora_A[1], banks[1].lora_A[1])
    assert not any(up.abs().max() for bank in banks for up in list(bank.lora_B)[1:])
    open_experts(model, 1)
    model(input_ids=tokens())
    assert all(router.last_routing.n_experts == 1 for router in routers(model).values())


@settings(max_examples=60, deadline=None)
@given(
    new=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    old=st.floats(0, 1),
    gate=st.sampled_from(["dense", "topk_full", "topk_renorm"]),
    seed=st.integers(0, 1_000),
)
def test_scales_and_gates_stay_in_their_ranges(new: list[float], old: float, gate: str, seed: int) -> None:
    fresh = torch.tensor(new, dtype=torch.float64)
    scale = update_scale(fresh, torch.full_like(fresh, old))
    assert ((scale >= 0) & (scale <= 1)).all()
    assert (scale[fresh <= old] == (1.0 if old == 0 else 0.0)).all()
    above = fresh > old
    torch.testing.assert_close(scale[above] * (fresh[above] + old), fresh[above] - old)
    logits = 5 * torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed))
    weights, indices, probabilities = choose(logits, gate, 2)
    assert (weights.sum(-1) <= 1 + 1e-6).all()
    assert (probabilities.sum(-1) - 1).abs().max() < 1e-5
    if gate == "topk_renorm":
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
    assert all(len(set(row.tolist())) == row.numel() for row in indices.flatten(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70), heads=st.integers(1, 3), chosen=st.integers(1, 2), experts=st.integers(2, 9),
    seed=st.integers(0, 1_000),
)  # fmt: skip
def test_blocks_hold_every_assignment_once_beside_its_own_expert(
    n: int, heads: int, chosen: int, experts: int, seed: int
) -> None:
    scores = torch.rand(n, heads, experts, generator=torch.Generator().manual_seed(seed))
    indices = scores.topk(chosen, -1).indices
    blocks = Blocks.of(indices, experts)
    assert torch.equal(blocks.assignment.sort().values, torch.arange(n * heads * chosen))
    assert len(blocks.place.unique()) == len(blocks.place)
    owner = (indices + experts * torch.arange(heads)[:, None]).reshape(-1)
    rows = len(blocks.spread(torch.zeros(len(blocks.place), 1))[0])
    assert torch.equal(blocks.expert[blocks.place // rows], owner[blocks.assignment])
    assert torch.equal(blocks.token, blocks.assignment // (heads * chosen))
    assert set(blocks.expert.tolist()) == set(owner.tolist())


def _gated(model: nn.Module, scales: float | None = None) -> UsageGate:
    gate = UsageGate(model)
    model(input_ids=tokens(seed=1))
    gate.observe()
    gate.finish()
    model(input_ids=tokens(seed=2))
    gate.observe()
    gate.start(freeze_routers=False)
    if scales is not None:
        for scale in gate._scales.values():
            scale.fill_(scales)
    return gate


def test_gated_experts_move_by_their_share_of_the_update() -> None:
    config = MHMoEConfig(heads=2, placement="block_shared")
    moved = {}
    for share in (0.0, 0.25, 1.0):
        model = randomize(attach(tiny_decoder(), config))
        before = _snapshot(model)
        gate = _gated(model, share)
        optimizer = torch.optim.AdamW(train_everything(model), lr=1e-2, weight_decay=0.1)
        ids = tokens(seed=3)
        model(input_ids=ids, labels=ids).loss.backward()
        gate.before_step()
        optimizer.step()
        gate.after_step()
        moved[share] = {name: tensor - before[name] for name, tensor in _snapshot(model).items() if "lora" in name}
        assert gate.gated_share() == (0.0 if share == 1 else 1.0)
    for name, whole in moved[1.0].items():
        assert whole.abs().max() > 0
        assert not moved[0.0][name].any()
        torch.testing.assert_close(moved[0.25][name], 0.25 * whole, rtol=1e-3, atol=1e-6)


def test_first_task_is_not_gated_and_later_routers_are_frozen() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig()))
    gate = UsageGate(model)
    scales = gate.start()
    assert all((scale == 1).all() for scale in scales.values())
    assert all(router.rows[0].requires_grad for router in routers(model).values())
    model(input_ids=tokens())
    gate.observe()
    gate.finish()
    model(input_ids=tokens(seed=4))
    gate.observe()
    scales = gate.start()
    assert not any(router.rows[0].requires_grad for router in routers(model).values())
    start = _snapshot(model)
    _train(model, [p for p in adapter_parameters(model).values() if p.requires_grad], seed=5, gate=gate)
    after = _snapshot(model)
    for name in adapters(model):
        frozen = scales[name] == 0
        assert frozen.any()
        for part in ("bank.lora_A.0", "bank.lora_B.0"):
            still = (after[f"{name}.{part}"] == start[f"{name}.{part}"]).flatten(2).all(-1)
            assert still[frozen].all()


def test_gate_follows_growth() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(experts=2)))
    gate = UsageGate(model)
    model(input_ids=tokens())
    gate.observe()
    gate.finish()
    grow(model, 1)
    model(input_ids=tokens(seed=1))
    gate.observe()
    train_new_experts(model)
    model(input_ids=tokens(seed=1))
    gate.observe()
    scales = gate.start()
    assert all(scale.shape == (4, 3) and (scale[:, 2] == 1).all() for scale in scales.values())
