"""The panels of a simulation's page, as JSON for `recollect.eval.panels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.agents.memory import Memory
from recollect.agents.observed import Observed
from recollect.agents.plan import Plan
from recollect.eval.metrics import ranking_table
from recollect.eval.slates import Slates
from recollect.eval.statistics import PairedDifference, cluster_bootstrap, entry
from recollect.types import Dataset, Report

if TYPE_CHECKING:
    from recollect.agents.agentcf import AgentCF

SAMPLES_SHOWN = 4
TAGS_OF_GROUP_SHOWN = 6


def forest(report: Report, metric: str, reference: float) -> dict[str, Any]:
    """Agents and every baseline on one metric, best first."""
    rows = [("agents", report.metrics[metric])]
    rows += [(name, table[metric]) for name, table in report.baselines.items() if metric in table]
    rows.sort(key=lambda row: -row[1]["value"])
    return {
        "kind": "intervals",
        "title": "Ranking the real choice among the candidates (MRR)",
        "note": "95 % intervals resample users; the line is chance.",
        "labels": [name for name, _ in rows],
        "values": [row["value"] for _, row in rows],
        "low": [row["ci95"][0] for _, row in rows],
        "high": [row["ci95"][1] for _, row in rows],
        "reference": reference,
        "axis": "MRR",
    }


def differences(found: Mapping[str, PairedDifference], adjusted: Mapping[str, float]) -> dict[str, Any]:
    """Agents minus each rival on the same cases."""
    order = sorted(found, key=lambda name: found[name].difference.value)
    return {
        "kind": "table",
        "title": "Agents minus each scorer, same cases (MRR)",
        "note": "Paired bootstrap over users; p from sign flips by user, Holm-adjusted over this table.",
        "columns": ["compared with", "difference", "p (Holm)"],
        "rows": [[name, entry(found[name].difference), float(adjusted[name])] for name in order],
    }


def ablations(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What leaving a part out of the fitted layer costs."""
    return {
        "kind": "table",
        "title": "What each part of the agents adds",
        "note": "The choice layer refitted without the part; gain = agents minus that, MRR, paired.",
        "columns": ["without", "MRR", "gain of the part", "p"],
        "rows": _part_rows(parts, "agent-without-"),
    }


def memories_alone(found: Mapping[str, Any]) -> dict[str, Any]:
    """What groups and fusion add where no other scorer stands beside the agents' own evidence."""
    whole = ["nothing", found["ranking/mrr"], "", ""]
    return {
        "kind": "table",
        "title": "What each part adds to the memories alone",
        "note": "The first stage fitted on memories and group views, without text similarities, factors and the "
        "language model; gain = memories alone minus the same without the part, MRR, paired.",
        "columns": ["without", "MRR", "gain of the part", "p"],
        "rows": [whole, *_part_rows(found["ablations"], "memories-alone-without-")],
    }


def _part_rows(parts: Mapping[str, Mapping[str, Any]], prefix: str) -> list[list[Any]]:
    return [
        [name.removeprefix(prefix).replace("-", " "), part["ranking/mrr"], part["gain"], part["p"]]
        for name, part in parts.items()
    ]


def weights(coefficients: Mapping[str, Mapping[str, Any]], stage: int) -> dict[str, Any]:
    """Coefficients of a stage of the choice layer."""
    notes = {
        1: "Fitted on rehearsals and calibration cases; needs no model call.",
        2: "Fitted on calibration cases: what the first stage says, and what model calls were paid for.",
    }
    names = sorted(coefficients, key=lambda name: -abs(coefficients[name]["value"]))
    return {
        "kind": "intervals",
        "title": f"What the fitted choice layer goes by, stage {stage}",
        "note": notes[stage],
        "labels": names,
        "values": [coefficients[name]["value"] for name in names],
        "low": [coefficients[name]["ci95"][0] for name in names],
        "high": [coefficients[name]["ci95"][1] for name in names],
        "reference": 0.0,
        "axis": "log-odds per standard deviation",
    }


def reliability(bins: Mapping[str, Any], title: str) -> dict[str, Any]:
    """A reliability diagram."""
    return {
        "kind": "reliability",
        "title": title,
        "predicted": bins["predicted"],
        "observed": bins["observed"],
        "counts": bins["counts"],
        "ece": bins["ece"]["value"],
    }


def distribution(kind: str, histogram: Mapping[str, Any], noise: Mapping[str, Any] | None) -> dict[str, Any]:
    """Simulated against real shares."""
    titles = {
        "popularity": "Popularity of what is chosen (training count)",
        "category": "Categories of what is chosen",
        "activity": "Items accepted per user",
        "rating": "Ratings",
    }
    notes = [] if noise is None else [f"Two halves of the real users differ by TV {noise['value']:.3f}."]
    if kind == "activity":
        notes.append(
            "The real number is the user's held-out interactions, which the plan fixes at the same few for everybody; "
            "read the simulated mean and spread, not the distance."
        )
    return {
        "kind": "distribution",
        "title": titles[kind],
        "note": " ".join(notes),
        "labels": list(histogram["labels"]),
        "series": {"simulated": list(histogram["simulated"]), "real": list(histogram["real"])},
        "axis": "share",
    }


def breakdown(
    title: str, labels: np.ndarray, columns: Mapping[str, np.ndarray], users: np.ndarray, seed: int
) -> dict[str, Any]:
    """A metric by part of the cases."""
    rows: list[list[Any]] = []
    for label in np.unique(labels.astype(str)):
        inside = labels.astype(str) == label
        cells = [entry(cluster_bootstrap(values[inside], users[inside], seed=seed)) for values in columns.values()]
        rows.append([str(label), int(inside.sum()), *cells])
    return {
        "kind": "table",
        "title": f"Agreement by {title} (MRR)",
        "columns": [title, "cases", *columns],
        "rows": rows,
    }


def truth_panel(dataset: Dataset, test: Slates, agent: np.ndarray, *, seed: int) -> dict[str, Any] | None:
    """Fidelity to the true choice probabilities of a synthetic world; None for real data."""
    from recollect.data.harbor import world_of

    world = world_of(dataset)
    if world is None:
        return None
    truth = np.stack(
        [
            world.truth.choice_probabilities(int(user), candidates, int(time))
            for user, candidates, time in zip(test.user, test.candidates, test.time, strict=True)
        ]
    )
    log_truth = np.log(np.maximum(truth, 1e-300))  # a certain choice leaves zeros, which add nothing
    divergence = (truth * (log_truth - np.log(np.maximum(agent, 1e-12)))).sum(axis=1)
    uniform = (truth * (log_truth + np.log(test.size))).sum(axis=1)
    ceiling = ranking_table(truth, test)["ranking/mrr"]

    def mean(values: np.ndarray) -> dict[str, Any]:
        return entry(cluster_bootstrap(values, test.user, seed=seed))

    metrics = {"truth/kl": mean(divergence), "truth/kl_of_uniform": mean(uniform), "truth/best_mrr": mean(ceiling)}
    return {
        "metrics": metrics,
        "panel": {
            "kind": "table",
            "title": "Fidelity to the world's true choice probabilities",
            "note": "KL from the true to the agents' probabilities, nats per slate.",
            "columns": ["quantity", "value"],
            "rows": [
                ["KL(true, agents)", metrics["truth/kl"]],
                ["KL(true, uniform)", metrics["truth/kl_of_uniform"]],
                ["MRR of the true probabilities", metrics["truth/best_mrr"]],
            ],
        },
    }


def learning_panels(
    observed: Observed, agents: AgentCF, plan: Plan, events: Sequence[Mapping[str, Any]], seed: int
) -> list[dict[str, Any]]:
    """How decisions and memories changed over the run: accuracy curve, groups, memories before and after, sameness."""
    shown = []
    parts = [part for part in np.array_split(np.arange(len(observed.training)), 10) if len(part) > 1]
    if len(parts) > 1:
        curve = [cluster_bootstrap(observed.training[part], observed.training_user[part], seed=seed) for part in parts]
        shown.append(
            {
                "kind": "lines",
                "title": "Training decisions: probability given to the real item",
                "x": list(range(1, len(curve) + 1)),
                "series": {"agents": [point.value for point in curve]},
                "low": {"agents": [_defined(point.low) for point in curve]},
                "high": {"agents": [_defined(point.high) for point in curve]},
                "x_label": "tenth of the training interactions",
                "y_label": "p(real item)",
            }
        )
    if agents.groups:
        shown.append(
            {
                "kind": "table",
                "title": "Interest groups at the end",
                "columns": ["group", "members", "tags"],
                "rows": [
                    [group.name, len(group.members), ", ".join(group.tags[:TAGS_OF_GROUP_SHOWN])]
                    for group in agents.groups
                ],
            }
        )
    samples = memory_samples(events)
    if samples:
        shown.append({"kind": "samples", "title": "Memories before and after", "items": samples})
    sameness = memory_sameness(agents, plan)
    if sameness:
        shown.append(sameness)
    return shown


def _defined(value: float) -> float | None:
    """JSON has no NaN: an interval of too few users is left out of the plot."""
    return None if np.isnan(value) else value


def memory_samples(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """First and last text of the memories that changed most often, one per kind of owner and user."""
    first: dict[tuple[str, str], str] = {}
    last: dict[tuple[str, str], str] = {}
    count: dict[tuple[str, str], int] = {}
    for event in events:
        if event["kind"] in ("private", "fuse", "item"):
            key = (event["owner"], event["key"])
            text = Memory.load(event["after"]).text
            first.setdefault(key, text)
            last[key] = text
            count[key] = count.get(key, 0) + 1
    ranked = sorted(count, key=lambda key: (-count[key], key))
    picked = [key for key in ranked if key[1] != "item"][:SAMPLES_SHOWN]
    picked += [key for key in ranked if key[1] == "item"][: SAMPLES_SHOWN // 2]
    return [
        {
            "title": f"{owner}, {key}" if key != "item" else owner,
            "before": first[owner, key],
            "after": last[owner, key],
            "note": f"after the first and after {count[owner, key]} updates",
        }
        for owner, key in picked
    ]


def memory_sameness(agents: AgentCF, plan: Plan) -> dict[str, Any] | None:
    """Do memories converge? Mean word overlap of pairs of users' texts, and items never written."""
    texts = []
    for user in plan.population.users.tolist():
        held = agents.privates(user) if agents.variant.dual else {0: agents.private(user, 0)}
        words = {word for memory in held.values() for word in memory.text.lower().split()}
        if words:
            texts.append(words)
    if len(texts) < 2:
        return None
    overlaps = [
        len(first & second) / len(first | second) for index, first in enumerate(texts) for second in texts[:index]
    ]
    written = sum(agents.memories.get(owner, "item") is not None for owner in agents.memories.owners())
    return {
        "kind": "table",
        "title": "Are memories still apart?",
        "note": "Word overlap (Jaccard) of two users' private memories; 1 would mean that everybody became the same.",
        "columns": ["quantity", "value"],
        "rows": [
            ["mean overlap of two users", float(np.mean(overlaps))],
            ["largest overlap of two users", float(np.max(overlaps))],
            ["items whose memory was ever written", written],
        ],
    }
