"""From the stored rows of a comparison to its report: intervals over seeds, and over seeds and users.

A metric of codes has one value per seed: mean and Student's 95 % interval over the seeds (none for one seed). The AUC
of the click model and the hits of the generator have one value per seed and user: users and seeds are resampled
together. Differences from the row `against` are paired: by seed for metrics of codes, by seed and user for the others,
p by sign flips of users on the mean over seeds, Holm-adjusted over the table.

Source: semantic_ids 3; recsys_evaluation 3.5 for the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recollect.io import read_json
from recollect.tokenize import bench_panels as panels
from recollect.tokenize.bench_generative import (
    COVERAGE,
    GENERATIVE_FILE,
    NDCG,
    SHOWN,
    budget_of,
    generative_units,
    read_columns,
)
from recollect.tokenize.bench_panels import AUC, WITHIN
from recollect.tokenize.bench_units import RESULT_FILE, Unit, read_scores
from recollect.tokenize.downstream_cases import CaseSets
from recollect.tokenize.embeddings import Items
from recollect.tokenize.run_config import BenchConfig
from recollect.types import Report

COMPARED = (
    "reconstruction/relative_mse",
    "unique_rate",
    "knn_overlap@10",
    "alignment/same_first_code",
)
SEEDS_FOR_A_CLAIM = 3
NO_GENERATIVE = "generative retrieval (HR and NDCG of a model that writes codes) was not measured; --generative does it"


def make_report(
    config: BenchConfig,
    items: Items,
    cases: CaseSets | None,
    units: Sequence[Unit],
    out: Path,
    manifest: dict[str, Any],
) -> Report:
    """The report of a run whose units are all finished."""
    results = {unit.folder: read_json(out / unit.folder / RESULT_FILE) for unit in units}
    labels = list(dict.fromkeys(unit.label for unit in units if unit.entry is not None))
    models: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for label in labels:
        per_seed = [results[unit.folder]["metrics"] for unit in units if unit.label == label and unit.entry is not None]
        for metric in dict.fromkeys(name for found in per_seed for name in found):
            values = [found[metric] for found in per_seed if found.get(metric) is not None]
            if values:
                models[label][metric] = over_seeds(values)
    differences = code_differences(models, config.against)
    floors: dict[str, dict[str, Any]] = {}
    if cases is not None:
        pseudo = user_values(units, out)
        for label, columns in pseudo.items():
            table = models[label] if label in models else floors.setdefault(label, {})
            table |= {name: entry_of(values, config) for name, values in columns.items()}
        floors["popularity"] = popularity_floor(cases, config)
        differences += user_differences(pseudo, config, AUC)
    generators = generative_units(units, config, items.dataset is not None)
    generated: dict[str, Any] = {}
    if generators:
        of_generators, generated = add_generative(models, floors, generators, items, config, out)
        differences += of_generators
    rows = {label: row_details(label, units, results) for label in labels}
    report = Report(
        kind="tokenize-bench",
        protocol=protocol(config, items, cases),
        metrics={},
        ledger={
            "rows": len(units),
            "seconds": round(sum(_seconds(result) for result in results.values()), 1),
        },
        warnings=[*find_warnings(config, items, cases, models, rows), *generative_warnings(generated, config)],
        sections={
            "models": models,
            "floors": floors,
            "rows": rows,
            "against": config.against if config.against in models else None,
            "differences": differences,
            "generative": generated,
            "run": manifest,
        },
    )
    report.sections["panels"] = panels.all_panels(report, config)
    return report


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one value per seed with Student's 95 % interval; none with one seed."""
    from scipy.stats import t

    n, mean = len(values), float(np.mean(values))
    ci95: list[float | None] = [None, None]
    if n > 1:
        half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
        ci95 = [mean - half, mean + half]
    return {"value": mean, "ci95": ci95, "n": n, "per_seed": [float(value) for value in values]}


def user_values(units: Sequence[Unit], out: Path) -> dict[str, dict[str, list[np.ndarray]]]:
    """{label: {metric: one (C,) array of pseudo-values per seed}}."""
    from recollect.tokenize.downstream import auc_by_user, wins_by_user

    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for unit in units:
        clicked, skipped = read_scores(unit, out)
        columns = found.setdefault(unit.label, {AUC: [], WITHIN: []})
        columns[AUC].append(auc_by_user(clicked, skipped))
        columns[WITHIN].append(wins_by_user(clicked, skipped))
    return found


def entry_of(values: Sequence[np.ndarray], config: BenchConfig) -> dict[str, Any]:
    """A report entry of values per seed and user."""
    from recollect.tokenize.downstream import over_seeds_and_users

    value, low, high = over_seeds_and_users(values, resamples=config.resamples, seed=config.seed)
    per_seed = [float(column.mean()) for column in values]
    return {"value": value, "ci95": [low, high], "n": len(values[0]), "per_seed": per_seed}


def popularity_floor(cases: CaseSets, config: BenchConfig) -> dict[str, Any]:
    """What the training count alone gives; near one half where negatives are as popular as clicks."""
    from recollect.tokenize.downstream import auc_by_user, wins_by_user

    counts = cases.popularity.astype(np.float64)
    scores = counts[cases.test.clicked], counts[cases.test.skipped]
    return {AUC: entry_of([auc_by_user(*scores)], config), WITHIN: entry_of([wins_by_user(*scores)], config)}


def add_generative(
    models: dict[str, dict[str, Any]],
    floors: dict[str, dict[str, Any]],
    units: Sequence[Unit],
    items: Items,
    config: BenchConfig,
    out: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Enter the generators and their references into the tables of a report.

    Args:
        models, floors: the report's, changed in place.
        units: of `generative_units`, all finished.

    Returns:
        Paired differences in NDCG@10 from the row compared with, and the report's section: {label: how it went}.
    """
    from recollect.tokenize.generative import reference_columns

    assert items.dataset is not None
    assert items.split is not None
    values: dict[str, dict[str, list[np.ndarray]]] = {}
    details: dict[str, Any] = {}
    for unit in units:
        columns = values.setdefault(unit.label, {f"generative/{name}": [] for name in SHOWN})
        for name, column in read_columns(unit, out).items():
            columns[f"generative/{name}"].append(column)
        result = read_json(out / unit.folder / GENERATIVE_FILE)
        entry = details.setdefault(unit.label, {"best_epochs": [], "extra_digits": [], "coverage": [], "seconds": []})
        entry["parameters"] = result["parameters"]
        entry["best_epochs"].append(result["best_epoch"])
        entry["extra_digits"].append(result["extra_digit"])
        entry["coverage"].append(result["coverage"])
        entry["seconds"].append(sum(result["seconds"].values()) if result["seconds"] else None)
    for label, reference in reference_columns(items.dataset, items.split).items():
        values[label] = {f"generative/{name}": [reference[name]] * config.seeds for name in SHOWN}
    for label, columns in values.items():
        table = models[label] if label in models else floors.setdefault(label, {})
        table |= {name: entry_of(column, config) for name, column in columns.items()}
        if label in details:
            table[COVERAGE] = over_seeds(details[label]["coverage"])
    return user_differences(values, config, NDCG), details


def generative_warnings(details: Mapping[str, Mapping[str, Any]], config: BenchConfig) -> list[str]:
    """Rows whose generator was still getting better when its epochs ran out."""
    last = budget_of(config)
    late = [
        label
        for label, row in details.items()
        if any(epoch + last.validate_every > last.epochs for epoch in row["best_epochs"])
    ]
    if not late:
        return []
    return [
        f"the generator of {', '.join(late)} was still improving at the last of {last.epochs} epochs; use a larger "
        "--generative-epochs before ranking these rows by it"
    ]


def code_differences(models: Mapping[str, Mapping[str, Any]], against: str) -> list[dict[str, Any]]:
    """Each row minus `against`, seed by seed, on the metrics of `COMPARED`."""
    found = []
    for label, table in models.items():
        for metric in COMPARED:
            base = models.get(against, {}).get(metric)
            if label == against or base is None or metric not in table:
                continue
            pairs = zip(table[metric]["per_seed"], base["per_seed"], strict=True)
            entry = over_seeds([mine - theirs for mine, theirs in pairs])
            found.append({"model": label, "metric": metric, **entry, "p_holm": None})
    return found


def user_differences(
    pseudo: Mapping[str, Mapping[str, Sequence[np.ndarray]]], config: BenchConfig, metric: str
) -> list[dict[str, Any]]:
    """Each row (floors too) minus `against` in a metric per user: interval over seeds and users, p over users."""
    from recollect.eval.statistics import holm, paired_differences
    from recollect.tokenize.downstream import over_seeds_and_users

    if config.against not in pseudo:
        return []
    base = pseudo[config.against][metric]
    others = {label: columns[metric] for label, columns in pseudo.items() if label != config.against}
    if not others:
        return []
    gaps = {
        label: [mine - theirs for mine, theirs in zip(columns, base, strict=True)] for label, columns in others.items()
    }
    users = np.arange(len(base[0]))
    tested = paired_differences(
        {label: np.mean(gap, axis=0) for label, gap in gaps.items()}, users, n=1, seed=config.seed
    )
    adjusted = holm(np.array([tested[label].p_value for label in gaps]))
    found = []
    for (label, gap), p_value in zip(gaps.items(), adjusted, strict=True):
        value, low, high = over_seeds_and_users(gap, resamples=config.resamples, seed=config.seed)
        per_seed = [float(column.mean()) for column in gap]
        entry = {"value": value, "ci95": [low, high], "n": len(users), "per_seed": per_seed}
        found.append({"model": label, "metric": metric, **entry, "p_holm": float(p_value)})
    return found


def row_details(label: str, units: Sequence[Unit], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How a row was made: method and options, codebook sizes, bits, the first seed's usage, epochs of the probe."""
    of_row = [unit for unit in units if unit.label == label and unit.entry is not None]
    first = results[of_row[0].folder]
    probes = [results[unit.folder]["downstream"] for unit in of_row if "downstream" in results[unit.folder]]
    return {
        **of_row[0].describe(),
        "seeds": [unit.seed for unit in of_row],
        "sizes": first["sizes"],
        "bits": sum(math.log2(size) for size in first["sizes"]),
        "warnings": sorted({warning for unit in of_row for warning in results[unit.folder]["warnings"]}),
        "best_epochs": [probe["best_epoch"] for probe in probes],
        "probe_parameters": probes[0]["parameters"] if probes else None,
    }


def protocol(config: BenchConfig, items: Items, cases: CaseSets | None) -> dict[str, Any]:
    """Everything a number of the table depends on."""
    found: dict[str, Any] = {
        "data": items.dataset.name if items.dataset is not None else config.data,
        "items": len(items),
        "dimension": int(items.embeddings.shape[1]),
        "vectors": items.source,
        "embedder": items.source.get("embedder", "none, vectors are given"),
        "preprocess": ", ".join(config.preprocess or ()) or "none",
        "fitted_on": "items with a training event" if config.hold_out_cold else "all items",
        "weight": config.weight,
        "levels": config.levels,
        "codebook_size": config.codebook_size,
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "collisions": "left as they are, so that all methods are compared on what they emit",
        "intervals": (
            f"Student's 95 % over seeds; AUC: {config.resamples} resamples of users and seeds together"
            if cases is not None
            else "Student's 95 % over seeds"
        ),
    }
    if cases is not None:
        found |= {
            "click_model": (
                f"pooled history and item through fields '{config.fields}', factorisation term and network; "
                f"{config.probe_epochs} epochs, the best on validation"
            ),
            "clicks": f"{len(cases.train)} training, {len(cases.valid)} validation, {len(cases.test)} test",
            "non_clicks": "items the user never touched, among the nearest in popularity",
            "split": items.split.rule if items.split is not None else "",
        }
    if config.generative and items.split is not None:
        found |= {
            "generator": (
                f"decoder-only transformer over codes, last {config.generative_history} items, at most "
                f"{config.generative_epochs} epochs, the best on validation NDCG@10; beam {config.beams} over the "
                "candidates' codes; colliding items told apart by one more digit"
            ),
            "split": items.split.rule,
        }
    return found


def find_warnings(
    config: BenchConfig,
    items: Items,
    cases: CaseSets | None,
    models: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What a reader must know before believing the table."""
    found = []
    if config.seeds < SEEDS_FOR_A_CLAIM:
        found.append(f"{config.seeds} seed(s) only; use --seeds {SEEDS_FOR_A_CLAIM} or more for a claim")
    if config.against not in models:
        found.append(f"{config.against!r} is not in the table, so no differences are reported; add it to --methods")
    bits = {label: row["bits"] for label, row in rows.items()}
    usual = bits.get(config.against, max(bits.values()))
    odd = {label: value for label, value in bits.items() if abs(value - usual) > 1e-6}
    if odd:
        listed = ", ".join(f"{label} {value:g}" for label, value in odd.items())
        found.append(f"not at the {usual:g} bits per item of the other rows: {listed}; read their errors beside that")
    if config.downstream and cases is None:
        found.append("there is no log behind an .npy file, so the click model was left out")
    if not config.generative:
        found.append(NO_GENERATIVE)
    elif items.dataset is None:
        found.append("there is no log behind an .npy file, so the generator was left out")
    without = items.source.get("items_without_text")
    if without:
        found.append(f"{without} items have no text at all and share one vector")
    found += [f"{label}: {warning}" for label, row in rows.items() for warning in row["warnings"]]
    if items.dataset is not None:
        found += [str(warning) for warning in items.dataset.meta.get("warnings", ())]
    return found


def _seconds(result: Mapping[str, Any]) -> float:
    return sum(result.get("seconds", {}).values()) + result.get("downstream", {}).get("seconds", 0.0)
