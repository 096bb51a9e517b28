"""The algebra of SD-MoE (arXiv 2602.12556): a matrix split along two orthonormal bases U (m, k) and V (n, k).

    common part  P_U M + (I - P_U) M P_V    rank at most 2k, not k: there are two cross terms
    unique part  (I - P_U) M (I - P_V)      what neither basis touches

They sum to M and are orthogonal to each other.  Both take one matrix (m, n) or a stack (E, m, n), work in at least
float32 and return the input's dtype.  k = 0 is legal: the common part is then zero.

Source: spec sd_moe 3.1, 3.3 [secondary formula, identities measured by us]; conversion, refresh and re-alignment are
our design.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.errors import ConfigError
from recollect.rng import call_seed

EXACT_SIDE = 64
"""Matrices with a side up to this are decomposed exactly on a refresh; beyond it subspace iteration is cheaper."""


class Basis(NamedTuple):
    """left: U (m, k).  right: V (n, k).  Both orthonormal, float32 or float64."""

    left: Tensor
    right: Tensor


class Split(NamedTuple):
    """Experts (E, m, n) = common + unique[e] + dropped_left[e] @ dropped_right[e], exactly up to rounding.

    common: (m, n), rank at most 2k.  unique: (E, m, n), in the complement of `basis` on both sides.
    dropped_left, dropped_right: (E, m, 2k) and (E, 2k, n), what an expert does in the common space that the mean
    expert does not.
    """

    common: Tensor
    unique: Tensor
    basis: Basis
    dropped_left: Tensor
    dropped_right: Tensor


def working(matrix: Tensor) -> Tensor:
    """The matrix in a dtype fit for projections: float32, or float64 when it is that already."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def common_part(matrix: Tensor, basis: Basis) -> Tensor:
    """P_U M + (I - P_U) M P_V of (m, n) or (E, m, n)."""
    exact = working(matrix)
    outer, inner = _common_factors(exact if exact.dim() == 3 else exact.unsqueeze(0), basis)
    return torch.bmm(outer, inner).view(exact.shape).to(matrix.dtype)


def unique_part(matrix: Tensor, basis: Basis) -> Tensor:
    """(I - P_U) M (I - P_V) of (m, n) or (E, m, n)."""
    return project_unique_(matrix.clone(), basis)


def project_unique_(matrix: Tensor, basis: Basis) -> Tensor:
    """`unique_part` written over `matrix` (m, n) or (E, m, n), which is returned; nothing else of that size is made."""
    exact = working(matrix)
    stack = exact if exact.dim() == 3 else exact.unsqueeze(0)
    if basis.left.shape[1] and stack.shape[0]:
        stack.baddbmm_(*_common_factors(stack, basis), alpha=-1)  # taken away in one pass over the weights
    if exact is not matrix:
        matrix.copy_(exact)
    return matrix


def _common_factors(stack: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Factors (E, m, 2k) and (E, 2k, n) whose product is the common part of a stack (E, m, n)."""
    left, right = basis.left.to(stack.dtype), basis.right.to(stack.dtype)
    rows, columns = left.T @ stack, stack @ right  # (E, k, n), (E, m, k)
    columns = columns - left @ (rows @ right)
    outer = torch.cat([left.expand(len(stack), -1, -1), columns], dim=2)
    return outer, torch.cat([rows, right.T.expand(len(stack), -1, -1)], dim=1)


def complement_leak(unique: Tensor, basis: Basis) -> tuple[float, float]:
    """Largest share of an expert's norm inside the common space: (left, right); 0 for experts that are zero.

    Args:
        unique: (E, m, n).

    Source: spec sd_moe 5.5.
    """
    exact = working(unique.detach())
    norms = torch.linalg.matrix_norm(exact).clamp_min(torch.finfo(exact.dtype).tiny)  # (E,)
    left = torch.linalg.matrix_norm(basis.left.to(exact.dtype).T @ exact) / norms
    right = torch.linalg.matrix_norm(exact @ basis.right.to(exact.dtype)) / norms
    return float(left.max()), float(right.max())


def check_common_rank(common_rank: int, out_features: int, in_features: int, where: str = "the layer") -> None:
    """Raise ConfigError unless 0 <= k < min(m, n): a full basis would leave nothing to the experts."""
    if not 0 <= common_rank < min(out_features, in_features):
        raise ConfigError(
            f"common_rank must be at least 0 and below min(out, in) = {min(out_features, in_features)} "
            f"in {where}, got {common_rank!r}"
        )


def check_usage(usage: Tensor, n_experts: int, where: str = "usage") -> None:
    """Raise ConfigError unless `usage` can weigh a mean of `n_experts` experts."""
    if usage.shape != (n_experts,) or bool((usage < 0).any()) or not float(usage.sum()) > 0:
        raise ConfigError(
            f"{where} must be {n_experts} non-negative numbers with a positive sum, got {usage.tolist()!r}"
        )


def random_basis(out_features: int, in_features: int, common_rank: int, generator: torch.Generator) -> Basis:
    """QR of two Gaussian matrices, float32 on the generator's device.  Source: spec 3.1, from scratch [secondary]."""

    def orthonormal(rows: int) -> Tensor:
        gaussian = torch.randn(rows, common_rank, generator=generator, device=generator.device)
        return torch.linalg.qr(gaussian).Q

    return Basis(orthonormal(out_features), orthonormal(in_features))


def leading_basis(matrix: Tensor, common_rank: int) -> Basis:
    """The `common_rank` leading left and right singular vectors of (m, n), by a full decomposition."""
    left, _, right = torch.linalg.svd(working(matrix.detach()), full_matrices=False)
    return Basis(left[:, :common_rank].contiguous(), right[:common_rank].T.contiguous())


def refreshed_basis(matrix: Tensor, start: Basis, iterations: int = 2, oversampling: int = 8) -> Basis:
    """Leading singular vectors of (m, n) by subspace iteration from an old basis: O(m n k) instead of O(m n min(m, n)).

    A few random columns beside the old basis let it leave a subspace that no longer leads; they come from a fixed
    seed, so the result is a function of the arguments.  Small matrices are decomposed exactly.

    Source: spec 3.4, warm-started randomised decomposition [our design].
    """
    exact = working(matrix.detach())
    common_rank = start.right.shape[1]
    width = min(common_rank + oversampling, *exact.shape)
    if common_rank == 0 or min(exact.shape) <= max(EXACT_SIDE, width):
        return leading_basis(exact, common_rank)
    generator = torch.Generator().manual_seed(call_seed(0, "subspace iteration"))
    extra = torch.randn(exact.shape[1], width - common_rank, generator=generator)
    right = torch.cat([start.right.to(exact.dtype), extra.to(exact)], dim=1)
    for _ in range(iterations):
        left = torch.linalg.qr(exact @ right).Q  # (m, k + extra)
        right = torch.linalg.qr(exact.T @ left).Q  # (n, k + extra)
    left = torch.linalg.qr(exact @ right).Q
    inner_left, _, inner_right = torch.linalg.svd(left.T @ exact, full_matrices=False)
    return Basis((left @ inner_left[:, :common_rank]).contiguous(), inner_right[:common_rank].T.contiguous())


def split_experts(experts: Tensor, common_rank: int, usage: Tensor | None = None) -> Split:
    """Split pretrained experts along the leading directions of their mean.

    Args:
        experts: (E, m, n).
        common_rank: k.
        usage: (E,) non-negative weights of the mean, e.g. tokens per expert; None = equal.

    Raises:
        ConfigError: a rank that does not fit, or weights that are not E non-negative numbers with a positive sum.

    Source: spec 3.1, from a pretrained MoE [our design].
    """
    if experts.dim() != 3:
        raise ConfigError(f"experts must be a stack (E, m, n), got shape {tuple(experts.shape)}")
    n_experts, out_features, in_features = experts.shape
    check_common_rank(common_rank, out_features, in_features)
    exact = working(experts.detach())
    if usage is None:
        mean = exact.mean(0)
    else:
        check_usage(usage, n_experts)
        weights = usage.to(exact)
        mean = torch.einsum("e,emn->mn", weights / weights.sum(), exact)
    basis = leading_basis(mean, common_rank)
    left, right = basis
    deviation = exact - mean
    rows = left.T @ deviation  # (E, k, n)
    columns = deviation @ right - left @ (rows @ right)  # (E, m, k)
    return Split(
        common=common_part(mean, basis),
        unique=unique_part(exact, basis),
        basis=basis,
        dropped_left=torch.cat([left.expand(n_experts, -1, -1), columns], dim=2),
        dropped_right=torch.cat([rows, right.T.expand(n_experts, -1, -1)], dim=1),
    )
