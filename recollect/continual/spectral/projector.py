"""What must happen around every optimiser step of a model with spectrally decoupled layers.

projector = SpectralProjector(model)
train(model, ..., before_step=projector.before_step, after_step=projector.after_step)   # recollect.loop
projector.attach(optimizer)                                                             # any other loop
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.errors import ConfigError


@runtime_checkable
class StepAware(Protocol):
    """A module that keeps an invariant the optimiser does not know of."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...

    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...


class SpectralProjector:
    """Calls `before_step` and `after_step` of every module that has them, in the order of the modules.

    State lives in the modules' parameters and buffers, so checkpoints of the model suffice to resume.

    Raises:
        ConfigError: no module of the model needs it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if isinstance(module, StepAware)]
        if not self.modules:
            raise ConfigError("the model has no spectrally decoupled layer; convert or attach one first")

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called when gradients are complete, before `optimizer.step()`."""
        for module in self.modules:
            module.before_step(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called after `optimizer.step()`."""
        for module in self.modules:
            module.after_step(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `optimizer.step()` itself call both."""

        def before(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self.before_step(stepped)

        def after(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self.after_step(stepped)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def parameter_groups(model: nn.Module, weight_decay: float, common_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimiser: common matrices decay by `common_weight_decay`, every other trained weight by
    `weight_decay`.  Decay of a unique matrix stays in its complement; decay of a common one shrinks what all experts
    share, hence the default (spec 9 [our design])."""
    common = [
        module.common
        for module in model.modules()
        if isinstance(module, SpectralDecoupledLinear) and module.common.requires_grad
    ]
    known = {id(parameter) for parameter in common}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in known]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": common, "weight_decay": common_weight_decay},
    ]
    return [group for group in groups if group["params"]]
