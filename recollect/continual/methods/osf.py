"""OSF (adaptive SVD, by PEFT): an external baseline that tunes the weights themselves in their weakest directions.

Each target weight is split by SVD; its strongest singular directions are frozen, the rest are trained with gradients
projected off the frozen part.  After a task the result is merged and the next task splits it anew with a larger frozen
share: 0, 1/n, 2/n, … of the directions for n tasks (PEFT freezes at least one).  The decomposition, the projection and
the training forward are PEFT's; of the adapters' options only `target_modules` counts.  Far more weights are trained
than by low-rank adapters, so it does not belong in comparisons at a matched budget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.methods.protocol import ContinualMethod, Task
from recollect.errors import ConfigError


class OSF(ContinualMethod):
    """Orthogonal subspace fine-tuning of the target weights."""

    name = "osf"

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze everything; weights are split task by task.

        Raises:
            ConfigError: a target names no linear.
        """
        _check_targets(model, self.adapter.target_modules)
        return model.requires_grad_(False)

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Split every target weight; the frozen share grows with the task's number."""
        from peft import OSFConfig, inject_adapter_in_model

        if _layers(model):
            return
        share = task.index / task.n_tasks
        config = OSFConfig(target_modules=list(self.adapter.target_modules), effective_rank=share or 1)
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".osf_svd_params." in name)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Merge, so that the model is an ordinary one again."""
        for name, layer in _layers(model).items():
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
        del model.peft_config
        super().after_task(task, model)

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The target weights."""
        return {}, _targets(model, self.adapter.target_modules)

    @torch.no_grad()
    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, weight in _targets(model, self.adapter.target_modules).items():
            weight.copy_(tensors[name])


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.osf.layer import OSFLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, OSFLayer)}


def _targets(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights of the linears called one of `names`."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    }


def _check_targets(model: nn.Module, names: tuple[str, ...]) -> None:
    found = {name.rpartition(".")[2] for name in _targets(model, names)}
    absent = sorted(set(names) - found)
    if absent:
        raise ConfigError(f"no linear of {type(model).__name__} is called {absent[0]!r}")
