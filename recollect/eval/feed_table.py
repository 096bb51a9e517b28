"""What a page-by-page run says about its agents: the table of sim_validation 5 from one row per exposure.

Denominators are exposures unless a name says otherwise. "Other" items include likes nobody recorded, and ratings are
given to watched items only, so selection explains part of any shift.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from recollect.errors import InputError
from recollect.eval.distances import (
    area_under_curve_of_counts,
    common_support,
    jensen_shannon_bits,
    total_variation,
    wasserstein1_of_shares,
)
from recollect.eval.statistics import (
    RESAMPLES,
    Interval,
    bootstrap_ratios,
    bootstrap_statistic,
    bootstrap_table,
    bootstrap_two_histograms,
    entry,
)

RATING_LEVELS = np.arange(1.0, 6.0)


@dataclass(frozen=True)
class FeedTable:
    """One row per exposure, all arrays (T,).

    agent: who.  activity, conformity, diversity: trait group of the agent (small integers, low first).  page, slot:
    place from 1.  catalogue_mean: mean real rating of the item.  positive: held-out positive of that user.  aligned,
    watched: what the agent did.  rating: 1..5, NaN where not watched.
    """

    agent: np.ndarray
    activity: np.ndarray
    conformity: np.ndarray
    diversity: np.ndarray
    page: np.ndarray
    slot: np.ndarray
    catalogue_mean: np.ndarray
    positive: np.ndarray
    aligned: np.ndarray
    watched: np.ndarray
    rating: np.ndarray

    def __post_init__(self) -> None:
        sizes = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(sizes.values())) != 1 or not sizes["agent"]:
            raise InputError(f"the columns of a feed table must have one common length above 0, got {sizes}")
        rating = np.asarray(self.rating, dtype=np.float64)
        given = rating[~np.isnan(rating)]
        if not np.isin(given, RATING_LEVELS).all():
            raise InputError(f"ratings must be 1, 2, 3, 4 or 5, got {sorted(set(given.tolist()) - {1, 2, 3, 4, 5})!r}")

    def __len__(self) -> int:
        return len(self.agent)


def discrimination(
    answered: np.ndarray, positive: np.ndarray, agents: np.ndarray, *, resamples: int = RESAMPLES, seed: int
) -> dict[str, dict[str, Any]]:
    """P(yes | positive), P(yes | other) and balanced accuracy over all decisions, intervals by agent.

    Args:
        answered: (T,) bool yes; positive: (T,) bool; agents: (T,).
    """
    answered = np.asarray(answered, dtype=np.float64)
    positive = np.asarray(positive, dtype=np.float64)
    shares_of_yes = bootstrap_ratios(
        {
            "given_positive": (answered * positive, positive),
            "given_other": (answered * (1.0 - positive), 1.0 - positive),
        },
        agents,
        n=resamples,
        seed=seed,
    )
    code = (2 * positive + answered).astype(np.int64)  # no/other, yes/other, no/positive, yes/positive

    def balanced(count: np.ndarray, _: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            hit = count[..., 3] / (count[..., 2] + count[..., 3])
            rejection = count[..., 0] / (count[..., 0] + count[..., 1])
        return 0.5 * (hit + rejection)

    one = bootstrap_two_histograms(
        {"balanced_accuracy": balanced}, (code, agents), (code, agents), 4, paired=True, n=resamples, seed=seed
    )
    return {name: entry(interval) for name, interval in (shares_of_yes | one).items()}


def separation(
    score: np.ndarray, positive: np.ndarray, agents: np.ndarray, *, resamples: int = RESAMPLES, seed: int
) -> dict[str, Any]:
    """AUC entry of `score` (T,) separating positives from others, ties half, interval by agent."""
    score, positive = np.asarray(score, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not positive.any() or positive.all():
        raise InputError("an AUC needs positives and others among the exposures")
    agents = np.asarray(agents)
    support, code_positive, code_other = common_support(score[positive], score[~positive])
    area = bootstrap_two_histograms(
        {"auc": area_under_curve_of_counts},
        (code_positive, agents[positive]),
        (code_other, agents[~positive]),
        len(support),
        paired=True,
        n=resamples,
        seed=seed,
    )["auc"]
    return entry(area._replace(n=len(score)))


def _curve(values: np.ndarray, by: np.ndarray, agents: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Mean of `values` (T,) in each level of `by`, as {"levels", "entries"}."""
    levels = np.unique(by)
    values = np.asarray(values, dtype=np.float64)
    columns = {str(level): (values * (by == level), (by == level).astype(np.float64)) for level in levels.tolist()}
    found = bootstrap_ratios(columns, agents, n=resamples, seed=seed)
    return {"levels": levels.tolist(), "entries": [entry(found[str(level)]) for level in levels.tolist()]}


def _last_pages(table: FeedTable) -> tuple[np.ndarray, np.ndarray]:
    """(A,) the last page each agent saw and the first row of each agent."""
    _, first_row, codes = np.unique(table.agent, return_index=True, return_inverse=True)
    last = np.zeros(len(first_row))
    np.maximum.at(last, codes, np.asarray(table.page, dtype=np.float64))
    return last, first_row


def rating_shift(
    ratings: np.ndarray, agents: np.ndarray, real_shares: np.ndarray, *, resamples: int = RESAMPLES, seed: int
) -> dict[str, dict[str, Any]]:
    """Distances of given ratings (R,) from real shares (5,) of the stars 1..5, taken as exact."""
    codes = np.searchsorted(RATING_LEVELS, ratings)
    real_shares = np.asarray(real_shares, dtype=np.float64)
    functions = {
        "tv": lambda p, _: total_variation(p, real_shares),
        "js": lambda p, _: jensen_shannon_bits(p, real_shares),
        "w1": lambda p, _: wasserstein1_of_shares(p, real_shares, RATING_LEVELS),
    }
    found = bootstrap_two_histograms(
        functions, (codes, agents), (codes, agents), len(RATING_LEVELS), paired=True, n=resamples, seed=seed
    )
    return {name: entry(interval) for name, interval in found.items()}


def feed_quantities(
    table: FeedTable,
    real_rating_shares: np.ndarray | None = None,
    *,
    possible_slots: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Every quantity of sim_validation 5.

    Args:
        real_rating_shares: (5,) shares of the stars 1..5 in the real log; adds "rating_distance".
        possible_slots: exposures an agent could have had at most (20 in the published run); adds
            "watched_per_possible_slot", the published "click rate" that divides by them.

    Returns:
        {"n_exposures", "n_agents", "rating_shares" [5], "mean_rating", "rating_distance" {tv, js, w1}, "aligned" and
        "watched" {given_positive, given_other, balanced_accuracy}, "aligned_by_slot", "watched_by_slot",
        "positive_by_slot", "watched_by_activity", "exit_page_by_activity", "rating_gap_by_conformity", "exit_page",
        "slot_auc", "catalogue_mean_auc", "watched_per_exposure"}; curves are {"levels", "entries"}.
    """
    agents = np.asarray(table.agent)
    options = {"resamples": resamples, "seed": seed}
    rating = np.asarray(table.rating, dtype=np.float64)
    rated = ~np.isnan(rating)
    slot, watched = np.asarray(table.slot), np.asarray(table.watched, dtype=np.float64)
    last, first_row = _last_pages(table)
    positive = np.asarray(table.positive, dtype=bool)
    result: dict[str, Any] = {
        "n_exposures": len(table),
        "n_agents": len(last),
        "aligned": discrimination(table.aligned, positive, agents, **options),
        "watched": discrimination(table.watched, positive, agents, **options),
        "aligned_by_slot": _curve(table.aligned, slot, agents, resamples, seed),
        "watched_by_slot": _curve(watched, slot, agents, resamples, seed),
        "positive_by_slot": _curve(positive, slot, agents, resamples, seed),
        "watched_by_activity": _curve(watched, np.asarray(table.activity), agents, resamples, seed),
        "exit_page_by_activity": _curve(
            last, np.asarray(table.activity)[first_row], np.arange(len(last)), resamples, seed
        ),
        "exit_page": bootstrap_table({"page": last}, np.arange(len(last)), n=resamples, seed=seed)["page"],
        "watched_per_exposure": bootstrap_table({"rate": watched}, agents, n=resamples, seed=seed)["rate"],
        "slot_auc": separation(-slot.astype(np.float64), positive, agents, **options),
        "catalogue_mean_auc": separation(table.catalogue_mean, positive, agents, **options),
    }
    if possible_slots is not None:
        rate = np.bincount(np.unique(agents, return_inverse=True)[1], watched) / possible_slots
        result["watched_per_possible_slot"] = bootstrap_table(
            {"rate": rate}, np.arange(len(rate)), n=resamples, seed=seed
        )["rate"]
    if rated.any():
        gap = np.abs(rating - np.asarray(table.catalogue_mean, dtype=np.float64))[rated]
        count = np.bincount(np.searchsorted(RATING_LEVELS, rating[rated]), minlength=len(RATING_LEVELS))
        result["rating_shares"] = (count / count.sum()).tolist()
        result["mean_rating"] = bootstrap_table({"mean": rating[rated]}, agents[rated], n=resamples, seed=seed)["mean"]
        result["rating_gap_by_conformity"] = _curve(
            gap, np.asarray(table.conformity)[rated], agents[rated], resamples, seed
        )
        if real_rating_shares is not None:
            result["rating_distance"] = rating_shift(rating[rated], agents[rated], real_rating_shares, **options)
    return result


def slot_curve_gap(table: FeedTable, *, resamples: int = 200, seed: int = 0) -> Interval:
    """Largest |watched - positive| over slots after both curves are divided by their mean: how far clicks follow the
    slot more than relevance does. 0 where position plays no part beyond relevance.
    """
    slot = np.asarray(table.slot)
    levels, code = np.unique(slot, return_inverse=True)
    watched = np.asarray(table.watched, dtype=np.float64)
    positive = np.asarray(table.positive, dtype=np.float64)

    def gap(weight: np.ndarray) -> float:
        seen = np.bincount(code, weight, minlength=len(levels))
        curves = [
            np.bincount(code, weight * rows, minlength=len(levels))
            / seen
            / max(np.average(rows, weights=weight), 1e-12)
            for rows in (watched, positive)
        ]
        return float(np.abs(curves[0] - curves[1]).max())

    return bootstrap_statistic(gap, np.asarray(table.agent), n=resamples, seed=seed)
