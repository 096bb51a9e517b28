"""The panels of a comparison's page, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recollect.eval.formats import number
from recollect.tokenize.bench_generative import COVERAGE, NDCG, REFERENCE, SHOWN
from recollect.tokenize.run_config import BenchConfig
from recollect.types import Report

DIGITS = 4
COARSE = {"max_group": 1, "fit_seconds": 2, "encode_items_per_s": 0, "peak_mb": 1}
SERIES = 5
"""Lines of a plot that can be told apart by colour."""

AUC, WITHIN = "downstream/auc", "downstream/auc_within_users"
RELATIVE = "reconstruction/relative_mse"

_ERRORS = (
    ("relative squared error", RELATIVE),
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
    ("peak memory above start (MiB)", "peak_mb"),
)


def all_panels(report: Report, config: BenchConfig) -> list[dict[str, Any]]:
    """Every panel, in reading order."""
    models = report.sections["models"]
    shown = [headline(report)]
    shown += metric_table(report, "Reconstruction and neighbours", _ERRORS, terminal=True)
    if any(AUC in table for table in models.values()):
        shown += [click_table(report), forest(models | report.sections["floors"], AUC, "AUC of the click model")]
    if report.sections["generative"]:
        shown += generative_panels(report.sections["generative"], models | report.sections["floors"])
    shown += differences(report)
    if any(RELATIVE in table for table in models.values()):
        reconstructing = {label: table for label, table in models.items() if RELATIVE in table}
        shown += [forest(reconstructing, RELATIVE, "Relative squared error"), *depths(report)]
    shown += metric_table(report, "How many items share a code", _SHARING, terminal=True)
    shown += usage(report, config)
    shown += metric_table(report, "Cost", _COSTS)
    return shown


def _cell(found: Mapping[str, Any] | None, digits: int = DIGITS) -> dict[str, Any]:
    if found is None:
        return {"value": None}
    return {"value": found["value"], "ci95": found.get("ci95"), "digits": digits}


def headline(report: Report) -> dict[str, Any]:
    """The best row on the click model (else on error) and what is known of its distance to the row compared with."""
    models, against = report.sections["models"], report.sections["against"]
    metric = AUC if any(AUC in table for table in models.values()) else RELATIVE
    sign = 1.0 if metric == AUC else -1.0
    known = {label: table[metric]["value"] for label, table in models.items() if metric in table}
    name = "AUC of the click model" if metric == AUC else "relative squared error"
    if not known:
        return {"kind": "text", "title": "In one sentence", "text": "No row has a number to compare.", "terminal": True}
    best = max(known, key=lambda label: sign * known[label])
    text = f"{best} has the best {name}: {_value(models[best][metric])}."
    row = next(
        (row for row in report.sections["differences"] if row["model"] == best and row["metric"] == metric), None
    )
    if row is not None:
        low, high = row["ci95"]
        is_clear = low is not None and (low > 0 or high < 0)
        if row["p_holm"] is not None:
            is_clear = is_clear and row["p_holm"] < 0.05
        verdict = "a difference beyond chance" if is_clear else "which chance alone could explain"
        text += f" It differs from {against} by {_value(row)}, {verdict}."
    elif best == against:
        text += " It is the row the others are compared with."
    return {"kind": "text", "title": "In one sentence", "text": text, "terminal": True}


def _value(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    bounds = "" if low is None else f" [{number(low, DIGITS)}, {number(high, DIGITS)}]"
    return number(found["value"], DIGITS) + bounds


def metric_table(
    report: Report, title: str, columns: Sequence[tuple[str, str]], *, terminal: bool = False
) -> list[dict[str, Any]]:
    """One line per row of the comparison; only columns some row has."""
    models, rows = report.sections["models"], report.sections["rows"]
    present = [(name, metric) for name, metric in columns if any(metric in table for table in models.values())]
    if not present:
        return []
    note = "Means over seeds with Student's 95 % intervals; a dash where a method has no such number."
    return [
        {
            "kind": "table",
            "title": title,
            "note": note,
            "columns": ["method", "levels", "bits", *(name for name, _ in present)],
            "rows": [
                [
                    label,
                    _shape(rows[label]["sizes"]),
                    {"value": rows[label]["bits"], "digits": 1},
                    *(_cell(table.get(metric), COARSE.get(metric, DIGITS)) for _, metric in present),
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


def click_table(report: Report) -> dict[str, Any]:
    """The click model on every row and on the floors."""
    from recollect.tokenize.bench_units import FLOORS

    notes = {**FLOORS, "popularity": "training count alone"}
    tables = {**report.sections["models"], **report.sections["floors"]}
    rows = report.sections["rows"]
    return {
        "kind": "table",
        "title": "Codes as features of a click model",
        "note": (
            "AUC of the next item against items of equal popularity the user never touched; .5 is chance. Intervals "
            "resample users and seeds. Within users: share of a user's own non-clicks ranked below the click."
        ),
        "columns": ["items seen through", "AUC", "AUC within users", "parameters", "best epochs", ""],
        "rows": [
            [
                label,
                _cell(table.get(AUC)),
                _cell(table.get(WITHIN)),
                rows[label]["probe_parameters"] if label in rows else None,
                ", ".join(map(str, rows[label]["best_epochs"])) if label in rows else "–",
                f"floor: {notes[label]}" if label in notes else "",
            ]
            for label, table in tables.items()
        ],
        "terminal": True,
    }


def generative_panels(
    details: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Mapping[str, Any]]
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
                "cannot be listed. Intervals resample users and seeds. Extra digit: codes of the digit that tells "
                "colliding items apart, 1 = none was needed. A tuned sequence model is not in this table; "
                "`recollect evaluate` has one."
            ),
            "columns": [
                "items written as",
                "HR@10",
                "NDCG@10",
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
                    *(_cell(table.get(metric)) for metric in columns),
                    _cell(table.get(COVERAGE)),
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


def differences(report: Report) -> list[dict[str, Any]]:
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
            shown += _of_users(rows, name, against)
    if labels:
        of_codes = {
            "kind": "table",
            "title": f"Paired differences from {against}, codes",
            "note": "Seed by seed, with Student's interval over the seeds.",
            "columns": ["method", *metrics],
            "rows": [[label, *(_cell(entries.get((label, metric))) for metric in metrics)] for label in labels],
            "terminal": True,
        }
        shown.append(of_codes)
    return shown


def _of_users(rows: Sequence[Mapping[str, Any]], name: str, against: str) -> list[dict[str, Any]]:
    """Table and plot of paired differences in one metric per user."""
    table = {
        "kind": "table",
        "title": f"Paired differences from {against}, {name}",
        "note": (
            "The same users and seeds, resampled together; p from sign flips by user on the mean over seeds, "
            "Holm-adjusted over the rows."
        ),
        "columns": ["method", "difference", "p (Holm)"],
        "rows": [[row["model"], _cell(row), {"value": row["p_holm"], "digits": DIGITS}] for row in rows],
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
        rows = [[label, *(_cell(models[label].get(key)) for key in keys)] for label in series]
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
        ("alignment/same_prefix", "Successive items with the same prefix"),
        ("posterior_entropy", "Entropy of the posterior (nats)"),
    )
    shown: list[dict[str, Any]] = []
    for key, title in measures:
        metrics = [f"{key}/level_{level}" for level in range(deepest)]
        if key == "alignment/same_prefix":
            metrics[0] = "alignment/same_first_code"
        if any(metric in table for table in models.values() for metric in metrics):
            shown.append(
                {
                    "kind": "table",
                    "title": title,
                    "columns": ["method", *(f"level {level + 1}" for level in range(deepest))],
                    "rows": [
                        [label, *(_cell(table.get(metric)) for metric in metrics)] for label, table in models.items()
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
