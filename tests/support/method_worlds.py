"""Tiny tasks for tests of continual methods: random tokens of which the last repeats one before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recollect.continual.methods.objective import Batch
from recollect.continual.methods.protocol import ContinualMethod, LiveState, Task
from recollect.continual.methods.registry import method_spec
from recollect.loop import LoopConfig

LOOP = LoopConfig(epochs=1, learning_rate=1e-2, patience=None)
N_TASKS = 3


def rows(task: int, number: int, count: int = 3, length: int = 6) -> Batch:
    """Batch `number` of a task: tokens from the task's own range, the last two are the answer; row 0 is padded."""
    generator = torch.Generator().manual_seed(1000 * task + number)
    ids = torch.randint(3 + 12 * task, 15 + 12 * task, (count, length), generator=generator)
    ids[:, -1] = ids[:, -3]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[0, :2] = 0
    labels = ids.clone()
    labels[:, :-2] = -100
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


class Kept:
    """A `Memory` over the tiny tasks: two batches of three samples each."""

    def __init__(self, general: int = 0) -> None:
        self._general = general

    def size(self, task: int) -> int:
        return 6

    def batches(self, task: int, samples: int) -> Sequence[Batch]:
        return [rows(task, number, min(3, samples - 3 * number)) for number in range(-(-min(samples, 6) // 3))]

    def general(self) -> Sequence[Batch]:
        return [rows(0, 100 + number) for number in range(self._general)]


def tiny_task(index: int, epochs: int = 1, steps: int = 2) -> Task:
    """Task `index` of `N_TASKS`, the same batches in every epoch."""
    batches = [rows(index, number) for number in range(steps)]
    return Task(index, f"task {index}", N_TASKS, lambda epoch: batches, epochs, steps, Kept())


def small_method(name: str, values: dict | None = None, adapter: dict | None = None) -> ContinualMethod:
    """A method of the table with small adapters."""
    spec = method_spec(name)
    small: dict = {"rank": 2} | ({"common_rank": 2, "common_rank_max": 5} if name == "sd-moe" else {})
    options = spec.options(values or {}, "the test")
    return spec.open(options, spec.adapter_options(small | (adapter or {}), "the test"))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all the model's tensors but what a method keeps between steps."""
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if not name.startswith(LiveState.NAME)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
