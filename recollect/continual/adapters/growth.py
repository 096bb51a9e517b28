"""Growing experts with router-only replay.

For every task after the first: add K experts to every bank and K rows to every router; phase 1 trains the new experts
and the routers on the task with older experts frozen; phase 2 freezes all experts and trains the routers alone on
replayed data of every task seen.  Experts of one growth are a generation with tensors of its own, so freezing is
`requires_grad` and a frozen expert stays bit-identical under any optimiser.

A new generation is closed at first (its rows are absent from the softmax, as if at −∞): growing changes no logit.
Phase 1 opens it.  Source: the strongest small-model result of an independent study of TRACE (moe_lora 6).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from recollect.continual.adapters.attach import adapter_parameters, adapters, attached_config, routers
from recollect.errors import ConfigError


def grow(model: nn.Module, experts: int) -> None:
    """Add a closed generation of `experts` to every bank and router; no logit changes.

    Raises:
        ConfigError: the method has no routers, or `experts` is below 1.
        InputError: the model has no adapters.
    """
    if not routers(model):
        raise ConfigError(f"{attached_config(model).kind!r} has no router and cannot grow; use loramoe or mh_moe")
    add_generation(model, experts)


def add_generation(model: nn.Module, experts: int) -> None:
    """`grow` for any adapters: without a router the new experts of a bank, once opened, are added with weight 1.

    Raises:
        ConfigError: `experts` is below 1.
        InputError: the model has no adapters.
    """
    if experts < 1:
        raise ConfigError(f"a growth adds at least 1 expert, got {experts!r}")
    for module in [*routers(model).values(), *_banks(model)]:
        known = {id(parameter) for parameter in module.parameters()}
        module.grow(experts, device=next(module.parameters()).device)
        for parameter in module.parameters():
            if id(parameter) not in known:
                parameter.requires_grad_(False)  # until it is opened it is in no graph


def generations(model: nn.Module) -> tuple[list[int], int]:
    """Experts per slice of each generation, first one first, and how many generations are open."""
    bank = _banks(model)[0]
    return [part.shape[1] for part in bank.lora_A], bank.n_open


def open_experts(model: nn.Module, n_open: int) -> None:
    """Let the first `n_open` generations take part in routing.

    Raises:
        ConfigError: there are fewer.
    """
    sizes, _ = generations(model)
    if not 1 <= n_open <= len(sizes):
        raise ConfigError(f"there are {len(sizes)} generations of experts, cannot open {n_open!r}")
    for module in [*routers(model).values(), *_banks(model)]:
        module.n_open = n_open


def train_new_experts(model: nn.Module) -> list[nn.Parameter]:
    """Phase 1: open everything, train the newest generation and the routers, freeze older experts.

    Trained too is what is no expert and always on: the common adapter of SD-LoRA-MoE, whose past is frozen apart.
    Returns the trained parameters, for the optimiser.
    """
    open_experts(model, len(generations(model)[0]))
    _freeze(model)
    for bank in _banks(model):
        bank.lora_A[-1].requires_grad_(True)
        bank.lora_B[-1].requires_grad_(True)
    for module in adapters(model).values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
    return _trained_with_routers(model)


def train_routers_only(model: nn.Module) -> list[nn.Parameter]:
    """Phase 2: freeze every expert, train the routers. Returns the trained parameters."""
    _freeze(model)
    return _trained_with_routers(model)


def train_everything(model: nn.Module) -> list[nn.Parameter]:
    """Open and unfreeze every expert and router. Returns the trained parameters."""
    open_experts(model, len(generations(model)[0]))
    parameters = list(adapter_parameters(model).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _banks(model: nn.Module) -> list[Any]:
    return [module.bank for module in adapters(model).values()]


def _freeze(model: nn.Module) -> None:
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(False)


def _trained_with_routers(model: nn.Module) -> list[nn.Parameter]:
    for router in routers(model).values():
        router.requires_grad_(True)
    return [parameter for parameter in adapter_parameters(model).values() if parameter.requires_grad]
