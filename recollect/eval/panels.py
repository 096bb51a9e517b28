"""From a report's JSON panels to what the page's template shows.

A panel is one object with `kind`, `title` and an optional `note`:

| kind | further keys |
|---|---|
| `table` | `columns` [str], `rows` [[cell]]; a cell is text, a number, or {"value", "ci95", "n", "marks", "digits"} |
| `intervals` | `labels`, `values`, `low`, `high`, optional `reference` (number), `axis`, `digits` |
| `bars`, `distribution` | `labels`, `series` {name: [number]}, optional `axis` |
| `reliability` | `predicted`, `observed`, `counts` per bin, optional `ece` |
| `lines` | `x`, `series` {name: [number]}, optional `low`, `high` (same keys), `x_label`, `y_label` |
| `pareto` | `series` {name: {"x", "y", "labels"}}, curves each with its own points; `marks`, the same, single points |
| | drawn in grey with their name beside; `x_label`, `y_label` |
| `map` | `x`, `y`, `group` [int] per point, `labels` [{"x", "y", "text"}], optional `x_label`, `y_label` |
| `heat` | `rows` [str], `columns` [str], `values` [[number or null]], optional `low`, `high` (0, 1), `x_label`, |
| | `y_label` |
| `samples` | `items` [{"title", "before", "after", "note"}] |
| `text` | `text` |

All text in it is untrusted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recollect.errors import InputError
from recollect.eval import plots
from recollect.eval.formats import MISSING, clean, interval, number, one_line

MAX_DIFFED_WORDS = 600


def panel_views(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One view per panel, in order.

    Raises:
        InputError: a panel lacks what its kind needs; the message names it.
    """
    views = []
    for index, panel in enumerate(panels):
        title = panel.get("title", "") if isinstance(panel, Mapping) else ""
        try:
            views.append(_view(panel, f"panel-{index}"))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(f"panel {index} ({one_line(title)!r}) of the report is malformed ({problem})") from error
    return views


def _view(panel: Mapping[str, Any], key: str) -> dict[str, Any]:
    kind = panel["kind"]
    view: dict[str, Any] = {
        "kind": kind,
        "key": key,
        "title": clean(panel.get("title", "")),
        "note": clean(panel.get("note") or ""),
        "legend": [],
    }
    match kind:
        case "table":
            view["columns"] = [clean(column) for column in panel["columns"]]
            view["rows"] = [[cell_view(cell) for cell in row] for row in panel["rows"]]
            view["numeric"] = [
                bool(view["rows"]) and all(row[column]["numeric"] for row in view["rows"] if column < len(row))
                for column in range(len(view["columns"]))
            ]
        case "intervals":
            columns = (panel["labels"], panel["values"], panel["low"], panel["high"])
            view["svg"] = plots.intervals_svg(*columns, panel.get("reference"), panel.get("axis") or "", key)
            view["columns"] = ["", "value", "95 % interval"]
            digits = int(panel.get("digits", 3))
            view["data"] = [
                [clean(label), number(value, digits), interval([low, high], digits)]
                for label, value, low, high in zip(*columns, strict=True)
            ]
        case "bars" | "distribution":
            view["svg"] = plots.bars_svg(panel["labels"], panel["series"], panel.get("axis") or "", key)
            view["legend"] = legend(panel["series"])
            view["columns"], view["data"] = series_table("", panel["labels"], panel["series"])
        case "reliability":
            bins = (panel["predicted"], panel["observed"], panel["counts"])
            view["svg"] = plots.reliability_svg(*bins, key)
            view["ece"] = number(panel["ece"]) if panel.get("ece") is not None else ""
            view["columns"] = ["predicted", "observed", "cases"]
            view["data"] = [[number(value) for value in row] for row in zip(*bins, strict=True)]
        case "lines":
            x_label = panel.get("x_label") or ""
            view["svg"] = plots.lines_svg(
                panel["x"],
                panel["series"],
                panel.get("low"),
                panel.get("high"),
                x_label,
                panel.get("y_label") or "",
                key,
            )
            view["legend"] = legend(panel["series"]) if len(panel["series"]) > 1 else []
            view["columns"], view["data"] = series_table(x_label, panel["x"], panel["series"])
        case "pareto":
            curves, marks = panel["series"], panel.get("marks") or {}
            axes = panel.get("x_label") or "", panel.get("y_label") or ""
            view["svg"] = plots.pareto_svg(curves, marks, *axes, key)
            view["legend"] = legend(curves)
            view["columns"] = ["", "at", *axes]
            view["data"] = [
                [one_line(name, 60), one_line(at, 20), number(x), number(y)]
                for name, curve in {**curves, **marks}.items()
                for x, y, at in zip(curve["x"], curve["y"], curve["labels"], strict=True)
            ]
        case "map":
            points, axes = (panel["x"], panel["y"], panel["group"]), (panel.get("x_label"), panel.get("y_label"))
            view["svg"] = plots.map_svg(*points, panel["labels"], axes[0] or "", axes[1] or "", key)
            view["columns"] = ["", axes[0] or "x", axes[1] or "y"]
            view["data"] = [
                [one_line(place["text"], 60), number(place["x"]), number(place["y"])] for place in panel["labels"]
            ]
        case "heat":
            names, lines = (panel["rows"], panel["columns"]), panel["values"]
            axes = panel.get("x_label") or "", panel.get("y_label") or ""
            ends = float(panel.get("low", 0.0)), float(panel.get("high", 1.0))
            view["svg"] = plots.heat_svg(*names, lines, *ends, *axes, key)
            view["columns"] = [clean(axes[1]), *(one_line(name, 60) for name in names[1])]
            view["data"] = [
                [one_line(name, 60), *(number(value) for value in line)]
                for name, line in zip(names[0], lines, strict=True)
            ]
        case "samples":
            view["items"] = [_sample_view(item) for item in panel["items"]]
        case "text":
            view["paragraphs"] = [part for part in clean(panel["text"]).split("\n\n") if part.strip()]
        case _:
            view["kind"] = "unknown"
            view["note"] = f"This version cannot draw a panel of kind {one_line(kind)!r}; report.json holds its data."
    return view


def legend(series: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, colour index from 1) per series, in drawing order."""
    return [(one_line(name, 60), 1 + index % plots.SERIES_COLOURS) for index, name in enumerate(series)]


def series_table(
    corner: str, labels: Sequence[Any], series: Mapping[str, Sequence[Any]]
) -> tuple[list[str], list[list[str]]]:
    """The numbers behind a plot as (column names, rows), for readers who cannot see it."""
    columns = [clean(corner), *(one_line(name, 60) for name in series)]
    rows = [
        [
            one_line(label, 60) if isinstance(label, str) else number(label),
            *(number(values[row]) for values in series.values()),
        ]
        for row, label in enumerate(labels)
    ]
    return columns, rows


def cell_view(cell: Any) -> dict[str, Any]:
    """{"text", "interval", "n", "marks", "numeric"} of a table cell."""
    if isinstance(cell, Mapping):
        digits = int(cell.get("digits", 3))
        return {
            "text": number(cell["value"], digits) if not isinstance(cell["value"], str) else clean(cell["value"]),
            "interval": interval(cell.get("ci95"), digits),
            "n": number(cell["n"]) if cell.get("n") is not None else "",
            "marks": clean(cell.get("marks") or ""),
            "numeric": not isinstance(cell["value"], str),
        }
    is_text = isinstance(cell, str)
    text = clean(cell) if is_text else number(cell)
    return {"text": text, "interval": "", "n": "", "marks": "", "numeric": not is_text or cell in ("", MISSING)}


def _sample_view(item: Mapping[str, Any]) -> dict[str, Any]:
    before, after = word_changes(clean(item.get("before") or ""), clean(item.get("after") or ""))
    return {
        "title": clean(item.get("title", "")),
        "note": clean(item.get("note") or ""),
        "before": before,
        "after": after,
    }


def word_changes(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as (piece, is only in this one) lists, compared word by word; long texts are not compared."""
    old, new = _words(before), _words(after)
    if not old or not new or len(old) + len(new) > MAX_DIFFED_WORDS:
        return ([(before, False)] if before else []), ([(after, False)] if after else [])
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    bare = [[word.strip(" \t\n.,;") for word in words] for words in (old, new)]  # punctuation is not a change
    matcher = difflib.SequenceMatcher(a=bare[0], b=bare[1], autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if i2 > i1:
            left.append(("".join(old[i1:i2]), tag != "equal"))
        if j2 > j1:
            right.append(("".join(new[j1:j2]), tag != "equal"))
    return left, right


def _words(text: str) -> list[str]:
    """Words with the white space that follows them; joined they give `text`."""
    return re.findall(r"\s+\S*\s*|\S+\s*", text)
