"""The panels of a comparison's page, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.eval.formats import number
from recollect.tokenize.bench_generative import COVERAGE, NDCG, REFERENCE, SHOWN
from recollect.tokenize.bench_level_panels import DIGITS, RELATIVE, alignment, cell, depths, usage
from recollect.tokenize.run_config import BenchConfig
from recollect.types import Report

COARSE = {"max_group": 1, "fit_seconds": 2, "encode_items_per_s": 0}
AUC, WITHIN, VALID_AUC = "downstream/auc", "downstream/auc_within_users", "downstream/valid_auc"
VALID_NDCG = "generative/valid_ndcg@10"

_ERRORS = (
    ("relative squared error", RELATIVE),  # read as `error_name` says
    ("RMSE", "reconstruction/rmse"),
    ("cosine", "reconstruction/cosine"),
    ("kNN overlap@10", "knn_overlap@10"),
    ("same first code: successive", "alignment/same_first_code"),
    ("random pairs", "alignment/random"),
    ("ratio", "alignment/lift"),
)
_SHARING = (
    ("distinct codes / items", "unique_rate"),
    ("collision rate", "collision_rate"),
    ("items in collision", "items_in_collision"),
    ("codes of one item (ICR)", "icr"),
    ("largest group", "max_group"),
)
_COSTS = (
    ("fit (s)", "fit_seconds"),
    ("encoded items per second", "encode_items_per_s"),
)
_STUDENT = "Means over seeds with Student's 95 % intervals; a dash where a method has no such number."
_NOTES = {
    "error": (
        " Codes look better on items they were fitted on than on new ones, large codebooks most. Successive items are "
        "of training events, so popular ones count more; random pairs are of two items, all alike."
    ),
    "cost": (
        " Peak memory is not here, for a process uses the pages of the row before again; benchmarks/semantic_ids.py "
        "measures it in processes of their own."
    ),
}


def all_panels(report: Report, config: BenchConfig) -> list[dict[str, Any]]:
    """Every panel, in reading order."""
    models = report.sections["models"]
    everything = models | report.sections["floors"]
    error = error_name(config)
    errors = [(error if metric == RELATIVE else name, metric) for name, metric in _ERRORS]
    over = intervals_over(config)
    shown = [headline(report, config)]
    shown += metric_table(report, "Reconstruction and neighbours", errors, _NOTES["error"], terminal=True)
    if any(AUC in table for table in models.values()):
        shown += [click_table(report, over), forest(everything, AUC, f"AUC of the click model, interval {over}")]
    if report.sections["generative"]:
        shown += generative_panels(report.sections["generative"], everything, over)
    shown += differences(report, over)
    if any(RELATIVE in table for table in models.values()):
        reconstructing = {label: table for label, table in models.items() if RELATIVE in table}
        shown += [forest(reconstructing, RELATIVE, error.capitalize()), *depths(report)]
    shown += metric_table(report, "How many items share a code", _SHARING, terminal=True)
    shown += [*usage(report, config), *alignment(report)]
    shown += metric_table(report, "Cost", _COSTS, _NOTES["cost"])
    return shown


def error_name(config: BenchConfig) -> str:
    """The relative squared error, with the items it is of."""
    return f"relative squared error of {'fitted and cold' if config.hold_out_cold else 'the fitted'} items"


def intervals_over(config: BenchConfig) -> str:
    """What the intervals of a metric per seed and user are over."""
    return "over users and seeds" if config.seeds > 1 else "over users only"


def judging_metric(models: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, float]:
    """By which metric rows are ranked, which one is then shown, and 1 where more is better, else -1.

    Validation where a model was trained on the codes, so that test users have no part in the choice.
    """
    for chosen_by, shown in ((VALID_AUC, AUC), (VALID_NDCG, NDCG)):
        if any(chosen_by in table for table in models.values()):
            return chosen_by, shown, 1.0
    return RELATIVE, RELATIVE, -1.0


def headline(report: Report, config: BenchConfig) -> dict[str, Any]:
    """The row that is best on validation (else on error), its test value and its distance to the row compared with."""
    models, against = report.sections["models"], report.sections["against"]
    chosen_by, metric, sign = judging_metric(models)
    known = {label: table[chosen_by]["value"] for label, table in models.items() if chosen_by in table}
    if not known:
        return {"kind": "text", "title": "In one sentence", "text": "No row has a number to compare.", "terminal": True}
    best = max(known, key=lambda label: sign * known[label])
    value = _value(models[best][metric])
    if chosen_by == metric:
        text = f"{best} has the least {error_name(config)}: {value}."
    else:
        name = {AUC: "AUC of the click model", NDCG: "NDCG@10 of the generator"}[metric]
        text = f"{best} has the best {name} on validation ({number(known[best], DIGITS)}); on test it is {value}."
    row = next(
        (row for row in report.sections["differences"] if row["model"] == best and row["metric"] == metric), None
    )
    if row is not None and row["p_holm"] is None:
        text += f" It differs from {against} by {_value(row)}, over seeds and not adjusted for the number of rows."
    elif row is not None:
        verdict = "a difference beyond chance" if row["p_holm"] < 0.05 else "which chance alone could explain"
        text += f" It differs from {against} by {_value(row)}, {verdict} (p {number(row['p_holm'], DIGITS)}, Holm)."
    elif best == against:
        text += " It is the row the others are compared with."
    return {"kind": "text", "title": "In one sentence", "text": text, "terminal": True}


def _value(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    bounds = "" if low is None else f" [{number(low, DIGITS)}, {number(high, DIGITS)}]"
    return number(found["value"], DIGITS) + bounds


def metric_table(
    report: Report, title: str, columns: Sequence[tuple[str, str]], note: str = "", *, terminal: bool = False
) -> list[dict[str, Any]]:
    """One line per row of the comparison; only columns some row has. Starts: the best of so many fits was kept."""
    models, rows = report.sections["models"], report.sections["rows"]
    present = [(name, metric) for name, metric in columns if any(metric in table for table in models.values())]
    if not present:
        return []
    return [
        {
            "kind": "table",
            "title": title,
            "note": _STUDENT + note,
            "columns": ["method", "levels", "bits", "starts", *(name for name, _ in present)],
            "rows": [
                [
                    label,
                    _shape(rows[label]["sizes"]),
                    {"value": rows[label]["bits"], "digits": 1},
                    rows[label]["starts"],
                    *(cell(table.get(metric), COARSE.get(metric, DIGITS)) for _, metric in present),
                ]
                for label, table in models.items()
            ],
            "terminal": terminal,
        }
    ]


def _shape(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes)}×{sizes[0]}"
    return "×".join(map(str, sizes))


def click_table(report: Report, over: str) -> dict[str, Any]:
    """The click model on every row and on the floors."""
    from recollect.tokenize.bench_units import FLOORS

    notes = {**FLOORS, "popularity": "training count alone"}
    tables = {**report.sections["models"], **report.sections["floors"]}
    rows = report.sections["rows"]
    return {
        "kind": "table",
        "title": "Codes as features of a click model",
        "note": (
            "AUC of the next item against items of equal popularity the user never touched; .5 is chance. Within "
            "users: share of a user's own non-clicks ranked below the click. Rows are judged by validation; test is "
            "shown. Best epochs: where validation was highest."
        ),
        "columns": [
            "items seen through",
            "AUC on validation",
            f"AUC, interval {over}",
            "AUC within users",
            "parameters",
            "best epochs",
            "",
        ],
        "rows": [
            [
                label,
                cell(table.get(VALID_AUC)),
                cell(table.get(AUC)),
                cell(table.get(WITHIN)),
                rows[label]["probe_parameters"] if label in rows else None,
                ", ".join(map(str, rows[label]["best_epochs"])) if label in rows else "–",
                f"floor: {notes[label]}" if label in notes else "",
            ]
            for label, table in tables.items()
        ],
        "terminal": True,
    }


def generative_panels(
    details: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Mapping[str, Any]], over: str
) -> list[dict[str, Any]]:
    """The table of HR and NDCG, and its plot; `tables` are models and floors together."""
    notes = {
        REFERENCE: "floor: a code per item, no content",
        "popularity": "training count alone",
        "markov": "what followed the last item in training",
        "random": "the null: codes without content",
    }
    columns = [f"generative/{name}" for name in SHOWN]
    shown = {label: table for label, table in tables.items() if NDCG in table}

    def listed(label: str, key: str) -> str:
        return ", ".join(map(str, details[label][key])) if label in details else "–"

    return [
        {
            "kind": "table",
            "title": "Codes written by a small generator",
            "note": (
                "Every item is a candidate; targets outside the beam count as missed. Masked: items of the history "
                "cannot be listed. Rows are judged by validation, test is shown. Extra digit: codes of the digit that "
                "tells colliding items apart, 1 = none was needed. A tuned sequence model is not in this table; "
                "`recollect evaluate` has one."
            ),
            "columns": [
                "items written as",
                "NDCG@10 on validation",
                "HR@10",
                f"NDCG@10, interval {over}",
                "HR@10, not masked",
                "NDCG@10, not masked",
                "coverage@10",
                "parameters",
                "best epochs",
                "extra digit",
                "",
            ],
            "rows": [
                [
                    label,
                    cell(table.get(VALID_NDCG)),
                    *(cell(table.get(metric)) for metric in columns),
                    cell(table.get(COVERAGE)),
                    details[label]["parameters"] if label in details else None,
                    listed(label, "best_epochs"),
                    listed(label, "extra_digits"),
                    notes.get(label, ""),
                ]
                for label, table in shown.items()
            ],
            "terminal": True,
        },
        forest(shown, NDCG, "NDCG@10 of the generator, history masked"),
    ]


def forest(tables: Mapping[str, Mapping[str, Any]], metric: str, title: str) -> dict[str, Any]:
    """Every row on one metric, the best on top."""
    found = {label: table[metric] for label, table in tables.items() if metric in table}
    sign = 1.0 if metric == RELATIVE else -1.0
    order = sorted(found, key=lambda label: sign * found[label]["value"])
    return {
        "kind": "intervals",
        "title": title,
        "labels": order,
        "values": [found[label]["value"] for label in order],
        "low": [found[label]["ci95"][0] for label in order],
        "high": [found[label]["ci95"][1] for label in order],
        "axis": title,
        "digits": DIGITS,
    }


def differences(report: Report, over: str) -> list[dict[str, Any]]:
    """Each row minus the one compared with, paired."""
    found, against = report.sections["differences"], report.sections["against"]
    if not found:
        return []
    of_users = {AUC: "AUC of the click model", NDCG: "NDCG@10 of the generator"}
    metrics = list(dict.fromkeys(row["metric"] for row in found if row["metric"] not in of_users))
    entries = {(row["model"], row["metric"]): row for row in found}
    labels = list(dict.fromkeys(row["model"] for row in found if row["metric"] not in of_users))
    shown: list[dict[str, Any]] = []
    for metric, name in of_users.items():
        rows = sorted((row for row in found if row["metric"] == metric), key=lambda row: -row["value"])
        if rows:
            shown += _of_users(rows, name, against, over)
    if labels:
        of_codes = {
            "kind": "table",
            "title": f"Paired differences from {against}, codes",
            "note": "Seed by seed, with Student's interval over the seeds, not adjusted for the number of rows.",
            "columns": ["method", *metrics],
            "rows": [[label, *(cell(entries.get((label, metric))) for metric in metrics)] for label in labels],
            "terminal": True,
        }
        shown.append(of_codes)
    return shown


def _of_users(rows: Sequence[Mapping[str, Any]], name: str, against: str, over: str) -> list[dict[str, Any]]:
    """Table and plot of paired differences in one metric per user."""
    table = {
        "kind": "table",
        "title": f"Paired differences from {against}, {name}",
        "note": (
            "The same users and seeds; p and interval are of one t statistic. p is Holm-adjusted over the rows, the "
            "intervals are not."
        ),
        "columns": ["method", f"difference, interval {over}", "p (Holm)"],
        "rows": [[row["model"], cell(row), {"value": row["p_holm"], "digits": DIGITS}] for row in rows],
        "terminal": True,
    }
    plot = {
        "kind": "intervals",
        "title": f"{name} minus that of {against}, same users and seeds",
        "labels": [row["model"] for row in rows],
        "values": [row["value"] for row in rows],
        "low": [row["ci95"][0] for row in rows],
        "high": [row["ci95"][1] for row in rows],
        "reference": 0.0,
        "axis": f"difference in {name.partition(' ')[0]}",
        "digits": DIGITS,
    }
    return [table, plot]
