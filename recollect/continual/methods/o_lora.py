"""O-LoRA (arXiv 2310.14152): task t trains a pair of its own, kept orthogonal to the frozen earlier ones.

    y = W0·x + Σ_{i≤t} s·B_i·A_i·x
    L = CE + λ1·Σ_layers Σ_{i<t} Σ|A_i·A_tᵀ| + λ2·Σ_layers (‖A_t‖_F + ‖B_t‖_F)

The released code has λ1 = 0.5, λ2 = 0, rank 8, alpha 32, dropout 0.1 on the attention's q and v; on feed-forward
linears it behaves differently.  The pairs are generations of one bank, whose product is that of the pairs concatenated
along the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.banks import banks, freeze_older, generations_of, grow_banks
from recollect.continual.methods.config import OLoraConfig
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task
from recollect.errors import ConfigError


class OLora(ContinualMethod):
    """A pair per task, orthogonal to the earlier ones.

    Raises:
        ConfigError: the adapters are not plain LoRA pairs.
    """

    name = "o-lora"

    def __init__(self, config: OLoraConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        require_pairs(self.name, adapter)
        self.options = config

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's pair and freeze the earlier ones."""
        start_pair(model, task)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy plus both penalties."""
        value = super().loss(model, batch)
        if self.options.orthogonality and len(generations_of(model)) > 1:
            value = value + self.options.orthogonality * orthogonality_penalty(model)
        if self.options.size:
            value = value + self.options.size * size_penalty(model)
        return value


def require_pairs(method: str, adapter: MoELoraConfig) -> None:
    """Raise `ConfigError` unless the adapters are plain LoRA pairs."""
    if adapter.kind != "lora":
        raise ConfigError(f"{method} keeps one LoRA pair per task and needs plain LoRA adapters, got {adapter.kind!r}")


def start_pair(model: nn.Module, task: Task) -> None:
    """The pair of a task: the first is there from the start, later ones are added; earlier ones are frozen."""
    if len(generations_of(model)) == task.index:
        grow_banks(model, 1)
    freeze_older(model)


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Σ_layers Σ_{i<t} Σ|A_i·A_tᵀ|; 0 exactly when the newest rows are orthogonal to all earlier ones."""
    parts = []
    for bank in banks(model).values():
        newest = bank.lora_A[-1].flatten(0, 2)  # (r, d)
        earlier = torch.cat([part.flatten(0, 2) for part in list(bank.lora_A)[:-1]])  # (R, d)
        parts.append((earlier @ newest.t()).abs().sum())
    return torch.stack(parts).sum()


def size_penalty(model: nn.Module) -> Tensor:
    """Σ_layers ‖A_t‖_F + ‖B_t‖_F of the newest pair."""
    return torch.stack([bank.lora_A[-1].norm() + bank.lora_B[-1].norm() for bank in banks(model).values()]).sum()
