"""What cannot work is refused before anything is changed, with the layer, the value and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.adapter_worlds import randomize, tiny_decoder, tokens
from torch import nn

from recollect.continual.adapters.attach import (
    adapter_state_dict,
    attach,
    attached,
    detach,
    load_adapter_state_dict,
    routing_loss,
    token_mask,
)
from recollect.continual.adapters.budget import match_budget
from recollect.continual.adapters.config import (
    LoRAMoEConfig,
    MHMoEConfig,
    MoELoraConfig,
    PlainLoraConfig,
    SDLoraMoEConfig,
    config_from_dict,
    config_to_dict,
)
from recollect.continual.adapters.export import Route, RouteObserver, chosen_route, export_route, forced_route
from recollect.continual.adapters.growth import grow, open_experts
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.continual.adapters.usage_gate import UsageGate
from recollect.errors import ConfigError, InputError, UnknownName


@pytest.mark.parametrize(("change", "message"), [
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"experts": 2, "top_k": 3}, "top_k must not exceed the 2 experts, got 3"),
    ({"alpha": 0.0}, "alpha must be a positive number"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"balance": -0.1}, "balance must be a number not below 0"),
    ({"lbc_delta": 1.0}, "lbc_delta must be in"),
    ({"gate": "soft"}, "gate must be one of dense, topk_full, topk_renorm, got 'soft'"),
    ({"placement": "everywhere"}, "placement must be one of"),
    ({"slice_source": "pre_o"}, "needs placement 'parallel_ffn', got 'per_linear'"),
    ({"target_modules": ()}, "target_modules is empty"),
])  # fmt: skip
def test_illegal_options_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MHMoEConfig(**change)


def test_options_of_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads must be 1, got 4"):
        LoRAMoEConfig(heads=4)
    with pytest.raises(ConfigError, match="one expert, one slice and no router"):
        PlainLoraConfig(experts=2)
    with pytest.raises(ConfigError, match="plain LoRA has no router for update_gate: it must be 'none', got 'usage'"):
        PlainLoraConfig(update_gate="usage")
    with pytest.raises(ConfigError, match="common_rank_max must be at least common_rank 8"):
        SDLoraMoEConfig(common_rank_max=4)
    with pytest.raises(ConfigError, match="placement must not be 'parallel_ffn'"):
        SDLoraMoEConfig(placement="parallel_ffn")
    with pytest.raises(UnknownName, match="unknown adapter 'dora'; known: hydra_lora, lora, loramoe, mh_moe"):
        config_from_dict("dora", {}, "here")
    with pytest.raises(ConfigError, match="unknown key 'rnk' in here"):
        config_from_dict("lora", {"rnk": 1}, "here")


@pytest.mark.parametrize("config", [PlainLoraConfig(), LoRAMoEConfig(lbc=0.1), MHMoEConfig(heads=2), SDLoraMoEConfig()])
def test_options_survive_json(config: MoELoraConfig) -> None:
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(config.kind, values, "here") == config


@pytest.mark.parametrize(("config", "layer"), [
    (MHMoEConfig(heads=3),
     "model.layers.0.mlp.gate_proj has inputs of width 32, which 3 heads do not divide; use one of 1, 2, 4"),
    (MHMoEConfig(heads=32), "model.layers.0.mlp.down_proj has inputs of width 48"),
    (MHMoEConfig(heads=3, placement="parallel_ffn"), "model.layers.0.mlp has inputs of width 32"),
    (MHMoEConfig(heads=4, placement="parallel_ffn", slice_source="pre_o"),
     "model.layers.0.self_attn.o_proj has 4 attention heads in 2 key-value groups, which 4 slices would cut"),
    (SDLoraMoEConfig(heads=2, common_rank_max=20), "common_rank_max must be below 16 in model.layers.0.mlp.gate_proj"),
    (MHMoEConfig(target_modules=("gate_proj", "w1")), "no linear of LlamaForCausalLM is called 'w1'"),
])  # fmt: skip
def test_widths_and_names_are_refused_and_leave_the_model_alone(config: MoELoraConfig, layer: str) -> None:
    model = tiny_decoder()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=layer):
        attach(model, config)
    assert [name for name, _ in model.named_modules()] == before
    assert attached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fused_native_experts_are_refused_with_the_parameter_named() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj is a fused 3-D parameter of 4"
    ):
        attach(model, MHMoEConfig())
    attach(model, MHMoEConfig(target_modules=("q_proj", "v_proj")))
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


def test_second_attachment_and_missing_adapters_are_refused() -> None:
    model = tiny_decoder()
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters"):
        detach(model)
    attach(model, PlainLoraConfig())
    with pytest.raises(ConfigError, match="has adapters already"):
        attach(model, PlainLoraConfig())
    with pytest.raises(ConfigError, match="'lora' has no router and cannot grow"):
        grow(model, 1)
    with pytest.raises(ConfigError, match="plain LoRA has none"):
        UsageGate(model)


def test_growth_and_usage_say_what_is_missing() -> None:
    model = attach(tiny_decoder(), MHMoEConfig())
    with pytest.raises(ConfigError, match="at least 1 expert, got 0"):
        grow(model, 0)
    with pytest.raises(ConfigError, match="there are 1 generations"):
        open_experts(model, 2)
    gate = UsageGate(model)
    with pytest.raises(InputError, match="has seen no tokens"):
        gate.observe()
    model(input_ids=tokens())
    gate.observe()
    gate.finish()
    with pytest.raises(InputError, match="usage on the new task is unknown"):
        gate.start()


def test_losses_say_what_they_need() -> None:
    model, ids = attach(tiny_decoder(), LoRAMoEConfig(lbc=0.1)), tokens()
    model(input_ids=ids)
    with pytest.raises(ConfigError, match="needs sample_types"):
        routing_loss(model)
    with pytest.raises(InputError, match="one type per sample"):
        routing_loss(model, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="must be 0 or 1"):
        routing_loss(model, torch.tensor([0, 1, 2]))
    with token_mask(model, torch.ones(2, 2)), pytest.raises(InputError, match="does not fit tokens of shape"):
        model(input_ids=ids)


def test_routing_losses_without_gradient_are_refused() -> None:
    model = attach(tiny_decoder().train(), MHMoEConfig())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(input_ids=tokens())
    with pytest.raises(ConfigError, match="use non-reentrant gradient checkpointing"):
        routing_loss(model)


def test_adapters_of_another_base_are_refused_naming_both(tmp_path: Path) -> None:
    model = tiny_decoder()
    model.config._name_or_path = "models/first"
    save_pretrained(randomize(attach(model, MHMoEConfig())), tmp_path)
    other = tiny_decoder(seed=1)
    other.config._name_or_path = "models/second"
    with pytest.raises(InputError, match=r"saved for the base 'first' \(.*this model is 'second'"):
        from_pretrained(other, tmp_path)
    assert attached(other) is None


@pytest.mark.parametrize(
    "damage",
    ["no json", "no weights", "torn weights", "foreign json", "format", "base", "kind", "generations", "no generation"],
)
def test_damaged_folders_are_refused_naming_the_file(damage: str, tmp_path: Path) -> None:
    save_pretrained(attach(tiny_decoder(), MHMoEConfig()), tmp_path)
    described, weights = tmp_path / "recollect_adapter.json", tmp_path / "recollect_adapter.safetensors"
    if damage == "no json":
        described.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "foreign json":
        described.write_text("{}")
    else:
        key, value = {
            "format": ("format", 99),
            "base": ("base", None),
            "kind": ("kind", []),
            "generations": ("generations", 3),
            "no generation": ("generations", []),
        }[damage]
        described.write_text(json.dumps(json.loads(described.read_text()) | {key: value}))
    named = weights if "weights" in damage else described
    model = tiny_decoder()
    with pytest.raises(InputError, match=named.name):
        from_pretrained(model, tmp_path)
    assert attached(model) is None


@pytest.mark.parametrize("change", [{"generations": [4, 4]}, {"open_generations": 7}, {"options": {"rank": 3}}])
def test_a_folder_that_does_not_fit_itself_leaves_the_model_bare(change: dict, tmp_path: Path) -> None:
    save_pretrained(attach(tiny_decoder(), MHMoEConfig()), tmp_path)
    described = tmp_path / "recollect_adapter.json"
    saved = json.loads(described.read_text())
    change = {key: {**saved[key], **value} if key == "options" else value for key, value in change.items()}
    described.write_text(json.dumps({**saved, **change}))
    model = tiny_decoder()
    with pytest.raises((InputError, ConfigError)):
        from_pretrained(model, tmp_path)
    assert attached(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_states_that_do_not_fit_are_refused_naming_the_tensor() -> None:
    model = attach(tiny_decoder(), MHMoEConfig())
    state = adapter_state_dict(model)
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.gate_proj.bank.lora_A.0' has shape"):
        load_adapter_state_dict(model, adapter_state_dict(attach(tiny_decoder(), MHMoEConfig(rank=3))))
    with pytest.raises(InputError, match="is missing in the saved adapters"):
        load_adapter_state_dict(model, dict(list(state.items())[1:]))
    with pytest.raises(InputError, match="'extra' is unknown to the model"):
        load_adapter_state_dict(model, state | {"extra": torch.zeros(1)})


def test_routes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = attach(tiny_decoder(), MHMoEConfig())
    with pytest.raises(ConfigError, match=r"must name 4 experts in 0\.\.3, got \[0, 1, 2, 7\]"):
        chosen_route(model, [0, 1, 2, 7])
    with pytest.raises(InputError, match="the route has gates None for"), forced_route(model, Route({})):
        pass
    with pytest.raises(InputError, match="no token was observed"):
        RouteObserver(model).route()
    beside = attach(tiny_decoder(), MHMoEConfig(placement="parallel_ffn"))
    with pytest.raises(ConfigError, match="no LoRA form"):
        export_route(beside, chosen_route(beside, [0, 0, 0, 0]), tmp_path)


def test_budgets_that_cannot_match_are_refused_with_the_nearest() -> None:
    dense = LoRAMoEConfig(rank=8)
    with pytest.raises(ConfigError, match=r"no rank matches within 5%: nearest are ranks .* activated"):
        match_budget(dense, MHMoEConfig(), [(1024, 3072)])
    small = LoRAMoEConfig(experts=4, rank=2, gate="topk_full")
    with pytest.raises(ConfigError, match="no rank matches"):
        match_budget(small, MHMoEConfig(), [(1024, 3072)], largest_rank=2)


def test_placement_beside_needs_a_transformers_decoder() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = nn.Linear(8, 8)

    with pytest.raises(ConfigError, match="needs a transformers decoder, got Plain"):
        attach(Plain(), MHMoEConfig(placement="parallel_ffn", target_modules=("gate_proj",)))
