"""The panels of an evaluation's page, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.eval.formats import number
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.recommenders.evaluate_grid import tuning_panels
from recollect.recommenders.evaluate_group_panels import DIGITS, cell, group_panels
from recollect.types import Report


def all_panels(
    report: Report, curves: Mapping[str, Sequence[Mapping[str, Any]]], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Every panel, in reading order."""
    metric = report.sections["primary_metric"]
    shown = [
        headline(report, metric),
        accuracy(report, config),
        forest(report, metric),
        *difference_panels(report, metric),
        lists(report, config),
        exposure(report, config),
        *calibration(report, config),
        *group_panels(report, metric),
    ]
    if report.sections["tie_orders"]:
        shown.append(orders(report, metric))
    if any(row["other_mask"] for row in report.sections["rows"].values()):
        shown.append(masks(report, config))
    shown += tuning_panels(report.sections["tuning"], config.seed)
    shown += learning_curves(curves)
    shown += [leaks(report), costs(report)]
    return shown


def headline(report: Report, metric: str) -> dict[str, Any]:
    """Who is first on the test, and what is known of its distance to the baseline, and why that one is it."""
    models, baseline = report.sections["models"], report.sections["baseline"]
    best = max(models, key=lambda label: models[label][metric]["value"])
    name = metric.upper()
    if len(models) == 1:
        text = f"{best} has {name} {_value(models[best][metric])}; no other row to compare with."
    elif best == baseline:
        text = (
            f"{best} has the highest {name}: {_value(models[best][metric])}. It is also what the other rows are "
            f"compared with: {report.sections['baseline_choice']}."
        )
    else:
        row = next(row for row in report.sections["differences"] if row["model"] == best)
        low, high = row["ci95"]
        is_clear = low is not None and (low > 0 or high < 0) and row["p_holm"] < 0.05
        verdict = "a difference beyond chance" if is_clear else "which chance alone could explain"
        text = (
            f"{best} has the highest {name}: {_value(models[best][metric])}. It differs from {baseline} by "
            f"{_value(row)}, {verdict} (p {number(row['p_holm'], DIGITS)} after Holm; the value of "
            f"{row['users_changed']:,} of {row['n']:,} users changes). All rows are compared with {baseline}: "
            f"{report.sections['baseline_choice']}."
        )
    return {"kind": "text", "title": "In one sentence", "text": text, "terminal": True}


def _value(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    bounds = "" if low is None else f" [{number(low, DIGITS)}, {number(high, DIGITS)}]"
    return number(found["value"], DIGITS) + bounds


def accuracy(report: Report, config: EvaluateConfig) -> dict[str, Any]:
    """The main table: accuracy per row."""
    models, rows = report.sections["models"], report.sections["rows"]
    measured = next(iter(models.values()))
    wanted = [
        f"{kind}@{cut}"
        for cut in sorted(config.k)
        for kind in ("hr", "recall", "ndcg", "map")
        if (kind, cut) != ("ndcg", 1)
    ]
    metrics = [metric for metric in [*wanted, "mrr"] if metric in measured]
    primary = report.sections["primary_metric"]
    return {
        "kind": "table",
        "title": "Accuracy on the test cases",
        "note": "Mean over users and seeds with 95 % intervals over users; ties count in expectation.",
        "columns": ["model", "seeds", f"validation {primary}", *metrics],
        "rows": [
            [
                label,
                len(rows[label]["seeds"]) or "none",
                {"value": (rows[label]["validation"] or {}).get(primary), "digits": DIGITS},
                *(cell(table.get(metric)) for metric in metrics),
            ]
            for label, table in models.items()
        ],
        "terminal": True,
    }


def forest(report: Report, metric: str) -> dict[str, Any]:
    """Every row on the primary metric, best first."""
    models = report.sections["models"]
    order = sorted(models, key=lambda label: -models[label][metric]["value"])
    return {
        "kind": "intervals",
        "title": metric.upper(),
        "note": "95 % intervals resample users.",
        "labels": order,
        "values": [models[label][metric]["value"] for label in order],
        "low": [models[label][metric]["ci95"][0] for label in order],
        "high": [models[label][metric]["ci95"][1] for label in order],
        "axis": metric.upper(),
        "digits": DIGITS,
    }


def difference_panels(report: Report, metric: str) -> list[dict[str, Any]]:
    """Each row minus the baseline on the same users, as a table and a plot."""
    found = sorted(report.sections["differences"], key=lambda row: -row["value"])
    if not found:
        return []
    title = f"{metric.upper()} minus that of {report.sections['baseline']}, same users"
    table = {
        "kind": "table",
        "title": title,
        "note": (
            f"{report.sections['baseline']} is {report.sections['baseline_choice']}. Paired bootstrap over users; p "
            "from sign flips by user, Holm-adjusted over this table."
        ),
        "columns": ["model", "difference", "relative", "users changed", "p (Holm)"],
        "rows": [
            [
                row["model"],
                cell(row),
                "–" if row["relative"] is None else f"{row['relative']:+.1%}",
                row["users_changed"],
                {"value": row["p_holm"], "digits": DIGITS},
            ]
            for row in found
        ],
        "terminal": True,
    }
    plot = {
        "kind": "intervals",
        "title": title,
        "labels": [row["model"] for row in found],
        "values": [row["value"] for row in found],
        "low": [row["ci95"][0] for row in found],
        "high": [row["ci95"][1] for row in found],
        "reference": 0.0,
        "axis": f"difference in {metric.upper()}",
        "digits": DIGITS,
    }
    return [table, plot]


def lists(report: Report, config: EvaluateConfig) -> dict[str, Any]:
    """What is recommended: spread, popularity, calibration."""
    models, cut = report.sections["models"], config.primary_cut
    metrics = [
        f"coverage@{cut}",
        f"gini@{cut}",
        f"arp@{cut}",
        f"dgap@{cut}",
        f"tail_share@{cut}:items20",
        f"tail_share@{cut}:mass80",
        f"lpd@{cut}",
        f"mrmc@{cut}:head/tail",
    ]
    return {
        "kind": "table",
        "title": "What is recommended",
        "note": (
            "Share of the catalogue shown to anyone; Gini of exposure (0 = even); mean popularity of the list; its "
            "lift over the profile; share of tail items, by both conventions; log popularity difference; rank "
            "miscalibration. Lists are cut by score, then item index. A resample of users sees fewer items by "
            "construction, so the draws for coverage and Gini are moved onto the value."
        ),
        "columns": ["model", *metrics],
        "rows": [[label, *(cell(table.get(metric)) for metric in metrics)] for label, table in models.items()],
    }


def exposure(report: Report, config: EvaluateConfig) -> dict[str, Any]:
    """How evenly the catalogue is shown, and head and tail in it."""
    models, cut = report.sections["models"], config.primary_cut
    by_rule = [f"{metric}@{cut}:{rule}" for metric in ("ltc", "rsp", "reo") for rule in ("items20", "mass80")]
    metrics = [f"entropy@{cut}", f"entropy_share@{cut}", *by_rule]
    return {
        "kind": "table",
        "title": "How evenly the catalogue is shown",
        "note": (
            "Entropy of exposure in nats, and as a share of ln(items); share of the tail's items shown to anyone "
            "(LtC); standard deviation over mean of the probability to be shown of head and tail (RSP), and of the "
            "relevant items among them (REO): 0 = alike, 1 = one of the two never. Draws for entropy and LtC are moved "
            "onto the value, as above; no value: nothing relevant was shown."
        ),
        "columns": ["model", *metrics],
        "rows": [[label, *(cell(table.get(metric)) for metric in metrics)] for label, table in models.items()],
    }


def calibration(report: Report, config: EvaluateConfig) -> list[dict[str, Any]]:
    """How far the categories of a list are from those of the history, where the catalogue has categories."""
    models, cut = report.sections["models"], config.primary_cut
    metrics = [f"calibration_kl@{cut}:category", f"calibration_js@{cut}:category", f"mrmc@{cut}:category"]
    if not any(metric in table for table in models.values() for metric in metrics):
        return []
    return [
        {
            "kind": "table",
            "title": "Are the categories of a list those of the history?",
            "note": (
                "0 = the same shares. KL of the history's shares from the list's, in nats (4.605 = no category in "
                "common); Jensen-Shannon divergence in bits (at most 1); rank miscalibration (at most 1). An item's "
                "categories count in equal shares; a history without any counts 0."
            ),
            "columns": ["model", *metrics],
            "rows": [[label, *(cell(table.get(metric)) for metric in metrics)] for label, table in models.items()],
        }
    ]


def orders(report: Report, metric: str) -> dict[str, Any]:
    """File order against random orders of tied events."""
    found = report.sections["tie_orders"]
    return {
        "kind": "table",
        "title": f"{metric.upper()} by order of simultaneous events",
        "note": "Events of a user with equal times have no order; the file's is one of many.",
        "columns": ["model", "file order", "mean of shuffles", "lowest", "highest", "shuffles"],
        "rows": [
            [
                label,
                {"value": table[metric]["file_order"], "digits": DIGITS},
                {"value": table[metric]["value"], "digits": DIGITS},
                {"value": min(table[metric]["per_shuffle"]), "digits": DIGITS},
                {"value": max(table[metric]["per_shuffle"]), "digits": DIGITS},
                len(table[metric]["per_shuffle"]),
            ]
            for label, table in found.items()
        ],
    }


def masks(report: Report, config: EvaluateConfig) -> dict[str, Any]:
    """Text models under the mask of the table and the other one."""
    metric = report.sections["primary_metric"]
    rows = []
    for label, row in report.sections["rows"].items():
        if row["other_mask"]:
            other = row["other_mask"]
            rows.append([label, cell(other["own"]), other["mask"], cell(other["other"])])
    return {
        "kind": "table",
        "title": f"Text models with another mask of seen items, {metric.upper()}",
        "note": (
            "First seed. Text models rank what the history holds first, so the mask decides much of their number."
        ),
        "columns": ["model", f"mask {config.mask} (this table)", "other mask", "with it"],
        "rows": rows,
    }


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Validation NDCG@10 and training loss by epoch, first seed of each trained row."""
    shown = []
    for key, title, axis in (
        ("validation", "Validation by epoch, first seed", "NDCG@10"),
        ("loss", "Training loss by epoch, first seed (losses of different kinds do not compare)", "loss"),
    ):
        series = {
            label: {int(row["epoch"]): float(row[key]) for row in rows if key in row} for label, rows in curves.items()
        }
        series = {label: points for label, points in series.items() if points}
        epochs = sorted({epoch for points in series.values() for epoch in points})
        if len(epochs) > 1:
            shown.append(
                {
                    "kind": "lines",
                    "title": title,
                    "x": epochs,
                    "series": {label: [points.get(epoch) for epoch in epochs] for label, points in series.items()},
                    "x_label": "epoch",
                    "y_label": axis,
                }
            )
    return shown


def leaks(report: Report) -> dict[str, Any]:
    """The leak check of every row."""
    rows = []
    for label, row in report.sections["rows"].items():
        leak = row["leak"] or {"n_cases": None, "leaking_cases": None, "future_share": None}
        rows.append(
            [
                label,
                row["fitted_on"],
                leak["n_cases"],
                leak["leaking_cases"],
                {"value": leak["future_share"], "digits": DIGITS},
            ]
        )
    return {
        "kind": "table",
        "title": "Leak check",
        "note": "First seed: cases answered by a model fitted on later events, recommended items that came later.",
        "columns": ["model", "fitted on", "cases", "leaking cases", "future items"],
        "rows": rows,
    }


def costs(report: Report) -> dict[str, Any]:
    """Wall times, means over seeds."""
    return {
        "kind": "table",
        "title": "Time",
        "columns": [
            "model",
            "fit (s)",
            "test (s)",
            "test cases per second",
            "training samples per second",
            "best epoch",
        ],
        "rows": [
            [
                label,
                row["seconds"]["fit"] + row["seconds"].get("refit", 0.0),
                row["seconds"]["test"],
                {"value": row["test_cases_per_s"]},
                {"value": row["train_samples_per_s"]},
                ", ".join(map(str, row["best_epochs"])) or "–",
            ]
            for label, row in report.sections["rows"].items()
        ],
    }
