"""Models of a run trained side by side, in processes that share the cores.

A task is a row of one seed, or the tests of a seed. It makes the stages it needs or, where another process is at one,
waits for it; which process made what changes no result, beyond the last digits that depend on the number of threads.
What the processes leave behind is what a run in one process would have made, so the caller goes through the seeds as
ever and only reads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from recollect.distill.config import DistillConfig
from recollect.distill.methods import run_method
from recollect.distill.seeds import run_seed
from recollect.distill.stages import Stages
from recollect.distill.workshop import Workshop
from recollect.progress import SilentProgress
from recollect.types import Dataset, Split

ALONE, TESTS = "alone", "tests"
_shop: Workshop | None = None
"""Of a worker process."""


class Task(NamedTuple):
    """what: "alone" (both models alone), a method, or "tests" (everything of the seed that is not there yet)."""

    what: str
    seed: int


def tasks_of(config: DistillConfig) -> Iterator[Task]:
    """All tasks, those that others wait for first."""
    yield from (Task(ALONE, seed) for seed in config.all_seeds)
    for method in config.rows:
        yield from (Task(method, seed) for seed in config.all_seeds)
    yield from (Task(TESTS, seed) for seed in config.all_seeds)


def train_side_by_side(shop: Workshop) -> None:
    """Make every stage and every test table of the run in `shop.config.workers` processes.

    Raises:
        RecollectError: what a task raised; the other processes are stopped, their checkpoints stay.
    """
    tasks = list(tasks_of(shop.config))
    shop.progress.stage(f"training in {shop.config.workers} processes", len(tasks))
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        shop.config.workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy torch's threads in mid-flight
        initializer=_begin,
        initargs=(shop.config, shop.dataset, shop.split, shop.stages.folder, shop.stages.context),
    )
    try:
        for future in as_completed([pool.submit(_carry_out, task) for task in tasks]):
            future.result()
            shop.progress.advance(1)
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # an inherited disposition may ignore SIGTERM, and checkpoints are whole files
        pool.shutdown(cancel_futures=True)  # returns when every process has been waited for
        raise
    pool.shutdown()


def _begin(config: DistillConfig, dataset: Dataset, split: Split, folder: Path, context: Mapping[str, Any]) -> None:
    import torch

    global _shop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    _shop = Workshop(config, dataset, split, Stages(folder, context), SilentProgress())


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # checkpoints are whole files, so there is nothing to tidy


def _carry_out(task: Task) -> None:
    assert _shop is not None
    if task.what == TESTS:
        run_seed(_shop, task.seed)
    elif task.what == ALONE:
        crm = _shop.crm(task.seed)
        _shop.llm(task.seed, crm)
    else:
        run_method(_shop, task.what, task.seed)
