"""What a user can get wrong with spectral splitting is refused with the thing, the value and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recollect.continual.spectral.convert import convert_moe, expert_stacks, merge_moe
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.projections import split_experts
from recollect.continual.spectral.projector import SpectralProjector
from recollect.continual.spectral.report import spectral_report
from recollect.errors import ConfigError, InputError
from tests.support.tiny_moe import tiny_moe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"common_rank": 8}, r"below min\(out, in\) = 8 .* got 8"),
        ({"common_rank": -1}, "got -1"),
        ({"project": "both "}, "project must be one of update, grad, both, got 'both '"),
        ({"realign": "forget"}, "realign must be one of absorb_mean, keep, drop"),
        ({"common_reduce": "mean"}, "common_reduce must be one of sum, usage_mean"),
        ({"common_reduce": "usage_mean", "forward_common": "shared"}, "needs each expert's gradient"),
        ({"refresh_every": -1}, "not negative"),
    ],
)
def test_layer_refuses_illegal_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpectralDecoupledLinear(3, 8, 12, **({"common_rank": 2} | options))


def test_usage_weights_must_fit_the_experts() -> None:
    experts = torch.randn(3, 8, 12)
    for usage in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0, 3.0]), torch.zeros(3)):
        with pytest.raises(ConfigError, match="3 non-negative numbers with a positive sum"):
            split_experts(experts, 2, usage)
    with pytest.raises(ConfigError, match=r"stack \(E, m, n\), got shape \(8, 12\)"):
        split_experts(experts[0], 2)


def test_model_without_experts_is_refused() -> None:
    with pytest.raises(InputError, match="no mixture-of-experts block"):
        convert_moe(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(InputError, match="nothing to merge"):
        merge_moe(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="no spectrally decoupled layer"):
        SpectralProjector(nn.Linear(4, 4))


def test_experts_of_another_layout_are_refused() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = GptOssForCausalLM(config)
    with pytest.raises(InputError, match="without biases"):
        convert_moe(model, 2)
    with pytest.raises(InputError, match="does not hold experts as stacks"):
        expert_stacks(model.model.layers[0].mlp.experts)


def test_refused_conversion_leaves_the_model_as_it_was() -> None:
    model = tiny_moe("qwen3_moe")
    names = set(model.state_dict())
    with pytest.raises(ConfigError, match=r"below min\(out, in\) = 16 in model.layers.0.mlp.experts, got 16"):
        convert_moe(model, 16)
    with pytest.raises(ConfigError, match="give perplexity="):
        convert_moe(model, 2, lossless=False)
    with pytest.raises(ConfigError, match="give perplexity="):
        convert_moe(model, 2, gate_input="complement")
    with pytest.raises(InputError, match=r"usage names 'model.layers.7.mlp.experts'"):
        convert_moe(model, 2, usage={"model.layers.7.mlp.experts": torch.ones(6)})
    with pytest.raises(ConfigError, match="project must be one of"):
        convert_moe(model, 2, project="never")
    with pytest.raises(ConfigError, match="6 non-negative numbers"):
        convert_moe(model, 2, usage={"model.layers.1.mlp.experts": torch.ones(5)})
    assert set(model.state_dict()) == names
    model(torch.arange(6)[None])


def test_step_without_its_beginning_is_refused() -> None:
    layer = SpectralDecoupledLinear(3, 8, 12, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="call before_step before"):
        layer.after_step(optimizer)


def test_report_refuses_what_it_cannot_read() -> None:
    with pytest.raises(InputError, match="Linear does not hold experts"):
        spectral_report(nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"tower must be a stack of matrices \(E, m, n\), got shape \(4, 5\)"):
        spectral_report({"tower": torch.randn(4, 5)})
    with pytest.raises(ConfigError, match="k must be between 1 and 4"):
        spectral_report({"tower": torch.randn(2, 4, 5)}, ks=(9,))
    with pytest.raises(ConfigError, match="not which experts were selected"):
        spectral_report(
            {"tower": torch.randn(2, 4, 5)}, torch.randn(6, 5), labels=torch.zeros(6, dtype=torch.int64), ks=(1,)
        )


def test_no_tokens_give_no_outputs() -> None:
    layer = SpectralDecoupledLinear(3, 8, 12, 2)
    nothing = layer(torch.zeros(0, 12), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert nothing.shape == (0, 8)
