"""Panels of a comparison with a column or point per level: errors by depth, use of the codes, behaviour of prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recollect.tokenize.run_config import BenchConfig
from recollect.types import Report

DIGITS = 4
SERIES = 5
"""Lines of a plot that can be told apart by colour."""

RELATIVE = "reconstruction/relative_mse"


def cell(found: Mapping[str, Any] | None, digits: int = DIGITS) -> dict[str, Any]:
    """A number of a table with its interval; empty without an entry."""
    if found is None:
        return {"value": None}
    return {"value": found["value"], "ci95": found.get("ci95"), "digits": digits}


def depths(report: Report) -> list[dict[str, Any]]:
    """Relative squared error after 1, 2, … levels, a line per method whose levels add up."""
    models = report.sections["models"]
    deepest = max(len(row["sizes"]) for row in report.sections["rows"].values())
    keys = [f"{RELATIVE}/level_{level}" for level in range(deepest)]
    series = {
        label: [table[key]["value"] if key in table else None for key in keys]
        for label, table in models.items()
        if sum(key in table for key in keys) > 1
    }
    if not series:
        return []
    title = "Relative squared error by number of levels"
    if len(series) > SERIES:
        columns = [f"{level} level{'s' if level > 1 else ''}" for level in range(1, deepest + 1)]
        rows = [[label, *(cell(models[label].get(key)) for key in keys)] for label in series]
        return [{"kind": "table", "title": title, "columns": ["method", *columns], "rows": rows}]
    return [
        {
            "kind": "lines",
            "title": title,
            "x": list(range(1, deepest + 1)),
            "series": series,
            "x_label": "levels",
            "y_label": "relative squared error",
        }
    ]


def usage(report: Report, config: BenchConfig) -> list[dict[str, Any]]:
    """Used codes and perplexity per level."""
    models, rows = report.sections["models"], report.sections["rows"]
    deepest = max(len(row["sizes"]) for row in rows.values())
    measures = (
        ("utilization", "Codes used, share of K"),
        ("perplexity", "Perplexity of the codes, share of K"),
        ("prefix_utilization", "Prefixes used, share of all possible"),
        ("prefix_gini", "Gini of the items per used prefix, 0 = even"),
        ("posterior_entropy", "Entropy of the posterior (nats)"),
    )
    shown: list[dict[str, Any]] = []
    for key, title in measures:
        metrics = [f"{key}/level_{level}" for level in range(deepest)]
        if any(metric in table for table in models.values() for metric in metrics):
            shown.append(
                {
                    "kind": "table",
                    "title": title,
                    "columns": ["method", *(f"level {level + 1}" for level in range(deepest))],
                    "rows": [
                        [label, *(cell(table.get(metric)) for metric in metrics)] for label, table in models.items()
                    ],
                }
            )
    labels = list(models)
    series: dict[str, list[float | None]] = {
        f"level {level + 1}": [
            (models[label].get(f"perplexity/level_{level}") or {"value": None})["value"] for label in labels
        ]
        for level in range(min(config.levels, deepest))
    }
    shown.append(
        {
            "kind": "bars",
            "title": "Evenness of the codebooks",
            "note": "Perplexity of the code frequencies as a share of K: 1 = every code is used equally often.",
            "labels": labels,
            "series": series,
            "axis": "perplexity / K",
        }
    )
    return shown


def alignment(report: Report) -> list[dict[str, Any]]:
    """How often successive items share a prefix of each length, beside both levels of chance; none without a log."""
    models, rows = report.sections["models"], report.sections["rows"]
    if not any("alignment/same_first_code" in table for table in models.values()):
        return []
    columns, metrics = ["method"], []
    for level in range(max(len(row["sizes"]) for row in rows.values())):
        columns += [f"level {level + 1}", "two items", "two events"]
        metrics += (
            [f"alignment/{name}/level_{level}" for name in ("same_prefix", "random", "random_events")]
            if level
            else [f"alignment/{name}" for name in ("same_first_code", "random", "random_events")]
        )
    return [
        {
            "kind": "table",
            "title": "Successive items with the same prefix",
            "note": (
                "Pairs are successive training events, so popular items count more. Chance beside each level: two "
                "items drawn all alike, and the items of two events, which are as popular as those of the pairs."
            ),
            "columns": columns,
            "rows": [[label, *(cell(table.get(metric)) for metric in metrics)] for label, table in models.items()],
        }
    ]
