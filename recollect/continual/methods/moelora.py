"""MOELoRA [recalled]: experts mixed by weights that depend on the task alone, so the task must be known at test time.

y = W0·x + s·Σ_e g_e(t)·B_e·A_e·x with g(t) = softmax(W_g·v_t), one gate for all linears; v_t is a learned vector of
task t.  Experts and W_g go on through all tasks, so earlier tasks' functions do change.  The gate is part of the
adapters (`adapters.weighed.TaskGates`) and is saved with them.
"""

from __future__ import annotations

from torch import nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.weighed import GATES, TaskGates
from recollect.continual.methods.config import MethodConfig
from recollect.continual.methods.protocol import ContinualMethod, Task
from recollect.errors import ConfigError, InputError


class MOELora(ContinualMethod):
    """Experts behind a gate that reads the task.

    Raises:
        ConfigError: the adapters are not MOELoRA's.
    """

    name = "moelora"

    def __init__(self, config: MethodConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        if adapter.kind != "moelora":
            raise ConfigError(f"moelora mixes experts by the task and needs adapters 'moelora', got {adapter.kind!r}")

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Add the task's vector; those of earlier tasks stay."""
        gates = _gates(model)
        if len(gates.tasks) == task.index:
            gates.add_task()
        for number, vector in enumerate(gates.tasks):
            vector.requires_grad_(number == task.index)
        gates.answer_as(task.index)

    def select(self, model: nn.Module, task: int | None) -> None:
        """Answer as `task`; one not met yet is answered as the last one met.

        Raises:
            InputError: no task was given.
        """
        if task is None:
            raise InputError("moelora mixes its experts by the task and must be told which one to answer")
        _gates(model).answer_as(task)


def _gates(model: nn.Module) -> TaskGates:
    gates = model.get_submodule(GATES)
    assert isinstance(gates, TaskGates)
    return gates
