"""The distillation loss of a batch in one sweep over its samples, with the weights it was computed under.

A training pass of a sequence model has thousands of samples, and each needs the student's and the teacher's scores of
the whole catalogue for the rank, the cross-entropy and the KL. Samples are taken in chunks; within one, every score is
made once and turned into loss, weight and gradient, so memory is O(chunk) and the backward pass only scales. Equal to
`recollect.distill.losses.distillation_loss` within rounding; `recollect.distill.blockwise` is its slower counterpart
for catalogues of which not even a few rows fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.distill.factors import Factors, Shares, row_products, wide
from recollect.distill.losses import require_same_shape, require_strength, require_temperature
from recollect.distill.weights import sample_weights, true_item_rank
from recollect.errors import ConfigError, InputError

CHUNK_SCORES = 2**20
ALL = slice(None)


class _Fused(torch.autograd.Function):
    """Gradients go to the student's factors only; no second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        items: Tensor,
        target: Tensor,
        teacher: Factors | Tensor | Shares,
        weight: Tensor | None,
        teacher_rank: Tensor | None,
        temperature: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        count, n_items = len(state), len(items)
        student = Factors(wide(state), wide(items))
        grad_state, grad_items = torch.empty_like(student.state), torch.zeros_like(student.items)
        used = torch.ones(count, dtype=student.state.dtype, device=state.device)
        loss = student.state.new_zeros(())
        rows = max(16, CHUNK_SCORES // n_items)
        for low in range(0, count, rows):
            part = slice(low, min(low + rows, count))
            logits = student.block(part, ALL)
            own = target[part, None]
            log_hard = logits.log_softmax(1)
            loss -= log_hard.gather(1, own).sum()
            gradient = log_hard.exp_()
            gradient.scatter_add_(1, own, torch.full_like(own, -1, dtype=gradient.dtype))
            if scale != 0:
                if teacher_rank is not None:
                    used[part] = sample_weights(true_item_rank(logits, target[part]), teacher_rank[part])
                elif weight is not None:
                    used[part] = weight[part]
                if isinstance(teacher, Shares):
                    share, log_mass = teacher.share[part], teacher.log_mass[part]
                else:
                    taught = wide(teacher[part]) if isinstance(teacher, Tensor) else teacher.block(part, ALL)
                    share, log_mass, _ = Shares.of(taught, temperature)
                log_soft = logits.div_(temperature).log_softmax(1)
                kl = log_mass - row_products(share, log_soft)
                loss += scale * (used[part] * kl).sum()
                difference = log_soft.exp_().sub_(share)
                gradient.addcmul_(difference, used[part, None], value=scale / temperature)
            torch.mm(gradient, student.items, out=grad_state[part])
            grad_items.addmm_(gradient.T, student.state[part])
        ctx.save_for_backward(grad_state.div_(count), grad_items.div_(count))
        ctx.mark_non_differentiable(used)
        ctx.kinds = state.dtype, items.dtype
        return loss / count, used

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        of_state, of_items = ctx.saved_tensors
        state, items = ctx.kinds
        return (of_state * gradient).to(state), (of_items * gradient).to(items), *(None,) * 6


def fused_distillation_loss(
    student: Factors,
    target: Tensor,
    teacher: Factors | Tensor | Shares,
    *,
    weight: Tensor | None = None,
    teacher_rank: Tensor | None = None,
    temperature: float,
    strength: float,
    t_squared: bool = True,
) -> tuple[Tensor, Tensor]:
    """mean_b [ CE_b + strength * w_b * T^2 * KL_b ] and the weights w.

    Args:
        student: states (M, D) and items (N, D) that may require gradients; no bias.
        target: (M,) int64.
        teacher: factors of any width, logits (M, N), or distributions made at this temperature; gets no gradient.
        weight: (M,) fixed trust per sample.
        teacher_rank: (M,) the teacher's ranks of the true items; the weights are then `sample_weights` against the
            student's ranks in this very pass. At most one of the two; with neither every weight is 1.
        temperature, strength, t_squared: as in `distillation_loss`.

    Returns:
        (scalar loss, (M,) weights), float32 or wider.

    Raises:
        ConfigError: an option is out of range.
        InputError: shapes disagree, or both kinds of weights are given.

    Source: spec 4.1, 4.2.
    """
    require_temperature(temperature)
    require_strength(strength)
    require_same_shape(student.shape, tuple(teacher.shape))
    if weight is not None and teacher_rank is not None:
        raise InputError("give weights or the teacher's ranks, not both")
    if isinstance(teacher, Shares) and teacher.temperature != temperature:
        raise ConfigError(f"the teacher's shares were made at temperature {teacher.temperature!r}, not {temperature!r}")
    for name, column in (("target", target), ("weight", weight), ("teacher_rank", teacher_rank)):
        if column is not None and column.shape != (len(student.state),):
            raise InputError(f"{name} must be ({len(student.state)},), one per sample, got {tuple(column.shape)}")
    if student.bias is not None:
        raise InputError("a student with an item bias is not supported here; use blockwise_distillation_loss")
    scale = strength * (temperature**2 if t_squared else 1.0)
    with torch.autocast(student.state.device.type, enabled=False):
        return _Fused.apply(
            student.state, student.items, target, teacher.detach(), weight, teacher_rank, temperature, scale
        )
