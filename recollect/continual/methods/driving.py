"""One task through a method: its hooks in order, every phase by the training loop, exact resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from recollect.checkpoints import Moments
from recollect.continual.methods.protocol import ContinualMethod, Task
from recollect.loop import LoopConfig, LoopResult, train
from recollect.progress import Progress
from recollect.tracking import Tracker


def learn_task(
    method: ContinualMethod,
    model: nn.Module,
    task: Task,
    config: LoopConfig,
    *,
    folder: Path | None = None,
    checkpoint_every: int | None = None,
    tracker: Callable[[str], Tracker | None] | None = None,
    progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
    moments: Moments | None = None,
) -> dict[str, LoopResult]:
    """Train a prepared model on one task and consolidate; returns each phase's result by its name.

    The model must be as the state of the last finished task left it.  A killed call is repeated from there: phases
    whose checkpoints are finished are loaded, the one under way goes on where it stood.

    Args:
        method, model, task: see `protocol`.
        config: how every phase is trained; its `epochs` are the phase's, its patience is off.
        folder: of the task's checkpoints, one folder per phase.  None = no files.
        checkpoint_every: optimiser steps between checkpoints.
        tracker: phase name -> where its figures go.
        progress: one step per batch.
        identity: JSON values that tell this run from others.
        moments: what the optimiser remembers of the last task, and in the end of this one.  None = every phase begins
            with a new optimiser.

    Raises:
        ConfigError, ResumeRefused, TrainingDiverged: see `recollect.loop.train`.
    """
    method.before_task(task, model)
    results = {}
    for phase in method.phases(task, model):
        results[phase.name] = train(
            model,
            batches=phase.batches,
            loss=lambda batch: method.loss(model, batch),
            config=dataclasses.replace(config, epochs=phase.epochs, patience=None),
            folder=folder / phase.name if folder is not None else None,
            checkpoint_every=checkpoint_every,
            tracker=tracker(phase.name) if tracker is not None else None,
            progress=progress,
            undecayed=method.undecayed(model),
            size=lambda batch: len(batch["input_ids"]),
            identity={**(identity or {}), "task": task.index, "phase": phase.name},
            before_step=lambda optimizer: method.after_backward(model, optimizer),
            after_step=lambda optimizer: method.after_step(model, optimizer),
            moments=moments,
        )
    method.after_task(task, model)
    return results
