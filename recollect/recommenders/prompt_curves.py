"""Every method with a knob over all values of the knob: accuracy against calibration, accuracy against coverage.

Methods: each re-ranker on the generator's scores and on each prompt's (lambda, beta or temperature), each prompt mixed
into the generator's scores (weight w of the prompt), and each prompt over the candidate mix (share of drawn niche items
among what it was asked to rank). A method without a knob is a curve of one point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.eval.pareto import Curve, PairedDraws, joint_frontier
from recollect.eval.statistics import entry
from recollect.recommenders.prompt_metrics import Judge, Lists
from recollect.recommenders.rerank import (
    calibrated_popularity,
    maximal_marginal_relevance,
    order_by,
    popularity_penalty,
    quota,
    softmax_order,
    unit_relevance,
    xquad,
)
from recollect.rng import stream

LAMBDAS = tuple(step / 10 for step in range(11))
BETAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
"""In standard deviations of a user's scores."""
OVER_THE_MIX = " over the candidate mix"
REFERENCE = "cp"
"""The re-ranker whose curve on the generator every other curve is compared with."""


@dataclass(frozen=True)
class Sweep:
    """A method and its lists, one per value of the knob."""

    method: str
    knob: str
    values: tuple[float, ...]
    lists: tuple[Lists, ...]


def rerank_sweeps(judge: Judge, base: Lists, names: Sequence[str], seed: int) -> Iterator[Sweep]:
    """The re-rankers `names` on one method's lists; `seed` is that of the draws of "softmax"."""
    cases = judge.cases
    popular = cases.popularity.is_popular[base.items]
    classes = (~popular).astype(np.int64)
    target = cases.class_shares((~cases.popularity.is_popular).astype(np.int64), 2)
    for name in names:
        match name:
            case "cp":
                orders = [calibrated_popularity(base.scores, classes, target, value) for value in LAMBDAS]
                yield _sweep(base, name, "lambda", LAMBDAS, orders)
            case "poppen":
                counts = cases.popularity.count[base.items]
                orders = [popularity_penalty(base.scores, counts, value) for value in BETAS]
                yield _sweep(base, name, "beta", BETAS, orders)
            case "xquad":
                orders = [xquad(base.scores, classes, target, value) for value in LAMBDAS]
                yield _sweep(base, name, "lambda", LAMBDAS, orders)
            case "mmr":
                features = category_features(judge)[base.items]
                orders = [maximal_marginal_relevance(base.scores, features, value) for value in LAMBDAS]
                yield _sweep(base, name, "lambda", LAMBDAS, orders)
            case "softmax":
                noise = gumbel_noise(judge, base.items, seed)
                orders = [softmax_order(base.scores, value, noise) for value in TEMPERATURES]
                yield _sweep(base, name, "T", TEMPERATURES, orders)
            case "quota":
                wanted = np.array([profile.quota(judge.k) for profile in cases.profiles])
                yield _sweep(base, name, "", (0.0,), [quota(base.scores, popular, wanted, judge.k)])


def _sweep(base: Lists, name: str, knob: str, values: tuple[float, ...], orders: Sequence[np.ndarray]) -> Sweep:
    method = f"{base.name} + {name}"
    return Sweep(method, knob, values, tuple(base.take(method, order) for order in orders))


def blend_sweep(generator: Lists, prompt: Lists) -> Sweep:
    """(1 - w) generator + w prompt, both scaled to 0..1 per user, over the items both hold."""
    method = f"{generator.name} mixed with {prompt.name}"
    scores = unit_relevance(generator.scores)
    place = (generator.items[:, :, None] == prompt.items[:, None, :]).argmax(axis=2)
    theirs = np.take_along_axis(unit_relevance(prompt.scores), place, axis=1)
    orders = [order_by((1 - weight) * scores + weight * theirs) for weight in LAMBDAS]
    return Sweep(method, "w", LAMBDAS, tuple(generator.take(method, order) for order in orders))


def gumbel_noise(judge: Judge, items: np.ndarray, seed: int) -> np.ndarray:
    """(U, C) standard Gumbel draws of each user's candidates (U, C), the same for every method that ranks them."""
    noise = np.empty(items.shape)
    for row, key in enumerate(judge.cases.keys):
        noise[row, np.argsort(items[row], kind="stable")] = stream(seed, "softmax", key).gumbel(size=items.shape[1])
    return noise


def mix_sweep(name: str, lists: Mapping[float, Lists]) -> Sweep:
    """One ranker over the share of drawn niche items among its candidates, {share: lists}."""
    shares = tuple(sorted(lists))
    return Sweep(name + OVER_THE_MIX, "share", shares, tuple(lists[share] for share in shares))


def category_features(judge: Judge) -> np.ndarray:
    """(n_items, F) bool: which categories an item has."""
    categories = judge.cases.dataset.catalog.categories
    names = {name: at for at, name in enumerate(sorted({name for names in categories for name in names}))}
    features = np.zeros((len(categories), max(1, len(names))), dtype=bool)
    for item, found in enumerate(categories):
        features[item, [names[name] for name in found]] = True
    return features


def draw_curves(judge: Judge, sweeps: Sequence[Sweep], *, resamples: int, seed: int) -> dict[str, Any]:
    """The curves of all methods in both planes, JSON-ready.

    Returns:
        {plane: {"gain", "cost", "curves": [{"method", "knob", "points": [{"value", gain and cost entries, "frontier"}],
        "hypervolume", "difference": from cp on the generator or None}]}} for the planes "calibration" (MRMC, lower is
        better) and "coverage" (LtC, higher is better; its area counts 1 - LtC as cost).
    """
    draws = judge.draws(resamples, seed)
    ndcg = judge.name("ndcg")
    planes: dict[str, list[Curve]] = {"calibration": [], "coverage": []}
    for sweep in sweeps:
        gain = [judge.accuracy(lists.items)[ndcg] for lists in sweep.lists]
        mrmc = [judge.miscalibration(lists.items) for lists in sweep.lists]
        gain_draws = np.stack([draws.mean(column) for column in gain])
        means = np.array([column.mean() for column in gain])
        planes["calibration"].append(
            Curve(
                sweep.method,
                sweep.knob,
                sweep.values,
                means,
                np.array([column.mean() for column in mrmc]),
                gain_draws,
                np.stack([draws.mean(column) for column in mrmc]),
            )
        )
        planes["coverage"].append(
            Curve(
                sweep.method,
                sweep.knob,
                sweep.values,
                means,
                np.array([1 - judge.coverage(lists.items) for lists in sweep.lists]),
                gain_draws,
                np.stack([1 - draws.coverage(lists.items[:, : judge.k], judge.tail) for lists in sweep.lists]),
            )
        )
    return {
        "calibration": _plane(planes["calibration"], draws, ndcg, judge.name("mrmc"), flip=False),
        "coverage": _plane(planes["coverage"], draws, ndcg, judge.name("ltc"), flip=True),
    }


def _plane(curves: Sequence[Curve], draws: PairedDraws, gain: str, cost: str, *, flip: bool) -> dict[str, Any]:
    reference = next((curve for curve in curves if curve.method.endswith(f" + {REFERENCE}")), None)
    rows = []
    for curve, flags in zip(curves, joint_frontier(curves), strict=True):
        points = []
        for at, value in enumerate(curve.values):
            costs = curve.cost[at], curve.cost_draws[at]
            shown = (1 - costs[0], 1 - costs[1]) if flip else costs
            points.append(
                {
                    "value": value,
                    gain: entry(draws.interval(float(curve.gain[at]), curve.gain_draws[at])),
                    cost: entry(draws.interval(float(shown[0]), shown[1])),
                    "frontier": bool(flags[at]),
                }
            )
        volume = curve.volume(draws)
        difference = None
        if reference is not None and curve is not reference:
            apart = curve.volume_draws() - reference.volume_draws()
            difference = entry(draws.interval(volume.value - reference.volume(draws).value, apart))
        rows.append(
            {
                "method": curve.method,
                "knob": curve.knob,
                "points": points,
                "hypervolume": entry(volume),
                "difference": difference,
            }
        )
    return {"gain": gain, "cost": cost, "reference": reference.method if reference else None, "curves": rows}
