"""From finished sequences to their report: matrices, aggregates with intervals, floors, per-task scores, cost.

Intervals join what test examples (rows with one prompt move together) and training seeds make uncertain, see
`trace_intervals`; differences between methods are paired over both.  Every score stands beside what a predictor without
a model gets.
Source: trace_benchmark 6, 8, 9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recollect.continual.aggregates import matrix_rows
from recollect.continual.benchmark import Benchmark
from recollect.continual.diagnostics.section import diagnostics_section
from recollect.continual.entries import Entry
from recollect.continual.general_ability import general_ability_delta
from recollect.continual.report_panels import all_panels
from recollect.continual.run_config import ContinualConfig
from recollect.continual.sequence import SequenceResult
from recollect.continual.task_stream import TaskRows
from recollect.continual.trace_intervals import aggregate_intervals, difference_intervals, per_seed
from recollect.eval.statistics import RESAMPLES, Interval
from recollect.types import Report

HEADLINE = ("op", "bwt", "forgetting", "op_norm")
FURTHER = ("bwt_T", "bwt_clipped_T", "forgetting_nonnegative", "average_incremental", "fwt")
SEEDS_FOR_A_CLAIM = 3
FLOORS = "no model (floors)"


class Resampling(NamedTuple):
    """What `trace_intervals` needs to know of the test examples."""

    clusters: Mapping[str, np.ndarray]
    across_tasks: bool
    seed: int


def make_report(
    config: ContinualConfig,
    entries: Sequence[Entry],
    benchmark: Benchmark,
    rows: Sequence[TaskRows],
    results: Mapping[str, Sequence[SequenceResult]],
    manifest: dict[str, Any],
) -> Report:
    """The report of a finished run; `results` holds each method's seeds in order."""
    floors = benchmark.floors
    values = np.array([floors[name].value for name in benchmark.names])
    floor_values = np.where(values < 1.0, values, np.nan)  # nothing lies above a perfect floor
    how = Resampling(benchmark.clusters(), benchmark.clusters_span_tasks, config.seed)
    methods = {
        entry.name: method_section(entry, results[entry.name], benchmark.names, floor_values, how) for entry in entries
    }
    first = entries[0].name
    main = methods[first]
    sections: dict[str, Any] = {
        "subject": first,
        **{name: main["aggregates"][name]["value"] for name in HEADLINE},
        "accuracy_matrix": main["accuracy_matrix"],
        "tasks": list(benchmark.names),
        "floors": {name: vars(floor) for name, floor in floors.items()},
        "task_facts": benchmark.facts(),
        "training_rows": {one.name: {**one.facts(), "epochs": one.epochs} for one in rows},
        "methods": methods,
        "differences": differences(entries, results, floor_values, how),
        "run": manifest,
    }
    baselines = {name: methods[name]["aggregates"] for name in methods if name != first}
    baselines[FLOORS] = {
        "op": {"value": float(values.mean()), "ci95": [None, None], "n": main["aggregates"]["op"]["n"]},
        "op_norm": {"value": 0.0, "ci95": [None, None], "n": main["aggregates"]["op"]["n"]},
    }
    report = Report(
        kind="continual",
        protocol=protocol_of(config, benchmark),
        metrics=main["aggregates"],
        baselines=baselines,
        ledger=ledger_of(results),
        warnings=warnings_of(config, benchmark, results),
        sections=sections,
    )
    if (found := diagnostics_section(results, benchmark.names, seed=config.seed)) is not None:
        sections["diagnostics"] = found
    sections["panels"] = all_panels(config, entries, benchmark, report)
    return report


def method_section(
    entry: Entry,
    results: Sequence[SequenceResult],
    tasks: Sequence[str],
    floors: np.ndarray,
    how: Resampling,
) -> dict[str, Any]:
    """What the report says of one method: means over seeds, each seed, cost."""
    runs = [result.scores for result in results]
    intervals = aggregate_intervals(runs, floors=floors, **how._asdict())
    mean = np.stack([run.rounds for run in runs]).mean(axis=0)
    each = per_seed(runs, floors)
    return {
        **entry.describe(),
        "aggregates": {name: interval_entry(intervals[name]) for name in (*HEADLINE, *FURTHER)},
        "per_seed": {name: [finite(value) for value in each[name]] for name in (*HEADLINE, *FURTHER)},
        "accuracy_matrix": matrix_rows(mean[1:]),
        "untouched": matrix_rows(mean[:1])[0],
        "scores": {name: task_scores(at, results) for at, name in enumerate(tasks)},
        "seeds": [
            {
                "seed": result.seed,
                "accuracy_matrix": matrix_rows(result.scores.matrix),
                "rounds": result.rounds,
                "ability": result.ability and {**result.ability, "delta": ability_delta(result.ability)},
                "evaluation_seconds": round(sum(cell.facts["seconds"] for cell in result.cells.values()), 1),
                "empty_predictions": sum(cell.facts["empty_predictions"] for cell in result.cells.values()),
            }
            for result in results
        ],
    }


def ability_delta(ability: Mapping[str, Any]) -> float:
    """General Ability Delta of one sequence over the skills of the general questions."""
    return general_ability_delta(ability["before"]["by_skill"], ability["after"]["by_skill"])


def task_scores(task: int, results: Sequence[SequenceResult]) -> dict[str, Any]:
    """{"learnt", "final"}: means over seeds of every metric right after the task's own training, and at the end."""
    last = len(results[0].scores.tasks)
    found: dict[str, Any] = {"primary": "", "n": 0}
    for name, after in (("learnt", task + 1), ("final", last)):
        cells = [cell for result in results for at, cell in result.cells.items() if tuple(at) == (after, task)]
        found[name] = (
            {metric: float(np.mean([cell.items[metric].mean() for cell in cells])) for metric in cells[0].items}
            if cells
            else None
        )
        if cells:
            found |= {"primary": cells[0].facts["primary"], "n": cells[0].facts["n"]}
    return found


def differences(
    entries: Sequence[Entry],
    results: Mapping[str, Sequence[SequenceResult]],
    floors: np.ndarray,
    how: Resampling,
) -> list[dict[str, Any]]:
    """The first method minus each other one, paired over test examples and seeds."""
    first, *others = (entry.name for entry in entries)
    found = []
    for other in others:
        pair = ([result.scores for result in results[name]] for name in (first, other))
        intervals = difference_intervals(*pair, floors=floors, **how._asdict())
        found += [
            {"method": first, "against": other, "metric": metric, **interval_entry(intervals[metric])}
            for metric in HEADLINE
        ]
    return found


def interval_entry(interval: Interval) -> dict[str, Any]:
    """{"value", "ci95", "n"}, None where undefined."""
    return {
        "value": finite(interval.value),
        "ci95": [finite(interval.low), finite(interval.high)],
        "n": interval.n,
    }


def finite(value: float) -> float | None:
    """The number, or None where it is none."""
    return float(value) if math.isfinite(value) else None


def protocol_of(config: ContinualConfig, benchmark: Benchmark) -> dict[str, Any]:
    """How the numbers were made."""
    return {
        "data": Path(config.data).name,
        "benchmark": config.benchmark,
        **benchmark.protocol(),
        "seeds": list(config.all_seeds),
        "intervals": (
            f"95 %, Student's t: variance of {RESAMPLES} resamples of test prompts (domains: of users)"
            + (f" plus that of {config.seeds} seeds by their number" if config.seeds > 1 else ", one seed")
            + ", Satterthwaite's degrees of freedom; none for forgetting and gains counted as 0, which noise biases"
        ),
    }


def ledger_of(results: Mapping[str, Sequence[SequenceResult]]) -> dict[str, Any]:
    """Sequences, rounds, evaluations and the seconds they took."""
    every = [result for runs in results.values() for result in runs]
    training = sum(one["seconds"] for result in every for one in result.rounds)
    evaluation = sum(cell.facts["seconds"] for result in every for cell in result.cells.values())
    return {
        "sequences": len(every),
        "rounds": sum(len(result.rounds) for result in every),
        "evaluations": sum(len(result.cells) for result in every),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluation, 1),
        "seconds": round(training + evaluation, 1),
    }


def warnings_of(
    config: ContinualConfig, benchmark: Benchmark, results: Mapping[str, Sequence[SequenceResult]]
) -> list[str]:
    """What a reader should know before quoting a number."""
    found, names, floors = [], benchmark.names, benchmark.floors
    if config.seeds < SEEDS_FOR_A_CLAIM:
        what = "the intervals cover test examples, not training" if config.seeds == 1 else "their spread is a guess"
        found.append(
            f"{config.seeds} seed{'s' if config.seeds > 1 else ''}: {what}; use --seeds {SEEDS_FOR_A_CLAIM} or more "
            "before claiming a difference"
        )
    found += benchmark.warnings()
    if config.evaluation == "cheap" and len(names) > 2:
        found.append("forgetting and the average of OP need --evaluation triangle")
    perfect = [name for name in names if floors[name].value >= 1.0]
    if perfect:
        found.append(f"no model is needed for {', '.join(perfect)} as drawn here: OP above floors is undefined")
    if config.learning_rate == 0:
        found.append("learning_rate is 0: nothing was learnt, on purpose")
    for method, runs in results.items():
        final = np.mean([result.scores.matrix[-1] for result in runs], axis=0)
        low = [name for value, name in zip(final, names, strict=True) if value <= floors[name].value]
        if low:
            found.append(f"{method}: at the end not above what no model gets on {', '.join(low)}")
        for name, empty in _empty_tasks(runs).items():
            found.append(f"{method}: all answers of {name} were empty after round {', '.join(map(str, empty))}")
    return found


def _empty_tasks(runs: Sequence[SequenceResult]) -> dict[str, list[int]]:
    """{task: rounds} of evaluations without a single answer."""
    found: dict[str, list[int]] = {}
    for result in runs:
        for at, cell in result.cells.items():
            if cell.facts["empty_predictions"] == cell.facts["n"]:
                rounds = found.setdefault(result.scores.tasks[at.task], [])
                if at.round not in rounds:
                    rounds.append(at.round)
    return found
