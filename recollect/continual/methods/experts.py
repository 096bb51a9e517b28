"""Routed experts through a sequence of tasks: LoRAMoE, MH-MoE and SD-LoRA-MoE, with what their adapters' options ask.

grow=K: from the second task on, K new experts per bank and the routers are trained and older experts frozen.
router_replay=ρ: after a task, all experts are frozen and the routers alone are trained on a share ρ of every task seen,
the present one included.  update_gate="usage": see `adapters.usage_gate`.  SD-LoRA-MoE keeps its split after every step
and absorbs what the experts share after every task, before a router replay: what is frozen there stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, routers
from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.growth import grow, train_everything, train_new_experts, train_routers_only
from recollect.continual.adapters.sd_lora_moe import SDLoraMoELinear, absorb_shared
from recollect.continual.adapters.usage_gate import UsageGate
from recollect.continual.methods.banks import generations_of
from recollect.continual.methods.config import ExpertsConfig
from recollect.continual.methods.objective import Batch, pass_over
from recollect.continual.methods.protocol import ContinualMethod, Phase, Task
from recollect.continual.methods.replay import kept_batches, shuffled
from recollect.continual.spectral.projector import StepAware


class RoutedExperts(ContinualMethod):
    """Routed low-rank experts; the recipe is the adapters' options."""

    name = "experts"

    def __init__(self, config: ExpertsConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.options = config
        self.gate: UsageGate | None = None
        self.gating = False
        self._has_absorbed = False
        self._facts: dict[str, Any] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Attach; the usage gate counts from here on."""
        model = super().prepare(model)
        if self.adapter.update_gate == "usage":
            self.gate = UsageGate(model)
        return model

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Grow, decide what is trained, and measure the new task's usage where updates are gated."""
        self._facts = {}
        self._forget_gates(model)
        if self.adapter.grow and task.index:
            if len(generations_of(model)) == task.index:
                grow(model, self.adapter.grow)
            train_new_experts(model)
        else:
            train_everything(model)
        if self.gate is not None:
            self._observe(task, model)
            self.gate.start(freeze_routers=not self.adapter.router_replay)
            self._facts["gated_share"] = self.gate.gated_share()

    def phases(self, task: Task, model: nn.Module) -> Iterator[Phase]:
        """The task, then the routers alone on replayed data of every task seen."""
        self.gating = self.gate is not None
        self._has_absorbed = False
        yield Phase("train", task.batches, task.epochs)
        self.gating = False
        if self.adapter.router_replay and task.index:
            self._absorb(model)
            train_routers_only(model)
            kept = kept_batches(task.memory, range(task.index + 1), self.adapter.router_replay, present=task.index)
            seed, epochs = self.options.seed, self.options.replay_epochs
            yield Phase("routers", lambda epoch: shuffled(kept, seed, task.index, epoch), epochs)

    def routing_loss(self, model: nn.Module, batch: Batch) -> Tensor | float:
        """None where no router is trained: it would only push what feeds them."""
        if not any(weight.requires_grad for router in routers(model).values() for weight in router.parameters()):
            return 0.0
        return super().routing_loss(model, batch)

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.gate is not None and self.gating:
            self.gate.before_step()
        for module in _step_aware(model):
            module.before_step(optimizer)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.gate is not None and self.gating:
            self.gate.after_step()
        for module in _step_aware(model):
            module.after_step(optimizer)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Count the task's usage; absorb what experts share (SD-LoRA-MoE)."""
        if self.gate is not None:
            self._observe(task, model)
            self.gate.finish()
        if not self._has_absorbed:
            self._absorb(model)
        super().after_task(task, model)

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    def undecayed(self, model: nn.Module) -> list[nn.Parameter]:
        """SD-LoRA-MoE's common pairs: decay would shrink what all experts share (sd_moe 9 [our design])."""
        return [part for module in _sd_linears(model) for part in (module.common_A, module.common_B)]

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {} if self.gate is None else self.gate.state_dict()

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if self.gate is not None:
            self.gate.load_state_dict({name: tensor.cpu() for name, tensor in tensors.items()})

    def _absorb(self, model: nn.Module) -> None:
        """Move what the trained experts share into the frozen pairs (SD-LoRA-MoE)."""
        if self.adapter.kind != "sd_lora_moe":
            return
        absorbed = absorb_shared(model).values()
        self._facts["absorbed_directions"] = sum(layer.directions for layer in absorbed)
        self._facts["frozen_rank"] = max(layer.frozen_rank for layer in absorbed)
        self._has_absorbed = True

    def _forget_gates(self, model: nn.Module) -> None:
        """Drop what SD-LoRA-MoE counted since it absorbed, in a router replay: the next task's mean is its own."""
        for module in _sd_linears(model):
            module.forget_gates()

    def _observe(self, task: Task, model: nn.Module) -> None:
        """Passes over the task's first batches, whose choices the gate counts; nothing else changes."""
        assert self.gate is not None
        batches = task.batches(0)
        was_training = model.training
        model.eval()
        for index in range(min(self.options.gate_batches, len(batches))):
            pass_over(model, batches[index])
            self.gate.observe()
        model.train(was_training)


def _sd_linears(model: nn.Module) -> list[SDLoraMoELinear]:
    return [module for module in adapters(model).values() if isinstance(module, SDLoraMoELinear)]


def _step_aware(model: nn.Module) -> list[StepAware]:
    return [module for module in adapters(model).values() if isinstance(module, StepAware)]
