"""What the agents did, read back from the event log as arrays in the order of the plan's cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.agents.plan import Plan


@dataclass(frozen=True)
class Acts:
    """Acts on one part of the plan (calibration or test).

    evidence: {name: (C, S)}.  pair: (C, 2) log-odds of the real item in a two-item decision, printed second and first,
    NaN where not asked.
    stars: (C, 5) probabilities of one to five stars, NaN where no rating was asked.
    """

    evidence: Mapping[str, np.ndarray]
    pair: np.ndarray
    stars: np.ndarray


@dataclass(frozen=True)
class Observed:
    """Everything validation needs of a run's events.

    rehearsal: {name: (T, S)} evidence on training slates, in the order of `plan.rehearsal`; rows never reached are 0.
    training: p(real item) of each training decision in step order (1 or 0 where a generated choice has none).
    training_user: (T,) dense user of each.  failed: events with unusable model output, by kind.
    """

    rehearsal: Mapping[str, np.ndarray]
    calibration: Acts
    test: Acts
    training: np.ndarray
    training_user: np.ndarray
    failed: Mapping[str, int]


def observe(events: Iterable[Mapping[str, Any]], plan: Plan, user_index: Mapping[str, int]) -> Observed:
    """Read the events of a finished run."""
    case_of = {step.number: step.index for step in plan.steps if step.kind in ("calibrate", "test")}
    sizes = {"calibrate": plan.calibration, "test": plan.test}
    evidence: dict[str, dict[str, np.ndarray]] = {"calibrate": {}, "test": {}}
    pair = {part: np.full((len(slates), 2), np.nan) for part, slates in sizes.items()}
    stars = {part: np.full((len(slates), 5), np.nan) for part, slates in sizes.items()}
    place_of_row = {row: place for place, row in enumerate(plan.rehearsal.row.tolist())}
    row_of = {step.number: step.index for step in plan.steps if step.kind == "train"}
    rehearsal: dict[str, np.ndarray] = {}
    training: list[float] = []
    training_user: list[int] = []
    failed: dict[str, int] = {}
    for event in events:
        part, kind = event["part"], event["kind"]
        if not event["ok"]:
            failed[kind] = failed.get(kind, 0) + 1
            if "evidence" not in event and kind in ("rank", "choice") and event["decision"] is None:
                continue  # nothing was chosen: such a slate carries no evidence, such a decision is not counted
        if part in sizes:
            case = case_of[event["step"]]
            if kind == "rank":
                slates = sizes[part]
                for name, column in event["evidence"].items():
                    table = evidence[part].setdefault(name, np.zeros(slates.candidates.shape))
                    table[case] = column
            elif kind == "choice":
                pair[part][case, : len(event["log_odds"])] = event["log_odds"]
            elif kind == "rate":
                stars[part][case] = event["stars"]
        elif kind == "rank":
            for name, column in event["evidence"].items():
                table = rehearsal.setdefault(name, np.zeros(plan.rehearsal.candidates.shape))
                table[place_of_row[row_of[event["step"]]]] = column
        elif kind == "choice":
            right = event["decision"] == event["items"][0]
            training.append(float(right) if event["probability"] is None else event["probability"])
            training_user.append(user_index[event["user"]])
    acts = {part: Acts(evidence[part], pair[part], stars[part]) for part in sizes}
    return Observed(
        rehearsal=rehearsal,
        calibration=acts["calibrate"],
        test=acts["test"],
        training=np.array(training),
        training_user=np.array(training_user, dtype=np.int64),
        failed=failed,
    )
