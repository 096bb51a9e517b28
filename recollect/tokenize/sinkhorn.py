"""Balanced assignment by Sinkhorn iterations (LC-Rec, arXiv 2311.09049), in the log domain.

Distances are centred to [-1, 1] by mid-range and half-range, Q = exp(-d / epsilon), rows are normalised to 1/B and
columns to 1/K in turn, and each row takes its largest entry. exp(-1 / .003) underflows in float32, hence float64 and
logarithms; where the range of a kernel permits (epsilon .003 does), the same iterations run on products, which are
about ten times as fast. Rows that are exactly equal keep equal plans: true duplicates are never told apart.

Source: LC-Rec's code; the 1e-5 added to the half-range is theirs [paper: code].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError
from recollect.tokenize.digit_costs import LastDigitCosts
from recollect.tokenize.groups import Groups, sizes_of, tuple_ids

_HALF_RANGE_SLACK = 1e-5
_LARGEST_RANGE = 690.0  # nats; e^-690 is still a normal float64


def centred(distances: Tensor) -> Tensor:
    """(…, B, K) float64 distances shifted and scaled to [-1, 1], each problem on its own."""
    distances = distances.to(torch.float64)
    high, low = distances.amax(dim=(-2, -1), keepdim=True), distances.amin(dim=(-2, -1), keepdim=True)
    middle = (high + low) / 2
    return (distances - middle) / (high - middle + _HALF_RANGE_SLACK)


def log_transport_plan(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Logarithm of the balanced plan Q: rows sum to 1 nearly and columns to B/K exactly, after the last half-step.

    Args:
        distances: (…, B, K), used as they are (see `centred`).
        epsilon: strength of the entropy term, > 0; the smaller, the nearer to a hard assignment.
        iterations: pairs of row and column normalisations, >= 1.

    Returns:
        (…, B, K) float64, scaled as in LC-Rec by B.

    Raises:
        InputError: epsilon or iterations out of range, or distances that are not finite.
    """
    if not epsilon > 0 or iterations < 1:
        raise InputError(f"sinkhorn needs epsilon > 0 and iterations >= 1, got {epsilon!r} and {iterations!r}")
    rows = distances.shape[-2]
    log_kernel = -distances.to(torch.float64) / epsilon
    if not bool(torch.isfinite(log_kernel).all()):
        raise InputError("sinkhorn distances hold NaN or infinity")
    log_kernel = log_kernel - log_kernel.amax(dim=-1, keepdim=True)  # a row's constant is normalised away
    plan = None
    if float(log_kernel.min()) >= -_LARGEST_RANGE:
        plan = _by_products(log_kernel, iterations)
    if plan is None:
        plan = _by_logarithms(log_kernel, iterations)
    return plan + math.log(rows)


def _by_logarithms(log_kernel: Tensor, iterations: int) -> Tensor:
    rows, columns = log_kernel.shape[-2:]
    column_scale = torch.zeros_like(log_kernel[..., :1, :])
    row_scale = torch.zeros_like(log_kernel[..., :, :1])
    for _ in range(iterations):
        row_scale = -math.log(rows) - torch.logsumexp(log_kernel + column_scale, dim=-1, keepdim=True)
        column_scale = -math.log(columns) - torch.logsumexp(log_kernel + row_scale, dim=-2, keepdim=True)
    return log_kernel + row_scale + column_scale


def _by_products(log_kernel: Tensor, iterations: int) -> Tensor | None:
    """As `_by_logarithms`; None where a scale left the range of float64."""
    rows, columns = log_kernel.shape[-2:]
    kernel = log_kernel.exp()
    turned = kernel.transpose(-2, -1).contiguous()
    column_scale = torch.ones_like(turned[..., :, :1])
    row_scale = torch.ones_like(kernel[..., :, :1])
    for _ in range(iterations):
        row_scale = 1 / (rows * (kernel @ column_scale))
        column_scale = 1 / (columns * (turned @ row_scale))
    scales = row_scale.log() + column_scale.log().transpose(-2, -1)
    return log_kernel + scales if bool(torch.isfinite(scales).all()) else None


@torch.no_grad()
def balanced_assignment(distances: Tensor, epsilon: float = 0.003, iterations: int = 100) -> Tensor:
    """(…, B) int64 codes that spread B rows evenly over K codes, for use in training and in re-assignment.

    Args:
        distances: (…, B, K) finite squared distances of rows to codes; leading axes are separate problems. No gradient
            flows.
        epsilon, iterations: see `log_transport_plan`; LC-Rec uses .003 and 50 to 100.
    """
    return log_transport_plan(centred(distances), epsilon, iterations).argmax(dim=-1)


def sinkhorn_last_digits(
    codes: np.ndarray,
    costs: LastDigitCosts,
    rank: np.ndarray,
    existing: np.ndarray,
    *,
    epsilon: float,
    iterations: int,
    rounds: int,
) -> np.ndarray:
    """Codes (N, L) after at most `rounds` re-assignments of the last digit of every group that shares a tuple.

    Where `existing` (M, L) tuples stand under a group's prefix, their digits are out of reach, and an item alone with
    one of them takes its nearest free digit (a plan of one row is uniform and says nothing) [our design].
    """
    codes = codes.copy()
    n = len(codes)
    prefixes = tuple_ids(np.concatenate([codes, existing])[:, :-1])
    for _ in range(rounds):
        whole = np.concatenate([codes, existing])
        ids = tuple_ids(whole)
        shared = (sizes_of(ids) > 1)[:n]
        if not shared.any():
            break
        groups = Groups.of(ids[:n], rank, shared)
        occupied = _digits_by_prefix(prefixes[n:], existing[:, -1])
        for rows, places in groups.blocks(costs.most_rows):
            digits = codes[rows, -1]
            table = costs.table(rows, codes[rows])
            free: dict[int, list[slice]] = {}
            for place in places:
                taken = occupied.get(int(prefixes[rows[place.start]]))
                if taken is None:
                    free.setdefault(place.stop - place.start, []).append(place)
                else:
                    digits[place] = _around(table[place], taken, digits[place], epsilon, iterations)
            for size in sorted(free):
                members = np.stack([np.arange(place.start, place.stop) for place in free[size]])  # (groups, size)
                plan = balanced_assignment(torch.from_numpy(table[members]), epsilon, iterations)
                digits[members] = plan.numpy().astype(codes.dtype)
            codes[rows, -1] = digits
    return codes


def _digits_by_prefix(prefixes: np.ndarray, digits: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(prefixes, kind="stable")
    names, starts = np.unique(prefixes[order], return_index=True)
    return dict(zip(names.tolist(), np.split(digits[order], starts[1:]), strict=True)) if len(names) else {}


def _around(table: np.ndarray, taken: np.ndarray, digits: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Digits of one group (n, K) that avoid `taken`; unchanged where nothing is free."""
    free = np.setdiff1d(np.arange(table.shape[1]), taken)
    if not len(free):
        return digits
    if len(table) == 1:
        return free[table[:, free].argmin(axis=1)]
    return free[balanced_assignment(torch.from_numpy(table[:, free]), epsilon, iterations).numpy()]
