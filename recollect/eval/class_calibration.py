"""Do the classes of a list match those of the profile? Steck's calibration, its bounded relative, and MRMC.

p(c|u) is the share of class c in the history, q(c|u) that in the list, q~ = (1 - a) q + a p with a = .01. A case with
an empty list has q = 0, hence the largest miscalibration ln(1/a); a case whose history has no class has nothing to
match and counts 0.

Source: Steck, RecSys 2018; rank miscalibration da Silva 2021 (recsys_evaluation 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recollect.data.examples import Cases
from recollect.errors import ConfigError, InputError
from recollect.eval.distances import jensen_shannon_bits
from recollect.eval.popularity import profile_means
from recollect.eval.topk import NO_ITEM
from recollect.types import Catalog

SMOOTHING = 0.01
_CHUNK_CELLS = 200_000  # with hundreds of categories a chunk that fits the cache is faster than a large one


def category_classes(catalog: Catalog) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n_items, G) p(c|i), an item's categories in equal shares (a row of zeros where it has none), and their names."""
    names = tuple(sorted({name for names in catalog.categories for name in names}))
    number = {name: index for index, name in enumerate(names)}
    classes = np.zeros((len(catalog), len(names)))
    for item, categories in enumerate(catalog.categories):
        for name in set(categories):
            classes[item, number[name]] = 1.0 / len(set(categories))
    return classes, names


def popularity_classes(popularity: np.ndarray, cuts: Sequence[float] = (0.2, 0.8)) -> np.ndarray:
    """(n_items, len(cuts) + 1) one-hot popularity classes by share of items, most popular first, ties by index.

    (0.2, 0.8) gives head, mid and tail; (0.2,) gives head and tail as "items20" does where every item is a candidate.

    Raises:
        ConfigError: cuts are not ascending within (0, 1).
    """
    if any(not 0 < cut < 1 for cut in cuts) or list(cuts) != sorted(set(cuts)):
        raise ConfigError(f"cuts must be ascending numbers between 0 and 1, got {tuple(cuts)!r}")
    n_items = len(popularity)
    place = np.empty(n_items, dtype=np.int64)
    place[np.argsort(-popularity, kind="stable")] = np.arange(n_items)
    bounds = np.ceil(np.asarray(cuts) * n_items - 1e-9)
    return np.eye(len(cuts) + 1)[np.searchsorted(bounds, place, side="right")]


def smoothed_kl(p: np.ndarray, q: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """KL(p || (1 - a) q + a p) in nats along the last axis; ln(1/a) for q = 0, 0 for p = 0.

    Args:
        p: (…, G) distributions, or zeros.
        q: (…, G) distributions, or zeros for an empty list.
    """
    p, q = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64))
    mixed = (1.0 - smoothing) * q + smoothing * p
    ratio = np.divide(p, mixed, out=np.ones(p.shape), where=p > 0)
    return np.maximum((p * np.log(ratio)).sum(axis=-1), 0.0)


def miscalibration(p: np.ndarray, q: np.ndarray, smoothing: float = SMOOTHING) -> np.ndarray:
    """MC = KL(p || q~) / KL(p || empty) in 0..1: 0 iff q = p, 1 iff the list has no mass where p lives."""
    return smoothed_kl(p, q, smoothing) / np.log(1.0 / smoothing)


def profile_distribution(cases: Cases, classes: np.ndarray) -> np.ndarray:
    """(C, G) p(c|u) over the events of each history; a row of zeros where no event has a class."""
    return _normalised(np.stack([profile_means(cases, column) for column in classes.T], axis=1))


def _normalised(mass: np.ndarray) -> np.ndarray:
    mass = np.where(mass > 1e-9, mass, 0.0)  # differences of running sums leave dust where a class is absent
    total = mass.sum(axis=-1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)


def calibration_columns(
    lists: np.ndarray, cases: Cases, classes: np.ndarray, *, rank_weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """{"kl", "js", "mrmc": (C,) float64} of lists (C, K).

    Args:
        classes: (n_items, G) p(c|i), rows summing to 1 or all zero.
        rank_weights: (K,) positive weights of the places in q for "kl" and "js"; None = equal.

    Returns:
        "kl": KL(p || q~) in nats.  "js": Jensen-Shannon divergence of p and q in bits, 1 for an empty list.
        "mrmc": mean over k = 1..K of MC(p, q of the first k places).

    Raises:
        InputError: `classes` or `rank_weights` does not fit.
    """
    weights = np.ones(lists.shape[1]) if rank_weights is None else np.asarray(rank_weights, dtype=np.float64)
    if weights.shape != lists.shape[1:] or not (weights > 0).all():
        raise InputError(f"rank_weights must be {lists.shape[1]} positive numbers, got {rank_weights!r}")
    if classes.ndim != 2 or not np.isfinite(classes).all() or (classes < 0).any():
        raise InputError(f"classes must be (n_items, G) non-negative shares, got shape {classes.shape}")
    p = profile_distribution(cases, classes)
    padded = np.concatenate([classes, np.zeros((1, classes.shape[1]))])  # the last row is that of "no item"
    table = {name: np.zeros(len(lists)) for name in ("kl", "js", "mrmc")}
    step = max(1, _CHUNK_CELLS // max(lists.shape[1] * classes.shape[1], 1))
    for start in range(0, len(lists), step):
        part = slice(start, start + step)
        of_place = padded[np.where(lists[part] == NO_ITEM, len(classes), lists[part])]  # (B, K, G)
        q = _normalised((of_place * weights[:, None]).sum(axis=1))
        running = _normalised(np.cumsum(of_place, axis=1))
        has_profile = p[part].any(axis=1)
        filled = has_profile & q.any(axis=1)
        table["kl"][part] = smoothed_kl(p[part], q)
        table["mrmc"][part] = miscalibration(p[part][:, None], running).mean(axis=1)
        table["js"][part][has_profile & ~filled] = 1.0
        table["js"][part][filled] = jensen_shannon_bits(p[part][filled], q[filled])
    return table
