"""How sure the aggregates are: test examples and seeds are resampled, for every method alike.

Scores come from a few dozen to a few hundred test examples a task and from a few training seeds.  A draw takes clusters
of test examples with replacement inside each task (the same ones for every round, seed and method, since all answered
the same examples); the aggregate is computed anew from the means.  Draws depend on (seed, task, number of clusters)
alone, so methods are compared on common draws.  Where clusters reach over tasks (a user with a case in several) one
draw of clusters serves all tasks; a task of which it holds none keeps its mean.

To the variance of these draws, for the mean over S seeds, comes that of the seeds: V = V_items + s² / S, with s² the
variance of the S values.  The interval is Student's, with Satterthwaite's degrees of freedom
V² / (V_items² / (clusters - tasks) + (s² / S)² / (S - 1)).  Resampling three seeds instead would give intervals from
the lowest to the highest of them.  With one seed the interval speaks of test examples only.

Aggregates with a maximum or minimum over noisy scores (`BIASED`) have no interval: their error does not lie around 0.
Source: trace_benchmark 9 ("bootstrap 95 % CI over test items"); clusters, seeds and pairing are [our design], the parts
are textbook (Satterthwaite 1946).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.continual import aggregates
from recollect.continual.evaluation_plan import Cell
from recollect.errors import InputError
from recollect.eval.seeds_and_users import student_half_width
from recollect.eval.statistics import RESAMPLES, Interval, cluster_codes, resample_weights

Clusters = Mapping[str, np.ndarray]
BIASED = ("forgetting", "forgetting_nonnegative", "bwt_clipped_T")
"""Aggregates whose expectation is off where scores are noisy: above 0 (the last: below) for a model that forgets
nothing.  Claims rest on bwt."""
_SAME = 1e-12
"""Share of the largest value that sums in another order may differ by."""


@dataclass(frozen=True)
class RunScores:
    """Scores of one run (one method, one training seed).

    tasks: names in the order of training.  cells: {(round, task): (n_i,) primary scores 0..1 of the test examples, file
    order}, round 0 = the untouched model, round t = after t tasks, task from 0.
    """

    tasks: tuple[str, ...]
    cells: Mapping[Cell, np.ndarray]

    def __post_init__(self) -> None:
        n_tasks = len(self.tasks)
        sizes: dict[int, int] = {}
        for cell, values in self.cells.items():
            if not (0 <= cell[0] <= n_tasks and 0 <= cell[1] < n_tasks):
                raise InputError(f"scores of round {cell[0]}, task {cell[1]} do not belong to {n_tasks} tasks")
            if len(values) != sizes.setdefault(cell[1], len(values)) or not len(values):
                raise InputError(
                    f"{self.tasks[cell[1]]}: {len(values)} scores after round {cell[0]}, {sizes[cell[1]]} elsewhere; "
                    "every round answers the same test examples"
                )

    @property
    def rounds(self) -> np.ndarray:
        """(T+1, T) mean scores, row 0 the untouched model; NaN where not evaluated."""
        table = np.full((len(self.tasks) + 1, len(self.tasks)), np.nan)
        for (after, task), values in self.cells.items():
            table[after, task] = np.mean(values)
        return table

    @property
    def matrix(self) -> np.ndarray:
        """R (T, T)."""
        return self.rounds[1:]

    @property
    def n_examples(self) -> int:
        """Test examples of all tasks."""
        return sum(len(values) for values in {task: values for (_, task), values in self.cells.items()}.values())


def statistics_of(floors: np.ndarray | None = None) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Aggregates as functions of tables (..., T+1, T); OP_norm with floors (T,)."""
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "op": lambda table: aggregates.overall_performance(table[..., 1:, :]),
        "bwt": lambda table: aggregates.bwt(table[..., 1:, :]),
        "bwt_T": lambda table: aggregates.bwt_T(table[..., 1:, :]),
        "bwt_clipped_T": lambda table: aggregates.bwt_clipped_T(table[..., 1:, :]),
        "forgetting": lambda table: aggregates.forgetting(table[..., 1:, :]),
        "forgetting_nonnegative": lambda table: aggregates.forgetting_nonnegative(table[..., 1:, :]),
        "average_incremental": lambda table: aggregates.average_incremental(table[..., 1:, :]),
        "fwt": lambda table: aggregates.forward_transfer(table[..., 1:, :], table[..., 0, :]),
    }
    if floors is not None:
        fixed = np.asarray(floors, dtype=np.float64)
        functions["op_norm"] = lambda table: aggregates.normalized_performance(table[..., 1:, :], fixed)
    return functions


def per_seed(runs: Sequence[RunScores], floors: np.ndarray | None = None) -> dict[str, list[float]]:
    """Each aggregate of each run; NaN where a cell it needs was not evaluated."""
    tables = np.stack([run.rounds for run in runs])
    return {name: function(tables).tolist() for name, function in statistics_of(floors).items()}


def aggregate_intervals(
    runs: Sequence[RunScores],
    *,
    floors: np.ndarray | None = None,
    clusters: Clusters | None = None,
    across_tasks: bool = False,
    n: int = RESAMPLES,
    seed: int,
) -> dict[str, Interval]:
    """Mean over training seeds of every aggregate with its 95 % interval; see the module's text.

    Args:
        runs: one method's runs, one per training seed, on the same tasks and test examples.
        clusters: {task: (n_i,) label}: examples that move together (equal or templated prompts); None or a task that
            is missing = every example by itself.
        across_tasks: equal labels in two tasks are one cluster; every task needs labels then.

    Raises:
        InputError: the runs differ in tasks or test examples, or labels do not fit.
    """
    _check_alike(runs)
    draws, freedom = _resampled(runs, clusters or {}, across_tasks, n, seed)
    tables = np.stack([run.rounds for run in runs])
    return {
        name: _interval(name, function(tables), function(draws), freedom, runs[0].n_examples)
        for name, function in statistics_of(floors).items()
    }


def difference_intervals(
    first: Sequence[RunScores],
    second: Sequence[RunScores],
    *,
    floors: np.ndarray | None = None,
    clusters: Clusters | None = None,
    across_tasks: bool = False,
    n: int = RESAMPLES,
    seed: int,
) -> dict[str, Interval]:
    """First minus second in every aggregate, paired by test example and by training seed (same order of seeds).

    Raises:
        InputError: the methods differ in tasks, test examples or number of seeds, or labels do not fit.
    """
    if len(first) != len(second):
        raise InputError(f"{len(first)} runs against {len(second)}; pair the methods seed by seed")
    _check_alike([*first, *second])
    known = clusters or {}
    one, freedom = _resampled(first, known, across_tasks, n, seed)
    other, _ = _resampled(second, known, across_tasks, n, seed)
    tables = np.stack([run.rounds for run in first]), np.stack([run.rounds for run in second])
    return {
        name: _interval(
            name,
            function(tables[0]) - function(tables[1]),
            function(one) - function(other),
            freedom,
            first[0].n_examples,
        )
        for name, function in statistics_of(floors).items()
    }


def _interval(name: str, values: np.ndarray, draws: np.ndarray, freedom: int, n: int) -> Interval:
    """Of the mean of values (S,), with draws (n, S) over test examples and their degrees of freedom."""
    value, n_seeds = float(values.mean()), len(values)
    means = draws.mean(axis=-1)
    if name in BIASED or not math.isfinite(value) or not np.isfinite(means).all() or freedom < 1:
        return Interval(value, math.nan, math.nan, n)
    of_items = float(means.var())
    of_seeds = float(values.var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    if math.sqrt(of_items + of_seeds) <= _SAME * max(1.0, float(np.abs(values).max())):
        return Interval(value, value, value, n)
    half, _ = student_half_width(of_items, freedom, of_seeds, n_seeds)
    return Interval(value, value - half, value + half, n)


def _check_alike(runs: Sequence[RunScores]) -> None:
    if not runs:
        raise InputError("no runs given; at least one is needed")
    sizes = [{task: len(values) for (_, task), values in run.cells.items()} for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        if run.tasks != runs[0].tasks or size != sizes[0]:
            raise InputError(
                f"runs differ in tasks or test examples: {run.tasks!r} with {size!r}, {runs[0].tasks!r} with "
                f"{sizes[0]!r}; compare runs on the same ones"
            )


def _resampled(
    runs: Sequence[RunScores], clusters: Clusters, across_tasks: bool, n: int, seed: int
) -> tuple[np.ndarray, int]:
    """Mean scores under resampled examples, (n, S, T+1, T), and their degrees of freedom."""
    tasks = runs[0].tasks
    draws = np.full((n, len(runs), len(tasks) + 1, len(tasks)), np.nan)
    everyone, shared, freedom = np.empty(0), np.empty((n, 0)), 0
    if across_tasks:
        everyone = np.unique(np.concatenate([np.asarray(clusters[name]) for name in tasks]))
        chunks = resample_weights(len(everyone), n, seed, name="test examples of all tasks")
        shared, freedom = np.concatenate(list(chunks)), len(everyone) - 1
    for at, name in enumerate(tasks):
        columns = [
            (number, after, np.asarray(values, dtype=np.float64))
            for number, run in enumerate(runs)
            for (after, task), values in run.cells.items()
            if task == at
        ]
        if not columns:
            continue
        scores = np.stack([values for _, _, values in columns], axis=1)  # (n_i, columns)
        labels = np.asarray(clusters.get(name, np.arange(len(scores))))
        if labels.shape != (len(scores),):
            raise InputError(f"{name}: {len(labels)} cluster labels for {len(scores)} test examples")
        codes, n_clusters = cluster_codes(labels)
        sums = np.zeros((n_clusters, scores.shape[1]))
        np.add.at(sums, codes, scores)
        counts = np.bincount(codes, minlength=n_clusters).astype(np.float64)
        start = 0
        if across_tasks:
            chunks = iter([shared[:, np.searchsorted(everyone, np.unique(labels))]])
        else:
            chunks = resample_weights(n_clusters, n, seed, name=f"test examples of {name}")
            freedom += n_clusters - 1
        for weights in chunks:
            weights = np.where((weights @ counts > 0)[:, None], weights, 1.0)
            means = (weights @ sums) / (weights @ counts)[:, None]
            for column, (number, after, _) in enumerate(columns):
                draws[start : start + len(weights), number, after, at] = means[:, column]
            start += len(weights)
    return draws, freedom
