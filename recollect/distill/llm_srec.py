"""LLM-SRec (arXiv 2502.13909): small heads on a frozen LLM learn a conventional model's view of the user.

Loss = retrieval softmax over items + squared distance to the conventional model's user vector + uniformity on both
sides, which keeps the two user spaces from collapsing into a point. Only the heads are trained.

Not covered: how the frozen LLM reads a user or an item; the heads take its vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.distill.factors import wide
from recollect.errors import InputError


class Losses(NamedTuple):
    """The three parts, scalars."""

    retrieval: Tensor
    distillation: Tensor
    uniformity: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, which is what is minimised."""
        return self.retrieval + self.distillation + self.uniformity


def uniformity(vectors: Tensor) -> Tensor:
    """Mean of exp(-2 |x_i - x_j|^2) over pairs of different rows; 1 when all coincide, near 0 when spread.

    Raises:
        InputError: fewer than two rows.
    """
    if len(vectors) < 2:
        raise InputError(f"uniformity needs at least two users in a batch, got {len(vectors)}")
    return torch.pdist(wide(vectors)).square().mul(-2.0).exp().mean()


def llm_srec_losses(user: Tensor, collaborative_user: Tensor, items: Tensor, target: Tensor) -> Losses:
    """The parts of the loss for one batch.

    | input | part |
    |---|---|
    | user (B, d) against items (N, d), target (B,) | softmax cross-entropy of the inner products |
    | user against collaborative_user (B, d) | mean squared distance |
    | both user sides | uniformity, summed |

    Args:
        user: the LLM side after its head.  collaborative_user: the conventional side after its head (the conventional
            model itself is frozen).  items: LLM item vectors after their head.  target: (B,) int64 row of `items`.

    Raises:
        InputError: the two user sides differ in shape, or hold fewer than two users.
    """
    if user.shape != collaborative_user.shape:
        raise InputError(f"user vectors are {tuple(user.shape)} and {tuple(collaborative_user.shape)}")
    user, collaborative_user = wide(user), wide(collaborative_user)
    retrieval = functional.cross_entropy(user @ wide(items).T, target)
    distillation = (user - collaborative_user).square().sum(1).mean()
    return Losses(retrieval, distillation, uniformity(user) + uniformity(collaborative_user))


class Heads(nn.Module):
    """The trained part: one two-layer perceptron each for LLM users, LLM items and conventional users.

    Args:
        llm_width: D of the LLM's vectors.
        collaborative_width: of the conventional model's user vector.
        width: of the shared space.
    """

    def __init__(self, llm_width: int, collaborative_width: int, width: int = 128) -> None:
        super().__init__()
        self.user = _perceptron(llm_width, width)
        self.items = _perceptron(llm_width, width)
        self.collaborative = _perceptron(collaborative_width, width)

    def losses(self, user: Tensor, collaborative_user: Tensor, items: Tensor, target: Tensor) -> Losses:
        """`llm_srec_losses` of vectors (B, D), (B, d_c) and (N, D) before the heads."""
        return llm_srec_losses(
            self.user(wide(user)), self.collaborative(wide(collaborative_user)), self.items(wide(items)), target
        )

    def logits(self, user: Tensor, items: Tensor) -> Tensor:
        """(B, N) scores for serving: inner products after the heads."""
        return self.user(wide(user)) @ self.items(wide(items)).T


def _perceptron(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.GELU(), nn.Linear(width_out, width_out)
    )
