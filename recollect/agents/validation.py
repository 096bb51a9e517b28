"""From a finished run to its report: micro checks M1-M4, macro check A1, null scorers, calibration, truth where known.

Fitted parts see calibration cases only; every number is of test cases, with intervals that resample users. Not covered:
logged impressions (M5), review text (M6), ranker comparison (A3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recollect.agents import report_panels as panels
from recollect.agents.agentcf import AgentCF
from recollect.agents.config import SimulateConfig
from recollect.agents.layers import AGENT, MEMORIES_ALONE, Scored, rival_scores, score_everybody
from recollect.agents.observed import Observed, observe
from recollect.agents.plan import Plan
from recollect.agents.ratings import Ratings, simulate_ratings
from recollect.data.fingerprints import fingerprint
from recollect.errors import InputError
from recollect.eval.agreement import (
    constant_rows,
    distribution_agreement,
    noise_ceiling,
    pairwise_choice,
    ranking,
    rating_agreement,
    taste_discrimination,
)
from recollect.eval.calibration import reliability
from recollect.eval.choice_layer import AcceptLayer
from recollect.eval.metrics import chance, ranking_table
from recollect.eval.null_scorers import audit
from recollect.eval.slates import Slates
from recollect.eval.statistics import bootstrap_table, cluster_bootstrap, entry, holm, paired_difference
from recollect.rng import stream
from recollect.types import Dataset, Report

HEADLINE = "ranking/mrr"
RANKING_SHOWN = ("ranking/mrr", "ranking/ndcg@10", "ranking/hr@1")


def validate(
    config: SimulateConfig,
    dataset: Dataset,
    plan: Plan,
    agents: AgentCF,
    events: Sequence[dict[str, Any]],
    embed: Callable[[Sequence[str]], np.ndarray],
) -> Report:
    """Compare what the agents did with the held-out log and with scorers that simulate nobody."""
    users = {str(user_id): index for index, user_id in enumerate(dataset.users.user_ids)}
    observed = observe(events, plan, users)
    vectors = agents.recall.dense_vectors(dataset.n_items)
    length = np.array([len(agents.item_memory(item).text) for item in range(dataset.n_items)], dtype=float)
    rivals = [
        rival_scores(
            dataset,
            slates,
            vectors,
            length[slates.candidates],
            counted=counted,
            one_by_one=slates is plan.rehearsal,
            seed=config.seed,
        )
        for slates, counted in (
            (plan.rehearsal, plan.background_rows),
            (plan.calibration, plan.training_rows),
            (plan.test, plan.training_rows),
        )
    ]
    scored = score_everybody(plan, observed, *rivals, seed=config.seed)
    report = Report("simulate", _protocol(config, dataset, plan, scored), {})
    report.sections["primary_metric"] = HEADLINE
    shown: list[dict[str, Any]] = []

    _rank(report, shown, plan.test, scored, config.seed)
    _choose(report, observed, plan, config.seed)
    accepted = _taste(report, plan, scored, config.seed)
    ratings = simulate_ratings(dataset, plan, observed, seed=config.seed)
    if isinstance(ratings, Ratings):
        report.metrics |= rating_agreement(ratings.drawn, ratings.actual, ratings.users, seed=config.seed)
        expected = rating_agreement(ratings.predicted, ratings.actual, ratings.users, seed=config.seed)
        for name in ("rating/mae", "rating/rmse", "rating/preference_estimation"):
            report.metrics[name] = expected[name]
        for name, values in ratings.baselines.items():
            table = rating_agreement(values, ratings.actual, ratings.users, seed=config.seed)
            report.baselines[name] = {key: table[key] for key in ("rating/mae", "rating/rmse", "rating/w1")}
    else:
        report.warnings.append(f"ratings (M4) are not reported: {ratings}")
    shown += _distributions(report, dataset, plan, scored, accepted, ratings, config.seed)

    findings = audit(rivals[2], plan.test)
    report.warnings += [finding.text for finding in findings]
    report.sections["audit"] = [
        {"scorer": finding.scorer, "metric": finding.metric, "value": finding.value, "z": finding.z}
        for finding in findings
    ]
    if scored.refused:
        report.warnings.append(scored.refused)
    if observed.failed:
        listed = ", ".join(f"{kind}: {count}" for kind, count in sorted(observed.failed.items()))
        report.warnings.append(f"unusable model output was recorded and left memories as they were ({listed})")
    relaxed = int(plan.test.relaxed.sum())
    if relaxed:
        report.warnings.append(
            f"{relaxed} of {len(plan.test)} test slates could not be matched fully on popularity and seen-ness"
        )
    shown += _breakdowns(dataset, plan, scored, length, config.seed)
    truth = panels.truth_panel(dataset, plan.test, scored.agent, seed=config.seed)
    if truth:
        report.metrics |= truth["metrics"]
        shown.append(truth["panel"])
    shown += panels.learning_panels(observed, agents, plan, events, config.seed)
    report.sections["panels"] = shown
    return report


def _protocol(config: SimulateConfig, dataset: Dataset, plan: Plan, scored: Scored) -> dict[str, Any]:
    return {
        "data": dataset.name,
        "data_fingerprint": fingerprint(dataset),
        "clock": dataset.clock,
        "method": config.method,
        "backbone": config.backbone,
        "embedder": config.embedder,
        "writer": config.writer,
        "users": len(plan.population.users),
        "interactions_per_user": config.interactions_per_user,
        "training_steps": plan.count("train") + plan.count("learn"),
        "calibration_cases": len(plan.calibration),
        "test_cases": len(plan.test),
        "split": "last interactions of each user: test; those before: calibration; one cut per user",
        "candidates": f"1 real + {config.candidates - 1} same-domain items the user never touched",
        "matching": config.matching,
        "ties": "expectation",
        "history": "everything before the user's first test row, for every scorer",
        "popularity": "training rows of all users",
        "fitted_on": (
            f"{len(plan.rehearsal)} rehearsals and {len(plan.calibration)} calibration cases"
            if scored.layers
            else "nothing (too few cases)"
        ),
        "intervals": "95 % percentile bootstrap over users",
        "seed": config.seed,
    }


def _rank(report: Report, shown: list[dict[str, Any]], test: Slates, scored: Scored, seed: int) -> None:
    """M3 for the agents and everybody else, paired differences, what each part adds, the layer's weights."""
    report.metrics |= ranking(scored.agent, test, seed=seed)
    for name, scores in scored.rivals.items():
        report.baselines[name] = ranking(scores, test, seed=seed)
    ours = ranking_table(scored.agent, test)[HEADLINE]
    differences = {
        name: paired_difference(ours, ranking_table(scores, test)[HEADLINE], test.user, seed=seed)
        for name, scores in scored.rivals.items()
    }
    adjusted = dict(zip(differences, holm(np.array([d.p_value for d in differences.values()])), strict=True))
    best = max(scored.rivals, key=lambda name: report.baselines[name][HEADLINE]["value"])
    report.sections["comparisons"] = {
        HEADLINE: {
            "baseline": best,
            "difference": entry(differences[best].difference),
            "p": differences[best].p_value,
        }
    }
    shown.append(panels.forest(report, HEADLINE, chance(test.size)[HEADLINE]))
    shown.append(panels.differences(differences, adjusted))
    if scored.ablations:
        report.sections["ablations"] = _parts(scored.agent, scored.ablations, test, seed)
        shown.append(panels.ablations(report.sections["ablations"]))
    if len(scored.memories) > 1:
        alone = scored.memories[MEMORIES_ALONE]
        without = {name: scores for name, scores in scored.memories.items() if name != MEMORIES_ALONE}
        report.sections["memories_alone"] = {
            **{metric: ranking(alone, test, seed=seed)[metric] for metric in RANKING_SHOWN},
            "ablations": _parts(alone, without, test, seed),
        }
        shown.append(panels.memories_alone(report.sections["memories_alone"]))
    if scored.layers:
        report.sections["choice_layer"] = [layer.to_json() for layer in scored.layers]
        shown += [panels.weights(layer.coefficient_entries(), stage) for stage, layer in enumerate(scored.layers, 1)]
    target = np.zeros(scored.agent.shape, dtype=bool)
    target[np.arange(len(test)), test.target] = True
    shown.append(
        panels.reliability(
            reliability(scored.agent.ravel(), target.ravel(), np.repeat(test.user, test.size), seed=seed),
            "Choice probabilities against what was chosen",
        )
    )


def _parts(whole: np.ndarray, without: Mapping[str, np.ndarray], test: Slates, seed: int) -> dict[str, dict[str, Any]]:
    """Per part left out: the ranking figures without it, and what the whole gains over that on the same cases."""
    ours = ranking_table(whole, test)[HEADLINE]
    parts = {}
    for name, scores in without.items():
        found = ranking(scores, test, seed=seed)
        gain = paired_difference(ours, ranking_table(scores, test)[HEADLINE], test.user, seed=seed)
        parts[name] = {
            **{metric: found[metric] for metric in RANKING_SHOWN},
            "gain": entry(gain.difference),
            "p": gain.p_value,
        }
    return parts


def _choose(report: Report, observed: Observed, plan: Plan, seed: int) -> None:
    """M2 from the test pairs, and the accuracy of decisions during training."""
    second, first = observed.test.pair.T
    asked = ~np.isnan(second)
    users = plan.test.user[asked]
    if np.isnan(first[asked]).all():
        right = 0.5 * (1 + np.sign(second[asked]))
        report.metrics |= bootstrap_table({"choice/accuracy": right}, users, seed=seed)
    else:
        report.metrics |= pairwise_choice(first[asked], second[asked], users, seed=seed)
    training = np.where(observed.training == 0.5, 0.5, observed.training > 0.5).astype(float)
    report.metrics["choice/training_accuracy"] = entry(cluster_bootstrap(training, observed.training_user, seed=seed))


def _taste(report: Report, plan: Plan, scored: Scored, seed: int) -> np.ndarray | None:
    """M1: yes or no to every item of the test slates. Returns p(yes) per item, None where no link could be fitted.

    Yes means at least the share of positives in the calibration cases: half would make a rare yes a constant no.
    """
    size = plan.test.size
    report.baselines |= constant_rows_as_entries(size - 1, len(plan.test) * size)

    def flat(slates: Slates) -> tuple[np.ndarray, np.ndarray]:
        target = np.zeros(slates.candidates.shape, dtype=bool)
        target[np.arange(len(slates)), slates.target] = True
        return target.ravel(), np.repeat(slates.user, size)

    yes, users = flat(plan.calibration)
    try:
        layer = AcceptLayer.fit(scored.calibration_utility.ravel(), yes, users, seed=seed)
    except InputError as error:
        report.warnings.append(f"yes/no answers (M1) are not reported: {error}")
        return None
    truth, users = flat(plan.test)
    accepted = layer.probabilities(scored.test_utility.ravel(), users=users)
    report.metrics |= taste_discrimination(accepted, truth, users, threshold=float(yes.mean()), seed=seed)
    return accepted.reshape(plan.test.candidates.shape)


def constant_rows_as_entries(m: int, n: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Always-yes and always-no as report rows; closed forms have no interval."""
    return {
        name: {metric: {"value": value, "ci95": [value, value], "n": n} for metric, value in row.items()}
        for name, row in constant_rows(m).items()
    }


def _distributions(
    report: Report,
    dataset: Dataset,
    plan: Plan,
    scored: Scored,
    accepted: np.ndarray | None,
    ratings: Ratings | str,
    seed: int,
) -> list[dict[str, Any]]:
    """A1: one item drawn per test slate by the agents' probabilities against the real choices, and what follows."""
    test, log = plan.test, dataset.interactions
    generator = stream(seed, "simulated-choices")
    cumulative = np.cumsum(scored.agent, axis=1)
    place = np.minimum((generator.random(len(test))[:, None] > cumulative).sum(axis=1), test.size - 1)
    chosen = test.candidates[np.arange(len(test)), place]
    count = np.bincount(log.item[plan.training_rows], minlength=dataset.n_items)
    categories = np.array(
        [
            (held[-1] if held else dataset.domains[domain])
            for held, domain in zip(dataset.catalog.categories, dataset.catalog.domain, strict=True)
        ],
        dtype=object,
    )
    compared: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {
        "popularity": (count[chosen], count[test.positive], test.user),
        "category": (categories[chosen], categories[test.positive], test.user),
    }
    if accepted is not None:
        said = stream(seed, "simulated-yes").random(accepted.shape) < accepted
        users, code = np.unique(test.user, return_inverse=True)
        compared["activity"] = (np.bincount(code, said.sum(axis=1)), np.bincount(code).astype(float), users)
    if isinstance(ratings, Ratings):
        compared["rating"] = (ratings.drawn, ratings.actual, ratings.users)
    shown = []
    for kind, (simulated, real, users) in compared.items():
        found = distribution_agreement(
            simulated,
            real,
            kind,  # type: ignore[arg-type]
            simulated_users=users,
            real_users=users,
            seed=seed,
        )
        report.metrics |= found["metrics"]
        shown.append(panels.distribution(kind, found["histogram"], _split_half_level(real, users, kind, seed)))
    return shown


def _split_half_level(real: np.ndarray, users: np.ndarray, kind: str, seed: int) -> dict[str, Any] | None:
    """TV between halves of the real users: what noise alone gives."""
    if len(np.unique(users)) < 2:
        return None

    def distance(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
        found = distribution_agreement(real[first], real[second], kind, resamples=1, seed=seed)  # type: ignore[arg-type]
        return {"tv": found["metrics"][f"{kind}/tv"]["value"]}

    return noise_ceiling(distance, users, repeats=10, seed=seed)["tv"]


def _breakdowns(
    dataset: Dataset, plan: Plan, scored: Scored, memory_length: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """MRR of the agents and the best null scorer by slot of the real item, domain, user activity and item memory."""
    test, log = plan.test, dataset.interactions
    best = max(scored.rivals, key=lambda name: float(ranking_table(scored.rivals[name], test)[HEADLINE].mean()))
    columns = {
        AGENT: ranking_table(scored.agent, test)[HEADLINE],
        best: ranking_table(scored.rivals[best], test)[HEADLINE],
    }
    activity = np.bincount(log.user[plan.training_rows], minlength=dataset.n_users)[test.user]
    length = memory_length[test.positive]
    splits = {
        "slot of the real item": np.array([f"{place + 1:02d}" for place in test.target]),
        "domain": np.array([dataset.domains[domain] for domain in test.domain]),
        "user activity": _thirds(activity, "interactions"),
        "length of the real item's memory": _thirds(length, "characters"),
    }
    return [
        panels.breakdown(title, labels, columns, test.user, seed)
        for title, labels in splits.items()
        if len(np.unique(labels)) > 1
    ]


def _thirds(values: np.ndarray, unit: str) -> np.ndarray:
    """A label per value: low, middle or high third, with its bounds."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    names = [f"low (up to {low:.0f} {unit})", f"middle (up to {high:.0f})", f"high (over {high:.0f})"]
    return np.array(names, dtype=object)[(values > low).astype(int) + (values > high)]
