"""Replay: a share of each earlier task's training samples is trained again.

after: when a task is learned, extra epochs on the kept samples of all earlier tasks and on general instructions where
there are some (TRACE: one epoch, a tenth of each task, plus LIMA).  mix: the kept samples' batches stand among the
task's own, at random places that depend on the epoch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

from torch import nn

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.methods.config import ReplayConfig
from recollect.continual.methods.objective import as_past
from recollect.continual.methods.protocol import Batch, ContinualMethod, Memory, Phase, Task
from recollect.rng import stream


class Replay(ContinualMethod):
    """Training with kept samples of earlier tasks."""

    name = "replay"

    def __init__(self, config: ReplayConfig, adapter: MoELoraConfig) -> None:
        super().__init__(config, adapter)
        self.options = config

    def phases(self, task: Task, model: nn.Module) -> Iterator[Phase]:
        """One phase of mixed batches, or the task followed by the replay."""
        options = self.options
        sources = kept_batches(task.memory, range(task.index), options.ratio)
        if options.general and task.index:
            sources.append(Past(task.memory.general()))
        if options.mode == "mix" and task.index:
            yield Phase(
                "train",
                lambda epoch: shuffled([task.batches(epoch), *sources], options.seed, task.index, epoch),
                task.epochs,
            )
            return
        yield Phase("train", task.batches, task.epochs)
        if task.index:
            yield Phase(
                "replay", lambda epoch: shuffled(sources, options.seed, task.index, epoch), options.replay_epochs
            )


class Past(Sequence[Batch]):
    """Batches marked as the past's."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return as_past(self._batches[index])


class Joined(Sequence[Batch]):
    """The batches of several sources in a given order; each is made when it is asked for."""

    def __init__(self, sources: Sequence[Sequence[Batch]], order: Sequence[int]) -> None:
        self._sources, self._order = sources, order
        self._starts = [0, *itertools.accumulate(len(source) for source in sources)]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        place = self._order[index]
        source = bisect.bisect_right(self._starts, place) - 1
        return self._sources[source][place - self._starts[source]]


def kept_batches(memory: Memory, tasks: range, ratio: float, *, present: int | None = None) -> list[Sequence[Batch]]:
    """Batches of a share `ratio` of each task's samples, at least one sample each.

    Args:
        present: the task at hand, whose batches stay as they are; those of the others are marked as the past's.
    """
    kept = {task: memory.batches(task, max(1, round(ratio * memory.size(task)))) for task in tasks}
    return [batches if task == present else Past(batches) for task, batches in kept.items()]


def shuffled(sources: Sequence[Sequence[Batch]], seed: int, task: int, epoch: int) -> Sequence[Batch]:
    """Every batch of the sources once, in an order of its own per task and epoch."""
    order = stream(seed, "replay order", task, epoch).permutation(sum(map(len, sources)))
    return Joined(sources, [int(place) for place in order])
