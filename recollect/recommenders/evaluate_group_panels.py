"""The panels of an evaluation's page about groups of users, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recollect.types import Report

DIGITS = 4
GROUP_NAMES = {"activity": ("q1", "q2", "q3"), "head share": ("niche", "balanced", "mainstream")}
_BY_EVENTS = (
    "Groups come from training events only: thirds of the users by their number of events (q1 the fewest), and "
    "20/60/20 % by the share of head items among them. "
)
_METRIC_GAP = "Gap = best minus worst group; chance alone makes it positive, so its draws are moved onto the value"
_LIFT = (
    "dGAP: mean popularity of a group's lists over that of its histories, minus 1; 0 = lists as popular as the group's "
    "own taste, above 0 = more popular. Gap = largest minus smallest; chance alone makes it positive, so its draws are "
    "moved onto the value. Furthest: the group furthest from 0."
)


def cell(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """A report entry as a cell; empty where there is none."""
    if found is None:
        return {"value": None}
    return {"value": found["value"], "ci95": found.get("ci95"), "digits": DIGITS}


def group_panels(report: Report, metric: str) -> list[dict[str, Any]]:
    """The primary metric, then the popularity lift, by group of users: both partitions by events in one table, and one
    table for each attribute."""
    lifts = report.sections["lift_groups"]
    lifted = next((row["metric"] for rows in lifts.values() for row in rows.values()), "")
    name = metric.upper()
    return [
        *_tables(
            report.sections["user_groups"],
            name,
            f"{_METRIC_GAP}.",
            f"{_METRIC_GAP}, and it grows with the number of groups.",
            "worst",
        ),
        *_tables(lifts, f"Popularity lift ({lifted})", _LIFT, _LIFT, "furthest"),
    ]


def _tables(every: Mapping[str, Any], title: str, note: str, note_by_attribute: str, last: str) -> list[dict[str, Any]]:
    by_events = {name: rows for name, rows in every.items() if name in GROUP_NAMES}
    return _by_events(by_events, title, note, last) + [
        _by_attribute(name, rows, title, note_by_attribute, last)
        for name, rows in every.items()
        if name not in GROUP_NAMES
    ]


def _by_attribute(name: str, rows: Mapping[str, Any], title: str, note: str, last: str) -> dict[str, Any]:
    sizes = {group: found["n"] for group, found in next(iter(rows.values()))["groups"].items()}
    return {
        "kind": "table",
        "title": f"{title} by {name} of users",
        "note": f"Users per group: {', '.join(f'{group} {size:,}' for group, size in sizes.items())}. {note}",
        "columns": ["model", *sizes, "gap", last],
        "rows": [
            [label, *(cell(row["groups"][group]) for group in sizes), cell(row["gap"]), _group(row[last])]
            for label, row in rows.items()
        ],
    }


def _by_events(found: Mapping[str, Any], title: str, note: str, last: str) -> list[dict[str, Any]]:
    if not found:
        return []
    sizes = []
    for partition, rows in found.items():
        of_group = next(iter(rows.values()))["groups"]
        listed = ", ".join(f"{name} {of_group[name]['n']:,}" for name in GROUP_NAMES[partition] if name in of_group)
        sizes.append(f"{partition}: {listed}")
    return [
        {
            "kind": "table",
            "title": f"{title} by group of users",
            "note": f"{_BY_EVENTS}Users per group, {'; '.join(sizes)}. {note}",
            "columns": ["users by", "model", "q1 / niche", "q2 / balanced", "q3 / mainstream", "gap", last],
            "rows": [
                [
                    partition,
                    label,
                    *(cell(row["groups"].get(name)) for name in GROUP_NAMES[partition]),
                    cell(row["gap"]),
                    _group(row[last]),
                ]
                for partition, rows in found.items()
                for label, row in rows.items()
            ],
        }
    ]


def _group(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else str(found["group"])
