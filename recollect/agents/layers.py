"""The fitted choice layer over agents' evidence, its ablations, and the scorers it is compared with.

Everything is fitted on calibration cases, which lie before the test cases of every user, and judged on test cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recollect.agents.evidence import FUSION, GROUP, LANGUAGE
from recollect.agents.observed import Observed
from recollect.agents.plan import Plan
from recollect.errors import InputError
from recollect.eval.choice_layer import ChoiceLayer
from recollect.eval.null_scorers import null_scores
from recollect.eval.slates import Slates
from recollect.types import Dataset

AGENT = "agent"
LOGISTIC = "logistic-choice"
LANGUAGE_ALONE = "language-model-alone"
KNOWING = ("popularity", "tfidf-history", "bm25-history", "mf", "minilm-history", "minilm-closest")
"""Scorers without any agent that enter the layers as features."""

ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "agent-without-language-model": LANGUAGE,
    "agent-without-groups": GROUP,
    "agent-without-fusion": FUSION,
}


@dataclass(frozen=True)
class Scored:
    """Scores of everybody on the test slates.

    agent: (C, S) choice probabilities (uncalibrated softmax where no layer could be fitted).
    rivals: {name: (C, S)} null scorers, the logistic model on them, the language model alone.
    ablations: {name: (C, S)}.  layer: None where too few calibration cases were at hand, then `refused` says why.
    """

    agent: np.ndarray
    rivals: Mapping[str, np.ndarray]
    ablations: Mapping[str, np.ndarray]
    layer: ChoiceLayer | None
    calibration_utility: np.ndarray
    test_utility: np.ndarray
    refused: str = ""
    weights: Mapping[str, dict] = field(default_factory=dict)


def history_before(dataset: Dataset, slates: Slates, first_row: Mapping[int, int]) -> list[np.ndarray]:
    """Per case the user's rows before the first row of its part: what the frozen agents had seen."""
    starts = np.searchsorted(dataset.interactions.user, slates.user, side="left")
    return [
        np.arange(start, first_row[user]) for start, user in zip(starts.tolist(), slates.user.tolist(), strict=True)
    ]


def rival_scores(
    dataset: Dataset,
    plan: Plan,
    slates: Slates,
    item_vectors: np.ndarray,
    memory_length: np.ndarray,
    *,
    seed: int,
) -> dict[str, np.ndarray]:
    """Every scorer that is not an agent, on the same slates with the same histories."""
    first_row: dict[int, int] = {}
    for user, row in zip(slates.user.tolist(), slates.row.tolist(), strict=True):
        first_row[user] = min(row, first_row.get(user, row))
    histories = history_before(dataset, slates, first_row)
    scores = null_scores(
        slates,
        dataset,
        histories,
        train_rows=plan.training_rows,
        seed=seed,
        memory_length=memory_length,
        item_vectors=item_vectors,
    )
    log = dataset.interactions
    scores["minilm-closest"] = np.stack(
        [
            (item_vectors[candidates] @ item_vectors[log.item[rows]].T).max(axis=1)
            if len(rows)
            else np.zeros(slates.size)
            for candidates, rows in zip(slates.candidates, histories, strict=True)
        ]
    )
    return scores


def _table(evidence: Mapping[str, np.ndarray], rivals: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """(C, S, F) features; popularity counts enter as log(1 + count)."""
    columns = []
    for name in names:
        column = evidence[name] if name in evidence else rivals[name]
        columns.append(np.log1p(column) if name == "popularity" else column)
    return np.stack(columns, axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def score_everybody(
    plan: Plan,
    observed: Observed,
    calibration_rivals: Mapping[str, np.ndarray],
    test_rivals: Mapping[str, np.ndarray],
    *,
    seed: int,
) -> Scored:
    """Fit the layer on calibration cases, the same without each part, and the logistic yardstick."""
    evidence = tuple(observed.test.evidence)
    language = next(name for name in LANGUAGE if name in evidence)
    alone = observed.test.evidence[language]
    rivals = {**test_rivals, LANGUAGE_ALONE: alone}

    def fit(names: Sequence[str]) -> tuple[ChoiceLayer, np.ndarray, np.ndarray]:
        train = _table(observed.calibration.evidence, calibration_rivals, names)
        test = _table(observed.test.evidence, test_rivals, names)
        layer = ChoiceLayer.fit(train, plan.calibration.target, plan.calibration.user, names, seed=seed)
        return layer, layer.utilities(train), layer.utilities(test)

    all_names = (*KNOWING, *evidence)
    try:
        layer, calibration_utility, test_utility = fit(all_names)
        rivals[LOGISTIC] = _softmax(fit(KNOWING)[2])
        ablations = {
            name: _softmax(fit([feature for feature in all_names if feature not in dropped])[2])
            for name, dropped in ABLATIONS.items()
            if any(feature in evidence for feature in dropped)
        }
    except InputError as error:
        return Scored(
            agent=_softmax(alone),
            rivals=rivals,
            ablations={},
            layer=None,
            calibration_utility=observed.calibration.evidence[language],
            test_utility=alone,
            refused=f"the choice layer was not fitted, so the agents are scored by the language model alone: {error}",
        )
    return Scored(
        agent=_softmax(test_utility),
        rivals=rivals,
        ablations=ablations,
        layer=layer,
        calibration_utility=calibration_utility,
        test_utility=test_utility,
        weights=layer.coefficient_entries(),
    )
