"""One method, one seed: task after task is learnt, kept and evaluated, resumable at every optimiser step.

    METHOD/seed-N/
        method.json         the method and its options
        round-T/            T = 1, 2, …: after T tasks
            training/       checkpoints of the phases while the task is being learnt
            method_state.safetensors    what the next task starts from (adapters, buffers, the method's own)
            optimizer.safetensors       likewise, where one optimiser goes through all tasks
            metrics-PHASE/  learning curves
            result.json     facts of the training; written last: the round is finished
        adapter/round-T/    the adapters after T tasks, see `round_adapters`
        cells/              see `cells`
        matrix.csv          R of the finished sequence
        ability-0.json, ability-T.json    the general questions before and after
        round-T/diagnostics.*    where they are asked for, see `diagnostics.rounds`

Every round is evaluated and the next one begun from a bare model with the round's state loaded, in an uninterrupted run
too: that a resumed run repeats it, bit for bit on a CPU, needs no further argument.
Source: trace_benchmark 9; moe_lora 7.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recollect.checkpoints import Moments
from recollect.continual.aggregates import matrix_csv
from recollect.continual.benchmark import Benchmark, OpenedLearner
from recollect.continual.cells import CellResult, is_finished, read_cell, write_cell
from recollect.continual.choice_likelihood import choice_scorer
from recollect.continual.diagnostics.factors import OldExamples
from recollect.continual.diagnostics.rounds import is_measured, measure_round, read_round
from recollect.continual.diagnostics.section import SequenceDiagnostics, sequence_diagnostics
from recollect.continual.entries import Entry
from recollect.continual.evaluation_plan import Cell, PlanKind, evaluation_plan
from recollect.continual.general_ability import score_general
from recollect.continual.joined_rows import prepare_for_cpu
from recollect.continual.learner import Generation, Learner
from recollect.continual.methods.driving import learn_task
from recollect.continual.methods.protocol import ContinualMethod, Task
from recollect.continual.methods.state_file import read_state, write_state
from recollect.continual.round_adapters import write_round_adapter
from recollect.continual.trace_intervals import RunScores
from recollect.errors import ResumeRefused
from recollect.io import disk_errors, read_json, write_json, write_text
from recollect.loop import LoopConfig
from recollect.progress import Progress
from recollect.rng import call_seed

RESULT_FILE = "result.json"
METHOD_FILE = "method.json"
MOMENTS_FILE = "optimizer.safetensors"
MATRIX_FILE = "matrix.csv"


@dataclass(frozen=True)
class SequenceOptions:
    """How a sequence is learnt and evaluated, alike for all methods and seeds.

    loop: of every task; its seed and epochs are replaced.  answers: its seed is replaced.  identity: JSON values that
    tell this run from others.  diagnostics: the examples of all tasks that are looked at; None = none.
    """

    loop: LoopConfig
    answers: Generation
    evaluation: PlanKind = "triangle"
    untouched: bool = False
    ability: bool = False
    checkpoint_every: int | None = None
    identity: Mapping[str, Any] | None = None
    diagnostics: OldExamples | None = None


@dataclass(frozen=True)
class SequenceResult:
    """What one method and seed made.

    scores: primary scores of all evaluated cells.  cells: the same with every metric.  rounds: result.json per round.
    ability: {"before", "after"} where it was asked for.  diagnostics: where they were asked for.
    """

    method: str
    seed: int
    scores: RunScores
    cells: dict[Cell, CellResult]
    rounds: list[dict[str, Any]]
    ability: dict[str, Any] | None
    diagnostics: SequenceDiagnostics | None = None


def sequence_cells(n_tasks: int, options: SequenceOptions, *, is_joint: bool) -> tuple[Cell, ...]:
    """The evaluations of one method; one that learns all tasks at once is evaluated at the end alone."""
    if not is_joint:
        return evaluation_plan(n_tasks, options.evaluation, untouched=options.untouched)
    untouched = [Cell(0, task) for task in range(n_tasks)] if options.untouched else []
    return (*untouched, *(Cell(n_tasks, task) for task in range(n_tasks)))


def check_same_method(folder: Path, entry: Entry, benchmark: Benchmark) -> None:
    """Refuse to continue a sequence that was made with other options of its method.

    Raises:
        ResumeRefused: the message names the first option that differs.
    """
    path = folder / METHOD_FILE
    if not path.is_file():
        return
    held, wanted = read_json(path), _described(entry, benchmark)
    if held != wanted:
        name, before, now = _first_difference(held, wanted)
        raise ResumeRefused(
            f"{path} was made with {name} {before!r}, not {now!r}; use the same options or another --out"
        )


def _described(entry: Entry, benchmark: Benchmark) -> dict[str, Any]:
    described = entry.describe()
    if entry.reads_general_rows:
        described["general_rows"] = benchmark.general_fingerprint()
    return described


def _first_difference(held: Any, wanted: Any, name: str = "") -> tuple[str, Any, Any]:
    """The name of the first leaf that differs, with dots between the levels, and both values."""
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in held if key not in wanted)]:
            if held.get(key) != wanted.get(key):
                return _first_difference(held.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    return name, held, wanted


def run_sequence(
    entry: Entry,
    seed: int,
    *,
    tasks: Sequence[Task],
    benchmark: Benchmark,
    options: SequenceOptions,
    folder: Path,
    progress: Progress,
) -> SequenceResult:
    """Learn and evaluate every task of one method and seed, or what of it is not yet in `folder`.

    Args:
        tasks: what the method learns, in order; a joint method has one.
        benchmark: opens bare models and examines them.

    Raises:
        ResumeRefused: `folder` holds this method with other options.
        ConfigError: the adapters do not fit the model.
        TrainingDiverged: a loss or a weight became NaN or infinite.
    """
    return _Run(entry.seeded(seed), seed, tasks, benchmark, options, folder, progress).carry_out()


class _Run:
    def __init__(
        self,
        entry: Entry,
        seed: int,
        tasks: Sequence[Task],
        benchmark: Benchmark,
        options: SequenceOptions,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.entry, self.seed, self.tasks, self.benchmark = entry, seed, tasks, benchmark
        self.options, self.folder, self.progress = options, folder, progress
        self.names = benchmark.names
        self.plan = sequence_cells(len(self.names), options, is_joint=entry.spec.is_joint)
        self.title = f"{entry.name}, seed {seed}"

    def carry_out(self) -> SequenceResult:
        self._claim_folder()
        for stage in range(len(self.tasks) + 1):
            waiting = self._waiting_cells(stage)
            asks_ability = self._asks_ability(stage)
            learns = stage < len(self.tasks) and not self._is_learnt(stage + 1)
            old = self._waiting_diagnostics(stage)
            if not (waiting or asks_ability or learns or old):
                continue
            learner, method = self._model_at(stage)
            for cell in waiting:
                self._evaluate(learner, method, cell)
            if asks_ability:
                self._measure_ability(learner, method, stage)
            if old is not None:
                self.progress.stage(f"{self.title}, after task {stage}: diagnostics", len(old))
                measure_round(learner, self.benchmark.pad_id, old, self._round_folder(stage), self.progress)
            if learns:
                self._learn(learner, method, stage)
        return self._result()

    def _claim_folder(self) -> None:
        check_same_method(self.folder, self.entry, self.benchmark)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / METHOD_FILE, _described(self.entry, self.benchmark))

    def _round_of(self, stage: int) -> int:
        """The round of the matrix that holds the model after `stage` trained tasks."""
        return len(self.names) if stage and self.entry.spec.is_joint else stage

    def _round_folder(self, stage: int) -> Path:
        return self.folder / f"round-{stage}"

    def _is_learnt(self, stage: int) -> bool:
        return (self._round_folder(stage) / RESULT_FILE).is_file()

    def _waiting_cells(self, stage: int) -> list[Cell]:
        own = [cell for cell in self.plan if cell.round == self._round_of(stage)]
        return [cell for cell in own if not is_finished(self.folder / "cells", cell, self.names[cell.task])]

    def _model_at(self, stage: int) -> tuple[OpenedLearner, ContinualMethod]:
        """The model and the method after `stage` tasks."""
        self.progress.stage(f"{self.title}: loading the model")
        learner = self.benchmark.open_learner()
        method = self.entry.spec.open(self.entry.options, self.entry.adapter)
        method.prepare(learner.model)
        prepare_for_cpu(learner.model, learner.arithmetic)
        if stage:
            method.load_state(learner.model, read_state(self._round_folder(stage)))
        return learner, method

    def _evaluate(self, learner: OpenedLearner, method: ContinualMethod, cell: Cell) -> None:
        name = self.names[cell.task]
        _, _, n_examples = self.benchmark.sizes()[name]
        self.progress.stage(f"{self.title}, after task {cell.round}: answering {name}", n_examples)
        started = time.perf_counter()
        if self.entry.spec.needs_task:
            method.select(learner.model, cell.task)
        how = Generation(
            self.options.answers.batch_size,
            self.options.answers.temperature,
            call_seed(self.seed, "continual answers", cell.round),
            self.options.answers.max_new_tokens,
        )
        records, predictions, scores = self.benchmark.examine(learner, name, how, self.progress.advance)
        seconds = time.perf_counter() - started
        write_cell(self.folder / "cells", cell, records, predictions, scores, seconds)

    def _ability_file(self, stage: int) -> Path:
        return self.folder / f"ability-{stage}.json"

    def _asks_ability(self, stage: int) -> bool:
        is_end = stage in (0, len(self.tasks)) and not self.entry.spec.needs_task
        return self.options.ability and is_end and not self._ability_file(stage).is_file()

    def _measure_ability(self, learner: OpenedLearner, method: ContinualMethod, stage: int) -> None:
        assert isinstance(learner, Learner)  # the general questions are asked in words
        self.progress.stage(f"{self.title}: general questions")
        found = score_general(choice_scorer(learner.model, learner.tokens))
        write_json(self._ability_file(stage), found.to_json())

    def _old_examples(self, stage: int) -> OldExamples | None:
        """The examples to look at after `stage` tasks."""
        old = self.options.diagnostics
        if old is None or not stage:
            return None
        return old if self.entry.spec.is_joint else old.first_tasks(stage)

    def _waiting_diagnostics(self, stage: int) -> OldExamples | None:
        old = self._old_examples(stage)
        return None if old is None or is_measured(self._round_folder(stage), old) else old

    def _diagnostics(self) -> SequenceDiagnostics | None:
        if self.options.diagnostics is None:
            return None
        rounds = [read_round(self._round_folder(stage)) for stage in range(1, len(self.tasks) + 1)]
        return sequence_diagnostics(rounds)

    def _learn(self, learner: OpenedLearner, method: ContinualMethod, stage: int) -> None:
        from recollect.continual.adapters.attach import attached
        from recollect.continual.adapters.budget import trainable_report
        from recollect.tracking import Tracker

        task, folder = self.tasks[stage], self._round_folder(stage + 1)
        self.progress.stage(f"{self.title}: learning {task.name}")
        started = time.perf_counter()
        config = _loop_of(self.options.loop, learner, call_seed(self.seed, "continual task", stage))
        moments = None
        if not self.entry.options.reset_optimizer:
            moments = Moments.read(self._round_folder(stage) / MOMENTS_FILE) if stage else Moments()
            config = replace(config, schedule_span=self._span(stage))
        with PeakOf(learner) as peak:
            phases = learn_task(
                method,
                learner.model,
                task,
                config,
                folder=folder / "training",
                checkpoint_every=self.options.checkpoint_every,
                tracker=lambda phase: Tracker(folder / f"metrics-{phase}"),
                progress=self.progress,
                identity={**(self.options.identity or {}), "method": self.entry.describe(), "seed": self.seed},
                moments=moments,
            )
        write_state(method.state(learner.model), folder)
        if moments is not None and stage + 1 < len(self.tasks):
            moments.write(folder / MOMENTS_FILE)
        about = {"method": self.entry.describe(), "seed": self.seed, "round": stage + 1, "task": task.name}
        write_round_adapter(learner.model, self.folder / "adapter" / folder.name, about)
        parameters = trainable_report(learner.model) if attached(learner.model) is not None else None
        write_json(
            folder / RESULT_FILE,
            {
                "task": task.name,
                "seconds": round(time.perf_counter() - started, 3),
                "peak_mb": peak.mb,
                "phases": {
                    name: {
                        "epochs": result.epochs,
                        "steps": result.steps,
                        "history": result.history,
                        "samples_per_second": result.samples_per_second,
                    }
                    for name, result in phases.items()
                },
                "parameters": None
                if parameters is None
                else {**vars(parameters), "trainable_share": parameters.trainable_share},
                "facts": method.facts(),
            },
        )
        shutil.rmtree(folder / "training", ignore_errors=True)

    def _span(self, stage: int) -> tuple[float, float]:
        """The part of the whole sequence's optimiser steps that a task is."""
        steps = [task.steps * task.epochs for task in self.tasks]
        return sum(steps[:stage]) / sum(steps), sum(steps[: stage + 1]) / sum(steps)

    def _result(self) -> SequenceResult:
        cells = {cell: read_cell(self.folder / "cells", cell, self.names[cell.task]) for cell in self.plan}
        scores = RunScores(self.names, {cell: result.primary for cell, result in cells.items()})
        rounds = [read_json(self._round_folder(stage) / RESULT_FILE) for stage in range(1, len(self.tasks) + 1)]
        ends = {"before": self._ability_file(0), "after": self._ability_file(len(self.tasks))}
        write_text(self.folder / MATRIX_FILE, matrix_csv(scores.matrix, self.names))
        held = {when: read_json(path) for when, path in ends.items() if path.is_file()}
        ability = held if self.options.ability and len(held) == len(ends) else None
        return SequenceResult(self.entry.name, self.seed, scores, cells, rounds, ability, self._diagnostics())


def _loop_of(loop: LoopConfig, learner: OpenedLearner, seed: int) -> LoopConfig:
    return replace(loop, seed=seed, precision=learner.arithmetic)


class PeakOf:
    """Highest memory in MiB inside a `with` block: of the GPU the model is on, else of the process beyond its start."""

    def __init__(self, learner: OpenedLearner) -> None:
        self._device, self._stack = learner.device, contextlib.ExitStack()
        self.mb: float | None = None

    def __enter__(self) -> PeakOf:
        import torch

        from recollect.tokenize.peak_memory import PeakMemory

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._resident = self._stack.enter_context(PeakMemory())
        return self

    def __exit__(self, *ending: object) -> None:
        import torch

        self._stack.close()
        on_gpu = self._device.type == "cuda"
        self.mb = torch.cuda.max_memory_allocated(self._device) / 2**20 if on_gpu else self._resident.mb
