"""The parts of a continual run's page that recommendation tasks have instead of TRACE's."""

from __future__ import annotations

from typing import Any

from recollect.continual.domain_ranking import CUT, FLOORS, PRIMARY
from recollect.types import Report


def task_panel(report: Report, method: str) -> dict[str, Any]:
    """NDCG of every task beside what no model gets, right after its training and at the end."""
    one = report.sections["methods"][method]
    rows: list[list[Any]] = []
    for name, found in one["scores"].items():
        floor = report.sections["floors"][name]
        values = {floor["predictor"]: floor["value"], **floor["others"]}
        learnt, final = found["learnt"] or {}, found["final"] or {}
        ends, was = final.get(PRIMARY), learnt.get(PRIMARY)
        change = ends - was if ends is not None and was is not None else None
        further = [final.get(f"hr@{CUT}"), final.get(f"{PRIMARY}_unmasked")]
        rows.append([name, found["n"], *(values[key] for key in FLOORS), was, ends, change, *further])
    return {
        "kind": "table",
        "title": f"Tasks: {method}",
        "columns": [
            "task",
            "test users",
            *FLOORS,
            "learnt",
            "at the end",
            "change",
            f"HR@{CUT} at the end",
            "seen items not masked",
        ],
        "rows": rows,
        "note": f"NDCG@{CUT} unless said otherwise, over the whole catalogue of the task. Popularity and the Markov "
        "chain are counted on the training rows the model learns from; text similarity (last items against all, by the "
        "vectors the model reads) needs no training. The best of the three is the task's floor.",
    }


def data_panel(report: Report) -> dict[str, Any]:
    """What the tasks hold, and what was drawn."""
    columns = {
        "events": "events",
        "users": "users",
        "catalogue": "items ranked",
        "new_items": "of these new to training",
        "rows": "training rows",
        "rows_used": "used",
        "targets": "items to predict in all rows",
        "cases": "test users",
        "cases_used": "used",
        "held_out": "events held out",
        "repeated_tests": "tests of an item seen before",
        "tied_tests": "tests tied in time",
        "later_training": "tests older than other training",
    }
    facts = report.sections["task_facts"]
    return {
        "kind": "table",
        "title": "What the tasks hold",
        "columns": ["task", *columns.values()],
        "rows": [[name, *(one[key] for key in columns)] for name, one in facts.items()],
        "note": "Tied in time: the order of the last two events is arbitrary. Empty: the log has no clock.",
    }
