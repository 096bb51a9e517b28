"""What a run will do, decided before any model is asked: rows, slates, negatives and the order of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.agents.config import SimulateConfig
from recollect.agents.population import Population, choose_population
from recollect.errors import InputError
from recollect.eval.slates import Slates, sample_slates
from recollect.rng import stream
from recollect.types import Dataset

REBUILDS_IN_TRAINING = 10
NEGATIVE_POOL = 100
TOKENS_PER_CHOICE = 260
TOKENS_PER_SLATE = 560
TOKENS_PER_TEXT = 420
JOURNAL_BYTES_PER_CALL = 2_500

Kind = Literal["train", "rebuild", "calibrate", "learn", "test"]


@dataclass(frozen=True)
class PlannedStep:
    """One step: `index` is a row of the log (train, learn) or a case number (calibrate, test); -1 for a rebuild."""

    number: int
    kind: Kind
    index: int = -1


@dataclass(frozen=True)
class Plan:
    """A run before it runs.

    negatives: row of the log -> the item the real one is compared with in training.
    rehearsal: a slate per training row, scored without any model call before the row is learned.
    training_rows: (N,) bool mask of the rows any scorer may count: all but the simulated users' held-out ones.
    background_rows: (N,) bool mask of what scorers of rehearsals may count: not the simulated training rows either.
    """

    population: Population
    rehearsal: Slates
    calibration: Slates
    test: Slates
    negatives: dict[int, int]
    training_rows: np.ndarray
    background_rows: np.ndarray
    steps: tuple[PlannedStep, ...]

    def count(self, kind: Kind) -> int:
        """Number of steps of a kind."""
        return sum(step.kind == kind for step in self.steps)

    def moments_of_rebuilds(self, dataset: Dataset) -> dict[int, int | None]:
        """Rebuild step -> time of the training row that follows it, before which its groups may know; None = none."""
        moments: dict[int, int | None] = {}
        following: int | None = None
        for step in reversed(self.steps):
            if step.kind == "rebuild":
                moments[step.number] = following
            elif step.kind == "train":
                following = int(dataset.interactions.time[step.index])
        return moments


def make_plan(dataset: Dataset, config: SimulateConfig) -> Plan:
    """Draw users, slates and negatives, and lay out the steps.

    Order: training with rebuild points at every tenth, calibration cases against the frozen state, learning of the
    calibration rows, test cases against the frozen state.

    Raises:
        InputError: nobody has enough interactions, or a domain has fewer items than a slate needs.
    """
    population = choose_population(
        dataset,
        users=config.users,
        interactions_per_user=config.interactions_per_user,
        held_out=config.held_out,
        seed=config.seed,
    )
    log = dataset.interactions
    training_rows = np.ones(len(log), dtype=bool)
    training_rows[population.held_out] = False
    background_rows = training_rows.copy()
    background_rows[population.training] = False
    slates = [
        sample_slates(
            log,
            dataset.n_items,
            dataset.catalog.domain,
            rows,
            size=config.candidates,
            matching=config.matching,
            seed=config.seed,
            train_rows=counted,
        )
        for rows, counted in (
            (population.training, background_rows),
            (population.calibration, training_rows),
            (population.test, training_rows),
        )
    ]
    negatives = draw_negatives(
        dataset,
        np.concatenate([population.training, population.calibration]),
        by=config.variant.negatives,
        training_rows=training_rows,
        seed=config.seed,
    )
    rehearsal, calibration, test = slates
    return Plan(
        population=population,
        rehearsal=rehearsal,
        calibration=calibration,
        test=test,
        negatives=negatives,
        training_rows=training_rows,
        background_rows=background_rows,
        steps=lay_out(population, len(calibration), len(test)),
    )


def lay_out(population: Population, n_calibration: int, n_test: int) -> tuple[PlannedStep, ...]:
    """Number the steps; a rebuild closes every tenth of training, the training and the learning of calibration rows."""
    sequence: list[tuple[Kind, int]] = []
    training = population.training.tolist()
    points = {len(training) * part // REBUILDS_IN_TRAINING for part in range(1, REBUILDS_IN_TRAINING)} - {0}
    for position, row in enumerate(training):
        if position in points:
            sequence.append(("rebuild", -1))
        sequence.append(("train", row))
    sequence.append(("rebuild", -1))
    sequence += [("calibrate", case) for case in range(n_calibration)]
    sequence.append(("rebuild", -1))
    sequence += [("learn", row) for row in population.calibration.tolist()]
    sequence.append(("rebuild", -1))
    sequence += [("test", case) for case in range(n_test)]
    return tuple(PlannedStep(number, kind, index) for number, (kind, index) in enumerate(sequence))


def draw_negatives(
    dataset: Dataset,
    rows: np.ndarray,
    *,
    by: Literal["uniform", "popularity", "matched"],
    training_rows: np.ndarray,
    seed: int,
) -> dict[int, int]:
    """One never-interacted item of the same domain per row.

    uniform: a pool of 100 per user and domain, then a uniform draw each time (official AgentCF++ code). popularity:
    proportional to training counts (AgentCF). matched: as the test slates.

    Raises:
        InputError: a user has interacted with every item of a domain.
    """
    log = dataset.interactions
    if by == "matched":
        pairs = sample_slates(
            log,
            dataset.n_items,
            dataset.catalog.domain,
            rows,
            size=2,
            matching="matched",
            seed=seed,
            train_rows=training_rows,
        )
        others = pairs.candidates[np.arange(len(pairs)), 1 - pairs.target]
        return dict(zip(pairs.row.tolist(), others.tolist(), strict=True))
    item_domain = np.asarray(dataset.catalog.domain)
    items_of = [np.flatnonzero(item_domain == domain) for domain in range(len(dataset.domains))]
    counts = np.bincount(log.item[training_rows], minlength=dataset.n_items).astype(float)
    users = np.unique(log.user[rows])
    starts = np.searchsorted(log.user, users, side="left")
    stops = np.searchsorted(log.user, users, side="right")
    touched = {
        int(user): np.unique(log.item[start:stop]) for user, start, stop in zip(users, starts, stops, strict=True)
    }
    pools: dict[tuple[int, int], np.ndarray] = {}
    negatives: dict[int, int] = {}
    for row in rows.tolist():
        user, domain = int(log.user[row]), int(item_domain[log.item[row]])
        user_id = str(dataset.users.user_ids[user])
        if (user, domain) not in pools:
            free = np.setdiff1d(items_of[domain], touched[user], assume_unique=True)
            if len(free) == 0:
                raise InputError(
                    f"user {user_id!r} has interacted with all {len(items_of[domain])} items of domain "
                    f"{dataset.domains[domain]!r}; there is none left to compare with"
                )
            if by == "uniform":
                generator = stream(seed, "negative-pool", user_id, domain)
                free = generator.choice(free, size=min(NEGATIVE_POOL, len(free)), replace=False)
            pools[user, domain] = free
        pool = pools[user, domain]
        generator = stream(seed, "negative", user_id, row)
        if by == "uniform":
            negatives[row] = int(generator.choice(pool))
        else:
            weights = counts[pool] + 1e-9
            negatives[row] = int(generator.choice(pool, p=weights / weights.sum()))
    return negatives


def estimate(plan: Plan, config: SimulateConfig, *, rated: bool) -> dict[str, int]:
    """Calls, prompt tokens and journal bytes a run will need at most; nothing is asked.

    Calls are exact for the structured writer with `choose` decisions; tokens are planning figures.
    """
    orders = 2 if config.order == "both" else 1
    decisions = plan.count("train") + plan.count("learn")
    texts = 0
    if config.writer == "llm":
        fuse = {"two_step": 2, "one_call": 1, "none": 0}[config.variant.fusion]
        texts = decisions * (2 + fuse)
        if config.variant.groups == "tags":
            texts += plan.count("rebuild") * (len(plan.population.users) + config.groups)
    generated = decisions if config.decision == "generate" else 0
    choices = (0 if generated else decisions * orders) + plan.count("test") * orders
    cases = plan.count("calibrate") + plan.count("test")
    if rated:
        choices += cases
    pairs = config.candidates * (config.candidates - 1)
    slates = {"pmi": 2 * cases, "pairwise": 0, "listwise": cases}[config.ranking]
    if config.ranking == "pairwise":
        choices += pairs * cases
    calls = texts + generated + choices + slates
    tokens = TOKENS_PER_TEXT * (texts + generated) + TOKENS_PER_CHOICE * choices + TOKENS_PER_SLATE * slates // 2
    return {
        "steps": len(plan.steps),
        "calls": calls,
        "prompt_tokens": tokens,
        "journal_bytes": JOURNAL_BYTES_PER_CALL * calls,
    }
