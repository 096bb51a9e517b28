"""The same numbers whichever way they are computed: product layout, padding, checkpointing, cache, copies, reload."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.adapter_worlds import randomize, tiny_decoder, tokens
from torch import Tensor, nn

from recollect.continual.adapters import experts
from recollect.continual.adapters.attach import (
    adapter_parameters,
    adapter_state_dict,
    adapters_disabled,
    attach,
    load_adapter_state_dict,
    routers,
    routing_loss,
    token_mask,
)
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig, MoELoraConfig
from recollect.continual.adapters.growth import grow, train_new_experts
from recollect.continual.adapters.saving import base_fingerprint, from_pretrained, save_pretrained
from recollect.continual.adapters.usage_gate import UsageGate
from recollect.continual.adapters.wrapped import AdapterLinear

CONFIGS = {
    "loramoe": LoRAMoEConfig(dropout=0.0, lbc=0.1, balance=0.01, z_loss=0.001),
    "mh_moe": MHMoEConfig(),
    "mh_moe shared": MHMoEConfig(placement="block_shared"),
    "mh_moe before o": MHMoEConfig(heads=2, placement="parallel_ffn", slice_source="pre_o"),
}


def _gradients(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    mask = torch.ones_like(ids) if mask is None else mask
    first = mask.cumsum(1) == 1  # what padding on the left would predict
    labels = ids.masked_fill((mask == 0) | first, -100)
    types = torch.arange(len(ids)) % 2
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss + routing_loss(model, types)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(("heads", "chosen", "gate"), [(1, 1, "topk_full"), (4, 1, "topk_full"), (2, 3, "topk_renorm")])
def test_grouped_products_equal_stacked_ones(
    heads: int, chosen: int, gate: str, activation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MHMoEConfig(heads=heads, experts=9, top_k=chosen, gate=gate, rank=2)
    layer = AdapterLinear(nn.Linear(16, 10), config)
    layer.bank.activation = activation
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.bank.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(experts, "STACKED_RANK", limit)
        x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.zero_grad(set_to_none=True)
        out = layer(x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in (*layer.bank.parameters(), *layer.own_router.parameters())]
        results.append([out, layer.delta(x), x.grad, *gradients])
    for stacked, grouped in zip(*results, strict=True):
        rounding = 3e-6 * float(grouped.detach().abs().max())  # of sums, whichever order a machine takes
        torch.testing.assert_close(stacked, grouped, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", CONFIGS)
def test_padding_changes_no_loss_gradient_or_count(method: str, side: str) -> None:
    model, ids = randomize(attach(tiny_decoder(), CONFIGS[method])), tokens()
    mask = torch.ones_like(ids)
    plain, gradients = _gradients(model, ids, mask)
    counts = [router.last_routing.usage() for router in routers(model).values()]
    pads = torch.zeros(len(ids), 4, dtype=torch.long)
    order = (lambda one, two: [one, two]) if side == "right" else (lambda one, two: [two, one])
    padded, padded_gradients = _gradients(model, torch.cat(order(ids, pads), 1), torch.cat(order(mask, pads), 1))
    torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=1e-3, atol=1e-5)
    for router, before in zip(routers(model).values(), counts, strict=True):
        after = router.last_routing.usage()
        if router.gate == "dense":
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(after, before)


@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointed_layers_give_the_same_gradients(method: str) -> None:
    ids, mask = tokens(), torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    model = randomize(attach(tiny_decoder().train(), CONFIGS[method]))
    loss, gradients = _gradients(model, ids, mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed, checkpointed_gradients = _gradients(model, ids, mask)
    assert torch.equal(loss, checkpointed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, checkpointed_gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", CONFIGS)
def test_cached_generation_equals_whole_passes(method: str) -> None:
    model, ids = randomize(attach(tiny_decoder(), CONFIGS[method])), tokens()
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("method", CONFIGS)
def test_samples_do_not_depend_on_their_batch(method: str) -> None:
    model, ids = randomize(attach(tiny_decoder(), CONFIGS[method])), tokens()
    together = model(input_ids=ids).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_reloaded_adapters_give_identical_logits(method: str, tmp_path: Path) -> None:
    model, ids = randomize(attach(tiny_decoder(), CONFIGS[method])), tokens()
    expected = model(input_ids=ids).logits
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tiny_decoder(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    saved = {name: tensor.numel() for name, tensor in adapter_state_dict(model).items()}
    assert sum(saved.values()) == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (tmp_path / "recollect_adapter.safetensors").stat().st_size < 4 * sum(saved.values()) + 16_384


def test_grown_adapters_reload_with_their_generations(tmp_path: Path) -> None:
    model, ids = randomize(attach(tiny_decoder(), MHMoEConfig(grow=1))), tokens()
    grow(model, 1)
    train_new_experts(model)
    grow(model, 2)
    randomize(model, seed=3)
    expected = model(input_ids=ids).logits
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tiny_decoder(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    for one in (model, loaded):
        train_new_experts(one)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids).logits, expected)


def test_copied_model_is_independent_and_equal() -> None:
    model, ids = randomize(attach(tiny_decoder(), MHMoEConfig(placement="block_shared"))), tokens()
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    twin = copy.deepcopy(model)
    randomize(model, seed=5)
    mask[:, 5:] = 0
    assert not torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(twin(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)
    own = {id(router) for router in routers(model).values()}
    assert not own & {id(router) for router in routers(twin).values()}
    assert all(router.last_routing.mask.all() for router in routers(twin).values())


def test_fingerprint_names_the_base_and_not_its_adapters_or_precision() -> None:
    bare = base_fingerprint(tiny_decoder())
    assert base_fingerprint(randomize(attach(tiny_decoder(), MHMoEConfig()))) == bare
    beside = MHMoEConfig(heads=2, placement="parallel_ffn", slice_source="pre_o")
    assert base_fingerprint(attach(tiny_decoder(), beside)) == bare
    assert base_fingerprint(tiny_decoder().to(torch.bfloat16)) == bare
    other = tiny_decoder()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    assert base_fingerprint(other) != bare


def test_disabled_adapters_are_the_bare_model() -> None:
    model, ids = tiny_decoder(), tokens()
    bare = model(input_ids=ids).logits
    randomize(attach(model, MHMoEConfig()))
    with adapters_disabled(model):
        assert torch.equal(model(input_ids=ids).logits, bare)
    assert not torch.equal(model(input_ids=ids).logits, bare)


def test_layers_own_mask_overrides_the_attention_mask() -> None:
    model, ids = randomize(attach(tiny_decoder(), MHMoEConfig())), tokens()
    own = torch.zeros_like(ids)
    own[:, -2:] = 1
    with token_mask(model, own):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert all(int(router.last_routing.usage()[0].sum()) == 6 for router in routers(model).values())
    model(input_ids=ids)
    assert all(int(router.last_routing.usage()[0].sum()) == ids.numel() for router in routers(model).values())


def _config_of_resumed_training() -> MoELoraConfig:
    return MHMoEConfig(update_gate="usage", dropout=0.0)


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, UsageGate]:
        model = attach(tiny_decoder(), _config_of_resumed_training())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2), UsageGate(model)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, gate: UsageGate, seeds: range) -> None:
        for seed in seeds:
            _gradients(model, tokens(seed=seed))
            gate.before_step()
            optimizer.step()
            gate.after_step()
            gate.observe()

    model, optimizer, gate = start()
    gate.start()
    steps(model, optimizer, gate, range(3))
    gate.finish()
    model(input_ids=tokens(seed=9))
    gate.observe()
    gate.start(freeze_routers=False)
    steps(model, optimizer, gate, range(3, 5))
    save_pretrained(model, tmp_path)
    moments, counts = copy.deepcopy(optimizer.state_dict()), gate.state_dict()
    steps(model, optimizer, gate, range(5, 8))

    resumed, again, gate_again = start()
    load_adapter_state_dict(resumed, adapter_state_dict(from_pretrained(tiny_decoder(), tmp_path)))
    again.load_state_dict(moments)
    gate_again.load_state_dict(counts)
    steps(resumed, again, gate_again, range(5, 8))
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(resumed)[name]), name
    assert all(torch.equal(tensor, gate_again.new[name]) for name, tensor in gate.new.items())


@pytest.mark.parametrize("rank", [2, 60])  # stacked, and grouped
def test_distributed_training_needs_no_search_for_unused_parameters(rank: int) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    config = MHMoEConfig(experts=4, rank=rank, gate="topk_renorm", balance=0.0)  # routers get zero gradients
    plain, model = attach(tiny_decoder(), config), attach(tiny_decoder(), config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for seed in range(3):
            ids = tokens(1, 3, seed=seed)
            for one in (plain, wrapped):
                one.zero_grad(set_to_none=True)
                one(input_ids=ids, labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    expected = adapter_parameters(plain)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_embedded_model_takes_adapters(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    ids = tokens(1, 5)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        attach(model, MHMoEConfig(heads=4, rank=3))
        assert torch.equal(model(input_ids=ids).logits, bare)
        assert not torch.equal(randomize(model, 0.05)(input_ids=ids).logits, bare)
    assert len(routers(model)) == 90
