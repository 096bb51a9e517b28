"""How much each training sample trusts its teacher (LLMD4Rec, arXiv 2505.18120, the sample-wise weights).

A sample's weight compares the rank of its true item under student and teacher: a student that is behind listens up to
twice as hard, one that is ahead ignores the teacher. Ranks are 1-based over the whole catalogue; ties count half.

Not covered: where the ranks come from; see `recollect.distill.crossfit` for ranks under models that were not fitted
on the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.distill.factors import Factors, blocks, wide
from recollect.errors import ConfigError, InputError


def rank_from_counts(greater: Tensor, equal: Tensor) -> Tensor:
    """1-based rank (B,) float32 of an item that `greater` others beat and `equal` others tie: g + 1 + e/2.

    Source: spec 4.2 (our design; the paper does not say how ties count).
    """
    return greater.float() + 1.0 + 0.5 * equal.float()


def true_item_rank(logits: Tensor, target: Tensor) -> Tensor:
    """Rank of each sample's true item among all items, without a sort.

    Args:
        logits: (B, N) scores, higher is better; not masked. A NaN beside the target counts as above it.
        target: (B,) int64 in 0..N-1.

    Returns:
        (B,) float32 in 1..N, detached.

    Raises:
        InputError: a true item's own logit is NaN.
    """
    logits = logits.detach()
    of_target = logits.gather(1, target[:, None])  # (B, 1)
    # Of N items g are above, l below and e + 1 level, so g + 1 + e/2 = (N + 1 + g - l)/2: one sum, no bools counted.
    if not bool(logits.sum().isnan()):
        ahead = (logits - of_target).sign_().sum(1)  # (B,) g - l; equal infinities differ by NaN, whose sign is 0
        return 0.5 * (logits.shape[1] + 1 + ahead.float())
    equal = (logits == of_target).sum(1)  # the target itself included
    not_above = (logits <= of_target).sum(1)
    _require_target_found(equal)
    return rank_from_counts(logits.shape[1] - not_above, equal - 1)


def true_item_rank_in_blocks(model: Factors | Tensor, target: Tensor, *, max_elements: int = 1 << 22) -> Tensor:
    """`true_item_rank` of logits that are never held whole.

    The target's score is a dot product of its own, so an exact tie between two equal item rows is found up to rounding
    only; the target itself is left out by its index and never counts.

    Args:
        model: state and item factors whose product is the logits, or the logits (B, N).
        target: (B,) int64.
        max_elements: logits held at a time.
    """
    if isinstance(model, Tensor):
        of_target = model.detach().gather(1, target[:, None]).float()  # (B, 1)
    else:
        of_target = model.of_items(target)[:, None]  # (B, 1)
    _require_target_found(~of_target[:, 0].isnan())
    greater, equal = torch.zeros_like(target), torch.zeros_like(target)
    for rows, items in blocks(len(target), model.shape[1], max_elements):
        logits = (model[rows, items] if isinstance(model, Tensor) else model.block(rows, items)).detach()
        other = torch.arange(items.start, items.stop, device=logits.device) != target[rows, None]
        greater[rows] += (~(logits <= of_target[rows]) & other).sum(1)
        equal[rows] += ((logits == of_target[rows]) & other).sum(1)
    return rank_from_counts(greater, equal)


def sample_weights(student_rank: Tensor, teacher_rank: Tensor, *, rank_base: int = 1) -> Tensor:
    """Weight of the teacher per sample, in [0, 2]; 1 at equal ranks.

    With s and t the ranks: clip(1 + (s - t)/max(t, 1), 0, 2) if s > t, else clip(1 - (t - s)/max(s, 1), 0, 2). The two
    branches are one expression over the better rank. Exchanging the roles gives 2 minus the weight. With 1-based ranks
    it depends on s/t alone and saturates at a factor of two.

    Args:
        student_rank, teacher_rank: (B,) 1-based ranks of the true item under either model, as `true_item_rank` gives.
        rank_base: 1 (default), or 0 to count ranks from 0 inside the formula; only then does the guard max(., 1) act.

    Returns:
        (B,) float32 (float64 if both ranks are), detached.

    Raises:
        ConfigError: another base.
        InputError: shapes differ, or a rank is below 1 or NaN.

    Source: the paper's weights; 1-based ranks are ours.
    """
    if rank_base not in (0, 1):
        raise ConfigError(f"rank_base must be 0 or 1, got {rank_base!r}")
    if student_rank.shape != teacher_rank.shape:
        raise InputError(f"ranks of student {tuple(student_rank.shape)} and teacher {tuple(teacher_rank.shape)} differ")
    student, teacher = wide(student_rank.detach()), wide(teacher_rank.detach())
    if not bool(((student >= 1) & (teacher >= 1)).all()):
        raise InputError("ranks must be 1-based: a rank below 1, or NaN, was given")
    if rank_base == 0:
        student, teacher = student - 1, teacher - 1
    better = torch.minimum(student, teacher).clamp(min=1.0)
    return (1.0 + (student - teacher) / better).clamp(0.0, 2.0)


def _require_target_found(found: Tensor) -> None:
    if not bool((found > 0).all()):
        first = int((found > 0).logical_not().nonzero()[0])
        raise InputError(f"the score of the true item of sample {first} of the batch is NaN; the model has diverged")
