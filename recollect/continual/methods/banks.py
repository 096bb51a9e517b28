"""Banks of experts without a router that grow task by task: O-LoRA and InfLoRA keep a pair per task.

A bank without a router adds every expert with weight 1, so a generation per task is y = W0·x + Σ_i s·B_i·A_i·x.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from recollect.continual.adapters.attach import adapters
from recollect.continual.adapters.growth import add_generation, open_experts


def banks(model: nn.Module) -> dict[str, Any]:
    """The expert bank of every wrapped module, by its name."""
    return {name: module.bank for name, module in adapters(model).items()}


def generations_of(model: nn.Module) -> list[int]:
    """Experts per slice of each generation, first one first."""
    return [part.shape[1] for part in next(iter(banks(model).values())).lora_A]


def grow_banks(model: nn.Module, experts: int) -> None:
    """Add an open generation of `experts` to every bank (and router, where there is one)."""
    add_generation(model, experts)
    open_experts(model, len(generations_of(model)))


def grow_banks_to(model: nn.Module, generations: list[int]) -> None:
    """Grow a fresh model's banks to the given generations, all open."""
    for experts in generations[len(generations_of(model)) :]:
        grow_banks(model, experts)


def freeze_older(model: nn.Module) -> None:
    """Train the newest generation of every bank alone."""
    for bank in banks(model).values():
        for number in range(len(bank.lora_A)):
            newest = number == len(bank.lora_A) - 1
            bank.lora_A[number].requires_grad_(newest)
            bank.lora_B[number].requires_grad_(newest)
