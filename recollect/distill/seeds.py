"""One seed of a distillation run, from training to its test cases, and the rows that need no seed.

The test cases are opened after all training of a seed, for the models of that seed that are reported: for the table,
again with shuffled histories, and in the first seed again under the other mask. Everything is kept beside the stage it
was made from, so that asking again only reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from recollect.distill.config import DistillConfig
from recollect.distill.ensemble import EnsembleScores
from recollect.distill.methods import Row, run_method
from recollect.distill.order_sensitivity import order_sensitivity
from recollect.distill.other_mask import other_mask
from recollect.distill.read_once import ReadOnce
from recollect.distill.results import SeedResults
from recollect.distill.stages import Stage, read_columns
from recollect.distill.workshop import Workshop
from recollect.eval.case_table import CaseTable
from recollect.eval.list_metrics import list_totals
from recollect.eval.ranking import evaluate_ranker
from recollect.io import canonical_json, read_json, sha256_text, write_arrays, write_json
from recollect.recommenders.llm_sequential import LlmSequential
from recollect.recommenders.models import model_spec

CHECKED_TOTALS = ("coverage@10", "gini@10")


def run_seed(shop: Workshop, seed: int) -> SeedResults:
    """Train every row of one seed, then open its test cases."""
    config = shop.config
    crm = shop.crm(seed)
    llm = shop.llm(seed, crm)
    rows = {method: run_method(shop, method, seed) for method in config.rows}
    ensemble = shop.ensemble(crm, llm)
    named: dict[str, Stage] = {"student_alone": crm, "teacher_alone": llm}
    named |= _named_rows(config, rows)
    loads: dict[str, Callable[[], Any]] = {name: cache(partial(_load, stage)) for name, stage in named.items()}
    tables, totals, shuffled, unmasked = {}, {}, {}, {}

    def mix() -> EnsembleScores:
        return EnsembleScores(loads["student_alone"](), loads["teacher_alone"](), float(ensemble.info["weight"]))

    tables["ensemble"], totals["ensemble"] = _evaluated(shop, "ensemble", ensemble.folder, seed, mix)
    for name, stage in named.items():
        load = loads.pop(name)  # with what it holds: one decoder at a time
        tables[name], totals[name] = _evaluated(shop, name, stage.folder, seed, load)
        if name in ("student_alone", "student_distilled") or "teacher" in name:
            shuffled[name] = order_sensitivity(shop, stage, load, seed)
        if seed == config.seed and "teacher" in name:
            unmasked[name] = other_mask(shop, stage, load, tables[name], seed)
    return SeedResults(
        seed=seed,
        stages=named,
        rows=rows,
        tables=tables,
        totals=totals,
        shuffled=shuffled,
        unmasked=unmasked,
        ensemble_weight=float(ensemble.info["weight"]),
        ensemble_validation=float(ensemble.info["validation"]),
    )


def floor(shop: Workshop, name: str) -> tuple[CaseTable, dict[str, Any]]:
    """Test table and list totals of a model that no table goes without, fitted on the training events."""
    spec = model_spec(name)

    def load() -> Any:
        return spec.open(spec.options({}, name)).fit(shop.dataset, shop.split)

    return _evaluated(shop, name, shop.stages.folder.parent / "floors" / name, None, load)


def _named_rows(config: DistillConfig, rows: Mapping[str, Row]) -> dict[str, Stage]:
    """Names of the table's models: the main method's two sides, self-distillation, then METHOD/student and /teacher."""
    named = {}
    for method, row in rows.items():
        for side, stage in (("student", row.student), ("teacher", row.teacher)):
            if stage is None:
                continue
            if method == config.method:
                named[f"{side}_distilled"] = stage
            if method == "self":
                named["self_distilled"] = stage
            elif method != config.method:
                named[f"{method}/{side}"] = stage
    return named


def _load(stage: Stage) -> Any:
    model = stage.load()
    return ReadOnce(model) if isinstance(model, LlmSequential) else model


def _evaluated(
    shop: Workshop, name: str, folder: Path, seed: int | None, load: Callable[[], Any]
) -> tuple[CaseTable, dict[str, Any]]:
    key = sha256_text(canonical_json(list(shop.config.k)))[:8]
    columns_file, facts_file = folder / f"test-{key}.safetensors", folder / f"test-{key}.json"
    none = np.zeros(0, dtype=np.int64)
    if not facts_file.is_file():
        table = evaluate_ranker(
            load(),
            shop.dataset,
            shop.split,
            ks=shop.config.k,
            list_length=max(10, *shop.config.k),
            seed=seed,
            name=name,
            progress=shop.progress,
        )
        totals = list_totals(table, shop.dataset, shop.split, resamples=0)
        write_arrays(columns_file, table.metrics)
        facts = {"protocol": dict(table.protocol), "totals": {key: totals[key] for key in CHECKED_TOTALS}}
        write_json(facts_file, facts)
    facts = read_json(facts_file)
    user = shop.dataset.interactions.user[shop.split.test_row]
    table = CaseTable(
        model=name,
        user=user,
        metrics=read_columns(columns_file),
        lists=np.zeros((len(user), 0), dtype=np.int64),
        greater=none,
        equal=none,
        target_case=none,
        popularity=np.zeros(shop.dataset.n_items, dtype=np.int64),
        candidate=np.ones(shop.dataset.n_items, dtype=bool),
        protocol=facts["protocol"],
    )
    return table, facts["totals"]
