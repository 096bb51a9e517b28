"""Log-likelihoods of short continuations under a causal language model in memory.

Used while a model is being tuned, where it is no backbone yet: adapters and routers are live in the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recollect.continual.examples import NO_LOSS, Example, TaskTokenizer, pad_left
from recollect.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def choice_scorer(model: nn.Module, tokens: TaskTokenizer) -> Callable[[str, tuple[str, ...]], list[float]]:
    """A function (prompt, continuations) -> summed log-likelihoods in nats, one batch a call, in evaluation mode."""

    def score(prompt: str, options: tuple[str, ...]) -> list[float]:
        return continuation_log_likelihoods(model, tokens, prompt, options)

    return score


def continuation_log_likelihoods(
    model: nn.Module, tokens: TaskTokenizer, prompt: str, options: Sequence[str]
) -> list[float]:
    """Summed log-probability (nats, float32) of each option's tokens after the prompt's.

    The module's mode is put back as it was.

    Raises:
        InputError: an option without tokens.
    """
    import torch

    from recollect.continual.adapters.weighed import reading_prompts
    from recollect.continual.joined_rows import mixed_products

    prompt_ids = tokens.encode_prompt(prompt)
    rows = []
    for option in options:
        ids = tokens.encode_answer(option)
        if not ids:
            raise InputError(f"option {option!r} has no tokens")
        whole = np.array([*prompt_ids, *ids], dtype=np.int64)
        learnt = whole.copy()
        learnt[: len(prompt_ids)] = NO_LOSS
        rows.append(Example(whole, learnt, len(prompt_ids)))
    batch = pad_left(rows, tokens.pad_id, multiple=1)
    device = next(model.parameters()).device
    mask, labels = (torch.from_numpy(part).to(device) for part in (batch.attention_mask, batch.labels))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed_products(model), reading_prompts(model, mask * (labels == NO_LOSS)):
            logits = model(
                input_ids=torch.from_numpy(batch.input_ids).to(device),
                attention_mask=mask,
                position_ids=torch.from_numpy(batch.position_ids).to(device),
            ).logits
    finally:
        model.train(was_training)
    targets = labels[:, 1:]
    log_probs = logits[:, :-1].float().log_softmax(-1)
    picked = log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return picked.where(targets != NO_LOSS, 0.0).sum(-1).tolist()
