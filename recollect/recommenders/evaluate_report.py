"""From the stored rows of an evaluation to its report: means over seeds, intervals, paired differences, warnings.

The baseline that every row is compared with is the best on validation, never on the test, of the rows that count as
baselines: those of the models `pop`, `markov` and `sasrec`, whatever their options. Another row (say `ease`) may be
better on validation and is no baseline all the same; only a table without any of the three takes its best row. The
statistics are those of `recollect.eval.comparison`.

Source: recsys_evaluation 3.2, 3.5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recollect.data.splits import LeakReport, tied_target_share
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.comparison import compare_models
from recollect.eval.list_metrics import EXPOSURE_RESAMPLES
from recollect.io import read_json
from recollect.recommenders import evaluate_panels as panels
from recollect.recommenders.evaluate_config import EvaluateConfig
from recollect.recommenders.evaluate_grid import Grid, tuned_row
from recollect.recommenders.evaluate_groups import GROUP_RESAMPLES, lift_by_group, user_groups
from recollect.recommenders.evaluate_runs import CASES_FILE, RESULT_FILE, Entry, Unit, is_finished, read_metrics
from recollect.tracking import Tracker
from recollect.types import Dataset, Report, Split

STRONG_BASELINES = ("pop", "markov", "sasrec")
TIED_SHARE_WORTH_A_WARNING = 0.01
SEEDS_FOR_A_CLAIM = 3


@dataclass(frozen=True)
class RowResult:
    """What the seeds of one row found on one order of the log: a table and a stored result each.

    seeds: empty for a model that draws no random number.
    """

    entry: Entry
    seeds: list[int]
    tables: list[CaseTable]
    results: list[Mapping[str, Any]]

    def validation(self, metric: str) -> float | None:
        """Mean over seeds of a validation metric; None without validation cases."""
        found = [result["validation"][metric] for result in self.results if result["validation"]]
        return float(np.mean(found)) if found else None


def read_rows(
    units: Sequence[Unit], dataset: Dataset, split: Split, out: Path, shuffle: int | None
) -> dict[str, RowResult]:
    """{label: what was found} on one order of tied events."""
    rows: dict[str, RowResult] = {}
    chosen = [unit for unit in units if unit.shuffle == shuffle]
    for label in dict.fromkeys(unit.entry.label for unit in chosen):
        of_row = [unit for unit in chosen if unit.entry.label == label]
        results = [read_json(out / unit.folder / RESULT_FILE) for unit in of_row]
        rows[label] = RowResult(
            entry=of_row[0].entry,
            seeds=[unit.seed for unit in of_row if unit.seed is not None],
            tables=[
                stored_table(out / unit.folder / CASES_FILE, label, result, dataset, split)
                for unit, result in zip(of_row, results, strict=True)
            ],
            results=results,
        )
    return rows


def stored_table(path: Path, label: str, result: Mapping[str, Any], dataset: Dataset, split: Split) -> CaseTable:
    """A stored test table with its metrics and protocol; lists and counts stay on disk."""
    none = np.zeros(0, dtype=np.int64)
    user = dataset.interactions.user[split.test_row]
    return CaseTable(
        model=label,
        user=user,
        metrics=read_metrics(path),
        lists=np.zeros((len(user), 0), dtype=np.int64),
        greater=none,
        equal=none,
        target_case=none,
        popularity=np.zeros(dataset.n_items, dtype=np.int64),
        candidate=np.ones(dataset.n_items, dtype=bool),
        protocol=result["protocol"],
        leak=LeakReport(**result["leak"]) if result["leak"] else None,
    )


def make_report(
    config: EvaluateConfig,
    dataset: Dataset,
    split: Split,
    units: Sequence[Unit],
    out: Path,
    manifest: dict[str, Any],
    tuning: Grid,
    chosen: Mapping[str, Entry],
) -> Report:
    """The report of a run whose units are all finished.

    Args:
        chosen: {label: its point} of every row that was tuned.
    """
    rows = read_rows(units, dataset, split, out, None)
    metric = config.primary_metric
    baseline, why = choose_baseline(rows, metric)
    comparison = compare_models(
        {label: row.tables for label, row in rows.items()},
        against=baseline,
        tested=[metric],
        totals={label: [result["totals"] for result in row.results] for label, row in rows.items()},
        seed=config.seed,
    )
    shuffles = {number: read_rows(units, dataset, split, out, number) for number in range(1, config.tie_shuffles + 1)}
    every = [row for table in (rows, *shuffles.values()) for row in table.values()]
    seconds = sum(sum(result["seconds"].values()) for row in every for result in row.results)
    tuned = read_tuning(tuning, chosen, config, dataset, split, out)
    seconds += sum(point["seconds"] for row in tuned.values() for point in row["points"] if not point["chosen"])
    report = Report(
        kind="evaluate",
        protocol={
            **comparison.protocols[baseline],
            "seeds": sorted({seed for row in rows.values() for seed in row.seeds}),
            "fitted_on": "train+val (refit)" if config.refit else "train",
            "n_users": len(np.unique(dataset.interactions.user[split.test_row])),
            "tied_target_share": tied_target_share(dataset, split) if dataset.clock == "unix" else None,
            "compared_with": f"{baseline}, {why}",
            **({"tuning": tuning.rule(config)} if tuning.points else {}),
            "intervals": (
                f"95 %, {RESAMPLES} resamples of users ({EXPOSURE_RESAMPLES} for what all lists have together, "
                f"{GROUP_RESAMPLES} for groups of users)"
            ),
        },
        metrics={},
        ledger={
            "rows": len(units),
            **({"grid_points": sum(len(points) for points in tuning.points.values())} if tuning.points else {}),
            "seconds": round(seconds, 3),
        },
        warnings=[*tuning.warnings, *find_warnings(config, dataset, split, rows)],
        sections={
            "models": comparison.models,
            "rows": {label: row_details(row, len(split.test_row)) for label, row in rows.items()},
            "primary_metric": metric,
            "baseline": baseline,
            "baseline_choice": why,
            "differences": list(comparison.differences),
            "user_groups": user_groups(
                {label: row.tables for label, row in rows.items()},
                dataset,
                split,
                metric,
                config.seed,
                config.attributes,
            ),
            "lift_groups": lift_by_group({label: row.tables for label, row in rows.items()}, dataset, split, config),
            "tie_orders": tie_orders(rows, shuffles),
            "tuning": tuned,
            "run": manifest,
        },
    )
    curves = {
        label: Tracker(out / Unit(row.entry, row.seeds[0]).folder).rows() for label, row in rows.items() if row.seeds
    }
    report.sections["panels"] = panels.all_panels(report, curves, config)
    return report


def read_tuning(
    tuning: Grid, chosen: Mapping[str, Entry], config: EvaluateConfig, dataset: Dataset, split: Split, out: Path
) -> dict[str, dict[str, Any]]:
    """{label: `tuned_row`} of every row that was tuned."""
    metric, found = config.primary_metric, {}
    for label, points in tuning.points.items():
        tests = []
        for point in points:
            folder = out / Unit(point, config.seed if point.is_seeded else None).folder
            table = stored_table(folder / CASES_FILE, label, read_json(folder / RESULT_FILE), dataset, split)
            tests.append(table.aggregate([metric], resamples=GROUP_RESAMPLES, seed=config.seed)[metric])
        found[label] = tuned_row(points, chosen[label], tests, config, out)
    return found


def choose_baseline(rows: Mapping[str, RowResult], metric: str) -> tuple[str, str]:
    """The row that all others are compared with: of the strong baselines, else of all, the best on validation.

    Returns:
        its label, and in words what it was chosen from and by.
    """
    strong = [label for label, row in rows.items() if row.entry.spec and row.entry.spec.name in STRONG_BASELINES]
    worth = {label: rows[label].validation(metric) for label in strong or rows}
    known = {label: value for label, value in worth.items() if value is not None}
    listed = ", ".join(strong)
    if strong:
        of_what = f"of the rows that count as baselines here ({listed})"
        if len(strong) == 1:
            return strong[0], "the only row of this table that counts as a baseline"
    else:
        of_what = f"of all rows, as none of the baselines {', '.join(STRONG_BASELINES)} is in this table"
    if not known:
        return next(iter(worth)), f"the first {of_what}; there is no validation to choose by"
    return max(known, key=known.__getitem__), f"the best by validation {metric} {of_what}"


def tie_orders(
    rows: Mapping[str, RowResult], shuffles: Mapping[int, Mapping[str, RowResult]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{label: {metric: {"file_order", "value": mean over shuffles, "per_shuffle"}}}; empty without shuffles.

    The file order is that of the first seed, as the shuffles are.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for label in next(iter(shuffles.values()), {}):
        found[label] = {}
        for metric in rows[label].tables[0].metrics:
            values = [table[label].tables[0].mean(metric) for table in shuffles.values()]
            found[label][metric] = {
                "file_order": rows[label].tables[0].mean(metric),
                "value": float(np.mean(values)),
                "per_shuffle": values,
            }
    return found


def row_details(row: RowResult, n_cases: int) -> dict[str, Any]:
    """How a row was made: model and options, seeds, validation, leak check, times (mean over seeds)."""
    first = row.results[0]
    seconds = {
        part: float(np.mean([result["seconds"].get(part, 0.0) for result in row.results])) for part in first["seconds"]
    }
    trained = [result["training"] for result in row.results if result["training"]]
    return {
        **row.entry.describe(),
        "seeds": row.seeds,
        "fitted_on": first["fitted_on"],
        "validation": first["validation"] and {name: row.validation(name) for name in first["validation"]},
        "leak": first["leak"],
        "other_mask": first["other_mask"],
        "seconds": seconds,
        "test_cases_per_s": n_cases / seconds["test"] if seconds["test"] > 0 else None,
        "best_epochs": [result["best_epoch"] for result in trained],
        "epochs": [result["epochs"] for result in trained],
        "train_samples_per_s": float(np.mean([result["samples_per_second"] for result in trained]))
        if trained
        else None,
    }


def find_warnings(config: EvaluateConfig, dataset: Dataset, split: Split, rows: Mapping[str, RowResult]) -> list[str]:
    """What a reader must know before believing the table."""
    found = []
    present = {row.entry.spec.name for row in rows.values() if row.entry.spec}
    missing = [name for name in STRONG_BASELINES if name not in present]
    if missing:
        lack = "no strong baseline in" if len(missing) == len(STRONG_BASELINES) else "not every strong baseline is in"
        found.append(
            f"{lack} this table: {', '.join(missing)} missing; add to --models, or the comparison can flatter every row"
        )
    trained = [label for label, row in rows.items() if row.entry.is_seeded]
    if trained and not len(split.valid_row):
        found.append(
            f"{', '.join(trained)}: there is no validation case, so training ran for all its epochs and nothing was "
            "chosen; use a longer log or another split"
        )
    if dataset.clock != "unix":
        found.append(
            "this log has positions instead of clock times: ties and leaks cannot be checked, and it has no global "
            "temporal split"
        )
    else:
        share = tied_target_share(dataset, split)
        if share >= TIED_SHARE_WORTH_A_WARNING:
            advice = "" if config.tie_shuffles else "; add --tie-shuffles 3 to see how much that matters"
            found.append(
                f"{share:.1%} of the targets happened at the same time as the event before them, so which of the two "
                f"is the target is arbitrary{advice}"
            )
    without = dataset.n_users - len(np.unique(dataset.interactions.user[split.test_row]))
    if config.protocol == "loo" and without:
        found.append(f"{without} users have fewer than 3 interactions and no test case; models are fitted on them")
    found += leak_warnings(config, rows)
    few = [label for label, row in rows.items() if row.entry.is_seeded and len(row.seeds) < SEEDS_FOR_A_CLAIM]
    if few:
        found.append(
            f"{', '.join(few)}: {config.seeds} seed{'s' if config.seeds > 1 else ''} only; how much seeds differ is "
            f"not known, use --seeds {SEEDS_FOR_A_CLAIM} or more for a claim"
        )
    if config.refit:
        found.append("models are refitted on training and validation events: do not compare with rows that are not")
    for row in rows.values():
        found += [warning for result in row.results for warning in result["warnings"] if warning not in found]
    return found + [str(warning) for warning in dataset.meta.get("warnings", ())]


def leak_warnings(config: EvaluateConfig, rows: Mapping[str, RowResult]) -> list[str]:
    """Cases whose model knew the future, and recommended items that did not exist yet."""
    found = []
    saved = [label for label, row in rows.items() if row.entry.saved is not None]
    if saved:
        found.append(
            f"{', '.join(saved)}: what a saved model was fitted on is not known here; it may have seen the test"
        )
    leaks = {label: row.results[0]["leak"] for label, row in rows.items()}
    leaks = {label: leak for label, leak in leaks.items() if leak and leak["leaking_cases"] is not None}
    worst = max((leak["leaking_cases"] for leak in leaks.values()), default=0)
    if worst:
        n_cases = next(iter(leaks.values()))["n_cases"]
        advice = "; use --protocol gts for a split without" if config.protocol == "loo" else ""
        found.append(
            f"{worst} of {n_cases} test cases were answered by models that had been fitted on later events{advice}"
        )
    future = {label: leak["future_share"] for label, leak in leaks.items() if leak["future_share"]}
    if future:
        listed = ", ".join(f"{label} {share:.1%}" for label, share in future.items())
        found.append(f"recommended items that did not exist yet at the time of the case: {listed}")
    return found


def plan_report(
    config: EvaluateConfig, dataset: Dataset, split: Split, units: Sequence[Unit], *, n_later: int = 0
) -> Report:
    """What a run would do; nothing is fitted or written.

    Args:
        n_later: units that are known only after points of a grid were chosen; counted as not yet run.
    """
    out = None if config.out is None else Path(config.out)
    finished = [unit for unit in units if config.resume and out is not None and is_finished(unit, out)]
    to_run = len(units) - len(finished) + n_later
    n_items = dataset.n_items
    saved_bytes = (
        sum(4 * n_items**2 for unit in units if unit.entry.spec and unit.entry.spec.name == "ease") * config.save_models
    )
    numbers: dict[str, Any] = {
        "users": dataset.n_users,
        "items": n_items,
        "interactions": len(dataset.interactions),
        "training_interactions": int(split.train.sum()),
        "validation_cases": len(split.valid_row),
        "test_cases": len(split.test_row),
        "rows_to_run": to_run,
        "rows_finished": len(finished),
        "scores_computed": to_run * (len(split.valid_row) + len(split.test_row)) * n_items,
    }
    if any(unit.entry.spec and unit.entry.spec.name == "ease" for unit in units):
        numbers["ease_memory_gb"] = round(12 * n_items**2 / 1e9, 3)
        numbers["ease_disk_gb"] = round(saved_bytes / 1e9, 3)
    shown = {
        "kind": "table",
        "title": "What would be fitted and tested",
        "columns": ["row", "model", "options"],
        "rows": [
            [
                unit.title,
                unit.entry.spec.summary if unit.entry.spec else f"saved in {unit.entry.saved}",
                ", ".join(f"{key}={value}" for key, value in unit.entry.describe().get("options", {}).items()),
            ]
            for unit in units
        ],
    }
    protocol = {"data": dataset.name, "split": split.rule, "dry_run": True}
    return Report("evaluate-plan", protocol, {}, ledger=numbers, sections={"panels": [shown]})
