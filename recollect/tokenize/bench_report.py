"""From the stored rows of a comparison to its report: intervals over seeds, and over seeds and users.

A metric of codes has one value per seed: mean and Student's 95 % interval over the seeds (none for one seed). The AUC
of the click model and the hits of the generator have one value per seed and user: interval and p-value are those of
`recollect.eval.seeds_and_users`, over both (over users alone for one seed). Differences from the row `against` are
paired: by seed for metrics of codes, by seed and user for the others, p Holm-adjusted over the rows. What is called
best is best on validation; test users have no part in choosing.

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
    generative_units,
    read_columns,
)
from recollect.tokenize.bench_panels import AUC, VALID_AUC, VALID_NDCG, WITHIN
from recollect.tokenize.bench_units import RESULT_FILE, Unit, read_scores
from recollect.tokenize.bench_warnings import find_warnings, generative_warnings
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
RATES = (
    *("unique_rate", "collision_rate", "items_in_collision", "icr", "utilization/", "perplexity/", "prefix_"),
    *("knn_overlap@", "alignment/same_", "alignment/random", "posterior_confidence/", "downstream/", "generative/"),
)
"""Beginnings of the names of metrics between 0 and 1; the others are not negative, but for cosines."""
_OF_SEEDS = ("best_epochs", "valid_ndcg", "extra_digits", "coverage", "seconds")


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
                models[label][metric] = over_seeds(values, bounds_of(metric))
    differences = code_differences(models, config.against)
    floors: dict[str, dict[str, Any]] = {}
    if cases is not None:
        pseudo = user_values(units, out)
        for label, columns in pseudo.items():
            table = models[label] if label in models else floors.setdefault(label, {})
            probes = [results[unit.folder]["downstream"]["valid_auc"] for unit in units if unit.label == label]
            table[VALID_AUC] = over_seeds([max(curve) for curve in probes], bounds_of(VALID_AUC))
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


def bounds_of(metric: str) -> tuple[float, float]:
    """What values of a metric cannot leave."""
    if metric.startswith("reconstruction/cosine"):
        return -1.0, 1.0
    return (0.0, 1.0) if metric.startswith(RATES) else (0.0, math.inf)


def over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, Any]:
    """Mean of one value per seed with Student's 95 % interval, cut at `bounds`; no interval with one seed."""
    from scipy.stats import t

    n, mean = len(values), float(np.mean(values))
    ci95: list[float | None] = [None, None]
    if n > 1:
        half = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
        ci95 = [max(bounds[0], mean - half), min(bounds[1], mean + half)]
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
    """A report entry of a rate with a value per seed and user."""
    return _entry_and_p(values, config, (0.0, 1.0))[0]


def _entry_and_p(
    values: Sequence[np.ndarray], config: BenchConfig, bounds: tuple[float, float]
) -> tuple[dict[str, Any], float]:
    """The entry, and the p-value of a mean of 0 (1 where one user gives none)."""
    from recollect.eval.seeds_and_users import over_seeds_and_users
    from recollect.eval.statistics import Interval, entry

    found = over_seeds_and_users(values, resamples=config.resamples, seed=config.seed, bounds=bounds)
    per_seed = [float(column.mean()) for column in values]
    made = {**entry(Interval(found.value, found.low, found.high, found.n)), "per_seed": per_seed}
    return made, found.p_value if math.isfinite(found.p_value) else 1.0


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
        entry = details.setdefault(unit.label, {name: [] for name in _OF_SEEDS})
        entry["parameters"] = result["parameters"]
        entry["best_epochs"].append(result["best_epoch"])
        entry["valid_ndcg"].append(result["valid_ndcg"])
        entry["extra_digits"].append(result["extra_digit"])
        entry["coverage"].append(result["coverage"])
        entry["seconds"].append(sum(result["seconds"].values()) if result["seconds"] else None)
    for label, reference in reference_columns(items.dataset, items.split).items():
        values[label] = {f"generative/{name}": [reference[name]] * config.seeds for name in SHOWN}
    for label, columns in values.items():
        table = models[label] if label in models else floors.setdefault(label, {})
        table |= {name: entry_of(column, config) for name, column in columns.items()}
        if label in details:
            table[COVERAGE] = over_seeds(details[label]["coverage"], bounds_of(COVERAGE))
            table[VALID_NDCG] = over_seeds(details[label]["valid_ndcg"], bounds_of(VALID_NDCG))
    return user_differences(values, config, NDCG), details


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
    """Each row (floors too) minus `against` in a metric per seed and user; p and interval are of one statistic."""
    from recollect.eval.statistics import holm

    if config.against not in pseudo:
        return []
    base = pseudo[config.against][metric]
    found = []
    for label, columns in pseudo.items():
        if label != config.against:
            gap = [mine - theirs for mine, theirs in zip(columns[metric], base, strict=True)]
            entry, p_value = _entry_and_p(gap, config, (-1.0, 1.0))
            found.append({"model": label, "metric": metric, **entry, "p_value": p_value})
    for row, adjusted in zip(found, holm(np.array([row["p_value"] for row in found])), strict=True):
        row["p_holm"] = float(adjusted)
    return found


def row_details(label: str, units: Sequence[Unit], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How a row was made: method and options, starts of a fit, codebook sizes, bits, epochs of the probe.

    starts: of how many fits from other first codes the best was kept; None where nothing is fitted.
    """
    of_row = [unit for unit in units if unit.label == label and unit.entry is not None]
    first = results[of_row[0].folder]
    probes = [results[unit.folder]["downstream"] for unit in of_row if "downstream" in results[unit.folder]]
    made = of_row[0].describe()
    return {
        **made,
        "starts": None if made["method"] == "random" else made["options"].get("restarts", 1),
        "seeds": [unit.seed for unit in of_row],
        "sizes": first["sizes"],
        "bits": sum(math.log2(size) for size in first["sizes"]),
        "warnings": sorted({warning for unit in of_row for warning in results[unit.folder]["warnings"]}),
        "best_epochs": [probe["best_epoch"] for probe in probes],
        "validations": [len(probe["valid_auc"]) for probe in probes],
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
        "perplexity": "exp of the entropy of a level's codes, over the number of its codes",
        "collisions": "left as they are, so that all methods are compared on what they emit",
        "intervals": (
            f"Student's 95 % over seeds; AUC, HR and NDCG: {panels.intervals_over(config)}, "
            f"{config.resamples} resamples of users"
            if cases is not None or config.generative
            else "Student's 95 % over seeds"
        ),
    }
    if cases is not None:
        found |= {
            "click_model": (
                f"pooled history and item through fields '{config.fields}', factorisation term and network; "
                f"at most {config.probe_epochs} epochs, the best point on validation"
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


def _seconds(result: Mapping[str, Any]) -> float:
    return sum(result.get("seconds", {}).values()) + result.get("downstream", {}).get("seconds", 0.0)
