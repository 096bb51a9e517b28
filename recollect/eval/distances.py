"""Distances between two distributions: total variation, Jensen-Shannon, Wasserstein-1, Kolmogorov-Smirnov.

The `*_of_shares` forms take histograms on a common support and work along the last axis, which is how the bootstrap
computes thousands of them at once; the others take samples. All equal SciPy.
"""

from __future__ import annotations

import numpy as np

from recollect.errors import InputError


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts (…, K) divided by their sum along the last axis.

    Raises:
        InputError: a count is negative or not finite, or a row sums to 0.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    if not np.isfinite(counts).all() or (counts < 0).any() or (total <= 0).any():
        raise InputError("a distribution needs non-negative finite weights with a positive sum")
    return counts / total


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Half the summed absolute difference of two histograms (…, K), normalised first; in 0..1."""
    return 0.5 * np.abs(shares(p) - shares(q)).sum(axis=-1)


def jensen_shannon_bits(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits (not its square root) of two histograms (…, K), normalised first; in 0..1."""
    p, q = np.broadcast_arrays(shares(p), shares(q))
    middle = 0.5 * (p + q)

    def relative_entropy(a: np.ndarray) -> np.ndarray:
        ratio = np.divide(a, middle, out=np.ones_like(a), where=a > 0)
        return (a * np.log2(ratio)).sum(axis=-1)

    return np.maximum(0.5 * (relative_entropy(p) + relative_entropy(q)), 0.0)


def wasserstein1_of_shares(p: np.ndarray, q: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Mean distance mass must travel between histograms (…, K) on ascending `support` (K,), in its unit."""
    gap = np.abs(np.cumsum(shares(p), axis=-1) - np.cumsum(shares(q), axis=-1))
    return (gap[..., :-1] * np.diff(np.asarray(support, dtype=np.float64))).sum(axis=-1)


def kolmogorov_smirnov_of_shares(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Largest gap of the two distribution functions of histograms (…, K) on a common ascending support."""
    return np.abs(np.cumsum(shares(p), axis=-1) - np.cumsum(shares(q), axis=-1)).max(axis=-1)


def common_support(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ascending distinct values of both samples, and the code of each value of `a` and of `b` in it.

    Raises:
        InputError: a sample is empty or not finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for name, sample in (("first", a), ("second", b)):
        if sample.ndim != 1 or not len(sample) or not np.isfinite(sample).all():
            raise InputError(f"the {name} sample must be a non-empty list of finite numbers, got shape {sample.shape}")
    support, code = np.unique(np.concatenate([a, b]), return_inverse=True)
    return support, code[: len(a)], code[len(a) :]


def wasserstein1(
    a: np.ndarray, b: np.ndarray, weights_a: np.ndarray | None = None, weights_b: np.ndarray | None = None
) -> float:
    """Wasserstein-1 distance of two samples, in their unit."""
    support, code_a, code_b = common_support(a, b)
    p = np.bincount(code_a, weights_a, minlength=len(support))
    q = np.bincount(code_b, weights_b, minlength=len(support))
    return float(wasserstein1_of_shares(p, q, support))


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of two samples, in 0..1."""
    support, code_a, code_b = common_support(a, b)
    p, q = np.bincount(code_a, minlength=len(support)), np.bincount(code_b, minlength=len(support))
    return float(kolmogorov_smirnov_of_shares(p, q))


def area_under_curve_of_counts(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """AUC from counts (…, K) of positives and negatives per ascending score value; ties count a half."""
    positive, negative = shares(positive), shares(negative)
    below = np.cumsum(negative, axis=-1) - negative
    return (positive * (below + 0.5 * negative)).sum(axis=-1)
