"""Runs the steps of a simulation: as much at once as their dependencies allow, with the result of one by one.

A step is a generator: it yields lists of calls, is sent their answers, and returns its events, its memory writes and
how to apply them. Two steps that touch the same element run in step order; a barrier runs alone. Hence what a step
reads does not depend on the schedule, and neither does the log.

Two dispatches. "levels" (in-process models): the steps of a dependency level advance together, so that their calls fill
batches whose composition depends on the steps alone. "ready" (servers): a step starts as soon as those it waits for are
done. Steps already in the journal are skipped; a step killed half-way runs again from recorded answers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from recollect.backbones.journaled import CALL_FAULTS, Journaled, Replay
from recollect.backbones.protocol import Answer, Call
from recollect.errors import BudgetReached, ConfigError, StorageRefused
from recollect.journal import Journal, MemoryWrite, StepCommit

STEPS_PER_COMMIT = 256
"""A level is cut into groups of this many steps, so that a long level is committed (and seen to advance) in parts."""
OPEN_STEPS = 512
"""Steps under way at once in "ready": enough to keep a server busy, few enough to bound what a kill leaves half-way."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves. `apply()` brings the state in memory up to date; it is called once, right after the step."""

    events: tuple[dict[str, Any], ...]
    memory: tuple[MemoryWrite, ...]
    apply: Callable[[], None]


@dataclass(frozen=True)
class Step:
    """One step. `touches` names everything it reads that an earlier step may write, and everything it writes.

    `run()` begins it; it must read state only once begun. An answer that failed for good is thrown into the generator
    as `MalformedOutput` or `ContextTooLong`.
    """

    number: int
    touches: tuple[str, ...]
    run: Callable[[], Generator[Sequence[Call], list[Answer], StepResult]]
    barrier: bool = False


def levels(steps: Sequence[Step]) -> list[list[Step]]:
    """Dependency levels: level(t) = 1 + the highest level of earlier steps that share an element; barriers are alone.

    Steps are in order of their numbers, in the levels too.
    """
    found: list[list[Step]] = []
    level_of: dict[str, int] = {}
    floor = 0
    for step in steps:
        if step.barrier:
            found.append([step])
            floor = len(found)
            level_of = {}
            continue
        level = max((level_of.get(element, floor) for element in step.touches), default=floor)
        if level == len(found):
            found.append([])
        found[level].append(step)
        for element in step.touches:
            level_of[element] = level + 1
    return found


def run_steps(
    steps: Sequence[Step],
    model: Journaled | Replay,
    journal: Journal,
    *,
    dispatch: Literal["levels", "ready"] | None = None,
    on_progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Run every step the journal does not hold yet, and commit each with its events and memory writes.

    Args:
        steps: all steps of the run, finished ones included, in any order; state as the journal left it.
        dispatch: by default "ready" for models that take calls one by one, else "levels".
        on_progress: told the number of steps each time some were committed.
        stop: asked before steps begin; once true, what is under way is finished and the call returns.

    Raises:
        BudgetReached: at a step boundary; answers in flight were waited for and recorded.
        StorageRefused: the disk refused; nothing is half-written.
        KeyboardInterrupt: (also for a SIGTERM handler that raises) after recording every answer that had come in and
            committing every finished step.
    """
    ordered = sorted(steps, key=lambda step: step.number)
    for first, second in pairwise(ordered):
        if first.number == second.number:
            raise ConfigError(f"two steps have the number {first.number}")
    if dispatch is None:
        dispatch = "ready" if model.is_concurrent else "levels"
    finished = _Finished(journal, on_progress)
    with journal.interrupts:
        if dispatch == "levels":
            _run_levels(ordered, model, finished, stop)
        elif isinstance(model, Journaled) and model.is_concurrent:
            for part in _parts(ordered):
                if not _Ready(model, finished, stop).run(part):
                    return
        else:
            raise ConfigError("dispatch 'ready' needs a model that takes calls one by one; use 'levels'")


class _Finished:
    """Finished steps on their way to the journal, in an order that respects dependencies."""

    def __init__(self, journal: Journal, on_progress: Callable[[int], None] | None) -> None:
        self.journal = journal
        self._on_progress = on_progress
        self._steps: list[StepCommit] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, number: int, result: StepResult) -> None:
        self._steps.append(StepCommit(number, result.events, result.memory))
        result.apply()

    def commit(self) -> None:
        if not self._steps:
            return
        with self.journal.interrupts.deferred():
            self.journal.commit(self._steps)
            n, self._steps = len(self._steps), []
        if self._on_progress is not None:
            self._on_progress(n)


class _Task:
    """A step under way: its generator, the answers it waits for, and in the end its result."""

    def __init__(self, step: Step) -> None:
        self.number = step.number
        self.result: StepResult | None = None
        self.calls: Sequence[Call] = ()
        self.futures: list[Future[Answer]] = []
        self.missing = 0
        self._generator = step.run()

    def begin(self) -> None:
        self._go_on(lambda: next(self._generator))

    def answer(self, answers: list[Answer]) -> None:
        self._go_on(lambda: self._generator.send(answers))

    def fail(self, error: BaseException) -> None:
        self._go_on(lambda: self._generator.throw(error))

    def take(self, futures: Sequence[Future[Answer]]) -> None:
        """Go on with settled futures: their answers, or the first failure among them."""
        error = next((error for future in futures if (error := future.exception()) is not None), None)
        if error is None:
            self.answer([future.result() for future in futures])
        elif isinstance(error, CALL_FAULTS):
            self.fail(error)
        else:
            raise error

    def _go_on(self, resume: Callable[[], Sequence[Call]]) -> None:
        try:
            self.calls = resume()
        except StopIteration as stop:
            if not isinstance(stop.value, StepResult):
                raise TypeError(f"step {self.number} returned {stop.value!r} instead of a StepResult") from None
            self.result = stop.value


# ---- levels ------------------------------------------------------------------------------------------------------


def _run_levels(
    steps: Sequence[Step], model: Journaled | Replay, finished: _Finished, stop: Callable[[], bool] | None
) -> None:
    for level in levels(steps):
        # Groups are cut from the whole level, finished steps included: the same groups before and after a kill.
        for start in range(0, len(level), STEPS_PER_COMMIT):
            group = [s for s in level[start : start + STEPS_PER_COMMIT] if not finished.journal.has_step(s.number)]
            if not group:
                continue
            if stop is not None and stop():
                return
            try:
                results = _in_lockstep(group, model)
            except StorageRefused:
                raise
            except BaseException:
                if isinstance(model, Journaled):
                    model.settle(wait=False)
                raise
            with finished.journal.interrupts.deferred():
                for number, result in results:
                    finished.add(number, result)
                finished.commit()


def _in_lockstep(group: Sequence[Step], model: Journaled | Replay) -> list[tuple[int, StepResult]]:
    """All steps to their ends: the calls of one phase of all steps are one list, in step order."""
    tasks = [_Task(step) for step in group]
    for task in tasks:
        task.begin()
    while waiting := [task for task in tasks if task.result is None]:
        calls = [call for task in waiting for call in task.calls]
        if isinstance(model, Journaled) and model.is_concurrent:
            futures = _settled(model, calls)
            for task in waiting:
                own, futures = futures[: len(task.calls)], futures[len(task.calls) :]
                task.take(own)
        else:
            try:
                answers = model.answer(calls)
            except CALL_FAULTS:
                _one_by_one(waiting, model)
                continue
            start = 0
            for task in waiting:
                end = start + len(task.calls)
                task.answer(answers[start:end])
                start = end
    return [(task.number, task.result) for task in tasks if task.result is not None]


def _one_by_one(tasks: Sequence[_Task], model: Journaled | Replay) -> None:
    """Answer each task's calls by themselves, so that a call that fails for good costs its own step alone."""
    for task in tasks:
        try:
            answers = model.answer(task.calls)
        except CALL_FAULTS as error:
            task.fail(error)
        else:
            task.answer(answers)


def _settled(model: Journaled, calls: Sequence[Call]) -> list[Future[Answer]]:
    futures: list[Future[Answer]] = []
    try:
        for call in calls:
            futures.append(model.submit(call))
    except BudgetReached:
        while model.in_flight:
            model.settle()
        raise
    while any(not future.done() for future in futures):
        model.settle()
    return futures


# ---- ready -------------------------------------------------------------------------------------------------------


def _parts(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Runs of steps between barriers, each barrier a part of its own."""
    part: list[Step] = []
    for step in steps:
        if step.barrier:
            if part:
                yield part
            yield [step]
            part = []
        else:
            part.append(step)
    if part:
        yield part


class _Ready:
    """One part of the run: steps start in step order, each as soon as the steps it waits for are done."""

    def __init__(self, model: Journaled, finished: _Finished, stop: Callable[[], bool] | None) -> None:
        self._model = model
        self._finished = finished
        self._stop = stop
        self._ready: list[tuple[int, Step]] = []
        self._n_before: dict[int, int] = {}
        self._after: dict[int, list[Step]] = {}
        self._answered: deque[_Task] = deque()
        self._n_open = 0
        self._is_stopping = False
        self._budget_reached: BudgetReached | None = None

    def run(self, steps: Sequence[Step]) -> bool:
        """Run the part; false when it was asked to stop before the end."""
        self._link(steps)
        try:
            while self._advance():
                self._finished.commit()
                self._model.settle()
            self._finished.commit()
        except StorageRefused:
            raise
        except BaseException:
            self._model.settle(wait=False)
            self._finished.commit()
            raise
        if self._budget_reached is not None:
            raise self._budget_reached
        return not self._is_stopping

    def _link(self, steps: Sequence[Step]) -> None:
        last: dict[str, int] = {}
        for step in steps:
            if self._finished.journal.has_step(step.number):
                continue
            before = dict.fromkeys(last[element] for element in step.touches if element in last)
            for number in before:
                self._after.setdefault(number, []).append(step)
            self._n_before[step.number] = len(before)
            if not before:
                self._ready.append((step.number, step))
            for element in step.touches:
                last[element] = step.number

    def _advance(self) -> bool:
        """Do everything that needs no waiting; false when nothing is under way."""
        while True:
            while self._answered:
                task = self._answered.popleft()
                task.take(task.futures)
                self._follow(task)
            if not self._ready or self._n_open >= OPEN_STEPS or self._is_ending():
                return self._model.in_flight > 0
            _, step = heapq.heappop(self._ready)
            self._n_open += 1
            task = _Task(step)
            task.begin()
            self._follow(task)
            if len(self._finished) >= STEPS_PER_COMMIT:
                self._finished.commit()

    def _is_ending(self) -> bool:
        if self._stop is not None and not self._is_stopping:
            self._is_stopping = self._stop()
        return self._is_stopping or self._budget_reached is not None

    def _follow(self, task: _Task) -> None:
        """Send a task's calls, or finish it and free the steps that waited for it."""
        if task.result is None:
            self._send(task)
            return
        self._finished.add(task.number, task.result)
        self._n_open -= 1
        for step in self._after.pop(task.number, ()):
            self._n_before[step.number] -= 1
            if not self._n_before[step.number]:
                heapq.heappush(self._ready, (step.number, step))

    def _send(self, task: _Task) -> None:
        try:
            task.futures = [self._model.submit(call) for call in task.calls]
        except BudgetReached as error:
            # The task stays unfinished; what it has sent is still waited for and recorded.
            self._budget_reached = self._budget_reached or error
            return
        task.missing = sum(not future.done() for future in task.futures)
        if not task.missing:
            self._answered.append(task)
            return
        for future in task.futures:
            if not future.done():
                future.add_done_callback(partial(self._one_arrived, task))

    def _one_arrived(self, task: _Task, _: Future[Answer]) -> None:
        task.missing -= 1
        if not task.missing:
            self._answered.append(task)


__all__ = ["Step", "StepResult", "levels", "run_steps"]
