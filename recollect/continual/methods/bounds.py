"""What sequential methods are measured against: separate adapters per task, the right ones chosen at test time.

Nothing is forgotten by construction, so it is the ceiling of what adapters of this size reach without transfer.  The
other bound, all tasks at once, is `SeqLora` given the union.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recollect.continual.adapters.attach import adapter_state_dict, load_adapter_state_dict
from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import MethodConfig
from recollect.continual.methods.protocol import ContinualMethod, Task
from recollect.errors import InputError


class PerTask(ContinualMethod):
    """Adapters of its own for every task."""

    name = "per-task"

    def __init__(self, config: MethodConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.initial: dict[str, Tensor] = {}
        self.of_task: dict[int, dict[str, Tensor]] = {}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Attach, and remember the weights every task starts from."""
        model = super().prepare(model)
        self.initial = _copied(model)
        return model

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Start from fresh adapters."""
        load_adapter_state_dict(model, self.initial)

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Keep the task's adapters."""
        self.of_task[task.index] = _copied(model)
        super().after_task(task, model)

    def select(self, model: nn.Module, task: int | None) -> None:
        """Answer with the adapters of `task`; a task not learned yet is answered by fresh ones.

        Raises:
            InputError: no task was given.
        """
        if task is None:
            raise InputError("per-task has adapters for every task and must be told which one to answer")
        load_adapter_state_dict(model, self.of_task.get(task, self.initial))

    def own_state(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {f"{task}/{name}": tensor for task, kept in self.of_task.items() for name, tensor in kept.items()}

    def load_own_state(self, model: nn.Module, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.of_task = {}
        for key, tensor in tensors.items():
            task, _, name = key.partition("/")
            self.of_task.setdefault(int(task), {})[name] = tensor


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
