"""The page of a continual run: tables and plots as JSON panels (`recollect.eval.panels`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.continual.benchmark import Benchmark
from recollect.continual.diagnostics.panels import diagnostic_panels
from recollect.continual.entries import Entry
from recollect.continual.methods.registry import method_spec
from recollect.continual.run_config import ContinualConfig
from recollect.types import Report

NAMES = {
    "op": "OP",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "op_norm": "OP above floors",
    "bwt_T": "BWT / T",
    "bwt_clipped_T": "BWT / T, gains as 0",
    "forgetting_nonnegative": "forgetting, gains as 0",
    "average_incremental": "mean OP over rounds",
    "fwt": "forward transfer",
}


def all_panels(
    config: ContinualConfig, entries: Sequence[Entry], benchmark: Benchmark, report: Report
) -> list[dict[str, Any]]:
    """Tables and plots of the page, in reading order."""
    found = []
    if len(entries) > 1:
        found += [
            comparison_panel(config, report),
            forest_panel(report, "op"),
            forest_panel(report, "bwt"),
            difference_panel(report),
            final_panel(report),
        ]
    for entry in entries:
        found += matrix_panels(report, entry, terminal=len(entries) == 1)
    found += [variant_panel(report)]
    found += [benchmark.task_panel(report, entry.name) for entry in entries]
    found += [*metric_panels(report, entries[0].name), *benchmark.data_panels(report)]
    found += [*curve_panels(report, entries, benchmark.loss_label), cost_panel(report)]
    if any(seed["ability"] for one in report.sections["methods"].values() for seed in one["seeds"]):
        found.append(ability_panel(report))
    found += diagnostic_panels(report.sections.get("diagnostics"))
    found.append(method_panel(entries))
    return found


def comparison_panel(config: ContinualConfig, report: Report) -> dict[str, Any]:
    """Every method against the four headline numbers and its size; the floors last."""
    columns = ("op", "bwt", "forgetting", "op_norm")
    rows: list[list[Any]] = []
    for name, one in report.sections["methods"].items():
        size = adapter_sizes(one)
        cells = [{"value": one["aggregates"][key]["value"], "ci95": one["aggregates"][key]["ci95"]} for key in columns]
        rows.append([name, *cells, size["own"], size["activated"]])
    floors = [floor["value"] for floor in report.sections["floors"].values()]
    rows.append(["no model (floors)", float(np.mean(floors)), None, None, 0.0, 0, 0])
    return {
        "kind": "table",
        "title": f"Methods, {len(floors)} tasks, mean of {config.seeds} seed{'s' if config.seeds > 1 else ''}",
        "columns": ["method", *(NAMES[key] for key in columns), "adapter parameters", "used per token"],
        "rows": rows,
        "note": "OP: mean score over all tasks at the end. BWT: mean change of earlier tasks since they were learnt; "
        "negative is forgetting. OP above floors: 0 is what no model gets, 1 a perfect score. Forgetting is a maximum "
        "over noisy scores, so above 0 for a model that forgets nothing, and has no interval: claims rest on BWT.",
    }


def forest_panel(report: Report, metric: str) -> dict[str, Any]:
    """One headline number of every method with its interval."""
    entries = {
        name: one["aggregates"][metric]
        for name, one in report.sections["methods"].items()
        if one["aggregates"][metric]["value"] is not None
    }
    floors = [floor["value"] for floor in report.sections["floors"].values()]
    return {
        "kind": "intervals",
        "title": NAMES[metric],
        "labels": list(entries),
        "values": [entry["value"] for entry in entries.values()],
        "low": [entry["ci95"][0] for entry in entries.values()],
        "high": [entry["ci95"][1] for entry in entries.values()],
        "reference": float(np.mean(floors)) if metric == "op" else 0.0,
        "axis": NAMES[metric],
        "note": "The line is what no model gets." if metric == "op" else "Left of the line is forgetting.",
    }


def difference_panel(report: Report) -> dict[str, Any]:
    """The first method minus the others, paired."""
    found = report.sections["differences"]
    against = list(dict.fromkeys(row["against"] for row in found))
    metrics = list(dict.fromkeys(row["metric"] for row in found))
    by_pair = {(row["against"], row["metric"]): {"value": row["value"], "ci95": row["ci95"]} for row in found}
    return {
        "kind": "table",
        "title": f"{report.sections['subject']} minus each other method, paired",
        "columns": ["against", *(NAMES[metric] for metric in metrics)],
        "rows": [[other, *(by_pair[other, metric] for metric in metrics)] for other in against],
        "terminal": True,
    }


def final_panel(report: Report) -> dict[str, Any]:
    """Every method against every task at the end, floors last."""
    tasks = report.sections["tasks"]
    floors = [report.sections["floors"][name]["value"] for name in tasks]
    rows = [[name, *one["accuracy_matrix"][-1]] for name, one in report.sections["methods"].items()]
    return {
        "kind": "table",
        "title": "Scores at the end",
        "columns": ["method", *tasks],
        "rows": [*rows, ["no model (floors)", *floors]],
        "note": "Mean over seeds of each task's primary metric, 0 to 1.",
        "terminal": True,
    }


def matrix_panels(report: Report, entry: Entry, terminal: bool) -> list[dict[str, Any]]:
    """R of a method as a table, with the untouched model above and the floors below, and as a heat map."""
    one = report.sections["methods"][entry.name]
    tasks = report.sections["tasks"]
    lines: list[tuple[str, list[float | None]]] = []
    if any(value is not None for value in one["untouched"]):
        lines.append(("untouched", one["untouched"]))
    rows = one["accuracy_matrix"]
    if entry.spec.is_joint:
        lines.append(("all at once", rows[-1]))
    else:
        lines += [
            (f"after {number}. {name}", row) for number, (name, row) in enumerate(zip(tasks, rows, strict=True), 1)
        ]
    floors = [report.sections["floors"][name]["value"] for name in tasks]
    return [
        {
            "kind": "table",
            "title": f"Scores after every task: {entry.name}",
            "columns": ["", *tasks],
            "rows": [*([name, *row] for name, row in lines), ["no model (floors)", *floors]],
            "note": "Mean over seeds of each task's primary metric, 0 to 1. Empty: not evaluated.",
            "terminal": terminal,
        },
        {
            "kind": "heat",
            "title": f"The same as a map: {entry.name}",
            "rows": [name for name, _ in lines],
            "columns": tasks,
            "values": [row for _, row in lines],
            "x_label": "task",
        },
    ]


def variant_panel(report: Report) -> dict[str, Any]:
    """Every variant of the aggregates, so that a number can be laid beside any paper's."""
    methods = report.sections["methods"]
    n_tasks = len(report.sections["tasks"])
    rows = []
    for key, name in NAMES.items():
        cells = []
        for one in methods.values():
            entry = one["aggregates"][key]
            each = [value for value in one["per_seed"][key] if value is not None]
            marks = f"seeds: {', '.join(f'{value:.3f}' for value in each)}" if len(each) > 1 else ""
            cells.append({"value": entry["value"], "ci95": entry["ci95"], "marks": marks})
        rows.append([name, *cells])
    return {
        "kind": "table",
        "title": "Every aggregate",
        "columns": ["", *methods],
        "rows": rows,
        "note": "OP: mean score over all tasks at the end; above floors, 0 is no model and 1 a perfect score. "
        "BWT: mean change of earlier tasks since they were learnt, negative = forgetting. "
        f"BWT divides by T-1, BWT / T by T = {n_tasks}; papers that print a positive BWT mean its negative. "
        "Forgetting: best score before the last task minus the last. It and what counts gains as 0 take a maximum or "
        "minimum of noisy scores and are off where nothing is forgotten: they have no interval, claims rest on BWT.",
    }


def task_panel(report: Report, method: str) -> dict[str, Any]:
    """Primary metric of every task beside its floor, right after its training and at the end."""
    one = report.sections["methods"][method]
    rows = []
    for name, found in one["scores"].items():
        floor = report.sections["floors"][name]
        primary = found["primary"]
        final = found["final"] or {}
        learnt = (found["learnt"] or {}).get(primary)
        ends = final.get(primary)
        lenient = final.get(f"{primary}_normalized")
        change = ends - learnt if ends is not None and learnt is not None else None
        rows.append([name, primary, found["n"], floor["value"], learnt, ends, change, lenient])
    return {
        "kind": "table",
        "title": f"Tasks: {method}",
        "columns": [
            "task",
            "metric",
            "test examples",
            "floor",
            "learnt",
            "at the end",
            "change",
            "normalised at the end",
        ],
        "rows": [[*row[:-1], "–" if row[-1] is None else row[-1]] for row in rows],
        "note": "Accuracy is the benchmark's: the very string. Normalised: blanks stripped, first letter or number "
        "taken, numbers compared by value. Floors: "
        + "; ".join(f"{name}: {floor['predictor']}" for name, floor in report.sections["floors"].items())
        + ".",
    }


def metric_panels(report: Report, method: str) -> list[dict[str, Any]]:
    """Further metrics of the tasks that have them, at the end."""
    rows = []
    for name, found in report.sections["methods"][method]["scores"].items():
        for metric, value in (found["final"] or {}).items():
            if metric not in (found["primary"], f"{found['primary']}_normalized"):
                rows.append([name, metric, value])
    if not rows:
        return []
    return [
        {
            "kind": "table",
            "title": f"Further metrics at the end: {method}",
            "columns": ["task", "metric", "value"],
            "rows": rows,
        }
    ]


def data_panel(report: Report) -> dict[str, Any]:
    """What the files hold: repeats, leaks, what was shortened."""
    rows = []
    for name, facts in report.sections["task_facts"].items():
        used = report.sections["training_rows"][name]
        train, test = facts["train"], facts["test"]
        rows.append(
            [
                name,
                train["n"],
                train["n_distinct_prompts"],
                train["n_conflicting_prompts"],
                train["n_used"],
                test["n"],
                test["n_distinct_prompts"],
                test["n_used"],
                test["shortened_prompts"],
                facts["test_in_train"],
                facts["test_in_eval"],
                used["epochs"],
                used["shortened_prompts"],
                used["cut_answers"],
            ]
        )
    return {
        "kind": "table",
        "title": "What the files hold",
        "columns": [
            "task",
            "train rows",
            "distinct prompts",
            "prompts with several answers",
            "used",
            "test rows",
            "distinct prompts",
            "used",
            "shortened",
            "test rows also in train",
            "test rows also in eval",
            "epochs",
            "shortened in training",
            "cut answers",
        ],
        "rows": rows,
    }


def curve_panels(report: Report, entries: Sequence[Entry], loss_label: str) -> list[dict[str, Any]]:
    """Training loss over the epochs of the whole sequence, mean of seeds; one panel for methods of equal length."""
    by_length: dict[int, dict[str, list[float]]] = {}
    for entry in entries:
        curves = []
        for seed in report.sections["methods"][entry.name]["seeds"]:
            curves.append([row["loss"] for one in seed["rounds"] for row in one["phases"]["train"]["history"]])
        by_length.setdefault(len(curves[0]), {})[entry.name] = np.mean(curves, axis=0).tolist()
    return [
        {
            "kind": "lines",
            "title": "Training loss",
            "x": list(range(1, length + 1)),
            "series": series,
            "x_label": "epoch of the whole sequence, task after task",
            "y_label": loss_label,
        }
        for length, series in by_length.items()
    ]


def cost_panel(report: Report) -> dict[str, Any]:
    """Parameters, memory and time of every method."""
    rows = []
    for name, one in report.sections["methods"].items():
        size = adapter_sizes(one)
        rounds = [found for seed in one["seeds"] for found in seed["rounds"]]
        peaks = [found["peak_mb"] for found in rounds if found["peak_mb"] is not None]
        speeds = [found["phases"]["train"]["samples_per_second"] for found in rounds]
        speeds = [speed for speed in speeds if speed]
        rows.append(
            [
                name,
                size["own"],
                size["experts"],
                size["router"],
                size["activated"],
                "–" if size["own"] is None else f"{100 * size['own'] / size['total']:.2f} %",
                round(max(peaks)) if peaks else None,
                sum(found["seconds"] for found in rounds) / len(one["seeds"]),
                float(np.mean(speeds)) if speeds else None,
                sum(seed["evaluation_seconds"] for seed in one["seeds"]) / len(one["seeds"]),
            ]
        )
    return {
        "kind": "table",
        "title": "Size and cost",
        "columns": [
            "method",
            "adapter parameters",
            "of experts",
            "of routers",
            "used per token",
            "share of the model",
            "peak MiB",
            "training seconds",
            "rows per second",
            "evaluation seconds",
        ],
        "rows": rows,
        "note": "Parameters after the last task, of one seed, frozen ones included. Memory: of the GPU, or what the "
        "process took beyond its start. Seconds: per sequence, of the processes that ended the rounds.",
    }


def adapter_sizes(one: Mapping[str, Any]) -> dict[str, Any]:
    """Counts after the last task: adapters, experts, routers, what a token uses, the model; None without adapters.

    Of a method that keeps a copy of its adapters for every task, all copies but for what a token uses.
    """
    rounds = one["seeds"][0]["rounds"]
    found = rounds[-1]["parameters"]
    if found is None:
        return dict.fromkeys(("own", "experts", "router", "activated", "total"))
    copies = len(rounds) if method_spec(one["method"]).per_task == "copy" else 1
    own = copies * (found["total"] - found["base"])
    kept = {key: copies * found[key] for key in ("experts", "router")}
    return {"own": own, **kept, "activated": found["activated"], "total": found["base"] + own}


def ability_panel(report: Report) -> dict[str, Any]:
    """The general questions before and after, mean over seeds."""
    rows = []
    for name, one in report.sections["methods"].items():
        found = [seed["ability"] for seed in one["seeds"] if seed["ability"]]
        if not found:
            continue
        before, after = (np.mean([each[when]["accuracy"] for each in found]) for when in ("before", "after"))
        deltas = [each["delta"] for each in found]
        margins = [each["after"]["margin"] - each["before"]["margin"] for each in found]
        rows.append([name, float(before), float(after), float(np.mean(deltas)), float(np.mean(margins))])
    return {
        "kind": "table",
        "title": "General questions",
        "columns": ["method", "before", "after", "general ability delta", "change of the right answer's log-odds"],
        "rows": rows,
        "note": "Forty questions with four short answers each, scored by likelihood; a standard error of about 0.07: "
        "they show a collapse, not a ranking of methods. Delta: mean over the skills asked for, after minus before.",
    }


def method_panel(entries: Sequence[Entry]) -> dict[str, Any]:
    """What the methods' names mean, what they are told or keep, and what else moves their updates."""
    rows: list[list[Any]] = []
    for entry in entries:
        adapter, has = entry.adapter, entry.spec.has_adapters
        moves = [adapter.scaling, adapter.dropout, adapter.balance] if has else ["–"] * 3
        told = ["yes" if flag else "no" for flag in (entry.spec.keeps_data, entry.spec.needs_task)]
        rows.append([entry.name, entry.spec.summary, *told, *moves])
    return {
        "kind": "table",
        "title": "What the methods are",
        "columns": ["method", "what it is", "keeps data", "is told the task", "scale", "dropout", "balance"],
        "rows": rows,
        "note": "Scale: alpha / rank of the adapters' update. Balance: coefficient of the routers' load-balancing "
        "loss. Where they differ between methods, so do more than the methods' ideas.",
    }
