"""Which task is evaluated after which round.

OP and BWT need the diagonal and the last row alone: 15 evaluations for eight tasks where the lower triangle has 36 and
the square 64.  Forgetting and the average of OP need the triangle; forward transfer needs the cells right above the
diagonal and the untouched model.
Source: trace_benchmark 6.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from recollect.errors import ConfigError

PlanKind = Literal["cheap", "triangle", "square"]


class Cell(NamedTuple):
    """One evaluation: task `task` (from 0) after `round` trained tasks; round 0 is the untouched model."""

    round: int
    task: int


def evaluation_plan(n_tasks: int, kind: PlanKind = "cheap", *, untouched: bool = False) -> tuple[Cell, ...]:
    """The evaluations of a run, in the order they can be made.

    Args:
        kind: "cheap" = what OP and BWT need, "triangle" = every task trained so far, "square" = every task.
        untouched: also every task before any training (round 0).

    Raises:
        ConfigError: fewer than one task, or an unknown kind.
    """
    if n_tasks < 1:
        raise ConfigError(f"a plan needs at least one task, got {n_tasks!r}")
    if kind not in ("cheap", "triangle", "square"):
        raise ConfigError(f"the plan must be 'cheap', 'triangle' or 'square', got {kind!r}")
    cells = [Cell(0, task) for task in range(n_tasks)] if untouched else []
    for after in range(1, n_tasks + 1):
        if after == n_tasks or kind == "square":
            tasks = range(n_tasks)
        elif kind == "triangle":
            tasks = range(after)
        else:
            tasks = range(after - 1, after)
        cells += [Cell(after, task) for task in tasks]
    return tuple(cells)
