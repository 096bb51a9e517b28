"""Learning without forgetting: L = CE + w·T²·KL(p_T(teacher) ‖ p_T(student)) on the answer tokens of the same batch.

The teacher is the adapters before the task.  It reads the batch as the student does (rows joined or padded, products
rounded or not) and sees its dropout masks (its pass starts from the same state of the generator), so at the first step
of a task student and teacher are equal, and the distillation loss and its gradient are exactly zero whatever the
dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recollect.continual.adapters.attach import adapter_state_dict
from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import LwFConfig
from recollect.continual.methods.objective import supervised_logits
from recollect.continual.methods.protocol import Batch, ContinualMethod, Task


class LwF(ContinualMethod):
    """Distillation from the adapters before the task."""

    name = "lwf"

    def __init__(self, config: LwFConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.options = config
        self.teacher: dict[str, Tensor] = {}

    def before_task(self, task: Task, model: nn.Module) -> None:
        """Keep a frozen copy of the adapters, from the second task on."""
        names = adapter_state_dict(model)
        self.teacher = {name: tensor.clone() for name, tensor in names.items()} if task.index else {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, the routers' losses and the distillation loss."""
        teacher = self.teacher_logits(model, batch) if self.teacher and self.options.weight else None
        logits, tokens = supervised_logits(model, batch)
        value = nn.functional.cross_entropy(logits, tokens) + self.routing_loss(model, batch)
        if teacher is None:
            return value
        return value + self.options.weight * distillation(logits, teacher, self.options.temperature)

    @torch.no_grad()
    def teacher_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The teacher's logits (n, V) on the supervised positions; the generators are left as they were."""
        device = batch["input_ids"].device

        def teacher(**inputs: Any) -> Any:
            return functional_call(model, self.teacher, (), inputs, tie_weights=False)

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return supervised_logits(model, batch, call=teacher)[0]

    def after_task(self, task: Task, model: nn.Module) -> None:
        """Forget the teacher; the next task's is made at its start."""
        self.teacher = {}
        super().after_task(task, model)


class _Distillation(torch.autograd.Function):
    """T²·mean KL(teacher ‖ student) with its gradient T·(p_student − p_teacher)/n, an exact zero for equal logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_student, log_teacher = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        probabilities = log_teacher.exp()
        ctx.save_for_backward(log_student.exp() - probabilities)
        ctx.temperature = temperature
        return temperature**2 * (probabilities * (log_teacher - log_student)).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (difference,) = ctx.saved_tensors
        return gradients[0] * ctx.temperature * difference / len(difference), None, None


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over positions, for logits (n, V)."""
    return _Distillation.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
