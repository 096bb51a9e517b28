"""The tasks of a run as methods see them: training batches as pure functions of seed and epoch, and a memory.

Rows are made once, for all methods and seeds of a run.  The order of an epoch depends on (seed, task, epoch) alone, so
methods of one seed read the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.continual.examples import Example, Lengths, LossOn, TaskTokenizer, encode_example
from recollect.continual.learner import RowBatches
from recollect.continual.methods.protocol import Task
from recollect.continual.trace_data import TraceData, TraceRecord
from recollect.continual.trace_tasks import TraceTask
from recollect.rng import stream


@dataclass(frozen=True)
class TaskRows:
    """Training rows of one task. epochs: passes over them."""

    name: str
    rows: Sequence[Example]
    epochs: int

    def facts(self) -> dict[str, int]:
        """Rows, tokens, supervised tokens of one epoch, shortened prompts, answers without their end."""
        return {
            "rows": len(self.rows),
            "tokens": sum(len(row) for row in self.rows),
            "supervised_tokens": sum(int((row.labels >= 0).sum()) for row in self.rows),
            "shortened_prompts": sum(row.n_dropped > 0 for row in self.rows),
            "cut_answers": sum(row.is_answer_cut for row in self.rows),
        }


def task_rows(
    data: Mapping[str, TraceData],
    tokens: TaskTokenizer,
    lengths: Lengths,
    *,
    epochs: int | None,
    loss_on: LossOn,
    after_task: Callable[[], None] | None = None,
) -> list[TaskRows]:
    """The training rows of every task, in order.

    Args:
        epochs: of every task; None = each task's own number for LoRA.

    Raises:
        DataError: a row cannot be used; the message names file and row.
    """
    found = []
    for name, one in data.items():
        rows = encode_rows(one.task, one.train, tokens, lengths, loss_on)
        found.append(TaskRows(name, rows, epochs or one.task.epochs_lora))
        if after_task is not None:
            after_task()
    return found


def encode_rows(
    task: TraceTask, records: Sequence[TraceRecord], tokens: TaskTokenizer, lengths: Lengths, loss_on: LossOn
) -> list[Example]:
    """One row per record, in order."""
    return [
        encode_example(task, record.prompt, record.answer, tokens, lengths, loss_on, record.where) for record in records
    ]


@dataclass(frozen=True)
class Batching:
    """How rows become batches. accumulation: batches per optimiser step."""

    batch_size: int
    accumulation: int
    pad_id: int
    seed: int


class RowMemory:
    """`Memory` over the rows of the tasks so far; what is drawn depends on (seed, task, number) alone."""

    def __init__(self, tasks: Sequence[TaskRows], general: Sequence[Example], how: Batching) -> None:
        self._tasks, self._general, self._how = tasks, general, how

    def size(self, task: int) -> int:
        """Training samples of task number `task`."""
        return len(self._tasks[task].rows)

    def batches(self, task: int, samples: int) -> RowBatches:
        """A fixed random choice of `samples` rows of a task, a smaller one part of a larger one."""
        one = self._tasks[task]
        order = stream(self._how.seed, "continual memory", one.name).permutation(len(one.rows))[:samples]
        return RowBatches(one.rows, order, self._how.batch_size, self._how.pad_id)

    def general(self) -> RowBatches:
        """The instructions of no task."""
        return RowBatches(self._general, np.arange(len(self._general)), self._how.batch_size, self._how.pad_id)


def make_tasks(
    tasks: Sequence[TaskRows], general: Sequence[Example], how: Batching, *, is_joint: bool = False
) -> list[Task]:
    """What a method learns, in order; all at once as one task where `is_joint`.

    A joint task passes over every row as often as its own task asks for: in epoch e, the rows of the tasks of more than
    e epochs.
    """
    if is_joint:
        return [_joint(tasks, general, how)]
    found = []
    for index, one in enumerate(tasks):
        memory = RowMemory(tasks[: index + 1], general, how)
        batches = _epochs([one], how, one.name)
        steps = -(-len(batches(0)) // how.accumulation)
        found.append(Task(index, one.name, len(tasks), batches, one.epochs, steps, memory))
    return found


def _joint(tasks: Sequence[TaskRows], general: Sequence[Example], how: Batching) -> Task:
    batches = _epochs(tasks, how, "joint")
    steps = -(-len(batches(0)) // how.accumulation)
    epochs = max(one.epochs for one in tasks)
    return Task(0, "joint", 1, batches, epochs, steps, RowMemory(tasks, general, how))


def _epochs(tasks: Sequence[TaskRows], how: Batching, name: str) -> Callable[[int], Any]:
    """epoch -> batches of the rows of the tasks that still learn in that epoch, in an order of its own."""

    def batches(epoch: int) -> RowBatches:
        rows = [row for one in tasks if epoch < one.epochs for row in one.rows]
        order = stream(how.seed, "continual order", name, epoch).permutation(len(rows))
        return RowBatches(rows, order, how.batch_size, how.pad_id)

    return batches
