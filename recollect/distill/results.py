"""What one seed of a distillation made, as the report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recollect.distill.methods import Row
from recollect.distill.stages import Stage
from recollect.eval.case_table import CaseTable

SEEDS_FOR_A_CLAIM = 3


@dataclass(frozen=True)
class SeedResults:
    """What one seed made. stages, tables, totals: by the table's model names; rows: by method.

    shuffled: `order_sensitivity` of the LLM models and two conventional ones.  unmasked: `other_mask` of the LLM
    models, in the first seed.
    """

    seed: int
    stages: Mapping[str, Stage]
    rows: Mapping[str, Row]
    tables: Mapping[str, CaseTable]
    totals: Mapping[str, Mapping[str, Any]]
    shuffled: Mapping[str, Mapping[str, float]]
    unmasked: Mapping[str, Mapping[str, Any]]
    ensemble_weight: float
    ensemble_validation: float
