"""Measures of how far experts differ: in their weights, in their gradients, in routing and in what they compute.

Pure functions of stacks of matrices (E, m, n), of any mixture of experts; `report` collects them for a layer.
Low spectral overlap does not mean that experts do different things: read it beside the functional measures.

Source: spec sd_moe 5, [secondary] for overlap, gate alignment and the 1 % rule; the functional measures are our choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recollect.continual.spectral.projections import Basis, common_part, working
from recollect.errors import ConfigError

EXACT_OVER = 512
"""Matrices whose smaller side exceeds this are decomposed by randomised iteration."""


def singular_directions(stack: Tensor, k: int) -> Basis:
    """The k leading left (E, m, k) and right (E, n, k) singular vectors of each matrix of (E, m, n)."""
    exact = working(stack.detach())
    smaller = min(exact.shape[1:])
    if not 1 <= k <= smaller:
        raise ConfigError(f"k must be between 1 and {smaller} for matrices {tuple(exact.shape[1:])}, got {k!r}")
    if smaller <= EXACT_OVER:
        left, _, right = torch.linalg.svd(exact, full_matrices=False)
        return Basis(left[..., :k], right[..., :k, :].transpose(1, 2))
    with torch.random.fork_rng(devices=[exact.device] if exact.device.type == "cuda" else []):
        torch.manual_seed(0)  # the sketch below draws from the global generator
        left, _, right = torch.svd_lowrank(exact, q=min(k + 8, smaller), niter=4)
    return Basis(left[..., :k], right[..., :k])


def pairwise_overlap(directions: Tensor) -> Tensor:
    """ov_ij = |U_i^T U_j|_F^2 / k in [0, 1] of orthonormal directions (E, d, k): (E, E).

    Equal spaces give 1, random ones k / d on average.
    """
    products = torch.einsum("edk,fdl->efkl", directions, directions)
    return products.square().sum((2, 3)) / directions.shape[2]


def mean_over_pairs(matrix: Tensor) -> float:
    """Mean of the entries (i, j), i < j, of (E, E); nan for one expert."""
    above = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return float(matrix[above[0], above[1]].mean())


def overlap_ranks(out_features: int, in_features: int) -> tuple[int, ...]:
    """The k reported: 1, 4, 8 and 1 % of the smaller side (rounded up), as far as they fit."""
    smaller = min(out_features, in_features)
    return tuple(sorted({k for k in (1, 4, 8, math.ceil(0.01 * smaller)) if k <= smaller}))


def gate_alignment(router: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each router row lies in the leading input directions of each expert.

    Args:
        router: (E, n).
        right: (E, n, k) orthonormal.

    Returns:
        score (E, E), score[i, j] = sum over the k directions v of expert j of cos^2(row i, v), in [0, 1], k / n for
        unrelated ones; and specificity (E,) = score[i, i] / mean over j != i of score[i, j].
    """
    rows = torch.nn.functional.normalize(working(router), dim=1)
    score = torch.einsum("in,jnk->ijk", rows, right.to(rows.dtype)).square().sum(2)
    n_experts = len(score)
    others = (score.sum(1) - score.diagonal()) / max(n_experts - 1, 1)
    return score, score.diagonal() / others.clamp_min(torch.finfo(score.dtype).tiny)


def input_alignment(router: Tensor, inputs: Tensor, k: int) -> Tensor:
    """(E,) share of each router row (E, n) in the k leading singular directions of the inputs (N, n)."""
    rows = torch.nn.functional.normalize(working(router), dim=1)
    _, _, right = torch.linalg.svd(working(inputs.detach()), full_matrices=False)
    return (rows @ right[:k].T.to(rows.dtype)).square().sum(1)


def common_energy_share(stack: Tensor, basis: Basis) -> Tensor:
    """(E,) squared norm of the common part over that of the whole, for weights or gradients (E, m, n)."""
    exact = working(stack.detach())
    energy = exact.square().sum((1, 2)).clamp_min(torch.finfo(exact.dtype).tiny)
    return common_part(exact, basis).square().sum((1, 2)) / energy


def effective_rank(stack: Tensor) -> Tensor:
    """(E,) exp of the entropy (nats) of the normalised squared singular values of each matrix."""
    energy = torch.linalg.svdvals(working(stack.detach())).square()
    shares = energy / energy.sum(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def linear_cka(outputs: Tensor) -> Tensor:
    """Linear centred kernel alignment of every pair of experts: (E, E) in [0, 1].

    Args:
        outputs: (E, N, m) of each expert on the same tokens.
    """
    centred = working(outputs) - working(outputs).mean(1, keepdim=True)
    if outputs.shape[1] <= outputs.shape[2]:
        kernels = centred @ centred.transpose(1, 2)  # (E, N, N)
        similarity = torch.einsum("enl,fnl->ef", kernels, kernels)
    else:
        similarity = torch.stack([(one.T @ centred).square().sum((1, 2)) for one in centred])
    norms = similarity.diagonal().sqrt()
    return similarity / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(similarity.dtype).tiny)


def routing_information(selected: Tensor, labels: Tensor, n_experts: int) -> float:
    """Mutual information (nats) between a token's domain and the expert of a random one of its slots.

    Args:
        selected: (N, K) experts of each token.
        labels: (N,) int64 domain of each token.

    The plug-in estimate; it is biased upwards by about (E - 1)(D - 1) / (2 N K) nats.
    """
    n_labels = int(labels.max()) + 1
    pairs = labels[:, None].expand_as(selected) * n_experts + selected
    joint = torch.bincount(pairs.flatten(), minlength=n_labels * n_experts).double().view(n_labels, n_experts)
    joint = joint / joint.sum()
    entropies = [torch.special.entr(part).sum() for part in (joint.sum(0), joint.sum(1), joint)]
    return max(0.0, float(entropies[0] + entropies[1] - entropies[2]))
