"""The rows of a distillation table: each method as the sequence of stages that makes its models (spec 4.3, 4.4).

The alternation stops early when a round improved neither side on validation. Its controls train for as many epochs at
most as its student does in all rounds, and those with a frozen teacher or without one go through every round, so that
none loses for want of training. What a row reports is each side's best round by validation, round 0 (both models alone)
excluded, so a row never falls back on a model that was not distilled.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

from recollect.distill import controls
from recollect.distill.config import DistillConfig
from recollect.distill.learners import KeptStates
from recollect.distill.rounds import RankSource
from recollect.distill.stages import Stage
from recollect.distill.workshop import Workshop

OTHER_SEED = 1
"""The other conventional model of self-distillation and mutual learning has this seed more."""
IN_ROUNDS: dict[str, RankSource] = {
    "llmd4rec": "online",
    "static": "static",
    "round-start": "round_start",
    "crossfit": "crossfit",
    "no-update": "online",
}


@dataclass
class Row:
    """What a method made for one seed.

    student, teacher: the stage of either side, None where the method leaves that side as it was trained alone.
    taught_by: the stage that taught the student in every round, where one did.
    half_rounds: one entry per half-round, in order.
    """

    method: str
    seed: int
    student: Stage | None = None
    teacher: Stage | None = None
    taught_by: Stage | None = None
    half_rounds: list[dict[str, Any]] = field(default_factory=list)

    def note(self, number: int, direction: str, stage: Stage, **more: Any) -> None:
        """Record a half-round and keep its stage where it is the best of its side so far."""
        self.half_rounds.append({"round": number, "direction": direction, "stage": stage.key, **stage.info, **more})
        side = "teacher" if direction == "down" else "student"
        best = getattr(self, side)
        if best is None or stage.validation > best.validation:
            setattr(self, side, stage)


def run_method(shop: Workshop, method: str, seed: int) -> Row:
    """Make (or read back) the models of one method and seed."""
    crm = shop.crm(seed)
    if method in IN_ROUNDS:
        return _rounds(shop, method, seed, crm)
    row = Row(method, seed)
    if method == "down-only":
        llm = shop.llm(seed, crm) if shop.config.teacher_start == "alone" else None
        for number in range(1, shop.config.rounds + 1):
            llm = shop.down(seed, number, llm, crm, embedding=crm, ranks="online")
            row.note(number, "down", llm)
        return row
    if method in ("up-only", "self"):
        teacher = shop.llm(seed, crm) if method == "up-only" else shop.crm(seed + OTHER_SEED)
        return _upward(shop, row, crm, teacher)
    if method == "labels-only":
        return _labels_only(shop, row, crm)
    if method in ("popularity", "label-smoothing"):
        student = crm
        for number in range(1, shop.config.rounds + 1):
            student = controls.constant(shop, seed, student, method, number)
            row.note(number, "up", student)
    elif method == "mutual":
        row.note(1, "up", controls.mutual(shop, seed, crm, shop.crm(seed + OTHER_SEED)))
    elif method == "dllm2rec":
        row.note(1, "up", controls.dllm2rec(shop, seed, crm, shop.llm(seed, crm)))
    else:
        row.note(1, "down", controls.llm_srec(shop, seed, crm, shop.llm(seed, crm)))
    return row


def _rounds(shop: Workshop, method: str, seed: int, crm: Stage) -> Row:
    """The alternation: LLM from CRM, CRM from LLM, item vectors re-injected (unless "no-update")."""
    row = Row(method, seed)
    ranks = IN_ROUNDS[method]
    crossfit = shop.crossfit(seed) if ranks == "crossfit" else None
    llm = shop.llm(seed, crm) if shop.config.teacher_start == "alone" else None
    student, first = crm, crm
    for number in range(1, shop.config.rounds + 1):
        before = row.student, row.teacher
        embedding = first if method == "no-update" else student
        llm = shop.down(seed, number, llm, student, embedding=embedding, ranks=ranks, crossfit=crossfit)
        row.note(number, "down", llm)
        student = shop.up(seed, number, student, llm, ranks=ranks, crossfit=crossfit)
        together = {}
        if method == shop.config.method:
            together = {"ensemble": shop.ensemble(student, llm).info["validation"]}
        row.note(number, "up", student, **together)
        if number > 1 and (row.student, row.teacher) == before:
            break
    return row


def _upward(shop: Workshop, row: Row, crm: Stage, teacher: Stage) -> Row:
    """One frozen teacher, in as many upward half-rounds as the alternation may have; it is read once for all."""
    row.taught_by = teacher
    student = crm
    kept = KeptStates(shop.stages.folder.parent / f"teacher-states-{row.method}-{row.seed}")
    try:
        for number in range(1, shop.config.rounds + 1):
            student = shop.up(row.seed, number, student, teacher, ranks="online", read=kept)
            row.note(number, "up", student)
    finally:
        shutil.rmtree(kept.folder, ignore_errors=True)
    return row


def _labels_only(shop: Workshop, row: Row, crm: Stage) -> Row:
    """The half-rounds of the alternation with lambda = 0: same starts, epochs, patience, rates, choice of a round."""
    llm = shop.llm(row.seed, crm) if shop.config.teacher_start == "alone" else None
    student = crm
    for number in range(1, shop.config.rounds + 1):
        if trains_llm(shop.config):
            llm = shop.down(row.seed, number, llm, None, embedding=student, ranks="static")
            row.note(number, "down", llm)
        student = shop.up(row.seed, number, student, None, ranks="static")
        row.note(number, "up", student)
    return row


def trains_llm(config: DistillConfig) -> bool:
    """Some row asked for trains the LLM in half-rounds, so that its control must."""
    asked = {config.method, *config.compare}
    return bool(asked & {*IN_ROUNDS, "down-only", "labels-only", "all"})


def planned_half_rounds(config: DistillConfig) -> tuple[int, int]:
    """Downward and upward half-rounds of a seed if none stops early, those that rows share counted once."""
    rows = set(config.rows)
    upward = {"up-only", "self", "labels-only", "popularity", "label-smoothing"}
    both = config.rounds * len(rows & set(IN_ROUNDS))
    down = both + config.rounds * (("down-only" in rows) + trains_llm(config))
    up = both + config.rounds * len(rows & upward)
    # Before any item vector was taken in anew, these have done the same.
    first_down = len(rows & {"llmd4rec", "no-update", "down-only"})
    first_up = len(rows & {"llmd4rec", "no-update"})
    return down - max(0, first_down - 1), up - max(0, first_up - 1)
