"""How far simulated decisions agree with what people did: the micro checks M1-M4 and the macro check A1.

Every function gives JSON-ready entries {"value", "ci95", "n"} whose intervals resample users. Micro checks judge single
decisions on held-out data; `distribution_agreement` compares marginals, which a simulator that confuses all users can
still match, so neither stands without the other.

Not covered: review text (M6), ranker comparison (A3), feedback loops (A4). Source: sim_validation 3, 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from recollect.errors import ConfigError, InputError
from recollect.eval.calibration import reliability
from recollect.eval.distances import (
    common_support,
    jensen_shannon_bits,
    kolmogorov_smirnov_of_shares,
    shares,
    total_variation,
    wasserstein1_of_shares,
)
from recollect.eval.metrics import ranking_table
from recollect.eval.slates import Slates
from recollect.eval.statistics import (
    RESAMPLES,
    Interval,
    bootstrap_ratios,
    bootstrap_table,
    bootstrap_two_histograms,
    cluster_codes,
    entry,
)
from recollect.rng import stream

__all__ = [
    "constant_rows",
    "distribution_agreement",
    "noise_ceiling",
    "pairwise_choice",
    "ranking",
    "rating_agreement",
    "reliability",
    "split_half",
    "taste_discrimination",
]

Kind = Literal["rating", "activity", "popularity", "category"]
KINDS: tuple[Kind, ...] = ("rating", "activity", "popularity", "category")
MAXIMUM_LEVELS = 20
MAXIMUM_CATEGORIES = 30
PREFERENCE_SCALE = 5.0


def constant_rows(m: float) -> dict[str, dict[str, float]]:
    """What always-yes and always-no get at M1 with one positive to m others, in closed form.

    Always-yes F1 = 2p / (1 + p) with p = 1 / (1 + m); always-no accuracy = 1 - p. A simulator below either has shown
    nothing.
    """
    p = 1.0 / (1.0 + m)
    even = {"taste/balanced_accuracy": 0.5, "taste/auc": 0.5}
    yes = {"taste/accuracy": p, "taste/precision": p, "taste/recall": 1.0, "taste/f1": 2.0 * p / (1.0 + p)}
    no = {"taste/accuracy": 1.0 - p, "taste/precision": 0.0, "taste/recall": 0.0, "taste/f1": 0.0}
    return {"always-yes": {**yes, **even}, "always-no": {**no, **even}}


def _user_auc(probabilities: np.ndarray, truth: np.ndarray, codes: np.ndarray, n_users: int) -> np.ndarray:
    """(G,) AUC within each user, ties half; NaN where a user has one class only."""
    order = np.lexsort((probabilities, codes))
    user, value, positive = codes[order], probabilities[order], truth[order].astype(np.float64)
    start = np.searchsorted(user, np.arange(n_users))
    rank = np.arange(len(order)) - start[user] + 1.0
    fresh = np.concatenate([[True], (user[1:] != user[:-1]) | (value[1:] != value[:-1])])
    tied = np.cumsum(fresh) - 1
    middle = (np.bincount(tied, rank) / np.bincount(tied))[tied]
    n_positive = np.bincount(user, positive, minlength=n_users)
    n_negative = np.bincount(user, minlength=n_users) - n_positive
    rank_sum = np.bincount(user, middle * positive, minlength=n_users)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def taste_discrimination(
    probabilities: np.ndarray,
    truth: np.ndarray,
    users: np.ndarray,
    *,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """M1: does the agent tell held-out positives from items the user never touched?

    Args:
        probabilities: (T,) of yes, or 0 and 1.
        truth: (T,) bool, the item is a held-out positive.
        users: (T,) who was asked.
        threshold: at or above it the answer is yes.

    Returns:
        taste/accuracy, precision, recall, f1, averaged over users (precision of a user who never says yes is 0), and
        taste/balanced_accuracy and taste/auc over the users who have both classes. `n` counts decisions except in the
        last two, where it counts users.

    Raises:
        InputError: a probability is outside 0..1, or no user has both classes.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    truth = np.asarray(truth, dtype=bool)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise InputError("probabilities must be between 0 and 1")
    codes, n_users = cluster_codes(users)

    def per_user(rows: np.ndarray) -> np.ndarray:
        return np.bincount(codes, rows, minlength=n_users)

    yes = probabilities >= threshold
    hits, said, positives, asked = per_user(yes & truth), per_user(yes), per_user(truth), per_user(np.ones(len(codes)))
    rejected = per_user(~yes & ~truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(said > 0, hits / said, 0.0)
        recall = np.where(positives > 0, hits / positives, 0.0)
        f1 = np.where(said + positives > 0, 2 * hits / (said + positives), 0.0)
        balanced = 0.5 * (hits / positives + rejected / (asked - positives))
    both = (positives > 0) & (positives < asked)
    if not both.any():
        raise InputError("taste discrimination needs users with positives and with others; no user has both")
    user = np.arange(n_users)
    every = {
        "taste/accuracy": (hits + rejected) / asked,
        "taste/precision": precision,
        "taste/recall": recall,
        "taste/f1": f1,
    }
    area = _user_auc(probabilities, truth, codes, n_users)
    table = bootstrap_table(every, user, n=resamples, seed=seed)
    for row in table.values():
        row["n"] = len(codes)
    mixed = {"taste/balanced_accuracy": balanced[both], "taste/auc": area[both]}
    return table | bootstrap_table(mixed, user[both], n=resamples, seed=seed)


def pairwise_choice(
    log_odds_first: np.ndarray,
    log_odds_second: np.ndarray,
    users: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """M2: positive against a matched negative, asked in both orders.

    Args:
        log_odds_first: (T,) log-odds of choosing the positive where it is printed first.
        log_odds_second: (T,) the same where it is printed second.

    Returns:
        choice/accuracy of the mean log-odds (0 counts half, so one who always answers "first" gets exactly .5),
        choice/accuracy_positive_first and _positive_second, choice/first_option_share (share of all answers that name
        the first option) and choice/flip_rate (pairs whose answer depends on the order).
    """
    first, second = np.asarray(log_odds_first, dtype=np.float64), np.asarray(log_odds_second, dtype=np.float64)

    def right(log_odds: np.ndarray) -> np.ndarray:
        settled = np.where(np.abs(log_odds) < 1e-9, 0.0, log_odds)
        return 0.5 * (1.0 + np.sign(settled))

    when_first, when_second = right(first), right(second)
    return bootstrap_table(
        {
            "choice/accuracy": right(0.5 * (first + second)),
            "choice/accuracy_positive_first": when_first,
            "choice/accuracy_positive_second": when_second,
            "choice/first_option_share": 0.5 * (when_first + 1.0 - when_second),
            "choice/flip_rate": np.abs(when_first - when_second),
        },
        users,
        n=resamples,
        seed=seed,
    )


def ranking(scores: np.ndarray, slates: Slates, *, resamples: int = RESAMPLES, seed: int) -> dict[str, dict[str, Any]]:
    """M3: entries of every ranking metric of scores (C, S), intervals over users."""
    return bootstrap_table(ranking_table(scores, slates), slates.user, n=resamples, seed=seed)


def rating_agreement(
    predicted: np.ndarray, actual: np.ndarray, users: np.ndarray, *, resamples: int = RESAMPLES, seed: int
) -> dict[str, dict[str, Any]]:
    """M4: how near predicted ratings come to real ones.

    Args:
        predicted, actual: (T,) in rating units (stars); users: (T,).

    Returns:
        rating/mae and rating/rmse (stars), rating/preference_estimation (1 - mae / 5, as published; flattering on a
        1-to-5 scale), rating/bias (predicted - actual, averaged within users first), rating/bias_spread (standard
        deviation of the users' biases), rating/variance_ratio (variance of predictions over that of ratings, both
        within users; null where real users never vary) and rating/w1 (stars, between the two distributions).

    Raises:
        InputError: lengths differ, nothing to compare, or a value is not finite.
    """
    predicted, actual = np.asarray(predicted, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if len(predicted) != len(actual):
        raise InputError(f"{len(predicted)} predicted ratings were given for {len(actual)} real ones")
    support, code_predicted, code_actual = common_support(predicted, actual)
    codes, n_users = cluster_codes(users)
    count = np.bincount(codes, minlength=n_users)
    error = predicted - actual
    bias = np.bincount(codes, error, minlength=n_users) / count

    def within(values: np.ndarray) -> np.ndarray:
        return (values - (np.bincount(codes, values, minlength=n_users) / count)[codes]) ** 2

    ones = np.ones(len(error))
    intervals = bootstrap_ratios(
        {
            "rating/mae": (np.abs(error), ones),
            "square": (error**2, ones),
            "rating/bias": (bias[codes] / count[codes], 1.0 / count[codes]),
            "bias_square": (bias[codes] ** 2 / count[codes], 1.0 / count[codes]),
            "rating/variance_ratio": (within(predicted), within(actual)),
        },
        codes,
        n=resamples,
        seed=seed,
    )
    square, bias_square = intervals.pop("square"), intervals.pop("bias_square")
    result = {name: entry(interval) for name, interval in intervals.items()}
    roots = [math.sqrt(bound) for bound in square[:3]]
    result["rating/rmse"] = entry(Interval(roots[0], roots[1], roots[2], square.n))
    value, low, high, n = intervals["rating/mae"]
    estimation = [1.0 - error_ / PREFERENCE_SCALE for error_ in (value, high, low)]
    result["rating/preference_estimation"] = entry(Interval(estimation[0], estimation[1], estimation[2], n))
    result["rating/bias_spread"] = {
        "value": math.sqrt(max(bias_square.value - intervals["rating/bias"].value ** 2, 0.0)),
        "ci95": [None, None],
        "n": n_users,
    }
    distance = bootstrap_two_histograms(
        {"rating/w1": lambda p, q: wasserstein1_of_shares(p, q, support)},
        (code_predicted, codes),
        (code_actual, codes),
        len(support),
        paired=True,
        n=resamples,
        seed=seed,
    )
    result["rating/w1"] = entry(distance["rating/w1"])
    result["rating/variance_ratio"]["n"] = len(error)
    return result


def _bins(simulated: np.ndarray, real: np.ndarray, kind: Kind) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Histogram labels and the bin of each value.

    Ratings keep their levels where these are few; activity and popularity are counts with long tails and get bins of
    doubling width; categories beyond the 30 commonest become one.
    """
    if kind == "category":
        names, code = np.unique(np.concatenate([simulated, real]).astype(str), return_inverse=True)
        count = np.bincount(code, minlength=len(names))
        kept = np.argsort(-count, kind="stable")[:MAXIMUM_CATEGORIES]
        place = np.full(len(names), len(kept))
        place[kept] = np.arange(len(kept))
        labels = [*names[kept].tolist(), *(["other"] if len(names) > len(kept) else [])]
        return labels, place[code[: len(simulated)]], place[code[len(simulated) :]]
    both = np.concatenate([simulated, real])
    levels = np.unique(both)
    if kind == "rating" and len(levels) <= MAXIMUM_LEVELS:
        edges, labels = levels, [f"{level:g}" for level in levels]
    elif kind == "rating":
        edges = np.linspace(levels[0], levels[-1], 11)[:-1]
        width = (levels[-1] - levels[0]) / 10
        labels = [f"{edge:.3g}-{edge + width:.3g}" for edge in edges]
    else:
        top = max(int(np.ceil(np.log2(both.max() + 1.0))), 1)
        edges = np.concatenate([[-np.inf], 2.0 ** np.arange(top)])
        labels = ["0", *(f"{int(edge)}" if edge == 1 else f"{int(edge)}-{int(2 * edge) - 1}" for edge in edges[1:])]
    place = np.searchsorted(edges, both, side="right") - 1
    used = np.bincount(place, minlength=len(labels)) > 0
    used[np.argmax(used) : len(used) - np.argmax(used[::-1])] = True
    renumbered = (np.cumsum(used) - 1)[place]
    kept_labels = [label for label, keep in zip(labels, used, strict=True) if keep]
    return kept_labels, renumbered[: len(simulated)], renumbered[len(simulated) :]


def distribution_agreement(
    simulated: np.ndarray,
    real: np.ndarray,
    kind: Kind,
    *,
    simulated_users: np.ndarray | None = None,
    real_users: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int,
) -> dict[str, Any]:
    """A1: distances between a simulated and a real marginal.

    Args:
        simulated, real: (A,), (B,) values: ratings, events per user, training counts of chosen items, or
            category names.
        simulated_users, real_users: whose each value is; None = every value stands alone.

    Returns:
        {"metrics": {"KIND/tv", "KIND/js" (bits), and, for ordered kinds, "KIND/w1" (the value's unit) and "KIND/ks":
        entries}, "histogram": {"labels", "simulated", "real"} with shares}. TV and JS are of the histogram, W1 and KS
        of the values. Noise alone makes distances positive: read them beside `noise_ceiling`.

    Raises:
        InputError: a sample is empty or not finite.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    simulated, real = np.asarray(simulated), np.asarray(real)
    if not len(simulated) or not len(real):
        raise InputError(f"nothing to compare: {len(simulated)} simulated and {len(real)} real values of {kind}")
    owners = [
        np.arange(len(values)) if users is None else np.asarray(users)
        for values, users in ((simulated, simulated_users), (real, real_users))
    ]
    if kind != "category":
        support, fine_simulated, fine_real = common_support(simulated, real)
    labels, bin_simulated, bin_real = _bins(simulated, real, kind)
    intervals = bootstrap_two_histograms(
        {f"{kind}/tv": total_variation, f"{kind}/js": jensen_shannon_bits},
        (bin_simulated, owners[0]),
        (bin_real, owners[1]),
        len(labels),
        n=resamples,
        seed=seed,
    )
    if kind != "category":
        intervals |= bootstrap_two_histograms(
            {
                f"{kind}/w1": lambda p, q: wasserstein1_of_shares(p, q, support),
                f"{kind}/ks": kolmogorov_smirnov_of_shares,
            },
            (fine_simulated, owners[0]),
            (fine_real, owners[1]),
            len(support),
            n=resamples,
            seed=seed,
        )
    histogram = {
        "labels": labels,
        "simulated": shares(np.bincount(bin_simulated, minlength=len(labels))).tolist(),
        "real": shares(np.bincount(bin_real, minlength=len(labels))).tolist(),
    }
    return {"metrics": {name: entry(interval) for name, interval in intervals.items()}, "histogram": histogram}


def split_half(users: np.ndarray, *, seed: int, repeat: int = 0) -> np.ndarray:
    """(N,) bool: True for the rows of a random half of the users (larger by one where their number is odd)."""
    codes, n_users = cluster_codes(users)
    half = np.zeros(n_users, dtype=bool)
    half[stream(seed, "split-half", repeat).permutation(n_users)[: (n_users + 1) // 2]] = True
    return half[codes]


def noise_ceiling(
    distance: Callable[[np.ndarray, np.ndarray], Mapping[str, float]],
    users: np.ndarray,
    *,
    repeats: int = 20,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """What one half of the real log gets against the other: no simulator should be asked to do better.

    Args:
        distance: takes the row numbers of both halves and gives {name: value}.
        users: (N,) of the real log's rows.

    Returns:
        {name: {"value": mean over repeats, "ci95": [2.5 %, 97.5 %] of the repeats, "n": users}}.
    """
    if cluster_codes(users)[1] < 2:
        raise InputError("a split-half needs at least two users")
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        half = split_half(users, seed=seed, repeat=repeat)
        for name, value in distance(np.flatnonzero(half), np.flatnonzero(~half)).items():
            found.setdefault(name, []).append(float(value))
    n_users = cluster_codes(users)[1]
    return {
        name: {"value": float(np.mean(values)), "ci95": np.percentile(values, [2.5, 97.5]).tolist(), "n": n_users}
        for name, values in found.items()
    }
