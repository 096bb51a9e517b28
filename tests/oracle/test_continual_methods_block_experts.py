"""HydraLoRA and MixLoRA against their formulas, token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from recollect.continual.adapters.attach import adapter_parameters, adapters, attach, detach, routers
from recollect.continual.adapters.config import HydraLoraConfig, MixLoraConfig
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.errors import ConfigError
from tests.support.adapter_worlds import randomize, tiny_decoder, tokens

CONFIGS = {
    "hydra": HydraLoraConfig(rank=2, experts=3),
    "mixlora": MixLoraConfig(rank=2, experts=4),
    "mixlora-all": MixLoraConfig(rank=2, experts=2),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_start_is_the_bare_model_bit_for_bit_and_so_is_the_end(name):
    bare = tiny_decoder()
    expected = bare(tokens()).logits
    model = attach(copy.deepcopy(bare), CONFIGS[name])
    assert torch.equal(model(tokens()).logits, expected)
    randomize(model)
    assert not torch.equal(model(tokens()).logits, expected)
    assert torch.equal(detach(model)(tokens()).logits, expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_saved_and_reloaded_model_gives_equal_logits(name, tmp_path):
    model = randomize(attach(tiny_decoder(), CONFIGS[name]))
    save_pretrained(model, tmp_path)
    again = from_pretrained(tiny_decoder(), tmp_path)
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, again(tokens()).logits)


def test_hydra_lora_is_a_shared_a_under_routed_bs():
    model = randomize(attach(tiny_decoder(num_hidden_layers=1), CONFIGS["hydra"]))
    for module in adapters(model).values():
        x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(1))
        down, up = module.bank.lora_A[0], module.bank.lora_B[0]
        assert down.shape == (1, 1, 2, module.in_features)
        gates = (x @ module.router.weight()[0].t()).softmax(-1)
        parts = torch.stack([x @ down[0, 0].t() @ up[0, expert] for expert in range(3)], dim=1)
        expected = module.base(x) + module.scaling * (gates[..., None] * parts).sum(1)
        assert torch.allclose(module(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mixlora", "mixlora-all"])
def test_mixlora_mixes_whole_ffns_with_equal_gradients(name):
    model = randomize(attach(tiny_decoder(num_hidden_layers=1), CONFIGS[name]), scale=0.1)
    generator = torch.Generator().manual_seed(1)
    ffn = model.model.layers[0].mlp
    (router,) = routers(model).values()
    h = torch.randn(2, 5, 32, generator=generator)

    def linear(part, expert, row):
        update = row @ part.bank.lora_A[0][0, expert].t() @ part.bank.lora_B[0][0, expert]
        return part.base(row) + part.scaling * update

    rows = []
    for row in h.flatten(0, 1):
        logits = router.weight()[0] @ row
        values, chosen = logits.topk(2)
        mixture = 0
        for weight, expert in zip(values.softmax(-1), chosen.tolist(), strict=True):
            hidden = functional.silu(linear(ffn.gate_proj, expert, row)) * linear(ffn.up_proj, expert, row)
            mixture = mixture + weight * linear(ffn.down_proj, expert, hidden)
        rows.append(mixture)
    expected = torch.stack(rows).view(2, 5, 32)
    found = ffn(h)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    parameters = list(adapter_parameters(model).values())
    target = torch.randn(2, 5, 32, generator=generator)
    ours = torch.autograd.grad((found * target).sum(), parameters)
    reference = torch.autograd.grad((expected * target).sum(), parameters)
    for one, other in zip(ours, reference, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_illegal_combinations_are_refused():
    with pytest.raises(ConfigError, match="heads 2"):
        HydraLoraConfig(heads=2)
    with pytest.raises(ConfigError, match="per_linear"):
        MixLoraConfig(placement="per_linear")
    with pytest.raises(ConfigError, match="down_proj"):
        MixLoraConfig(target_modules=("gate_proj",))
