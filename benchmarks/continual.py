"""Keeps what finished sequences of `recollect continual` scored, and compares methods over all that was kept.

    python benchmarks/continual.py keep RUN_FOLDER … [--kept FILE]
    python benchmarks/continual.py compare [--kept FILE] [--out benchmarks/results/continual.jsonl]

A sequence is one method with one seed through all tasks, on two cores an hour of work; a table of eight methods is made
in several sittings, and none has the run folders of all. So a line is kept of each sequence: the primary score of every
test example wherever it was evaluated, which examples have equal prompts, floors, parameters, time; no text of a task.
Sequences are compared only where data, options and model are the same; a method with two sets of options is two.

* compare: OP, BWT and OP_norm of each method with 95 % intervals (test prompts and seeds resampled as in the report of
  a run), scores of each task when learnt and at the end, every method minus each of `--against`, and BWT of the first
  method minus half of that of the second (`--half`): above 0 it forgets less than half as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rows import Rows, commit, machine

from recollect.config import build, versions
from recollect.continual.benchmark import Benchmark, open_benchmark
from recollect.continual.cells import read_cell
from recollect.continual.evaluation_plan import Cell
from recollect.continual.run_config import ContinualConfig
from recollect.continual.sequence import MATRIX_FILE, METHOD_FILE, RESULT_FILE
from recollect.continual.trace_intervals import RunScores, aggregate_intervals, difference_intervals
from recollect.eval.statistics import Interval
from recollect.io import read_json

KEPT = Path(__file__).resolve().parent / "results" / "sequences" / "continual.jsonl"
METRICS = ("op", "bwt", "op_norm")
FEW_DIGITS = 4


def main() -> None:
    """Parse the command line; keep sequences, or compare those kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    keep_parser = actions.add_parser("keep", help="add the finished sequences of runs")
    keep_parser.add_argument("runs", nargs="+", type=Path, help="run folders, finished or not")
    compare_parser = actions.add_parser("compare", help="tables over what is kept")
    compare_parser.add_argument(
        "--against", nargs="+", default=["seq-lora", "loramoe"], help="the methods every other one is compared with"
    )
    compare_parser.add_argument("--half", nargs=2, default=["mh-moe", "loramoe"], metavar=("METHOD", "OTHER"))
    compare_parser.add_argument("--out", type=Path, help="also write the rows to this file")
    for one in (keep_parser, compare_parser):
        one.add_argument("--kept", type=Path, default=KEPT, help="file of sequences (default: %(default)s)")
    options = parser.parse_args()
    if options.action == "keep":
        for folder in options.runs:
            keep(folder, options.kept)
    else:
        compare(read_kept(options.kept), options.against, tuple(options.half), options.out)


# ---- keeping -----------------------------------------------------------------------------------------------------


def keep(folder: Path, file: Path) -> None:
    """Add the finished sequences of one run that are not kept yet."""
    manifest = read_json(folder / "run.json")
    benchmark = open_benchmark(build(ContinualConfig, manifest["options"], "the options of a run"), replays=False)
    identity = manifest["identity"]
    known = {sequence_key(kept) for kept in read_kept(file)} if file.is_file() else set()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for finished in sorted(folder.glob(f"methods/*/seed-*/{MATRIX_FILE}")):
            kept = {"identity": identity, **sequence_of(finished.parent, benchmark)}
            if sequence_key(kept) not in known:
                lines.write(json.dumps(kept, allow_nan=False) + "\n")
                sys.stderr.write(f"kept {kept['method']}, seed {kept['seed']}\n")


def sequence_key(kept: Mapping[str, Any]) -> str:
    """What one sequence is told from another by."""
    return json.dumps([kept["identity"], kept["about"], kept["seed"]], sort_keys=True)


def sequence_of(folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """The line of one finished sequence; its folder is methods/NAME/seed-S."""
    names = benchmark.names
    rounds = [read_json(folder / f"round-{number}" / RESULT_FILE) for number in range(1, len(names) + 1)]
    cells, seconds = {}, 0.0
    for file in sorted((folder / "cells").glob("*.json")):
        after, _, task = file.stem.partition("-")
        found = read_cell(folder / "cells", Cell(int(after), names.index(task)), task)
        cells[file.stem] = [round(float(score), FEW_DIGITS) for score in found.primary]
        seconds += found.facts["seconds"]
    ability = {file.stem: read_json(file) for file in sorted(folder.glob("ability-*.json"))}
    return {
        "method": folder.parent.name,
        "seed": int(folder.name.removeprefix("seed-")),
        "about": read_json(folder / METHOD_FILE),
        "tasks": list(names),
        "cells": cells,
        "prompts": {name: labels.tolist() for name, labels in benchmark.clusters().items()},
        "floors": {name: benchmark.floors[name].value for name in names},
        "parameters": rounds[-1]["parameters"],
        "training_seconds": round(sum(one["seconds"] for one in rounds), 1),
        "evaluation_seconds": round(seconds, 1),
        "ability": {when: found["accuracy"] for when, found in ability.items()},
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }


def read_kept(file: Path) -> list[dict[str, Any]]:
    """The sequences of a file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


# ---- comparing ---------------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """Sequences of one data set, options and model. runs: {method: {seed: scores}}."""

    identity: Mapping[str, Any]
    runs: Mapping[str, Mapping[int, RunScores]]
    lines: Sequence[Mapping[str, Any]]

    def scores(self, method: str, seeds: Sequence[int]) -> list[RunScores]:
        """Of a method with these seeds, in order."""
        return [self.runs[method][seed] for seed in seeds]

    def common_seeds(self, one: str, other: str) -> list[int]:
        """Seeds that both methods were run with."""
        return sorted(self.runs[one].keys() & self.runs[other].keys())

    def how(self) -> dict[str, Any]:
        """What intervals need beside scores."""
        first = self.lines[0]
        return {
            "floors": np.array([first["floors"][name] for name in first["tasks"]]),
            "clusters": {name: np.array(labels) for name, labels in first["prompts"].items()},
            "seed": 0,
        }


def grouped(kept: Sequence[Mapping[str, Any]]) -> list[Sequences]:
    """Sequences that may be compared with each other, together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in kept:
        groups.setdefault(json.dumps(one["identity"], sort_keys=True), []).append(one)
    found = []
    for lines in groups.values():
        named = [{**one, "method": name} for one, name in zip(lines, told_apart(lines), strict=True)]
        runs: dict[str, dict[int, RunScores]] = {}
        for one in named:
            runs.setdefault(one["method"], {})[one["seed"]] = scores_of(one)
        found.append(Sequences(lines[0]["identity"], runs, named))
    return found


def told_apart(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The method of each sequence; of one with several sets of options, all but the first have a number, too."""
    variants: dict[str, list[str]] = {}
    names = []
    for one in lines:
        about = json.dumps(one["about"], sort_keys=True)
        known = variants.setdefault(one["method"], [])
        if about not in known:
            known.append(about)
        number = known.index(about)
        names.append(f"{one['method']} ({number + 1})" if number else one["method"])
    return names


def scores_of(kept: Mapping[str, Any]) -> RunScores:
    """The scores of one kept sequence."""
    cells = {}
    for stem, values in kept["cells"].items():
        after, _, task = stem.partition("-")
        cells[Cell(int(after), kept["tasks"].index(task))] = np.array(values, dtype=np.float64)
    return RunScores(tuple(kept["tasks"]), cells)


def halved(run: RunScores) -> RunScores:
    """The same with half of every score, and so half of its BWT."""
    return RunScores(run.tasks, {cell: values / 2 for cell, values in run.cells.items()})


def compare(kept: Sequence[Mapping[str, Any]], against: Sequence[str], half: tuple[str, str], out: Path | None) -> None:
    """The rows of every group of sequences."""
    with Rows("continual", out) as rows:
        for group in grouped(kept):
            identity = group.identity
            rows.data = (
                f"{identity['data']}, {identity['train_examples']} training and {identity['test_examples']} test rows "
                f"a task, epochs {identity['epochs']} in batches of {identity['batch_size']}"
            )
            rows.model = str(identity["backbone"])
            rows.note = f"prompts up to {identity['max_prompt']} tokens, learning rate {identity['learning_rate']:g}"
            add_methods(rows, group)
            add_tasks(rows, group)
            for other in against:
                add_differences(rows, group, other)
            if all(method in group.runs for method in half):
                add_half(rows, group, half)


def add_methods(rows: Rows, group: Sequences) -> None:
    """Aggregates, parameters and time of every method."""
    for method, runs in group.runs.items():
        seeds = sorted(runs)
        told = ",".join(map(str, seeds))
        found = aggregate_intervals(group.scores(method, seeds), **group.how())
        for metric in METRICS:
            add_interval(rows, "all methods", method, metric, found[metric], told, len(seeds))
        lines = [one for one in group.lines if one["method"] == method]
        parameters = lines[0]["parameters"] or {}
        for name in ("experts", "activated"):
            if name in parameters:
                rows.add("all methods", method, f"{name}_parameters", parameters[name], seed=told)
        minutes = [(one["training_seconds"] + one["evaluation_seconds"]) / 60 for one in lines]
        rows.add_median("all methods", method, "minutes", minutes, seed=told)


def add_tasks(rows: Rows, group: Sequences) -> None:
    """Mean score of each task just after it was learnt and at the end, and what needs no model."""
    tasks, floors = group.lines[0]["tasks"], group.lines[0]["floors"]
    for name in ("when learnt", "at the end"):
        for method, runs in group.runs.items():
            seeds = sorted(runs)
            matrix = np.mean([run.matrix for run in group.scores(method, seeds)], axis=0)
            scores = np.diagonal(matrix) if name == "when learnt" else matrix[-1]
            told = ",".join(map(str, seeds))
            for task, score in zip((*tasks, "mean"), (*scores, scores.mean()), strict=True):
                rows.add(name, method, task, float(score), n=len(seeds), seed=told)
        for task, score in {**floors, "mean": float(np.mean(list(floors.values())))}.items():
            rows.add(name, "no model", task, score)


def add_differences(rows: Rows, group: Sequences, against: str) -> None:
    """Every method minus one, over their common seeds."""
    for method in group.runs:
        seeds = group.common_seeds(method, against) if against in group.runs and method != against else []
        if seeds:
            pair = group.scores(method, seeds), group.scores(against, seeds)
            found = difference_intervals(*pair, **group.how())
            for metric in METRICS:
                told = ",".join(map(str, seeds))
                add_interval(rows, f"minus {against}", method, metric, found[metric], told, len(seeds))


def add_half(rows: Rows, group: Sequences, half: tuple[str, str]) -> None:
    """BWT of one method minus half of another's."""
    seeds = group.common_seeds(*half)
    if not seeds:
        return
    other = [halved(run) for run in group.scores(half[1], seeds)]
    found = difference_intervals(group.scores(half[0], seeds), other, **group.how())["bwt"]
    told = ",".join(map(str, seeds))
    add_interval(rows, f"minus half of {half[1]}", half[0], "bwt", found, told, len(seeds))


def add_interval(rows: Rows, name: str, method: str, metric: str, found: Interval, seeds: str, n_seeds: int) -> None:
    """One mean with its interval; n counts test rows times seeds."""
    rows.add(
        name, method, metric, found.value, low=found.low, high=found.high, spread="ci95",
        n=found.n * n_seeds, seed=seeds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
