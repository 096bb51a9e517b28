"""MOELoRA [recalled]: experts mixed by weights that depend on the task alone, so the task must be known at test time.

y = W0·x + s·Σ_e g_e(t)·B_e·A_e·x with g(t) = softmax(W_g·v_t), one gate for all linears; v_t is a learned vector of
task t.  Experts and W_g go on through all tasks, so earlier tasks' functions do change.  The adapters' own routers are
never used.  Not saved with `save_pretrained`: the gate is part of the method's state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import routers
from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import MethodConfig
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task
from recollect.errors import ConfigError, InputError
from recollect.rng import stream

GATES = "task_gates"
WIDTH = 16


class TaskGates(nn.Module):
    """v_t of every task met, and W_g."""

    def __init__(self, experts: int, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self.weight = nn.Parameter(self._drawn(experts, "gate"))  # (E, WIDTH)
        self.tasks = nn.ParameterList()  # each (WIDTH,)

    def _drawn(self, rows: int, *names: str | int) -> Tensor:
        values = stream(self._seed, "task gates", *names).standard_normal((rows, WIDTH)) / WIDTH**0.5
        return torch.tensor(values, dtype=torch.float32)

    def add_task(self) -> None:
        """Draw the vector of the next task."""
        vector = self._drawn(1, "task", len(self.tasks))[0]
        self.tasks.append(nn.Parameter(vector.to(self.weight.device)))

    def forward(self, task: int) -> Tensor:
        """(1, E) gate weights of a task; equal ones before any task was met."""
        if not len(self.tasks):
            return torch.full_like(self.weight[:, :1].t(), 1 / len(self.weight))
        return (self.weight @ self.tasks[task]).softmax(-1)[None]


class MOELora(ContinualMethod):
    """Experts behind a gate that reads the task.

    Raises:
        ConfigError: the adapters are not dense experts over whole inputs.
    """

    name = "moelora"

    def __init__(self, config: MethodConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        if adapter.kind != "loramoe" or adapter.gate != "dense" or adapter.grow:
            raise ConfigError(
                "moelora mixes a fixed number of LoRAMoE experts densely, got "
                f"{adapter.kind!r}, gate {adapter.gate!r}, grow {adapter.grow!r}"
            )
        self._task = 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Attach the experts and the gate; the experts' own routers are not trained."""
        model = super().prepare(model)
        gates = TaskGates(self.adapter.experts, self.config.seed).to(next(model.parameters()).device)
        model.add_module(GATES, gates)
        for router in routers(model).values():
            router.requires_grad_(False)
        self._use(model, 0)
        return model

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's vector; those of earlier tasks stay."""
        gates = _gates(model)
        if len(gates.tasks) == task.index:
            gates.add_task()
        for number, vector in enumerate(gates.tasks):
            vector.requires_grad_(number == task.index)
        self._task = task.index

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy through the task's gate."""
        self._use(model, self._task)
        return super().loss(model, batch)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Keep answering as the task just learned, without the graph."""
        self.select(model, task.index)
        super().after_task(task, model)

    @torch.no_grad()
    def select(self, model: nn.Module, task: int | None) -> None:
        """Answer as `task`; one not met yet is answered as the last one met.

        Raises:
            InputError: no task was given.
        """
        if task is None:
            raise InputError("moelora mixes its experts by the task and must be told which one to answer")
        self._use(model, min(task, max(len(_gates(model).tasks) - 1, 0)))

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, dict(_gates(model).state_dict())

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        gates = _gates(model)
        while len(gates.tasks) < len(tensors) - 1:
            gates.add_task()
        gates.load_state_dict(tensors)
        self.select(model, self.finished - 1)

    def _use(self, model: nn.Module, task: int) -> None:
        weights = _gates(model)(task)
        for router in routers(model).values():
            router.forced = weights


def _gates(model: nn.Module) -> TaskGates:
    gates = model.get_submodule(GATES)
    assert isinstance(gates, TaskGates)
    return gates
