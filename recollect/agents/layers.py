"""The fitted choice layer over agents' evidence, its ablations, and the scorers it is compared with.

Two stages, both before any test case of any user. The first weighs memories, group views and text similarities on
rehearsals (training rows before they were learned) and calibration cases; it needs no model calls, so its cases are
many. The second adds what calls were paid for, the language model's evidence, and item memories, on calibration cases.
The logistic yardstick is the first stage on scorers without agents: as many cases, no agent. Judged on test cases.

A part may add nothing to the whole layer and still do its work: a text similarity over all domains, which no agent
needs, tells much of what a fused memory tells. So the first stage is also fitted on the agents' own evidence alone, and
on that without groups and without fusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.agents.evidence import FUSION, GROUP, LANGUAGE
from recollect.agents.observed import Observed
from recollect.agents.plan import Plan
from recollect.errors import InputError
from recollect.eval.choice_layer import ChoiceLayer
from recollect.eval.null_scorers import earlier_rows, null_scores
from recollect.eval.slates import Slates
from recollect.types import Dataset

AGENT = "agent"
LOGISTIC = "logistic-choice"
LANGUAGE_ALONE = "language-model-alone"
FIRST_STAGE = "memories-and-similarities"
KNOWING = ("popularity", "tfidf-history", "bm25-history", "mf", "minilm-history", "minilm-closest")
"""Scorers without any agent that enter the layers as features."""

ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "agent-without-language-model": LANGUAGE,
    "agent-without-groups": GROUP,
    "agent-without-fusion": FUSION,
}
MEMORIES_ALONE = "memories-alone"
MEMORY_ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "memories-alone-without-groups": GROUP,
    "memories-alone-without-fusion": FUSION,
}


@dataclass(frozen=True)
class Scored:
    """Scores of everybody on the test slates.

    agent: (C, S) choice probabilities (uncalibrated softmax where no layer could be fitted).
    rivals: {name: (C, S)} null scorers, the logistic model on them, the language model alone.
    ablations: {name: (C, S)} of the whole layer refitted without a part.
    memories: {name: (C, S)} of the first stage on the agents' evidence alone (`MEMORIES_ALONE`), and without a part.
    layers: the fitted stages, none where too few cases were at hand; then `refused` says why.
    """

    agent: np.ndarray
    rivals: Mapping[str, np.ndarray]
    ablations: Mapping[str, np.ndarray]
    memories: Mapping[str, np.ndarray]
    layers: tuple[ChoiceLayer, ...]
    calibration_utility: np.ndarray
    test_utility: np.ndarray
    refused: str = ""


def history_before(dataset: Dataset, slates: Slates, first_row: Mapping[int, int]) -> list[np.ndarray]:
    """Per case the user's rows before the first row of its part: what the frozen agents had seen."""
    starts = np.searchsorted(dataset.interactions.user, slates.user, side="left")
    return [
        np.arange(start, first_row[user]) for start, user in zip(starts.tolist(), slates.user.tolist(), strict=True)
    ]


def rival_scores(
    dataset: Dataset,
    slates: Slates,
    item_vectors: np.ndarray,
    memory_length: np.ndarray,
    *,
    counted: np.ndarray,
    one_by_one: bool,
    seed: int,
) -> dict[str, np.ndarray]:
    """Every scorer that is not an agent, on the same slates with the same histories.

    Args:
        counted: (N,) bool mask of the rows popularity and factors come from.
        one_by_one: histories grow with every case (rehearsals) or stop before the user's first case (frozen agents).
    """
    first_row: dict[int, int] = {}
    for user, row in zip(slates.user.tolist(), slates.row.tolist(), strict=True):
        first_row[user] = min(row, first_row.get(user, row))
    if one_by_one:
        histories = earlier_rows(dataset.interactions, slates.row)
    else:
        histories = history_before(dataset, slates, first_row)
    scores = null_scores(
        slates,
        dataset,
        histories,
        train_rows=counted,
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
    rehearsal_rivals: Mapping[str, np.ndarray],
    calibration_rivals: Mapping[str, np.ndarray],
    test_rivals: Mapping[str, np.ndarray],
    *,
    seed: int,
) -> Scored:
    """Fit both stages, the same without each part, and the logistic yardstick."""
    evidence = tuple(observed.test.evidence)
    language = next(name for name in LANGUAGE if name in evidence)
    alone = observed.test.evidence[language]
    rivals = {**test_rivals, LANGUAGE_ALONE: alone}
    rehearsed = tuple(name for name in evidence if name in observed.rehearsal)
    paid_for = tuple(name for name in evidence if name not in observed.rehearsal)
    target = np.concatenate([plan.rehearsal.target, plan.calibration.target])
    users = np.concatenate([plan.rehearsal.user, plan.calibration.user])

    def first_stage(names: Sequence[str]) -> tuple[ChoiceLayer, np.ndarray, np.ndarray]:
        fitted_on = np.concatenate(
            [
                _table(observed.rehearsal, rehearsal_rivals, names),
                _table(observed.calibration.evidence, calibration_rivals, names),
            ]
        )
        layer = ChoiceLayer.fit(fitted_on, target, users, names, seed=seed)
        utility = layer.utilities(fitted_on)[len(plan.rehearsal) :]
        return layer, utility, layer.utilities(_table(observed.test.evidence, test_rivals, names))

    def both_stages(dropped: Sequence[str] = ()) -> tuple[list[ChoiceLayer], np.ndarray, np.ndarray]:
        free = [name for name in (*KNOWING, *rehearsed) if name not in dropped]
        paid = [name for name in paid_for if name not in dropped]
        layer, before, after = first_stage(free)
        if not paid:
            return [layer], before, after
        columns = ((before, observed.calibration.evidence), (after, observed.test.evidence))
        train, held_out = (np.stack([utility, *(table[name] for name in paid)], axis=-1) for utility, table in columns)
        second = ChoiceLayer.fit(train, plan.calibration.target, plan.calibration.user, (FIRST_STAGE, *paid), seed=seed)
        return [layer, second], second.utilities(train), second.utilities(held_out)

    try:
        layers, calibration_utility, test_utility = both_stages()
        rivals[LOGISTIC] = _softmax(first_stage(KNOWING)[2])
        ablations = {
            name: _softmax(both_stages(dropped)[2])
            for name, dropped in ABLATIONS.items()
            if any(feature in evidence for feature in dropped)
        }
        memories = {}
        for name, dropped in {MEMORIES_ALONE: (), **MEMORY_ABLATIONS}.items():
            kept = [feature for feature in rehearsed if feature not in dropped]
            if kept and (len(kept) < len(rehearsed) or not dropped):
                memories[name] = _softmax(first_stage(kept)[2])
    except InputError as error:
        return Scored(
            agent=_softmax(alone),
            rivals=rivals,
            ablations={},
            memories={},
            layers=(),
            calibration_utility=observed.calibration.evidence[language],
            test_utility=alone,
            refused=f"the choice layer was not fitted, so the agents are scored by the language model alone: {error}",
        )
    return Scored(
        agent=_softmax(test_utility),
        rivals=rivals,
        ablations=ablations,
        memories=memories,
        layers=tuple(layers),
        calibration_utility=calibration_utility,
        test_utility=test_utility,
    )
