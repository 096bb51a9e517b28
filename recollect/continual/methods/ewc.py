"""Elastic weight consolidation: L = CE + (λ/2)·Σ_i F_i·(θ_i − θ*_i)² over the adapters' weights.

per_sample: F is the mean over samples of the finished task of the squared gradient of log p, the log probability of the
sample's whole answer (the sum over its tokens); F ← γ·F + F_t after each task.  The loss that is trained is the mean
over tokens, so answers of n tokens pull n² times as hard as they would by that mean; λ = 400 is the benchmark's own
code's, whose F is another (trace_online), and no number says which λ suits this one: try several.
trace_online: the benchmark's own code adds (batch gradient of the total loss)² / (steps of an epoch) at every training
step of every epoch and never resets; θ* is where the last task ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import EWCConfig
from recollect.continual.methods.objective import on_device_of, sample_rows, supervised_logits
from recollect.continual.methods.protocol import (
    Batch,
    ContinualMethod,
    Task,
    live_state,
    make_live_state,
    trained_parameters,
)
from recollect.rng import stream


class EWC(ContinualMethod):
    """A quadratic pull to where earlier tasks ended, as strong as they depend on each weight."""

    name = "ewc"

    def __init__(self, config: EWCConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.options = config
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._steps = 1

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Start the running information of trace_online."""
        self._steps = task.steps
        if self.options.fisher == "trace_online" and live_state(model) is None:
            live = make_live_state(model)
            for name, parameter in trained_parameters(model).items():
                live.put(name, torch.zeros_like(parameter))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy plus the pull; exactly the cross-entropy for strength 0 or in the first task."""
        value = super().loss(model, batch)
        if not self.options.strength or not self.anchor:
            return value
        return value + self.options.strength * quadratic_pull(
            trained_parameters(model), self.information(model), self.anchor
        )

    def information(self, model: nn.Module) -> dict[str, Tensor]:
        """F of every weight, as the penalty uses it now."""
        live = live_state(model)
        if self.options.fisher == "per_sample" or live is None:
            return self.fisher
        return {name: live.get(name) for name in self.anchor}

    def after_backward(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """trace_online: add the squared gradient of the total loss."""
        live = live_state(model)
        if self.options.fisher == "trace_online" and live is not None:
            for name, parameter in trained_parameters(model).items():
                if parameter.grad is not None:
                    live.get(name).add_(parameter.grad.square(), alpha=1 / self._steps)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's information and move θ* here."""
        if self.options.fisher == "per_sample":
            rows = _chosen_rows(task, self.options.samples, self.options.seed)
            new = sample_fisher(model, rows)
            decay = self.options.decay
            self.fisher = {name: decay * self.fisher[name] + f if self.fisher else f for name, f in new.items()}
        self.anchor = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
        super().after_task(task, model)

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"anchor.{name}": tensor for name, tensor in self.anchor.items()}
        if self.options.fisher == "per_sample":
            tensors |= {f"fisher.{name}": tensor for name, tensor in self.fisher.items()}
        return {}, tensors

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for part, target in (("fisher.", self.fisher), ("anchor.", self.anchor)):
            target.clear()
            target |= {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}


def quadratic_pull(
    parameters: Mapping[str, Tensor], fisher: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """½·Σ_i F_i·(θ_i − θ*_i)²."""
    parts = [(fisher[name] * (parameters[name] - anchor[name]).square()).sum() for name in anchor]
    return 0.5 * torch.stack(parts).sum()


def sample_fisher(model: nn.Module, rows: Iterator[Batch]) -> dict[str, Tensor]:
    """Mean over single samples of the squared gradient of the whole answer's log probability, without dropout."""
    parameters = trained_parameters(model)
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training = model.training
    model.eval()
    count = 0
    for row in rows:
        logits, tokens = supervised_logits(model, on_device_of(model, row))
        value = nn.functional.cross_entropy(logits, tokens, reduction="sum")
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient.square())
        count += 1
    model.train(was_training)
    return {name: total / max(count, 1) for name, total in totals.items()}


def _chosen_rows(task: Task, samples: int, seed: int) -> Iterator[Batch]:
    """The samples of the first `samples` / batch-size batches in a random order (all for 0), one by one."""
    batches: Sequence[Batch] = task.batches(0)
    order = stream(seed, "fisher samples", task.index).permutation(len(batches))
    left = samples or None
    for index in order:
        rows = sample_rows(batches[int(index)])
        yield from rows if left is None else rows[:left]
        if left is not None:
            left -= len(rows)
            if left <= 0:
                return
