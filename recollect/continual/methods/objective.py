"""The loss every method shares: cross-entropy of the supervised tokens, computed on the positions that need it.

Rows are padded on the left and answers stand at their ends, so only the last positions go through the vocabulary's
matrix, which is much of a small model's cost.  A model prepared by `recollect.continual.joined_rows` gets the rows
without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.joined_rows import are_joined, joined_lengths, mixed_products
from recollect.errors import InputError

NO_LOSS = -100

Batch = Mapping[str, Tensor]
"""Rows padded on the left: input_ids, attention_mask, labels, position_ids (B, T) int64, labels −100 where nothing is
learned.  Optional sample_types (B,) int64: 1 = a sample of the task at hand, 0 = of the past; absent = all 1."""


def supervised_logits(
    model: Callable[..., Any], batch: Batch, *, call: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) in float32 that predict the supervised tokens, and these tokens (n,), row after row.

    Args:
        model: a causal language model of transformers, or what is called with its keywords.
        batch: see `Batch`.
        call: what is called in the model's place, e.g. the model with other weights; how rows are laid out and
            products rounded is the model's.

    Raises:
        InputError: no token of the batch is supervised.
    """
    called = call or model
    if are_joined(model):
        with mixed_products(model):
            return _joined_logits(called, batch)
    labels = batch["labels"][:, 1:]  # nothing predicts a row's first token
    wanted = labels != NO_LOSS
    if "attention_mask" in batch:
        wanted = wanted & batch["attention_mask"][:, :-1].bool()  # nor does padding predict it
    columns = wanted.any(0).nonzero()
    if len(columns) == 0:
        raise _unsupervised(batch)
    first = int(columns[0])
    kept = labels.shape[1] - first
    with mixed_products(model):
        logits = called(**model_inputs(batch), logits_to_keep=kept + 1, use_cache=False).logits[:, -kept - 1 : -1]
    wanted = wanted[:, first:]
    return logits[wanted].float(), labels[:, first:][wanted]


def _joined_logits(called: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """`supervised_logits` without padding: the rows are read as one, and supervised positions alone get logits."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    labels = batch["labels"][real].clone()
    labels[lengths.cumsum(0) - lengths] = NO_LOSS  # nothing predicts a row's first token
    places = (labels != NO_LOSS).nonzero()[:, 0]
    if len(places) == 0:
        raise _unsupervised(batch)
    logits = called(
        input_ids=batch["input_ids"][real][None],
        position_ids=batch["position_ids"][real][None],
        attention_mask=joined_lengths(lengths),
        logits_to_keep=places - 1,
        use_cache=False,
    ).logits[0]
    return logits.float(), labels[places]


def _unsupervised(batch: Batch) -> InputError:
    return InputError(
        f"no token of a batch of shape {tuple(batch['labels'].shape)} is supervised: every label is {NO_LOSS}"
    )


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy (nats) over the batch's supervised tokens.

    Raises:
        InputError: there is none.
    """
    logits, tokens = supervised_logits(model, batch)
    return functional.cross_entropy(logits, tokens)


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model is given of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def sample_types(batch: Batch) -> Tensor:
    """(B,) int64: 1 = a sample of the task at hand, 0 = of the past."""
    if "sample_types" in batch:
        return batch["sample_types"]
    return torch.ones(len(batch["input_ids"]), dtype=torch.long, device=batch["input_ids"].device)


def as_past(batch: Batch) -> dict[str, Tensor]:
    """The batch with the sample type of the past."""
    return {**batch, "sample_types": torch.zeros(len(batch["input_ids"]), dtype=torch.long)}


def sample_rows(batch: Batch) -> list[dict[str, Tensor]]:
    """The batch's samples as batches of one row."""
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(batch["input_ids"]))]


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def pass_over(model: nn.Module, batch: Batch) -> None:
    """One pass for the sake of what hooks and routers see; one position goes through the vocabulary."""
    with mixed_products(model):
        model(**model_inputs(on_device_of(model, batch)), logits_to_keep=1, use_cache=False)


def mean_gradient(model: nn.Module, batches: Sequence[Batch], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradient of the mean answer loss over all tokens of `batches`, without dropout; `.grad` is left alone."""
    was_training = model.training
    model.eval()
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    tokens = 0
    try:
        for batch in batches:
            logits, targets = supervised_logits(model, on_device_of(model, batch))
            value = functional.cross_entropy(logits, targets, reduction="sum")
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            tokens += len(targets)
    finally:
        model.train(was_training)
    for total in totals:
        total /= max(tokens, 1)
    return totals
