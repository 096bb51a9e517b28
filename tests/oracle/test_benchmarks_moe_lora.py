"""The benchmark of low-rank experts compares equal functions at equal activated ranks, and runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.adapter_worlds import randomize, tiny_decoder, tokens

from recollect.continual.adapters.attach import adapters, attach
from recollect.continual.adapters.config import LoRAMoEConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def moe_lora(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import moe_lora

    yield moe_lora
    for name in set(sys.modules) - before:
        module_file = getattr(sys.modules[name], "__file__", None)
        if module_file and Path(module_file).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parametrize("style", ["all tokens", "own tokens"])
def test_the_loops_are_the_batched_layers_with_their_gradients(moe_lora, style):
    from expert_loops import with_loops

    config = LoRAMoEConfig(experts=4, rank=2, gate="topk_full", dropout=0.0)
    batched, looped = (randomize(attach(tiny_decoder(), config)) for _ in range(2))
    layers = adapters(looped)
    first, ids = next(iter(layers)), tokens()
    with_loops(looped, style)
    logits = [model(input_ids=ids).logits for model in (batched, looped)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for one in logits:
        one.square().mean().backward()
    layer, loop = batched.get_submodule(first), looped.get_submodule(first)
    assert layer.bank.lora_B[0].grad.abs().sum() > 0
    pairs = [
        (torch.stack([up.grad for up in loop.up]), layer.bank.lora_B[0]),
        (loop.router.grad, layer.own_router.rows[0]),
    ]
    for gradient, parameter in pairs:
        rounding = 1e-3 * float(gradient.abs().max())  # of a whole decoder, whichever order a machine sums in
        torch.testing.assert_close(gradient, parameter.grad[0], rtol=0, atol=rounding)


def test_every_method_activates_the_rank_of_pefts_lora(moe_lora):
    for name, config in moe_lora.configs().items():
        activated = config.heads * config.active_experts * config.rank
        assert activated == (moe_lora.RANK if "pre_o" not in name else moe_lora.RANK + 1), name
        assert config.dropout == 0, name


def test_with_two_experts_in_use_the_others_get_no_token(moe_lora):
    layer = moe_lora.loramoe(24, 16, 6, 2)
    moe_lora.use_two(layer)
    layer(torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(0)))
    assert set(layer.last_routing.indices.flatten().tolist()) == {0, 1}


def test_copies_share_the_decoders_weights_and_leave_it_bare(moe_lora):
    model = moe_lora.small_decoder()
    adapted = moe_lora.adapted(model, "LoRAMoE, top-1")
    down = "model.layers.0.mlp.down_proj"
    assert adapted.get_submodule(down).base.weight is model.get_submodule(down).weight
    assert type(model.get_submodule(down)) is torch.nn.Linear


def test_a_quick_run_measures_every_section(moe_lora, monkeypatch, tmp_path):
    import json

    out = tmp_path / "rows.jsonl"
    sections = [section for section in moe_lora.SECTIONS if section != "memory"]  # which forks
    monkeypatch.setattr(sys, "argv", ["moe_lora.py", "--quick", "--out", str(out), "--only", *sections])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    moe_lora.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["value"] is not None and row["value"] == row["value"] for row in rows)
    assert {row["name"] for row in rows} == {
        "training",
        "inference",
        "adapter of one layer",
        "growth with experts, top-1",
        "growth with total rank, dense gate",
        "step of a split expert linear",
    }
    speeds = {row["method"] for row in rows if row["metric"] == "speed_of_PEFT's"}
    assert speeds == {"PEFT LoRA", *moe_lora.configs(), *moe_lora.LOOPS}
