"""Rows sorted by expert, and the product of each group of rows with its expert's matrix, without a loop in Python."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ALIGNMENT = 16
"""Bytes a row of either operand must fill a multiple of for the grouped kernel."""


class Grouping(NamedTuple):
    """The S = N * K (token, slot) pairs of a batch in the order of their experts.

    token: (S,) token of each sorted pair.  expert: (S,) its expert.  place: (S,) where pair s = token * K + slot
    stands in the sorted order.  ends: (E,) int32, end of each expert's rows.
    """

    token: Tensor
    expert: Tensor
    place: Tensor
    ends: Tensor

    @property
    def counts(self) -> Tensor:
        """(E,) pairs per expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def group_by_expert(selected: Tensor, n_experts: int) -> Grouping:
    """Sort (N, K) selected experts; pairs of one expert keep the order of their tokens."""
    flat = selected.reshape(-1)
    expert, order = flat.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = torch.bincount(flat, minlength=n_experts).cumsum(0).to(torch.int32)
    return Grouping(order // selected.shape[-1], expert, place, ends)


def grouped_linear(rows: Tensor, weights: Tensor, grouping: Grouping) -> Tensor:
    """Each row times its expert's matrix.

    Args:
        rows: (S, n), sorted by expert.
        weights: (E, m, n).

    Returns:
        (S, m), differentiable in both.
    """
    weights = weights.to(rows.dtype)
    if len(rows) == 0:
        return rows.new_zeros(0, weights.shape[1])
    if _has_kernel(rows, weights):
        product = functional.grouped_mm(rows.contiguous(), weights.transpose(1, 2), offs=grouping.ends)
        if product.requires_grad:
            product.register_hook(lambda gradient: gradient.contiguous())  # the kernel refuses expanded gradients
        return product
    return _padded_linear(rows, weights, grouping)


def _has_kernel(rows: Tensor, weights: Tensor) -> bool:
    if not hasattr(functional, "grouped_mm") or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    sides = [side * rows.element_size() for side in weights.shape[1:]]
    return not any(side % ALIGNMENT for side in sides)


def _padded_linear(rows: Tensor, weights: Tensor, grouping: Grouping) -> Tensor:
    """The same by one batched product of groups padded to the longest; for dtypes and widths the kernel refuses."""
    counts = grouping.counts
    starts = grouping.ends - counts  # (E,)
    within = torch.arange(len(rows), device=rows.device) - starts[grouping.expert]  # (S,)
    padded = rows.new_zeros(len(weights), int(counts.max()), rows.shape[1])
    padded = padded.index_put((grouping.expert, within), rows)
    return torch.bmm(padded, weights.transpose(1, 2))[grouping.expert, within]
