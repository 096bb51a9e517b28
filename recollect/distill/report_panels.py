"""The page of a distillation: tables and plots as JSON panels (`recollect.eval.panels`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recollect.distill.config import SUMMARIES, DistillConfig
from recollect.distill.methods import Row
from recollect.distill.results import SEEDS_FOR_A_CLAIM, SeedResults
from recollect.distill.rounds import WEIGHT_BINS
from recollect.types import Report


def all_panels(config: DistillConfig, report: Report, seeds: Sequence[SeedResults]) -> list[dict[str, Any]]:
    """Tables and plots of the page, in reading order."""
    metric = report.sections["primary_metric"]
    found = [accuracy_panel(config, report), forest_panel(report, metric), difference_panel(report)]
    if report.sections["goals"]:
        found.append(goal_panel(report))
    found += [*round_panels(config, seeds, metric), *weight_panels(config, seeds)]
    found += [mask_panel(report, metric), shuffle_panel(report, metric), cost_panel(report), method_panel(config)]
    return found


def accuracy_panel(config: DistillConfig, report: Report) -> dict[str, Any]:
    """Every model against hit rate, NDCG and coverage."""
    models = report.sections["models"]
    cut = report.sections["primary_metric"].partition("@")[2]
    wanted = (f"hr@{cut}", f"ndcg@{cut}", "mrr", "coverage@10")
    columns = [name for name in wanted if all(name in table for table in models.values())]
    metric = report.sections["primary_metric"]
    rows = []
    for name, table in models.items():
        cells = ({key: table[column][key] for key in ("value", "ci95")} for column in columns)
        rows.append([name, *cells, _sd(table[metric]["sd"])])
    details = report.sections["rows"]
    own, alone = details["self_distilled"]["teacher_validation"], details["student_alone"]["validation"]
    return {
        "kind": "table",
        "title": f"Test, full ranking, mean of {config.seeds} seed{'s' if config.seeds > 1 else ''}",
        "columns": ["model", *columns, f"sd over seeds, {metric}"],
        "rows": rows,
        "note": f"student: {config.student}; teacher: {config.teacher}; distilled: {config.method}. "
        "Names with a slash are a method's two sides; pop counts training events, markov what followed the last item. "
        f"ensemble: the LLM's share is the best of {report.sections['ensemble']['weights_tried']} on validation. "
        f"self_distilled: its teacher, another seed, has {metric} {np.mean(own):.4f} on validation where the student "
        f"alone has {np.mean(alone):.4f} (means of seeds).",
        "terminal": True,
    }


def forest_panel(report: Report, metric: str) -> dict[str, Any]:
    """The primary metric of every model with its interval; the line is the student alone."""
    models = report.sections["models"]
    entries = [table[metric] for table in models.values()]
    return {
        "kind": "intervals",
        "title": f"{metric} on test",
        "labels": list(models),
        "values": [entry["value"] for entry in entries],
        "low": [entry["ci95"][0] for entry in entries],
        "high": [entry["ci95"][1] for entry in entries],
        "reference": models["student_alone"][metric]["value"],
        "axis": metric,
    }


def difference_panel(report: Report) -> dict[str, Any]:
    """Paired differences against the student alone, the controls and the ensemble."""
    rows = [
        [
            row["model"],
            row["against"],
            {"value": row["value"], "ci95": row["ci95"]},
            _sd(row["sd"]),
            "–" if row["relative"] is None else f"{100 * row['relative']:+.1f} %",
            row["p_holm"],
        ]
        for row in report.sections["differences"]
        if row["against"] == "student_alone" or row["model"].endswith("_distilled")
    ]
    return {
        "kind": "table",
        "title": f"Paired differences of {report.sections['primary_metric']}",
        "columns": ["model", "against", "difference", "sd over seeds", "relative", "p (Holm)"],
        "rows": rows,
        "note": "Difference: mean of seeds, its interval over users. p is adjusted by Holm over all models tested "
        "against the same one, those included that are not shown here.",
        "terminal": True,
    }


def goal_panel(report: Report) -> dict[str, Any]:
    """What was aimed at, and whether it was reached."""
    rows = [
        [
            goal["goal"],
            "–" if goal["measured"] is None else f"{100 * goal['measured']:+.1f} %",
            "–" if goal["difference"] is None else {**goal["difference"], "n": None, "digits": 4},
            _sd(goal["sd"]),
            "yes" if goal["met"] else f"no: {goal['why_not']}",
        ]
        for goal in report.sections["goals"]
    ]
    return {
        "kind": "table",
        "title": "Goals",
        "columns": ["goal", "measured", "difference", "sd over seeds", "met"],
        "rows": rows,
        "note": f"A goal needs at least {SEEDS_FOR_A_CLAIM} seeds, an interval above 0 over users and no seed whose "
        "own difference is below 0. Difference: mean of seeds; of goal C the gain less 90 % of the ensemble's.",
        "terminal": True,
    }


def _sd(value: float | None) -> str | dict[str, Any]:
    return "–" if value is None else {"value": value, "digits": 4}


def round_panels(config: DistillConfig, seeds: Sequence[SeedResults], metric: str) -> list[dict[str, Any]]:
    """Validation per half-round of both sides, per method that has rounds; mean of seeds."""
    found = []
    for method in config.rows:
        rows = [results.rows[method] for results in seeds]
        n_rounds = max((half["round"] for row in rows for half in row.half_rounds), default=0)
        if n_rounds < 1 or len(rows[0].half_rounds) < 2:
            continue
        sides = {"up": ("student", "student_alone"), "down": ("teacher", "teacher_alone")}
        series: dict[str, list[float | None]] = {}
        for direction, (side, alone) in sides.items():
            if any(half["direction"] == direction for half in rows[0].half_rounds):
                start = _mean([float(results.stages[alone].info["validation"]) for results in seeds])
                series[side] = [
                    start,
                    *(_at(rows, number, direction, "validation") for number in range(1, n_rounds + 1)),
                ]
        if any("ensemble" in half for half in rows[0].half_rounds):
            start = _mean([results.ensemble_validation for results in seeds])
            series["ensemble"] = [start, *(_at(rows, number, "up", "ensemble") for number in range(1, n_rounds + 1))]
        found.append(
            {
                "kind": "lines",
                "title": f"Validation {metric} per round: {method}",
                "x": list(range(n_rounds + 1)),
                "series": series,
                "x_label": "round (0 = each alone)",
                "y_label": metric,
            }
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _at(rows: Sequence[Row], number: int, direction: str, key: str) -> float | None:
    """Mean over seeds of one half-round's number; a seed that stopped before is left out."""
    found = [
        float(half[key])
        for row in rows
        for half in row.half_rounds
        if half["round"] == number and half["direction"] == direction and key in half
    ]
    return _mean(found)


def weight_panels(config: DistillConfig, seeds: Sequence[SeedResults]) -> list[dict[str, Any]]:
    """Histograms of the sample weights of the main method's first round, and the means of all."""
    found: list[dict[str, Any]] = []
    rows = [results.rows[config.method] for results in seeds]
    series = {}
    for direction, side in (("down", "teacher listens to student"), ("up", "student listens to teacher")):
        histograms = [
            half["weights"]["histogram"]
            for row in rows
            for half in row.half_rounds
            if half["direction"] == direction and half["round"] == 1 and "weights" in half
        ]
        if histograms:
            series[side] = np.mean(histograms, axis=0).tolist()
    if series:
        edges = np.linspace(0, 2, WEIGHT_BINS + 1)
        found.append(
            {
                "kind": "distribution",
                "title": "Sample weights after round 1",
                "labels": [f"{low:.1f}" for low in edges[:-1]],
                "series": series,
                "axis": "share of samples",
                "note": "By the ranks of both models in evaluation mode, over the training samples of up to 100 users. "
                "0 ignores the teacher, 1 trusts it as an equal, 2 most; bins by their lower edge.",
            }
        )
    means = [
        [method, half["round"], half["direction"], half["weights"]["train"], half["weights"]["valid"]]
        for method in config.rows
        for half in seeds[0].rows[method].half_rounds
        if "weights" in half
    ]
    if means:
        found.append(
            {
                "kind": "table",
                "title": f"Mean weights, seed {seeds[0].seed}",
                "columns": ["method", "round", "direction", "training samples", "validation cases"],
                "rows": means,
                "note": "What the ranks of both models after the half-round would give, whatever weights the method "
                "trained by. Training ranks flatter whoever memorises more: compare with validation.",
            }
        )
    return found


def mask_panel(report: Report, metric: str) -> dict[str, Any]:
    """The LLM rows under both masks."""
    found = report.sections["other_mask"]
    return {
        "kind": "table",
        "title": f"{metric} of the LLM rows with and without masking seen items",
        "columns": ["model", "history masked (the other tables)", "nothing masked"],
        "rows": [
            [name, *({key: entry[part][key] for key in ("value", "ci95")} for part in ("own", "other"))]
            for name, entry in found.items()
        ],
        "note": "First seed. Published rows differ in the mask.",
    }


def shuffle_panel(report: Report, metric: str) -> dict[str, Any]:
    """Who reads the order of a history."""
    found = report.sections["shuffled_histories"]
    return {
        "kind": "table",
        "title": f"{metric} with shuffled histories",
        "columns": ["model", "in order", "shuffled", "change", "cosine of user vectors"],
        "rows": [
            [name, entry["in_order"], entry["shuffled"], f"{100 * entry['relative']:+.1f} %", entry["cosine"]]
            for name, entry in found.items()
        ],
        "note": "Mean over seeds, without intervals: one random order per history. A model that loses nothing shows no "
        "use of the order. Cosine: between the vectors of a history in order and shuffled; 1 = taken for a set.",
    }


def cost_panel(report: Report) -> dict[str, Any]:
    """Size and training time of every model's last stage."""
    return {
        "kind": "table",
        "title": "Size and cost",
        "columns": ["model", "parameters", "epochs", "seconds", "samples per second"],
        "rows": [
            [name, row["parameters"], _mean(row["epochs"]), _mean(row["seconds"]), _mean(row["samples_per_second"])]
            for name, row in report.sections["rows"].items()
        ],
        "note": "Parameters: what serving reads, item vectors included, the decoder's table of words left out. Epochs "
        "and seconds: of the reported checkpoint's own training, in the process that ended it; stages before it are "
        "shared between rows. Samples are positions; of the student alone, sequences.",
    }


def method_panel(config: DistillConfig) -> dict[str, Any]:
    """What the methods' names mean."""
    return {
        "kind": "table",
        "title": "Methods",
        "columns": ["name", "what it is"],
        "rows": [[method, SUMMARIES[method]] for method in config.rows],
        "note": f"Controls may train as long as the distilled student, {config.rounds * config.round_epochs} epochs "
        "after the student alone, at half the learning rate from round 2 on; mutual and dllm2rec keep the full rate. "
        "llm-srec trains its small heads for up to 30.",
    }
