"""Layers of low-rank experts against PEFT, against each other and against what must not change."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.adapter_worlds import randomize, tiny_decoder, tokens
from torch import Tensor, nn

from recollect.continual.adapters import experts, routing
from recollect.continual.adapters.attach import adapters, attach, detach, routers
from recollect.continual.adapters.config import LoRAMoEConfig, MHMoEConfig, MoELoraConfig, PlainLoraConfig
from recollect.continual.adapters.growth import grow
from recollect.continual.adapters.mh_moe import route_numbers
from recollect.continual.adapters.routing import Routing, choose
from recollect.continual.adapters.wrapped import AdapterLinear

METHODS = {
    "lora": PlainLoraConfig(),
    "loramoe": LoRAMoEConfig(),
    "loramoe sparse": LoRAMoEConfig(experts=4, gate="topk_renorm", top_k=2),
    "loramoe beside": LoRAMoEConfig(placement="parallel_ffn"),
    "mh_moe": MHMoEConfig(),
    "mh_moe top-2": MHMoEConfig(top_k=2, dropout=0.1),
    "mh_moe shared": MHMoEConfig(placement="block_shared"),
    "mh_moe beside": MHMoEConfig(placement="parallel_ffn"),
    "mh_moe before o": MHMoEConfig(heads=2, placement="parallel_ffn", slice_source="pre_o"),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapters_change_no_bit_of_the_logits(family: str, method: str) -> None:
    model, ids = tiny_decoder(family), tokens()
    bare = model(input_ids=ids).logits
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attach(model, METHODS[method])
    assert torch.equal(model(input_ids=ids).logits, bare)
    assert torch.equal(model.train()(input_ids=ids).logits, bare)
    assert not torch.allclose(randomize(model.eval())(input_ids=ids).logits, bare)
    detach(model)
    assert torch.equal(model(input_ids=ids).logits, bare)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def _layer(config: MoELoraConfig, width: int = 24, out: int = 20, seed: int = 0) -> AdapterLinear:
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(width, out)
    for parameter in base.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    layer = AdapterLinear(base, config)
    for parameter in (*layer.bank.parameters(), *layer.own_router.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def _inputs(n: int = 40, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def _by_loops(layer: AdapterLinear, x: Tensor) -> Tensor:
    """The definition, one token, slice and expert at a time, in float64."""
    config, router = layer.config, layer.own_router
    down, up = (weight.double() for weight in layer.bank.weights())
    width = layer.in_features // config.heads
    rows = []
    for token in x.double():
        out = layer.base.weight.double() @ token + layer.base.bias.double()
        for j in range(config.heads):
            part = token[j * width : (j + 1) * width]
            logits = router.weight()[j].double() @ part
            p = logits.softmax(0)
            chosen = p.argsort(descending=True)[: config.active_experts].tolist()
            renormalised = logits[chosen].softmax(0)
            for place, e in enumerate(chosen):
                gate = renormalised[place] if config.gate == "topk_renorm" else p[e]
                out = out + gate * config.alpha / config.rank * (up[j, e].t() @ (down[j, e] @ part))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("gate", ["dense", "topk_full", "topk_renorm"])
@pytest.mark.parametrize(("heads", "top_k"), [(1, 1), (1, 3), (4, 1), (4, 2), (3, 4)])
def test_layer_equals_the_formula_written_as_loops(gate: str, heads: int, top_k: int) -> None:
    layer = _layer(MHMoEConfig(heads=heads, experts=4, top_k=top_k, gate=gate, rank=3, alpha=5.0))
    x = _inputs(16)
    torch.testing.assert_close(layer(x).double(), _by_loops(layer, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mistake", ["slices swapped", "gate forgotten", "scale forgotten", "winner not the largest"])
def test_formula_catches_planted_mistakes(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(MHMoEConfig(heads=4, experts=4, rank=3, alpha=5.0)), _inputs(16)
    expected = _by_loops(layer, x)
    if mistake == "slices swapped":
        product = experts.slice_products
        monkeypatch.setattr(experts, "slice_products", lambda tokens, weight: product(tokens.flip(1), weight))
    elif mistake == "gate forgotten":
        monkeypatch.setattr(Routing, "gates", lambda routing: torch.ones_like(routing.probabilities))
    elif mistake == "scale forgotten":
        layer.scaling = 1.0
    else:
        monkeypatch.setattr(routing, "choose", lambda logits, gate, top_k: choose(-logits, gate, top_k))
    assert (layer(x).double() - expected).abs().max() > 0.1


@pytest.mark.parametrize("gate", ["dense", "topk_full", "topk_renorm"])
def test_one_headed_mh_moe_is_loramoe(gate: str) -> None:
    flat = _layer(LoRAMoEConfig(experts=4, rank=3, gate=gate, top_k=2, dropout=0.0, alpha=6.0))
    headed = _layer(MHMoEConfig(heads=1, experts=4, rank=3, gate=gate, top_k=2, alpha=6.0))
    results = []
    for layer in (flat, headed):
        x = _inputs().requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in (*layer.bank.parameters(), *layer.own_router.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_single_renormalised_expert_is_pefts_lora(rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = MHMoEConfig(heads=1, experts=1, rank=4, alpha=10.0, gate="topk_renorm", rslora=rslora)
    ours, ids = attach(tiny_decoder(), config), tokens()
    randomize(ours)
    theirs = get_peft_model(
        tiny_decoder(),
        LoraConfig(r=4, lora_alpha=10, use_rslora=rslora, target_modules=["gate_proj", "up_proj", "down_proj"]),
    )
    for name, module in adapters(ours).items():
        pair = theirs.base_model.model.get_submodule(name)
        pair.lora_A["default"].weight.data.copy_(module.bank.lora_A[0][0, 0])
        pair.lora_B["default"].weight.data.copy_(module.bank.lora_B[0][0, 0].t())
    logits = [model(input_ids=ids).logits for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
    for one in logits:
        one.square().mean().backward()
    for name, module in adapters(ours).items():
        pair = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(module.bank.lora_A[0].grad[0, 0], pair.lora_A["default"].weight.grad)
        torch.testing.assert_close(module.bank.lora_B[0].grad[0, 0].t(), pair.lora_B["default"].weight.grad)


def test_plain_lora_equals_its_single_expert_form() -> None:
    plain = attach(tiny_decoder(), PlainLoraConfig(rank=4))
    routed = attach(tiny_decoder(), MHMoEConfig(heads=1, experts=1, rank=4, gate="topk_renorm"))
    assert not routers(plain)
    for name, module in adapters(randomize(plain)).items():
        adapters(routed)[name].bank.load_state_dict(module.bank.state_dict())
    torch.testing.assert_close(plain(input_ids=tokens()).logits, routed(input_ids=tokens()).logits)


def test_input_change_in_one_slice_stays_in_its_bank() -> None:
    config = MHMoEConfig(heads=4, experts=3, rank=2)
    layer, x = _layer(config), _inputs()
    changed = x.clone()
    changed[:, 6:12] += 1.0  # slice 1 of width 6
    before, after = layer.own_router(x), layer.own_router(changed)
    others = [0, 2, 3]
    assert torch.equal(before.logits[:, others], after.logits[:, others])
    assert not torch.allclose(before.logits[:, 1], after.logits[:, 1])
    for j in range(4):
        gates = [
            torch.zeros_like(routing.gates()).index_copy(1, torch.tensor([j]), routing.gates()[:, [j]])
            for routing in (before, after)
        ]
        outputs = [
            layer.bank(inputs, replace(one, weights=gate, indices=torch.arange(3).expand(len(x), 4, 3)), 1.0)
            for inputs, one, gate in ((x, before, gates[0]), (changed, after, gates[1]))
        ]
        assert torch.equal(*outputs) == (j != 1)


def test_expert_no_token_chose_has_exactly_zero_gradient() -> None:
    for heads, n_experts, rank in ((1, 4, 2), (3, 4, 2), (1, 4, 60), (3, 4, 60)):  # stacked, and grouped (wide)
        layer = _layer(MHMoEConfig(heads=heads, experts=n_experts, rank=rank))
        layer.own_router.rows[0].data[:, 2] = 0.0
        layer.own_router.rows[0].data[:, 2, 0] = -50.0
        x = _inputs().abs() + 0.1
        layer(x).square().sum().backward()
        usage = layer.last_routing.usage()
        assert (usage[:, 2] == 0).all()
        for parameter in (layer.bank.lora_A[0], layer.bank.lora_B[0]):
            used = parameter.grad.flatten(2).abs().amax(-1) > 0
            assert torch.equal(used, usage > 0)


@pytest.mark.parametrize("gate", ["dense", "topk_full", "topk_renorm"])
@pytest.mark.parametrize("rank", [2, 60])  # stacked, and grouped
@pytest.mark.parametrize("placement", ["per_linear", "block_shared", "parallel_ffn"])
def test_every_trained_parameter_is_in_the_graph_for_distributed_training(gate: str, rank: int, placement: str) -> None:
    model = attach(tiny_decoder(), MHMoEConfig(experts=4, rank=rank, gate=gate, balance=0.0, placement=placement))
    grow(model, 1)  # closed: trained by nobody yet
    ids = tokens(1, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert missing == []


def test_router_learns_from_the_task_under_topk_full_alone() -> None:
    gradients = {}
    for gate in ("topk_full", "topk_renorm"):
        layer = _layer(MHMoEConfig(heads=2, experts=4, gate=gate))
        layer(_inputs()).square().sum().backward()
        gradients[gate] = layer.own_router.rows[0].grad
    assert gradients["topk_full"].abs().max() > 0
    assert gradients["topk_renorm"].abs().max() == 0


def test_block_shared_linears_use_one_route() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(placement="block_shared")))
    model(input_ids=tokens())
    found = adapters(model)
    layer = [found[f"model.layers.0.mlp.{name}"].last_routing for name in ("gate_proj", "up_proj", "down_proj")]
    assert layer[0] is layer[1] is layer[2]
    assert len(routers(model)) == 2
    per_linear = randomize(attach(tiny_decoder(), MHMoEConfig()))
    assert len(routers(per_linear)) == 6


def test_slices_before_the_output_projection_are_attention_head_groups() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(heads=2, placement="parallel_ffn", slice_source="pre_o")))
    seen = {}
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(input_ids=tokens())
    ffn = adapters(model)["model.layers.0.mlp"]
    heads = seen["x"].reshape(-1, 2, 16)  # 4 heads of width 8 in 2 key-value groups
    expected = torch.einsum("nhc,hec->nhe", heads, ffn.own_router.weight())
    torch.testing.assert_close(ffn.last_routing.logits, expected)


def test_bank_beside_the_ffn_is_slice_low_rank_silu() -> None:
    model = randomize(attach(tiny_decoder(), MHMoEConfig(heads=2, experts=2, placement="parallel_ffn", gate="dense")))
    ffn = adapters(model)["model.layers.1.mlp"]
    h = _inputs(9, 32)
    down, up = ffn.bank.weights()
    hidden = nn.functional.silu(torch.einsum("nhc,herc->nher", h.reshape(9, 2, 16), down))
    p = torch.einsum("nhc,hec->nhe", h.reshape(9, 2, 16), ffn.own_router.weight()).softmax(-1)
    expected = ffn.base(h) + ffn.scaling * torch.einsum("nhe,nher,hero->no", p, hidden, up)
    torch.testing.assert_close(ffn(h), expected, rtol=1e-5, atol=1e-5)


def test_route_numbers_count_e_to_the_h_routes() -> None:
    layer = _layer(MHMoEConfig(heads=3, experts=4))
    numbers = route_numbers(layer.own_router(_inputs(500)))
    indices = layer.last_routing.indices[..., 0]
    assert torch.equal(numbers, indices[:, 0] + 4 * indices[:, 1] + 16 * indices[:, 2])
    assert numbers.min() >= 0
    assert numbers.max() < 4**3


def test_router_stays_in_float32_beside_a_bfloat16_base() -> None:
    model = attach(tiny_decoder().to(torch.bfloat16), MHMoEConfig())
    randomize(model)
    out = model(input_ids=tokens())
    assert out.logits.dtype == torch.bfloat16
    for router in routers(model).values():
        assert router.last_routing.logits.dtype == torch.float32
        assert router.rows[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = attach(tiny_decoder(), MHMoEConfig())
        under_autocast(input_ids=tokens())
    assert next(iter(routers(under_autocast).values())).last_routing.logits.dtype == torch.float32


def test_dropout_reaches_experts_but_not_routers() -> None:
    layer = _layer(MHMoEConfig(heads=2, dropout=0.5)).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, logits = layer(_inputs()), layer.last_routing.logits
        second = layer(_inputs())
    assert torch.equal(logits, layer.last_routing.logits)
    assert not torch.allclose(first, second)
    twin = copy.deepcopy(layer).eval()
    assert torch.equal(twin(_inputs()), twin(_inputs()))
