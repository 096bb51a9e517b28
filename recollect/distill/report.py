"""From the trained rows of a distillation to its report: one table, paired differences, curves, weights.

Every difference is paired over users, seeds averaged first. A missed goal is printed like a met one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recollect.distill.config import DistillConfig
from recollect.distill.ensemble import WEIGHTS
from recollect.distill.goals import goals
from recollect.distill.methods import Row
from recollect.distill.report_panels import all_panels
from recollect.distill.results import SEEDS_FOR_A_CLAIM, SeedResults
from recollect.eval.case_table import RESAMPLES, CaseTable
from recollect.eval.comparison import Comparison, compare_models
from recollect.recommenders.models import model_spec
from recollect.types import Dataset, Report, Split

AGAINST = (
    "student_alone",
    "self_distilled",
    "labels-only/student",
    "ensemble",
    "teacher_alone",
    "labels-only/teacher",
)


def make_report(
    config: DistillConfig,
    dataset: Dataset,
    split: Split,
    seeds: Sequence[SeedResults],
    floors: Mapping[str, tuple[CaseTable, Mapping[str, Any]]],
    manifest: dict[str, Any],
    seconds: Mapping[str, float],
) -> Report:
    """The report of a finished run.

    Args:
        floors: {model: test table and list totals} of rows that are shown and not tested against.
        seconds: training time of every stage behind it, by name; each counts once however many rows share it.
    """
    metric = config.primary_metric
    names = [name for name in seeds[0].tables if all(name in results.tables for results in seeds)]
    tables = {name: [results.tables[name] for results in seeds] for name in names}
    totals = {name: [results.totals[name] for results in seeds] for name in names}
    comparisons = {
        against: compare_models(
            tables, against=against, tested=[metric], totals=totals if against == AGAINST[0] else None, seed=config.seed
        )
        for against in AGAINST
        if against in tables
    }
    main = comparisons[AGAINST[0]]
    # Beside the first run of the baseline, so that another protocol would be refused; no p-value is adjusted for them.
    shown = compare_models(
        {AGAINST[0]: tables[AGAINST[0]][:1], **{name: table for name, (table, _) in floors.items()}},
        tested=[],
        totals={name: [found] for name, (_, found) in floors.items()},
        seed=config.seed,
    ).models
    differences = [row for one in comparisons.values() for row in one.differences]
    sections: dict[str, Any] = {
        "models": {**main.models, **{name: shown[name] for name in floors}},
        "primary_metric": metric,
        "baseline": AGAINST[0],
        "differences": differences,
        "goals": goals(tables, differences, metric, config.all_seeds, config.seed),
        "rows": {name: row_details(name, seeds) for name in names if name != "ensemble"},
        "ensemble": {
            "weight_of_the_llm": [results.ensemble_weight for results in seeds],
            "validation": [results.ensemble_validation for results in seeds],
            "weights_tried": len(WEIGHTS),
        },
        "shuffled_histories": sensitivity(metric, main, seeds),
        "other_mask": seeds[0].unmasked,
        "half_rounds": {
            method: [half_rounds(results.rows[method]) for results in seeds if method in results.rows]
            for method in config.rows
        },
        "run": manifest,
    }
    teachers = [results.rows["self"].taught_by for results in seeds]
    sections["rows"]["self_distilled"]["teacher_validation"] = [one.validation for one in teachers if one]
    protocol = {
        **main.protocols[AGAINST[0]],
        "student": config.student,
        "teacher": config.teacher,
        "method": config.method,
        "rounds": config.rounds,
        **({"folds": config.folds} if "crossfit" in config.rows else {}),
        "chosen_by": f"on validation: epochs by ndcg@10; rounds and the weight of the ensemble by {metric}",
        "n_users": len(np.unique(dataset.interactions.user[split.test_row])),
        "intervals": f"95 %, {RESAMPLES} resamples of users; differences paired over users",
    }
    report = Report(
        kind="distill",
        protocol=protocol,
        metrics={},
        ledger={"stages": len(seconds), "seconds": round(sum(seconds.values()), 1)},
        warnings=warnings_of(config, dataset, seeds),
        sections=sections,
    )
    sections["panels"] = all_panels(config, report, seeds)
    return report


def row_details(name: str, seeds: Sequence[SeedResults]) -> dict[str, Any]:
    """Validation, parameters and cost of a model, per seed."""
    infos = [results.stages[name].info for results in seeds]
    return {
        "stage": [results.stages[name].folder.name for results in seeds],
        "validation": [info["validation"] for info in infos],
        "parameters": infos[0]["parameters"],
        "epochs": [info["epochs"] for info in infos],
        "seconds": [info["seconds"] for info in infos],
        "samples_per_second": [info["samples_per_second"] for info in infos],
    }


def half_rounds(row: Row) -> list[dict[str, Any]]:
    """A row's half-rounds without their inner curves."""
    return [{key: value for key, value in half.items() if key != "curve"} for half in row.half_rounds]


def sensitivity(metric: str, main: Comparison, seeds: Sequence[SeedResults]) -> dict[str, dict[str, float]]:
    """How much each model loses when histories are shuffled: {"in_order", "shuffled", "relative", "cosine" of its user
    vectors} (llmd4rec 7.18)."""
    found = {}
    for name in seeds[0].shuffled:
        in_order = float(main.models[name][metric]["value"])
        shuffled = float(np.mean([results.shuffled[name]["shuffled"] for results in seeds]))
        relative = (shuffled - in_order) / in_order if in_order else 0.0
        cosine = float(np.mean([results.shuffled[name]["cosine"] for results in seeds]))
        found[name] = {"in_order": in_order, "shuffled": shuffled, "relative": relative, "cosine": cosine}
    return found


def warnings_of(config: DistillConfig, dataset: Dataset, seeds: Sequence[SeedResults]) -> list[str]:
    """What a reader should know before quoting a number."""
    found = [str(warning) for warning in dataset.meta.get("warnings", ())]
    if len(seeds) < SEEDS_FOR_A_CLAIM:
        found.append(
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: the intervals cover users, not training; use --seeds "
            f"{SEEDS_FOR_A_CLAIM} or more before claiming a difference"
        )
    alone = seeds[0].stages["student_alone"].info["parameters"]
    for name, stage in seeds[0].stages.items():
        is_student = name in ("student_distilled", "self_distilled") or name.endswith("/student")
        if is_student and stage.info["parameters"] != alone:
            found.append(f"{name} has {stage.info['parameters']} parameters where the student alone has {alone}")
    most = config.rounds * config.teacher_round_epochs
    if config.teacher_start == "alone":
        most += config.teacher_epochs
    if most > config.teacher_epochs:
        found.append(
            f"distilled LLM rows had up to {most} epochs where the LLM alone had {config.teacher_epochs}: part of a "
            "gain of the LLM side may be longer training; labels-only/teacher has as many"
        )
    loss = config.student_loss or getattr(model_spec(config.student).options({}, "the student"), "loss", "ce")
    if loss != "ce" and "student_distilled" in seeds[0].stages:
        found.append(
            f"the student alone trains with {loss}, half-rounds with cross-entropy over the whole catalogue: part of a "
            "gain over it is the change of loss, which labels-only/student shares"
        )
    return found
