"""The LLM rows of a distillation once more without masking seen items.

How much of a number the mask decides differs between models that read text and models of ids, and published rows differ
in it, so both are printed for every LLM row. Source: recsys_evaluation 3.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recollect.distill.stages import Stage
from recollect.distill.workshop import Workshop
from recollect.eval.case_table import CaseTable
from recollect.eval.ranking import evaluate_ranker
from recollect.io import read_json, write_json


def other_mask(shop: Workshop, stage: Stage, load: Callable[[], Any], table: CaseTable, seed: int) -> dict[str, Any]:
    """The primary metric of a stage's model under both masks; the one without is kept beside the stage.

    Args:
        load: gives the stage's model.
        table: of the same model with the history masked.

    Returns:
        {"mask": "none", "own": report entry of `table`, "other": that of the same cases without masking}.
    """
    metric = shop.config.primary_metric
    path = stage.folder / f"unmasked-{metric.replace('@', '-')}.json"
    if not path.is_file():
        bare = evaluate_ranker(
            load(), shop.dataset, shop.split, mask="none", ks=shop.config.k, seed=seed, progress=shop.progress
        )
        write_json(path, bare.aggregate([metric], seed=shop.config.seed)[metric])
    return {
        "mask": "none",
        "own": table.aggregate([metric], seed=shop.config.seed)[metric],
        "other": read_json(path),
    }
