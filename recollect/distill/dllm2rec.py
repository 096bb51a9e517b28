"""DLLM2Rec (RecSys 2024): a conventional student learns a teacher's top list, item by item.

Each listed item has a weight from its place in the list, from the teacher's confidence and from whether the student
lists it too; the student's loss is a weighted binary cross-entropy towards the listed items. Departures from the
released script, which are ours: the negative's term is log sigmoid(-s) (there: log sigmoid(1 - s)), selection is on
validation (there: on test), and no distributionally robust term.

Not covered: generating titles; the caller gives distances of whatever the teacher says to the listed items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.distill.factors import wide
from recollect.errors import InputError

POSITION, CONFIDENCE, CONSISTENCY = 0.3, 0.5, 0.1
LIST_STRENGTH = 0.8
EMBEDDING_SHARE = 0.2


def list_weights(
    teacher_list: Tensor,
    distance: Tensor,
    student_logits: Tensor,
    *,
    position: float = POSITION,
    confidence: float = CONFIDENCE,
    consistency: float = CONSISTENCY,
) -> Tensor:
    """Weight of each listed item, summing to 1 per sample.

    position * exp(-rank) normalised over the list + confidence * exp(-distance) normalised over the list + consistency
    * [the student's own top K holds the item], then normalised.

    Args:
        teacher_list: (B, K) int64, best first.
        distance: (B, K) of the teacher's expressed taste to each item, >= 0, e.g. between text embeddings.
        student_logits: (B, N).

    Returns:
        (B, K) float32, detached.

    Raises:
        InputError: shapes disagree.

    Source: the released script's defaults (K 10; .3, .5, .1).
    """
    if distance.shape != teacher_list.shape:
        raise InputError(f"distance is {tuple(distance.shape)} where the list is {tuple(teacher_list.shape)}")
    length = teacher_list.shape[1]
    rank = torch.arange(1, length + 1, device=teacher_list.device, dtype=torch.float32)
    by_place = (-rank).softmax(0)  # (K,)
    by_confidence = (-wide(distance.detach())).softmax(1)  # (B, K)
    own = student_logits.detach().topk(length, dim=1).indices  # (B, K)
    agreed = (teacher_list[:, :, None] == own[:, None, :]).any(2).float()
    weight = position * by_place + confidence * by_confidence + consistency * agreed
    return weight / weight.sum(1, keepdim=True)


def list_loss(student_logits: Tensor, teacher_list: Tensor, weight: Tensor, negative: Tensor) -> Tensor:
    """Weighted binary cross-entropy towards the listed items, against one negative per sample.

    Args:
        student_logits: (B, N).
        teacher_list, weight: (B, K), see `list_weights`.
        negative: (B,) int64, an item that is not the next one.

    Returns:
        Scalar; add `LIST_STRENGTH` times it to the student's own loss.
    """
    logits = wide(student_logits)
    towards = functional.softplus(-logits.gather(1, teacher_list))  # (B, K)
    away = functional.softplus(logits.gather(1, negative[:, None]))  # (B, 1)
    return (weight.detach() * (towards + away)).sum(1).mean()


class TextInformedEmbedding(nn.Module):
    """Item embedding = id embedding + share * Linear(frozen text vector of the item).

    Args:
        embedding: (N, d) the student's id embedding, trained on.
        text: (N, D) the LLM's item vectors, frozen.
        share: of the text part.
    """

    def __init__(self, embedding: Tensor, text: Tensor, share: float = EMBEDDING_SHARE) -> None:
        super().__init__()
        if len(embedding) != len(text):
            raise InputError(f"{len(embedding)} items have an id embedding, {len(text)} a text vector")
        self.embedding = nn.Parameter(embedding.detach().clone())
        self.register_buffer("text", text.detach().clone())
        self.project = nn.Linear(text.shape[1], embedding.shape[1])
        self.share = share

    def forward(self) -> Tensor:
        """(N, d) all item vectors."""
        return self.embedding + self.share * self.project(self.text)
