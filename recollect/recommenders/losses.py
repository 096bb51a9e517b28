"""Losses over a catalogue, with exact gradients and bounded memory.

The scores of (M, D) hidden states over (N, D) item vectors are never held whole: positions are taken in chunks, and
because every loss here is a weighted mean over positions, a chunk's gradient is known as soon as its scores are.  So
forward computes both, each score once, and backward only scales.  No second derivative.

| loss | inputs | target |
|---|---|---|
| cross_entropy | all N items | softmax over the catalogue |
| sampled_loss "bce" | k negatives | sigmoid of positive up, of negatives down |
| sampled_loss "gbce" | k negatives | BCE with the positive's sigmoid to the power beta |
| sampled_loss "bpr" | k negatives | positive above each negative |
| sampled_loss "softmax" | k negatives | softmax over positive and negatives |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from recollect.errors import ConfigError, InputError, UnknownName

CHUNK_SCORES = 2**20  # scores held at a time (4 MB): larger chunks leave the cache, smaller ones idle the matmul
CHUNK_SCORES_GPU = 2**26
SMALLEST_PROBABILITY = 1e-30  # below it the logarithm of a float32 softmax is taken from the scores instead
DENSE_RATIO = 64  # catalogues up to this many times the negatives are scored whole: a matmul beats gathering rows

SampledLoss = Literal["bce", "gbce", "bpr", "softmax"]
SAMPLED_LOSSES: tuple[SampledLoss, ...] = ("bce", "gbce", "bpr", "softmax")
LogitLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(hidden: Tensor, item_vectors: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Full-softmax cross-entropy of scores hidden @ item_vectors.T, in nats, as a weighted mean.

    Args:
        hidden: (M, D).
        item_vectors: (N, D).
        targets: (M,) int64 in 0..N-1.
        weights: (M,) not differentiated; default 1.  The mean divides by their sum.

    Returns:
        () in float32 or the inputs' wider type; gradients reach `hidden` and `item_vectors`.

    Raises:
        InputError: shapes disagree, there is no position, or a target is out of range.
    """
    _check(hidden, item_vectors, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        return _CrossEntropy.apply(_wide(hidden), _wide(item_vectors), targets, weights)


def sampled_loss(
    kind: SampledLoss,
    hidden: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    calibration: float = 0.75,
    offset: Tensor | None = None,
) -> Tensor:
    """Mean over positions of a loss that compares the target with k negatives.

    With s+ the target's score, s- the negatives' and sigma the logistic function:
    bce = -(log sigma(s+) + sum log(1 - sigma(s-))) / (k + 1); gbce replaces log sigma(s+) by beta log sigma(s+) with
    beta from `gbce_beta`; bpr = -mean log sigma(s+ - s-); softmax = -log(exp s+ / (exp s+ + sum exp s-)).

    Args:
        kind: which loss.
        hidden: (M, D).
        item_vectors: (N, D).
        targets: (M,) int64.
        negatives: (M, k) int64.
        calibration: gBCE's t in [0, 1]; 0 is BCE.
        offset: (1,) added to every score, which no ranking sees; see `starting_offset`.

    Source: llmd4rec 3.1 (gSASRec, paper) for bce and gbce.
    """
    _check(hidden, item_vectors, targets)
    if negatives.ndim != 2 or len(negatives) != len(targets) or negatives.shape[1] < 1:
        raise InputError(f"negatives must be ({len(targets)}, k) with k >= 1, got {tuple(negatives.shape)}")
    logit_loss = _logit_loss(kind, negatives.shape[1], len(item_vectors), calibration)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Sampled.apply(_wide(hidden), _wide(item_vectors), targets, negatives, logit_loss, offset)


def gbce_beta(n_negatives: int, n_items: int, calibration: float) -> float:
    """beta = alpha (t (1 - 1/alpha) + 1/alpha) with alpha = k/(n-1): 1 at t = 0, alpha at t = 1.

    Source: llmd4rec 3.1 (gSASRec, paper).
    """
    if not 0 <= calibration <= 1:
        raise ConfigError(f"gBCE's calibration must be in [0, 1], got {calibration!r}")
    alpha = n_negatives / (n_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def starting_offset(config: Any, n_items: int) -> float | None:
    """Where the learned offset of scores starts under `config.loss`; None for losses that a shift does not change.

    Binary losses with k negatives want scores of -log(k/beta) on average. Where item vectors are read as well as scored
    with, and nothing else can give that shift, they take it up as one common direction and the model forgets which
    item is which: it stays at popularity for dozens of epochs (ML-100K, k = 256: validation NDCG@10 .033 in place of
    .109 after 24). Ours; the published gSASRec has no offset.
    """
    if config.loss not in ("bce", "gbce"):
        return None
    beta = gbce_beta(config.negatives, n_items, config.calibration) if config.loss == "gbce" else 1.0
    return -math.log(config.negatives / beta)


def draw_negatives(targets: Tensor, n_negatives: int, n_items: int) -> Tensor:
    """(M, k) items drawn uniformly, with replacement, from all but each position's own target.

    Uses torch's current generator, which the training loop seeds per step.
    """
    if n_items < 2:
        raise InputError(f"negatives need a catalogue of at least 2 items, got {n_items}")
    drawn = torch.randint(n_items - 1, (len(targets), n_negatives), device=targets.device)
    return drawn + (drawn >= targets[:, None])


def next_item_loss(
    config: Any, hidden: Tensor, item_vectors: Tensor, targets: Tensor | None, offset: Tensor | None = None
) -> Tensor:
    """The loss `config.loss` names ("ce", or "bce" and "gbce" with `negatives` and `calibration`) at all positions."""
    if targets is None:
        raise InputError("these batches have no targets; build them with targets to train on the next item")
    if config.loss == "ce":
        return cross_entropy(hidden, item_vectors, targets)
    negatives = draw_negatives(targets, config.negatives, len(item_vectors))
    return sampled_loss(
        config.loss, hidden, item_vectors, targets, negatives, calibration=config.calibration, offset=offset
    )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _check(hidden: Tensor, item_vectors: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or item_vectors.ndim != 2 or hidden.shape[1] != item_vectors.shape[1]:
        raise InputError(f"hidden (M, D) and item vectors (N, D) do not fit: {hidden.shape}, {item_vectors.shape}")
    if targets.shape != hidden.shape[:1]:
        raise InputError(f"targets must be ({len(hidden)},), got {tuple(targets.shape)}")
    if len(targets) == 0:
        raise InputError("a loss needs at least one position")


def _rows_per_chunk(device: torch.device, scores_per_row: int) -> int:
    budget = CHUNK_SCORES if device.type == "cpu" else CHUNK_SCORES_GPU
    return max(16, budget // scores_per_row)


class _CrossEntropy(torch.autograd.Function):
    """Per chunk: scores, softmax in place, and P E for the hidden states' and P' H for the items' gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, item_vectors: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        count, n_items = len(hidden), len(item_vectors)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        share = hidden.new_ones(count) if weights is None else weights.to(hidden.dtype)
        share = share / share.sum()
        weighted = hidden * share[:, None] if needs else hidden
        grad_hidden = torch.empty_like(hidden) if needs else hidden.new_empty(0)
        grad_items = torch.zeros_like(item_vectors) if needs else hidden.new_empty(0)
        of_target = hidden.new_empty(count)  # probability of the target
        rows = min(_rows_per_chunk(hidden.device, n_items), count)
        buffer = hidden.new_empty((rows, n_items))
        for low in range(0, count, rows):
            chunk = slice(low, low + rows)
            scores = torch.mm(hidden[chunk], item_vectors.T, out=buffer[: len(hidden[chunk])])
            probability = torch.softmax(scores, 1, out=scores)
            of_target[chunk] = probability.gather(1, targets[chunk, None]).squeeze(1)
            if needs:
                torch.mm(probability, item_vectors, out=grad_hidden[chunk])
                grad_items.addmm_(probability.T, weighted[chunk])
        if needs:
            grad_hidden.sub_(item_vectors[targets]).mul_(share[:, None])
            grad_items.index_add_(0, targets, weighted, alpha=-1)
        ctx.save_for_backward(grad_hidden, grad_items)
        log_loss = -of_target.log()
        unlikely = (of_target < SMALLEST_PROBABILITY).nonzero().squeeze(1)
        for part in unlikely.split(rows):  # near or below the smallest float: take these from the scores
            scores = hidden[part] @ item_vectors.T
            log_loss[part] = scores.logsumexp(1) - scores.gather(1, targets[part, None]).squeeze(1)
        return (log_loss * share).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        grad_hidden, grad_items = ctx.saved_tensors
        return grad_hidden * gradient, grad_items * gradient, None, None


class _Sampled(torch.autograd.Function):
    """Scores of target and negatives per chunk, by gathering their vectors or, for small catalogues, all scores."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_vectors: Tensor,
        targets: Tensor,
        negatives: Tensor,
        logit_loss: LogitLoss,
        offset: Tensor | None,
    ) -> Tensor:
        count, n_items, dimension = len(hidden), *item_vectors.shape
        columns = torch.cat([targets[:, None], negatives], 1)  # (M, k + 1)
        dense = n_items <= DENSE_RATIO * negatives.shape[1]
        rows = _rows_per_chunk(hidden.device, n_items if dense else columns.shape[1] * dimension)
        grad_hidden, grad_items = torch.empty_like(hidden), torch.zeros_like(item_vectors)
        loss, grad_offset = hidden.new_zeros(()), hidden.new_zeros(1)
        for low in range(0, count, rows):
            own, column = hidden[low : low + rows], columns[low : low + rows]
            if dense:
                scores = (own @ item_vectors.T).gather(1, column)
            else:
                vectors = item_vectors[column]  # (C, k + 1, D)
                scores = torch.bmm(vectors, own[:, :, None]).squeeze(2)
            if offset is not None:
                scores = scores + offset
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                part = logit_loss(leaf[:, :1], leaf[:, 1:]).sum() / count
            (grad_scores,) = torch.autograd.grad(part, leaf)
            loss += part.detach()
            grad_offset += grad_scores.sum()
            if dense:
                spread = own.new_zeros((len(own), n_items)).scatter_add_(1, column, grad_scores)
                torch.mm(spread, item_vectors, out=grad_hidden[low : low + rows])
                grad_items.addmm_(spread.T, own)
            else:
                grad_hidden[low : low + rows] = torch.bmm(grad_scores[:, None], vectors).squeeze(1)
                outer = grad_scores[:, :, None] * own[:, None]  # (C, k + 1, D)
                grad_items.index_add_(0, column.reshape(-1), outer.view(-1, dimension))
        ctx.save_for_backward(grad_hidden, grad_items, grad_offset)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        grad_hidden, grad_items, grad_offset = ctx.saved_tensors
        of_offset = grad_offset * gradient if ctx.needs_input_grad[5] else None
        return grad_hidden * gradient, grad_items * gradient, None, None, None, of_offset


def _logit_loss(kind: str, n_negatives: int, n_items: int, calibration: float) -> LogitLoss:
    """(positive (C, 1), negatives (C, k)) -> loss of each position (C,)."""
    if kind in ("bce", "gbce"):
        power = gbce_beta(n_negatives, n_items, calibration) if kind == "gbce" else 1.0

        def binary(positive: Tensor, negative: Tensor) -> Tensor:
            agreement = power * functional.logsigmoid(positive).squeeze(1) + functional.logsigmoid(-negative).sum(1)
            return -agreement / (n_negatives + 1)

        return binary
    if kind == "bpr":
        return lambda positive, negative: -functional.logsigmoid(positive - negative).mean(1)
    if kind == "softmax":
        return lambda positive, negative: torch.cat([positive, negative], 1).logsumexp(1) - positive.squeeze(1)
    raise UnknownName("sampled loss", kind, SAMPLED_LOSSES)
