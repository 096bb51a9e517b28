"""The report people read: one HTML file from the stored results, and its tables for the terminal.

The page needs no network and no script; its policy forbids both. Everything on it comes from `report.json`, so it can
be rebuilt at any time. `sections` of a report may hold, beside what a command adds for itself:

- `panels`: list of JSON panels (`recollect.eval.panels`),
- `run`: the content of `run.json` (command, options, versions, data fingerprint, models, seed),
- `primary_metric`: name of the metric the headline speaks of (default: the first of `metrics`),
- `subject`: what `metrics` is about, where that is not simulated agents; such a page has no headline,
- `comparisons`: {metric: {"baseline", "difference": {"value", "ci95", "n"}, "p"}}, paired differences of the agents
  from the best baseline, positive = agents higher.

Not covered: the numbers themselves; they are computed elsewhere and only written here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect.errors import InputError
from recollect.eval.formats import clean, direction, interval, label, metric_label, number, scalar
from recollect.types import Report

if TYPE_CHECKING:
    from rich.console import Group

CHANCE = "random"
AGENTS = "simulated agents"

# Columns of the first table, in this order; whatever else was measured follows below it.
HEADLINE_METRICS = (
    "ranking/mrr",
    "ranking/ndcg@10",
    "ranking/hr@1",
    "choice/accuracy",
    "rating/mae",
    "rating/w1",
    "taste/balanced_accuracy",
    "op",
    "bwt",
    "forgetting",
    "op_norm",
)
MAX_COLUMNS = 8

_TITLES = {
    "simulate": "Simulated users against the real log",
    "evaluate": "Recommenders on held-out events",
    "evaluate-plan": "What an evaluation would do",
    "distill": "A language model and a conventional recommender teach each other",
    "distill-plan": "What a distillation would do",
    "prompt-rank": "Prompted rankings against the log",
    "tokenize": "Semantic IDs of a catalogue",
    "tokenize-plan": "What a tokenization would do",
    "tokenize-bench": "Item tokenizers on one catalogue",
    "tokenize-bench-plan": "What a comparison of tokenizers would do",
    "continual": "One language model, task after task",
    "continual-plan": "What a run of task after task would do",
}
_FACTS = (
    "data",
    "method",
    "items",
    "dimension",
    "users",
    "interactions_per_user",
    "interactions",
    "backbone",
    "embedder",
    "generator",
    "backend",
    "writer",
    "environment",
    "seed",
)


def render_html(report: Report) -> str:
    """The page of a report; equal reports give equal pages.

    Raises:
        InputError: a panel or a metric entry is malformed; the message names it.
    """
    import jinja2
    from markupsafe import Markup

    from recollect.eval.panels import panel_views

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # only for documents made by recollect.eval.plots
    stylesheet = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    run = report.sections.get("run") or {}
    return environment.get_template("report.html.jinja").render(
        stylesheet=Markup(stylesheet),
        title=_TITLES.get(report.kind, label(report.kind.replace("-", " "))),
        kind=clean(report.kind),
        facts=_facts(report),
        verdict=verdict(report),
        warnings=[clean(warning) for warning in _all_warnings(report)],
        table=main_table(report),
        is_about_agents="subject" not in report.sections,
        further=further_tables(report),
        panels=panel_views(report.sections.get("panels") or []),
        protocol=_pairs(report.protocol),
        ledger=_pairs(report.ledger),
        run=_pairs({key: value for key, value in run.items() if key not in ("versions", "options")}),
        options=_pairs(run.get("options") or {}),
        versions=_pairs(run.get("versions") or {}),
    )


def verdict(report: Report) -> dict[str, Any] | None:
    """The headline: the primary metric of the agents, the best baseline, and which is ahead.

    "ahead" and "behind" need a paired interval that excludes zero where `comparisons` holds one, else two intervals
    that do not overlap; everything between is "tied". None where the report has no metrics.
    """
    if "subject" in report.sections:
        return None
    metric = report.sections.get("primary_metric") or next(iter(report.metrics), None)
    if metric is None or metric not in report.metrics:
        return None
    sign = -1.0 if direction(metric) == "lower" else 1.0
    ours = report.metrics[metric]
    rivals = {
        name: table[metric]
        for name, table in report.baselines.items()
        if metric in table and table[metric].get("value") is not None
    }
    result: dict[str, Any] = {
        "metric": metric_label(metric),
        "ours": _entry(ours),
        "chance": _entry(rivals[CHANCE]) if CHANCE in rivals else None,
        "at_chance": _holds(ours, rivals.get(CHANCE)),
        "best": None,
        "state": "alone",
        "difference": "",
        "lower_is_better": sign < 0,
    }
    if not rivals or ours.get("value") is None:
        return result
    comparison = (report.sections.get("comparisons") or {}).get(metric) or {}
    compared = comparison.get("baseline")
    best = max(rivals, key=lambda name: (sign * rivals[name]["value"], name == compared, name))
    result["best"] = {"name": clean(best), **_entry(rivals[best])}
    paired = _bounds(comparison["difference"]) if compared == best else None
    mine, theirs = _bounds(ours), _bounds(rivals[best])
    over = under = False
    if paired:
        over, under = paired[0] > 0, paired[1] < 0
        result["difference"] = f"{number(comparison['difference']['value'])} {interval(paired)}"
    elif mine and theirs:
        over, under = mine[0] > theirs[1], mine[1] < theirs[0]
    ahead, behind = (over, under) if sign > 0 else (under, over)
    result["state"] = "ahead" if ahead else "behind" if behind else "tied"
    return result


def main_table(report: Report) -> dict[str, Any] | None:
    """Agents and every baseline against the headline metrics; None without metrics.

    Rows hold cells {"text", "interval", "n", "best", "chance"}: `best` marks the best value of a column, `chance` an
    interval that holds the value of the `random` row.
    """
    metrics = _every_metric(report)
    shown = [metric for metric in HEADLINE_METRICS if metric in metrics] or metrics[:MAX_COLUMNS]
    return _table(report, shown) if shown else None


def further_tables(report: Report) -> list[dict[str, Any]]:
    """The metrics the main table leaves out, one table per family (the part of the name before "/")."""
    metrics = _every_metric(report)
    shown = [metric for metric in HEADLINE_METRICS if metric in metrics] or metrics[:MAX_COLUMNS]
    families: dict[str, list[str]] = {}
    for metric in metrics:
        if metric not in shown:
            families.setdefault(metric.partition("/")[0], []).append(metric)
    return [{"title": label(family), **_table(report, members)} for family, members in families.items()]


def _every_metric(report: Report) -> list[str]:
    tables = (report.metrics, *report.baselines.values())
    return list(dict.fromkeys(metric for table in tables for metric in table))


def _table(report: Report, metrics: list[str]) -> dict[str, Any]:
    subject = str(report.sections.get("subject", AGENTS))
    entries = {subject: report.metrics, **report.baselines}
    best = {metric: _best_value(metric, entries) for metric in metrics}
    chance = report.baselines.get(CHANCE, {})
    rows = []
    has_mark = False
    for name, table in entries.items():
        if not any(metric in table for metric in metrics):
            continue
        cells = []
        for metric in metrics:
            entry: Mapping[str, Any] = table.get(metric) or {"value": None}
            is_best = entry["value"] is not None and entry["value"] == best[metric]
            at_chance = name != CHANCE and _holds(entry, chance.get(metric))
            has_mark |= at_chance
            cells.append({**_entry(entry), "best": is_best, "chance": at_chance})
        rows.append({"name": clean(name), "is_agents": name == subject, "is_chance": name == CHANCE, "cells": cells})
    arrows = {"higher": "↑", "lower": "↓", "neither": ""}
    columns = [
        {
            "name": clean(metric),
            "label": metric_label(metric),
            "arrow": arrows[direction(metric)],
            "n": _common_count(metric, entries),
        }
        for metric in metrics
    ]
    return {"columns": columns, "rows": rows, "has_chance_mark": has_mark}


def _best_value(metric: str, entries: Mapping[str, Mapping[str, Any]]) -> float | None:
    values = [table[metric]["value"] for table in entries.values() if metric in table]
    known = [value for value in values if value is not None]
    if len(known) < 2 or direction(metric) == "neither":
        return None
    return min(known) if direction(metric) == "lower" else max(known)


def _common_count(metric: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    counts = {table[metric].get("n") for table in entries.values() if metric in table}
    return number(counts.pop()) if len(counts) == 1 and None not in counts else ""


def _holds(entry: Mapping[str, Any], chance: Mapping[str, Any] | None) -> bool:
    bounds = _bounds(entry)
    if not chance or chance.get("value") is None or bounds is None:
        return False
    return bool(bounds[0] <= chance["value"] <= bounds[1])


def _bounds(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = entry.get("ci95") or (None, None)
    return None if low is None or high is None else (low, high)


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": number(entry["value"]),
        "interval": interval(entry.get("ci95")),
        "n": number(entry["n"]) if entry.get("n") is not None else "",
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    options = (report.sections.get("run") or {}).get("options") or {}
    found = {**options, **report.protocol}
    return [(label(key), scalar(found[key])) for key in _FACTS if found.get(key) is not None]


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(label(key), scalar(value)) for key, value in values.items()]


def _all_warnings(report: Report) -> list[str]:
    if report.metrics and not report.protocol:
        return [*report.warnings, "This report does not say how its numbers were made: it has no protocol block."]
    return report.warnings


def table_csv(report: Report) -> str:
    """The main table in long form: who, metric, value, low, high, n."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["who", "metric", "value", "low", "high", "n"])
    subject = str(report.sections.get("subject", AGENTS))
    for who, table in {subject: report.metrics, **report.baselines, **_models(report)}.items():
        for metric, entry in table.items():
            low, high = entry.get("ci95") or (None, None)
            writer.writerow([who, metric, entry["value"], low, high, entry.get("n")])
    return buffer.getvalue()


def _models(report: Report) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """The `models` section of an evaluation or a comparison of tokenizers: {model: {metric: entry}}."""
    return (report.sections.get("models") or {}) if report.kind in ("evaluate", "tokenize-bench") else {}


def load_report(folder: str | Path) -> Report:
    """The report stored in a run folder.

    Raises:
        InputError: there is no `report.json`, or it is not a report.
    """
    from recollect.io import read_json

    path = Path(folder) / "report.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no report.json; give the folder of a finished run")
    value = read_json(path)
    kinds = {"kind": str, "protocol": dict, "metrics": dict, "baselines": dict, "ledger": dict, "warnings": list}
    if not isinstance(value, dict) or "kind" not in value:
        raise InputError(f"{path} is not a report: it has no 'kind'")
    for key, kind in kinds.items():
        if not isinstance(value.get(key, kind()), kind):
            raise InputError(f"{path} is not a report: {key!r} must be a {kind.__name__}")
    tables = [value.get("metrics", {}), *value.get("baselines", {}).values()]
    entries = [entry for table in tables if isinstance(table, dict) for entry in table.values()]
    if not all(isinstance(table, dict) for table in tables) or not all(
        isinstance(entry, dict) and isinstance(entry.get("value"), int | float | None) for entry in entries
    ):
        raise InputError(
            f'{path} is not a report: a metric must be {{"value": number, "ci95": [low, high], "n": count}}'
        )
    return Report.from_json({"protocol": {}, "metrics": {}, **value})


def rebuild(folder: str | Path) -> Report:
    """Draw `report.html` and `tables.csv` of a run folder again from its `report.json`.

    Raises:
        InputError: the folder holds no readable report.
    """
    from recollect.io import write_text

    report = load_report(folder)
    write_text(Path(folder) / "report.html", render_html(report))
    if report.metrics or _models(report):
        write_text(Path(folder) / "tables.csv", table_csv(report))
    return report


def summary_table(report: Report) -> Group:
    """The main table, the panels marked `terminal` (every table where nothing is marked), the warnings, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from recollect.eval.panels import cell_view

    parts: list[Any] = []
    table = main_table(report)
    if table:
        shown = Table(title=Text(_TITLES.get(report.kind, label(report.kind))), title_justify="left")
        shown.add_column("")
        for column in table["columns"]:
            shown.add_column(Text(column["label"]), justify="right")
        for row in table["rows"]:
            cells = [
                Text(f"{cell['text']}\n{cell['interval']}".rstrip(), style="bold" if cell["best"] else "")
                for cell in row["cells"]
            ]
            shown.add_row(Text(row["name"] + (" (chance)" if row["is_chance"] else "")), *cells)
        parts.append(shown)
    panels = report.sections.get("panels") or []
    has_chosen = bool(table) or any(panel.get("terminal") for panel in panels)
    for panel in panels:
        if has_chosen and not panel.get("terminal"):
            continue
        if panel.get("kind") == "text":
            parts.append(Text(clean(panel["text"])))
        if panel.get("kind") != "table":
            continue
        shown = Table(title=Text(clean(panel.get("title", ""))), title_justify="left")
        for column in panel["columns"]:
            shown.add_column(Text(clean(column)), overflow="fold")
        for cells in panel["rows"]:
            views = [cell_view(cell) for cell in cells]
            shown.add_row(*(Text(f"{view['text']} {view['interval']}".rstrip()) for view in views))
        parts.append(shown)
    if report.ledger:
        if not table:
            parts.append(Text("\n".join(f"{name:<28} {value}" for name, value in _pairs(report.ledger))))
        else:
            parts.append(Text("cost: " + ", ".join(f"{name.lower()} {value}" for name, value in _pairs(report.ledger))))
    parts += [Text(f"warning: {clean(warning)}", style="yellow") for warning in report.warnings]
    return Group(*parts)
