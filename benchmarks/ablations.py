"""What interest groups and fused memories add on the bundled world, without a language model.

    python benchmarks/ablations.py [--seeds 20 21 22 23] [--users 120] [--label NAME] [--out FILE]

For each seed a world is made and its users are simulated by a model that knows nothing (every answer alike), so that
all that is known stands in memories by weighted features, group views and the embeddings of the default embedder. The
rows pool the seeds; users of different seeds are different people in the bootstrap. The look-up of past memories, which
takes most of the time and belongs to neither mechanism, is off. Two tables:

* whole layer: the fitted choice layer of `recollect simulate`, with text similarities, factors and popularity.
* memories alone: its first stage on the agents' own evidence.

Rows of both: the agents; without groups or without fusion (refitted); with one group of everybody, the true groups or
the true open shocks of the user in place of what the agents found; the world's own choice probabilities, which is the
most anybody can reach. `agents_minus_this` is the paired difference, `clear_seeds` the share of seeds whose own
interval of it lies above 0 (what one run shows by itself). A third table has the gain of fusion, memories alone, by
kind of case.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rows import Rows

from recollect.agents import simulate as pipeline
from recollect.agents.config import SimulateConfig
from recollect.agents.groups import Group, GroupViews
from recollect.agents.layers import MEMORIES_ALONE, rival_scores, score_everybody
from recollect.agents.observed import Acts, Observed, observe
from recollect.agents.plan import Plan, make_plan
from recollect.agents.population import in_time_order
from recollect.backbones.journaled import Journaled
from recollect.backbones.resolve import open_embedder
from recollect.backbones.scripted import ScriptedBackbone
from recollect.data.harbor import World, build_harbor
from recollect.eval.metrics import ranking_table
from recollect.eval.slates import Slates
from recollect.eval.statistics import cluster_bootstrap, paired_difference
from recollect.journal import Journal
from recollect.progress import SilentProgress

AGENTS = "agents"
WHOLE, ALONE = "whole layer", "memories alone"
NO_GROUPS, NO_FUSION = "without groups", "without fusion"
CEILING = "true choice probabilities"
FEW_EVENTS = 3
METRIC = "ranking/mrr"
Evidence = Callable[[Slates, int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Found:
    """One seed: {table: {method: (C,) reciprocal ranks}}, user of each case, {kind of case: (C,) bool}."""

    ranks: Mapping[str, Mapping[str, np.ndarray]]
    users: np.ndarray
    kinds: Mapping[str, np.ndarray]
    seconds: float


def main() -> None:
    """Parse the command line, run the seeds, pool them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23])
    parser.add_argument("--users", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--label", default="", help="said of these seeds in the rows")
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    parser.add_argument("--append", action="store_true", help="keep the rows of --out")
    options = parser.parse_args()
    kept = options.out.read_text(encoding="utf-8") if options.append and options.out.is_file() else ""
    with Rows("ablations", options.out, data="harbor", model="scripted, knows nothing") as rows:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(run_seed, options.seeds, [options.users] * len(options.seeds)))
        name = ", ".join(part for part in (f"{options.users} users", options.label) if part)
        add_rows(rows, name, found, options.seeds)
    if kept:
        options.out.write_text(kept + options.out.read_text(encoding="utf-8"), encoding="utf-8")


# ---- one seed ----------------------------------------------------------------------------------------------------


def run_seed(seed: int, users: int) -> Found:
    """Make a world, simulate its users, rank every test slate by every method."""
    began = time.monotonic()
    world = build_harbor(seed=seed)
    config = SimulateConfig(users=users, seed=seed, recall=False)
    plan = make_plan(world.dataset, config)
    observed, vectors, length = simulated(world, plan, config)
    rivals = [
        rival_scores(
            world.dataset,
            slates,
            vectors,
            length[slates.candidates],
            counted=counted,
            one_by_one=slates is plan.rehearsal,
            seed=seed,
        )
        for slates, counted in (
            (plan.rehearsal, plan.background_rows),
            (plan.calibration, plan.training_rows),
            (plan.test, plan.training_rows),
        )
    ]

    def ranked(scores: np.ndarray) -> np.ndarray:
        return ranking_table(scores, plan.test)[METRIC]

    scored = score_everybody(plan, observed, *rivals, seed=seed)
    ranks = {
        WHOLE: {
            AGENTS: ranked(scored.agent),
            NO_GROUPS: ranked(scored.ablations["agent-without-groups"]),
            NO_FUSION: ranked(scored.ablations["agent-without-fusion"]),
        },
        ALONE: {
            AGENTS: ranked(scored.memories[MEMORIES_ALONE]),
            NO_GROUPS: ranked(scored.memories["memories-alone-without-groups"]),
            NO_FUSION: ranked(scored.memories["memories-alone-without-fusion"]),
        },
    }
    everybody = Group("everybody", (), tuple(plan.population.users.tolist()))
    for method, evidence in (
        ("one group of everybody", views_of(world, vectors, lambda user: everybody)),
        ("true groups", views_of(world, vectors, true_groups(world, plan))),
        ("true open shocks", open_shocks(world)),
    ):
        other = score_everybody(plan, with_groups(plan, observed, evidence), *rivals, seed=seed)
        ranks[WHOLE][method] = ranked(other.agent)
        ranks[ALONE][method] = ranked(other.memories[MEMORIES_ALONE])
    true = ranked(true_probabilities(world, plan.test))
    for table in ranks.values():
        table[CEILING] = true
    return Found(ranks, plan.test.user, kinds_of_case(world, plan), time.monotonic() - began)


def simulated(world: World, plan: Plan, config: SimulateConfig) -> tuple[Observed, np.ndarray, np.ndarray]:
    """What the agents did; item vectors (I, D); length of each item's memory (I,)."""
    model = ScriptedBackbone(
        choose=lambda choice: [0.0] * len(choice.options), score=lambda scoring: [-1.0] * len(scoring.continuations)
    )
    embedder, dataset = open_embedder("minilm"), world.dataset
    with TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / pipeline.JOURNAL_FILE, config={}, resume=False)
        try:
            asked = Journaled(model, journal, embedder=embedder, batch_size=config.batch_size)
            agents = pipeline._simulate(config, dataset, plan, asked, (), journal, Path(folder), SilentProgress())
            index = {str(name): user for user, name in enumerate(dataset.users.user_ids)}
            observed = observe(journal.events(), plan, index)
        finally:
            journal.close()
            embedder.close()
    length = np.array([len(agents.item_memory(item).text) for item in range(dataset.n_items)], dtype=float)
    return observed, agents.recall.dense_vectors(dataset.n_items), length


def true_groups(world: World, plan: Plan) -> Callable[[int], Group]:
    """Of every user the simulated members of the user's true group."""
    group = world.truth.group
    users = plan.population.users
    groups = [Group(f"group {at}", (), tuple(users[group[users] == at].tolist())) for at in range(group.max() + 1)]
    return lambda user: groups[group[user]]


def views_of(world: World, vectors: np.ndarray, group_of: Callable[[int], Group]) -> Evidence:
    """Group evidence as agents compute it, of one given group per user."""
    dataset = world.dataset
    rows = in_time_order(dataset, np.arange(len(dataset.interactions)))
    views = GroupViews(dataset.interactions, rows, len(dataset.domains))
    window = SimulateConfig().group_window

    def evidence(slates: Slates, case: int) -> dict[str, np.ndarray]:
        user, domain, now = int(slates.user[case]), int(slates.domain[case]), int(slates.time[case])
        group, candidates = group_of(user), slates.candidates[case]
        popularity = views.popularity([group], domain, now, user)
        recent = views.recent(group, domain, now, user, window)
        near = (vectors[candidates] @ vectors[recent].T).max(axis=1) if len(recent) else np.zeros(len(candidates))
        counts = np.array([math.log1p(popularity.get(int(item), 0.0)) for item in candidates])
        return {"group_view": near, "group_popularity": counts}

    return evidence


def open_shocks(world: World) -> Evidence:
    """1 for items of a shock that is open in the user's true group, else 0."""

    def evidence(slates: Slates, case: int) -> dict[str, np.ndarray]:
        shocked = world.truth.shocked(int(slates.user[case]), int(slates.time[case]))[slates.candidates[case]]
        return {"group_view": np.zeros(slates.size), "group_popularity": shocked.astype(float)}

    return evidence


def with_groups(plan: Plan, observed: Observed, evidence: Evidence) -> Observed:
    """What was observed, with other group evidence."""

    def columns(slates: Slates) -> dict[str, np.ndarray]:
        found = [evidence(slates, case) for case in range(len(slates))]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    def acts(old: Acts, slates: Slates) -> Acts:
        return replace(old, evidence={**old.evidence, **columns(slates)})

    return replace(
        observed,
        rehearsal={**observed.rehearsal, **columns(plan.rehearsal)},
        calibration=acts(observed.calibration, plan.calibration),
        test=acts(observed.test, plan.test),
    )


def true_probabilities(world: World, slates: Slates) -> np.ndarray:
    """(C, S) of the world's own choice model."""
    cases = zip(slates.user.tolist(), slates.candidates, slates.time.tolist(), strict=True)
    return np.stack([world.truth.choice_probabilities(user, items, now) for user, items, now in cases])


def kinds_of_case(world: World, plan: Plan) -> dict[str, np.ndarray]:
    """Test cases by what the user's log says of the domain, and by whether the user's tastes conflict."""
    log, test = world.dataset.interactions, plan.test
    seen = np.zeros((world.dataset.n_users, len(world.dataset.domains)), dtype=np.int64)
    known = np.ones(len(log), dtype=bool)
    known[plan.population.test] = False
    np.add.at(seen, (log.user[known], log.domain[known]), 1)
    few = seen[test.user, test.domain] <= FEW_EVENTS
    conflicted = world.truth.conflicted[test.user]
    return {
        f"up to {FEW_EVENTS} earlier events in the domain": few,
        "more events in the domain": ~few,
        "users with conflicting tastes": conflicted,
        "other users": ~conflicted,
    }


# ---- all seeds ---------------------------------------------------------------------------------------------------


def add_rows(rows: Rows, name: str, found: Sequence[Found], seeds: Sequence[int]) -> None:
    """Pool the seeds; a user is a user of one seed."""
    listed = ", ".join(map(str, seeds))
    seconds = sum(one.seconds for one in found)
    users = people(found, [one.users for one in found])
    for table in (WHOLE, ALONE):
        ours = [one.ranks[table][AGENTS] for one in found]
        for method in found[0].ranks[table]:
            theirs = [one.ranks[table][method] for one in found]
            fields = {"n": len(users), "seed": listed, "seconds": seconds, "spread": "ci95"}
            level = cluster_bootstrap(np.concatenate(theirs), users, seed=0)
            title = f"{table} ({name})"
            rows.add(title, method, "mrr", level.value, low=level.low, high=level.high, **fields)
            if method == AGENTS:
                continue
            gap = paired_difference(np.concatenate(ours), np.concatenate(theirs), users, seed=0).difference
            rows.add(title, method, "agents_minus_this", gap.value, low=gap.low, high=gap.high, **fields)
            alone = [
                paired_difference(mine, other, one.users, seed=0).difference
                for mine, other, one in zip(ours, theirs, found, strict=True)
            ]
            share = float(np.mean([gap.low > 0 for gap in alone]))
            rows.add(title, method, "clear_seeds", share, n=len(users), seed=listed)
    for kind in found[0].kinds:
        inside = [one.kinds[kind] for one in found]
        ours, theirs = (
            np.concatenate([one.ranks[ALONE][method][held] for one, held in zip(found, inside, strict=True)])
            for method in (AGENTS, NO_FUSION)
        )
        who = people(found, [one.users[held] for one, held in zip(found, inside, strict=True)])
        gap = paired_difference(ours, theirs, who, seed=0).difference
        rows.add(
            f"gain of fusion, memories alone ({name})", kind, "gain", gap.value, low=gap.low, high=gap.high,
            spread="ci95", n=len(ours), seed=listed, seconds=seconds,
        )  # fmt: skip


def people(found: Sequence[Found], users: Sequence[np.ndarray]) -> np.ndarray:
    """One label per person: users of different seeds differ."""
    most = max(int(one.users.max()) for one in found) + 1
    return np.concatenate([seed * most + who for seed, who in enumerate(users)])


if __name__ == "__main__":
    main()
