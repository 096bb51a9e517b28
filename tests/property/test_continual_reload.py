"""Adapters of every kind, in every state training leaves them in, come back from a folder as they were: the same
logits, the same frozen parts, and the same next step of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recollect.continual.adapters.attach import adapter_parameters, attach, attached_config
from recollect.continual.adapters.config import (
    CONFIGS,
    HydraLoraConfig,
    LoRAMoEConfig,
    MHMoEConfig,
    MixLoraConfig,
    PlainLoraConfig,
    SAPTAdapterConfig,
    SDLoraMoEConfig,
    TaskGatedConfig,
)
from recollect.continual.adapters.growth import grow, train_new_experts, train_routers_only
from recollect.continual.adapters.saving import from_pretrained, save_pretrained
from recollect.continual.adapters.sd_lora_moe import absorb_shared
from recollect.continual.adapters.weighed import ATTENTION, GATES
from recollect.continual.methods.banks import freeze_older, grow_banks
from tests.support.adapter_worlds import randomize, tiny_decoder
from tests.support.method_worlds import same, weights
from tests.support.training_steps import flags, logits, step

SD = {"rank": 2, "common_rank": 2, "common_rank_max": 9, "absorb_rank": 1, "refresh_every": 2, "dropout": 0.1}


def grown(model: nn.Module) -> None:
    grow(model, 1)
    train_new_experts(model)


def closed(model: nn.Module) -> None:
    grow(model, 2)


def routers_alone(model: nn.Module) -> None:
    grown(model)
    train_routers_only(model)


def absorbed(model: nn.Module) -> None:
    step(model, 3)
    absorb_shared(model)


def absorbed_and_grown(model: nn.Module) -> None:
    absorbed(model)
    grown(model)
    step(model, 3)


def two_pairs(model: nn.Module) -> None:
    grow_banks(model, 1)
    freeze_older(model)


def two_tasks(model: nn.Module) -> None:
    gates = model.get_submodule(GATES)
    for task in range(2):
        gates.add_task()
        gates.answer_as(task)
    gates.tasks[0].requires_grad_(False)


def two_blocks(model: nn.Module) -> None:
    two_pairs(model)
    attention = model.get_submodule(ATTENTION)
    attention.add_key()
    attention.keys[0].requires_grad_(False)


STATES = {
    "lora": (PlainLoraConfig(rank=2, dropout=0.1), None),
    "lora, a pair per task": (PlainLoraConfig(rank=2), two_pairs),
    "loramoe": (LoRAMoEConfig(rank=2, experts=3), None),
    "loramoe sparse, grown": (LoRAMoEConfig(rank=2, experts=2, gate="topk_full"), grown),
    "mh_moe": (MHMoEConfig(rank=2, top_k=2), None),
    "mh_moe shared, grown and closed": (MHMoEConfig(rank=2, placement="block_shared"), closed),
    "mh_moe beside, routers alone": (MHMoEConfig(rank=2, placement="parallel_ffn"), routers_alone),
    "mh_moe before the output projection": (
        MHMoEConfig(rank=2, heads=2, placement="parallel_ffn", slice_source="pre_o"),
        grown,
    ),
    "sd_lora_moe": (SDLoraMoEConfig(**SD), None),
    "sd_lora_moe absorbed": (SDLoraMoEConfig(**SD, heads=2), absorbed),
    "sd_lora_moe absorbed and grown": (SDLoraMoEConfig(**SD), absorbed_and_grown),
    "hydra_lora": (HydraLoraConfig(rank=2), None),
    "mixlora": (MixLoraConfig(rank=2, experts=3), None),
    "moelora": (TaskGatedConfig(rank=2, experts=3), two_tasks),
    "sapt": (SAPTAdapterConfig(rank=2, query_width=8), two_blocks),
}


def assert_alike(model: nn.Module, again: nn.Module) -> None:
    assert torch.equal(logits(model), logits(again))
    assert flags(model) == flags(again)
    before = weights(again)
    step(model)
    step(again)
    assert same(weights(model), weights(again))
    assert not same(before, weights(again))
    assert torch.equal(logits(model), logits(again))


def test_every_kind_of_adapter_is_among_the_states() -> None:
    assert {config.kind for config, _ in STATES.values()} == set(CONFIGS)


@pytest.mark.parametrize("name", STATES)
def test_reloaded_adapters_are_the_saved_ones_and_train_on_alike(name: str, tmp_path) -> None:
    config, change = STATES[name]
    model = randomize(attach(tiny_decoder(), config))
    step(model, 2)
    if change is not None:
        change(model)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tiny_decoder(), tmp_path)
    assert attached_config(again) == config
    assert adapter_parameters(model).keys() == adapter_parameters(again).keys()
    assert_alike(model, again)


def test_a_folder_of_another_form_is_refused(tmp_path) -> None:
    from recollect.errors import InputError
    from recollect.io import read_json, write_json

    save_pretrained(attach(tiny_decoder(), PlainLoraConfig()), tmp_path)
    path = tmp_path / "recollect_adapter.json"
    write_json(path, {**read_json(path), "format": 1})
    with pytest.raises(InputError, match="has format 1; this version reads 2"):
        from_pretrained(tiny_decoder(), tmp_path)
