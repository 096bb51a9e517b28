"""The distillation losses of LLMD4Rec (arXiv 2505.18120): output distributions over the whole catalogue.

Per sample, with the teacher frozen: KL = D_KL(softmax(z_t/T) || softmax(z_s/T)), and for the batch
mean_b [ CE_b + strength * w_b * T^2 * KL_b ]. The direction (teacher first) and the weight per sample are the paper's,
the combination with cross-entropy and T^2 is ours (spec 4.1).

`recollect.distill.blockwise` computes the same loss without an [B, N] tensor.
Not covered: the weights (`recollect.distill.weights`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from recollect.distill.factors import wide
from recollect.errors import ConfigError, InputError


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """D_KL(teacher || student) of the softened distributions, per sample.

    An item the teacher excludes (-inf, e.g. a padding column) adds nothing. Adding a constant to a row changes nothing.

    Args:
        student_logits, teacher_logits: (B, N); column j is the same item in both. The teacher gets no gradient.
        temperature: T > 0.

    Returns:
        (B,) nats, float32 (float64 if both inputs are) whatever the input.

    Raises:
        ConfigError: the temperature is not positive.
        InputError: the shapes differ: another vocabulary of items, or another batch.
    """
    require_temperature(temperature)
    require_same_shape(tuple(student_logits.shape), tuple(teacher_logits.shape))
    log_teacher = (wide(teacher_logits.detach()) / temperature).log_softmax(-1)
    log_student = (wide(student_logits) / temperature).log_softmax(-1)
    probability = log_teacher.exp()
    return torch.where(probability > 0, probability * (log_teacher - log_student), 0.0).sum(-1)


def distillation_loss(
    student_logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    strength: float,
    t_squared: bool = True,
) -> Tensor:
    """Loss of a student that learns from the labels and from a frozen teacher.

    | input | what it is compared with |
    |---|---|
    | target (B,) | cross-entropy of `student_logits` at temperature 1 |
    | teacher_logits (B, N) | KL of the softened distributions, times `strength`, `weight` and T^2 |

    Args:
        student_logits: (B, N).
        target: (B,) int64, the true next item.
        teacher_logits: (B, N), detached here.
        weight: (B,) trust per sample (see `sample_weights`); ones for the static variant.
        temperature: T > 0.
        strength: lambda >= 0; at 0 the loss is the cross-entropy, bit for bit.
        t_squared: multiply by T^2, so that `strength` means about the same for every T.

    Returns:
        Scalar, the mean over the batch.

    Raises:
        ConfigError: the temperature is not positive, or the strength negative.
        InputError: shapes disagree.

    Source: spec 4.1.
    """
    require_strength(strength)
    cross_entropy = functional.cross_entropy(wide(student_logits), target, reduction="none")
    if strength == 0:
        return cross_entropy.mean()
    kl = distillation_kl(student_logits, teacher_logits, temperature)
    if weight.shape != kl.shape:
        raise InputError(f"weight must be ({len(kl)},), one per sample, got {tuple(weight.shape)}")
    scale = strength * (temperature**2 if t_squared else 1.0)
    return (cross_entropy + scale * wide(weight.detach()) * kl).mean()


class TopK(NamedTuple):
    """A teacher's distribution at one temperature, all but K items merged into one bucket.

    items: (B, K) int64.  log_probability: (B, K) of those items.  log_rest: (B,) of all others together, -inf if none.
    """

    items: Tensor
    log_probability: Tensor
    log_rest: Tensor


def top_k_of(logits: Tensor, k: int, temperature: float) -> TopK:
    """The K likeliest items of each row (B, N) of teacher logits and the mass of the rest.

    Raises:
        ConfigError: k is not in 1..N, or the temperature is not positive.
    """
    require_temperature(temperature)
    n_items = logits.shape[1]
    if not 1 <= k <= n_items:
        raise ConfigError(f"k must be between 1 and the {n_items} items, got {k!r}")
    log_probability = (wide(logits.detach()) / temperature).log_softmax(-1)
    top, items = log_probability.topk(k)
    rest = log_probability.scatter(1, items, -torch.inf)
    log_rest = rest.logsumexp(1) if k < n_items else torch.full_like(top[:, 0], -torch.inf)
    return TopK(items, top, log_rest)


def top_k_rest_kl(student_logits: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """KL to the teacher over K + 1 outcomes: its top items, and all others as one.

    Never exceeds `distillation_kl` (merging outcomes loses information), grows with K, equals it at K = N - 1 and N.

    Args:
        student_logits: (B, N).
        teacher: made at the same temperature.
        temperature: T > 0.

    Returns:
        (B,) nats, float32 or wider.

    Source: spec 4.3 (our design).
    """
    require_temperature(temperature)
    log_student = (wide(student_logits) / temperature).log_softmax(-1)
    probability = teacher.log_probability.exp()
    gap = teacher.log_probability - log_student.gather(1, teacher.items)
    kl = torch.where(probability > 0, probability * gap, 0.0).sum(1)
    if teacher.items.shape[1] == log_student.shape[1]:
        return kl
    rest = log_student.scatter(1, teacher.items, -torch.inf).logsumexp(1)
    mass = teacher.log_rest.exp()
    return kl + torch.where(mass > 0, mass * (teacher.log_rest - rest), 0.0)


def mutual_learning_losses(
    first_logits: Tensor, second_logits: Tensor, target: Tensor, *, temperature: float, strength: float
) -> tuple[Tensor, Tensor]:
    """Losses of two students trained at once, each the other's teacher with weight 1 (a control: no LLM in it).

    Args:
        first_logits, second_logits: (B, N) of the same samples; neither loss sends gradient into the other model.
        target: (B,) int64.

    Returns:
        Two scalars, one per model.

    Source: spec 4.4 (f). Self-distillation, the other half of (f), is `distillation_loss` with another seed as teacher.
    """
    everyone = torch.ones(len(target), device=target.device)
    first = distillation_loss(first_logits, target, second_logits, everyone, temperature=temperature, strength=strength)
    second = distillation_loss(
        second_logits, target, first_logits, everyone, temperature=temperature, strength=strength
    )
    return first, second


def label_smoothing_loss(logits: Tensor, target: Tensor, strength: float) -> Tensor:
    """CE + strength * KL(uniform || student): what a teacher that knows nothing does to the student at T = 1.

    The control beside a useless teacher (spec 7, oracle 17). Scalar.
    """
    require_strength(strength)
    log_student = wide(logits).log_softmax(-1)
    cross_entropy = functional.nll_loss(log_student, target)
    uniform = -log_student.mean(1).mean() - torch.log(torch.tensor(float(logits.shape[1])))
    return cross_entropy + strength * uniform


def require_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be a positive number, got {temperature!r}")


def require_strength(strength: float) -> None:
    """Refuse a negative or infinite strength."""
    if not 0 <= strength < float("inf"):
        raise ConfigError(f"strength must be 0 or a positive number, got {strength!r}")


def require_same_shape(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Refuse logits over different catalogues or batches."""
    if student != teacher:
        raise InputError(
            f"student logits are {student}, teacher logits {teacher}; both models must score the same "
            f"samples over the same items"
        )
