"""Tuning with equal budgets: every point of a row's grid is fitted once, and the one best on validation is the row.

    ease: {regularization: [50, 100, 250, 500]}                     # every value: 4 points
    sasrec: {hidden: [32, 64], dropout: [0.1, 0.3]}                 # every combination: 4 points
    gru4rec: [{hidden: 64, dropout: [0.1, 0.3, 0.5]}, {hidden: 128}]     # several such grids: 3 + 1 points

Points are fitted with the first seed only; the chosen one is then fitted with the others. The report prints every point
with its validation and its test value, the test value of the chosen one and the median over all; the best test value
decides nothing and is not singled out.

Not covered: search that looks at earlier points; several processes (torchrun). A point whose training diverges stops
the run like any other row: leave its values out and resume.
Source: recsys_evaluation 3.6.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.errors import ConfigError
from recollect.io import read_json
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.recommenders.evaluate_runs import RESULT_FILE, Entry, Unit, options_text

MOST_POINTS = 1_000


@dataclass(frozen=True)
class Grid:
    """points: {label: the entries to choose from, in the order of the grid}.  budgets: {label: number of points} of
    every row that has options, 1 where the grid does not name it.  untold: rows of saved models, tuned elsewhere."""

    points: Mapping[str, Sequence[Entry]]
    budgets: Mapping[str, int]
    untold: Sequence[str] = ()

    def units(self, config: EvaluateConfig) -> list[Unit]:
        """Every point with the first seed."""
        return [Unit(entry, config.seed if entry.is_seeded else None) for row in self.points.values() for entry in row]

    def n_later(self, config: EvaluateConfig) -> int:
        """Units of the chosen points that are no point of the grid: further seeds, shuffled orders of ties."""
        seeds = sum(config.seeds - 1 for row in self.points.values() if row[0].is_seeded)
        return seeds + config.tie_shuffles * len(self.points)

    def describe(self, entry: Entry) -> dict[str, Any]:
        """What a row is, for the run's manifest: its model with its options, or with those of every point."""
        if entry.label not in self.points:
            return entry.describe()
        described = [point.describe() for point in self.points[entry.label]]
        return {"model": described[0]["model"], "grid": [point["options"] for point in described]}

    def rule(self, config: EvaluateConfig) -> str:
        """How rows were tuned, for the protocol."""
        sizes = _listed({label: len(points) for label, points in self.points.items()})
        return f"points of a grid ({sizes}), the best by validation {config.primary_metric} with seed {config.seed}"

    @property
    def warnings(self) -> list[str]:
        """What makes the comparison of tuned rows uneven."""
        found = []
        if len(set(self.budgets.values())) > 1:
            found.append(
                f"tuning budgets differ ({_listed(self.budgets)}): a row that was chosen from more points is flattered"
            )
        if self.points and self.untold:
            found.append(f"{', '.join(self.untold)}: how much a saved model was tuned is not known here")
        return found


def make_grid(
    grid: Mapping[str, Any],
    entries: Sequence[Entry],
    sections: Mapping[str, Mapping[str, Any]],
    source: str,
    *,
    allow_unequal: bool = False,
) -> Grid:
    """The points a grid asks for.

    Args:
        grid: {label of a row: {option: value or list of values}, or a list of such mappings}; {} = no tuning.
        sections: options of the rows that hold for each of their points.
        source: of the grid, for messages.

    Raises:
        ConfigError: no such row, no value, an unknown option or illegal value, a point twice, too many points, or rows
            with different numbers of points.
    """
    rows = {entry.label: entry for entry in entries}
    unknown = sorted(set(grid) - set(rows))
    if unknown:
        raise ConfigError(f"{source} has values for {', '.join(map(repr, unknown))}, which --models does not name")
    points = {
        label: _points(entry, grid[label], sections.get(label, {}), source)
        for label, entry in rows.items()
        if label in grid
    }
    budgets = {
        label: len(points.get(label, [entry])) for label, entry in rows.items() if entry.spec and _has_options(entry)
    }
    if points and not allow_unequal and len(set(budgets.values())) > 1:
        raise ConfigError(
            f"{source} gives rows unequal tuning budgets: {_listed(budgets)} points; give every row that has options "
            "equally many, or add --unequal-budgets"
        )
    return Grid(points, budgets if points else {}, [label for label, entry in rows.items() if entry.saved is not None])


def _listed(budgets: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {count}" for label, count in budgets.items())


def _has_options(entry: Entry) -> bool:
    """A model without options has nothing to tune."""
    return bool(dataclasses.fields(entry.options))


def _points(entry: Entry, values: Any, section: Mapping[str, Any], source: str) -> list[Entry]:
    """The entries of one row's grid."""
    where = f"the grid of {entry.label!r} in {source}"
    if entry.spec is None:
        raise ConfigError(f"{where}: a saved model is fitted already, so nothing can be tuned")
    if not _has_options(entry):
        raise ConfigError(f"{where}: {entry.spec.name!r} has no options; leave it out")
    parts = values if isinstance(values, list | tuple) else [values]
    if not parts:
        raise ConfigError(f"{where} is empty; name an option and its values")
    chosen: list[dict[str, Any]] = []
    for part in parts:
        chosen += combinations(part, where)
        if len(chosen) > MOST_POINTS:
            raise ConfigError(f"{where} has more than {MOST_POINTS} points; list fewer values")
    found: list[Entry] = []
    for point in chosen:
        both = sorted({name.replace("-", "_") for name in point} & {name.replace("-", "_") for name in section})
        if both:
            raise ConfigError(f"{where} varies {both[0]!r}, which the options of {entry.label!r} also set; keep one")
        fixed = {key: value for key, value in section.items() if key != "model"}
        options = entry.spec.options({**fixed, **point}, where)
        candidate = dataclasses.replace(entry, options=options, point=tuple(point.items()))
        if any(candidate.options == other.options for other in found):
            raise ConfigError(f"{where} names the point {options_text(candidate.point)} twice; a point counts once")
        found.append(candidate)
    return found


def combinations(part: Any, where: str) -> list[dict[str, Any]]:
    """Every combination of a mapping's values, the last option varying fastest.

    Raises:
        ConfigError: it is no mapping, is empty, has an option without a value, or makes more than `MOST_POINTS`.
    """
    if not isinstance(part, Mapping) or not part:
        raise ConfigError(f"{where} must hold 'option: [values]', got {part!r}")
    lists = {str(name): value if isinstance(value, list | tuple) else [value] for name, value in part.items()}
    for name, options in lists.items():
        if not options:
            raise ConfigError(f"{where} gives no value for {name!r}; list at least one, or leave the option out")
    size = math.prod(len(options) for options in lists.values())
    if size > MOST_POINTS:
        raise ConfigError(f"{where} has more than {MOST_POINTS} points ({size}); list fewer values")
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def choose(points: Sequence[Entry], config: EvaluateConfig, out: Path) -> Entry:
    """The point with the highest validation value of the primary metric; of equal ones the first."""
    values = [_result(point, config, out)["validation"][config.primary_metric] for point in points]
    return points[int(np.argmax(values))]


def tuned_row(
    points: Sequence[Entry], chosen: Entry, tests: Sequence[Mapping[str, Any]], config: EvaluateConfig, out: Path
) -> dict[str, Any]:
    """What the report holds of one row's tuning.

    Args:
        tests: per point, the report entry of the primary metric on the test.
    """
    shown = []
    for point, test in zip(points, tests, strict=True):
        result = _result(point, config, out)
        shown.append(
            {
                "options": dict(point.point),
                "validation": result["validation"][config.primary_metric],
                "test": test,
                "seconds": sum(result["seconds"].values()),
                "chosen": point == chosen,
            }
        )
    best = next(point for point in shown if point["chosen"])
    return {
        "metric": config.primary_metric,
        "budget": len(points),
        "points": shown,
        "chosen": best["options"],
        "validation": best["validation"],
        "test_chosen": best["test"]["value"],
        "test_median": float(np.median([point["test"]["value"] for point in shown])),
    }


def _result(point: Entry, config: EvaluateConfig, out: Path) -> Mapping[str, Any]:
    unit = Unit(point, config.seed if point.is_seeded else None)
    found: Mapping[str, Any] = read_json(out / unit.folder / RESULT_FILE)
    return found


def tuning_panels(tuned: Mapping[str, Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """One table over the rows, and one with every point for each of them, best on validation first."""
    if not tuned:
        return []
    metric = next(iter(tuned.values()))["metric"].upper()
    panels: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "Tuning",
            "note": (
                f"Every point is fitted once with seed {seed}; the best on validation is the row of the other tables. "
                "The median says what an untuned choice from the same grid would have given on the test; the highest "
                "test value of a grid is nobody's result."
            ),
            "columns": ["model", "points", "chosen", f"validation {metric}", f"test {metric}", "median test of points"],
            "rows": [
                [
                    label,
                    row["budget"],
                    options_text(row["chosen"].items()),
                    *({"value": row[key], "digits": 4} for key in ("validation", "test_chosen", "test_median")),
                ]
                for label, row in tuned.items()
            ],
            "terminal": True,
        }
    ]
    for label, row in tuned.items():
        ordered = sorted(row["points"], key=lambda point: -point["validation"])
        names = list(dict.fromkeys(name for point in ordered for name in point["options"]))
        panels.append(
            {
                "kind": "table",
                "title": f"Every point of {label}",
                "note": f"Seed {seed}, in the order of validation, by which the first was chosen.",
                "columns": [*names, f"validation {metric}", f"test {metric}", "time (s)", "chosen"],
                "rows": [
                    [
                        *(str(point["options"].get(name, "default")) for name in names),
                        {"value": point["validation"], "digits": 4},
                        {"value": point["test"]["value"], "ci95": point["test"]["ci95"], "digits": 4},
                        point["seconds"],
                        "yes" if point["chosen"] else "",
                    ]
                    for point in ordered
                ],
            }
        )
    return panels
