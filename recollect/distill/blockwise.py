"""The distillation loss without an [B, N] tensor: logits are made block by block, twice.

The forward pass streams the normalisers and the teacher's expectation; the backward pass makes each block again and
turns it into gradients at once. Memory is O(max_elements + B + N D) instead of O(B N) times the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.distill.factors import Factors, blocks, wide
from recollect.distill.losses import require_same_shape, require_strength, require_temperature
from recollect.errors import InputError


class _Normaliser:
    """Streaming log-sum-exp per row, accumulated in double precision."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.highest = torch.full((n_rows,), -torch.inf, dtype=torch.float64, device=device)
        self.mass = torch.zeros(n_rows, dtype=torch.float64, device=device)

    def add(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a block (b, n); gives exp(logits - highest so far) and what earlier sums must be multiplied by."""
        before = self.highest[rows]
        highest = torch.maximum(before, logits.amax(1).double())
        anchor = torch.where(highest.isinf(), 0.0, highest)
        rescale = (before - anchor).exp()
        share = (logits - anchor.to(logits.dtype)[:, None]).exp()
        self.mass[rows] = self.mass[rows] * rescale + share.sum(1, dtype=torch.float64)
        self.highest[rows] = highest
        return share, rescale

    def value(self) -> Tensor:
        """(B,) log of the sum of exponentials."""
        return self.highest + self.mass.log()


class _BlockwiseLoss(torch.autograd.Function):
    """See `blockwise_distillation_loss`; gradients go to the student's factors only."""

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        items: Tensor,
        bias: Tensor | None,
        target: Tensor,
        teacher: Factors | Tensor,
        weight: Tensor,
        temperature: float,
        scale: float,
        max_elements: int,
    ) -> Tensor:
        student = Factors(state, items, bias)
        n_rows, n_items = student.shape
        device = state.device
        hard, soft, guide = (_Normaliser(n_rows, device) for _ in range(3))
        of_target = torch.zeros(n_rows, dtype=torch.float64, device=device)
        expected_gap = torch.zeros(n_rows, dtype=torch.float64, device=device)
        for rows, columns in blocks(n_rows, n_items, max_elements):
            logits = student.block(rows, columns)
            hard.add(rows, logits)
            of_target[rows] += _picked(logits, target[rows], columns).double()
            if scale == 0:
                continue
            soft.add(rows, logits / temperature)
            taught = _teacher_block(teacher, rows, columns) / temperature
            share, rescale = guide.add(rows, taught)
            gap = torch.where(share > 0, share * (taught - logits / temperature), 0.0)
            expected_gap[rows] = expected_gap[rows] * rescale + gap.sum(1, dtype=torch.float64)
        normaliser = hard.value()
        loss = normaliser - of_target
        if scale == 0:
            soft_value = guide_value = normaliser
        else:
            soft_value, guide_value = soft.value(), guide.value()
            loss = loss + scale * weight.double() * (expected_gap / guide.mass - guide_value + soft_value)
        ctx.save_for_backward(state, items, bias, target, weight, normaliser, soft_value, guide_value)
        ctx.teacher, ctx.temperature, ctx.scale, ctx.max_elements = teacher, temperature, scale, max_elements
        return loss.mean().to(wide(state).dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        state, items, bias, target, weight, normaliser, soft, guide = ctx.saved_tensors
        student = Factors(state, items, bias)
        n_rows, n_items = student.shape
        of_state, of_items = torch.zeros_like(wide(state)), torch.zeros_like(wide(items))
        of_bias = torch.zeros_like(wide(bias)) if bias is not None else None
        kind = of_state.dtype
        for rows, columns in blocks(n_rows, n_items, ctx.max_elements):
            logits = student.block(rows, columns)
            gradient = (logits - normaliser[rows, None].to(kind)).exp()
            _subtract_one(gradient, target[rows], columns)
            if ctx.scale != 0:
                taught = _teacher_block(ctx.teacher, rows, columns) / ctx.temperature
                difference = (logits / ctx.temperature - soft[rows, None].to(kind)).exp()
                difference -= (taught - guide[rows, None].to(kind)).exp()
                gradient += (ctx.scale / ctx.temperature) * weight[rows, None].to(kind) * difference
            gradient *= upstream / n_rows
            of_state[rows] += gradient @ wide(items[columns])
            of_items[columns] += gradient.T @ wide(state[rows])
            if of_bias is not None:
                of_bias[columns] += gradient.sum(0)
        of_bias = of_bias.to(bias.dtype) if of_bias is not None else None
        return of_state.to(state.dtype), of_items.to(items.dtype), of_bias, None, None, None, None, None, None


def blockwise_distillation_loss(
    student: Factors,
    target: Tensor,
    teacher: Factors | Tensor,
    weight: Tensor,
    *,
    temperature: float,
    strength: float,
    t_squared: bool = True,
    max_elements: int = 1 << 22,
) -> Tensor:
    """`distillation_loss` of factored logits; equal to it within rounding, gradients included.

    Args:
        student: (B, D) states and (N, D) items (and bias) that may require gradients.
        target: (B,) int64.
        teacher: factors of another width, or logits (B, N) (an expanded row is fine); gets no gradient.
        weight: (B,).
        temperature, strength, t_squared: as in `distillation_loss`.
        max_elements: logits of either model held at a time.

    Returns:
        Scalar, float32 (float64 for float64 students).

    Raises:
        ConfigError: an option is out of range.
        InputError: shapes disagree, or a target is not an item.
    """
    require_temperature(temperature)
    require_strength(strength)
    require_same_shape(student.shape, tuple(teacher.shape))
    if weight.shape != target.shape or len(target) != len(student.state):
        raise InputError(
            f"target {tuple(target.shape)} and weight {tuple(weight.shape)} must have one entry for each of the "
            f"{len(student.state)} samples"
        )
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < student.shape[1]:
        raise InputError(
            f"targets must be items 0..{student.shape[1] - 1}, got {int(target.min())}..{int(target.max())}"
        )
    scale = strength * (temperature**2 if t_squared else 1.0)
    return _BlockwiseLoss.apply(
        student.state,
        student.items,
        student.bias,
        target,
        teacher.detach(),
        weight.detach(),
        temperature,
        scale,
        max_elements,
    )


def _teacher_block(teacher: Factors | Tensor, rows: slice, columns: slice) -> Tensor:
    return wide(teacher[rows, columns]) if isinstance(teacher, Tensor) else teacher.block(rows, columns)


def _inside(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which samples have their target in a block, and its column there."""
    sample = ((target >= columns.start) & (target < columns.stop)).nonzero()[:, 0]
    return sample, target[sample] - columns.start


def _picked(logits: Tensor, target: Tensor, columns: slice) -> Tensor:
    """(b,) the target's logit where it lies in this block, else 0."""
    sample, column = _inside(target, columns)
    picked = logits.new_zeros(len(target))
    picked[sample] = logits[sample, column]
    return picked


def _subtract_one(gradient: Tensor, target: Tensor, columns: slice) -> None:
    sample, column = _inside(target, columns)
    gradient[sample, column] -= 1.0
