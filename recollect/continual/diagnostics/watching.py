"""One pass over old examples without training: what every token costs, which experts it chose, what the routers saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.attach import attached, routers
from recollect.continual.adapters.routing import Router, Routing
from recollect.continual.diagnostics.factors import OldExamples
from recollect.continual.joined_rows import mixed_products
from recollect.continual.learner import token_batch
from recollect.continual.methods.objective import model_inputs, on_device_of

TOKENS_PER_PASS = 2_048
"""Tokens, padding included, of one pass: their logits over a vocabulary of 50 000 take 400 MB."""


@dataclass(frozen=True)
class Choices:
    """The experts that n tokens chose at one router.

    winners: (n, H, k) int64, rising along k; under a dense gate (k = 1) the expert with the largest weight.
    n_experts: E.  is_dense: every expert takes part.
    """

    winners: np.ndarray
    n_experts: int
    is_dense: bool = False

    @classmethod
    def of(cls, routing: Routing) -> Choices:
        """The choices of the real tokens of a pass."""
        if routing.is_dense:
            winners = routing.probabilities.argmax(-1, keepdim=True)
        else:
            winners = routing.indices.sort(-1).values
        real = winners if routing.mask is None else winners[routing.mask]
        return cls(real.cpu().numpy(), routing.n_experts, routing.is_dense)

    def routes(self) -> np.ndarray:
        """(n,) int64: tokens with the same experts in every slice have the same number, 0, 1, …"""
        flat = self.winners.reshape(len(self.winners), -1)
        powers = np.array([self.n_experts**at for at in range(flat.shape[1])], dtype=object)
        if self.n_experts ** flat.shape[1] < 2**62:
            return np.unique(flat @ powers.astype(np.int64), return_inverse=True)[1].reshape(-1)
        return np.unique(flat, axis=0, return_inverse=True)[1].reshape(-1)

    def banks(self) -> np.ndarray:
        """(n, H·k) int64: j·E + e of every expert a token uses."""
        offsets = self.n_experts * np.arange(self.winners.shape[1])
        return (self.winners + offsets[:, None]).reshape(len(self.winners), -1)


@dataclass
class Watched:
    """What a pass over n tokens showed.

    losses: (n,) float64, nats of the next token given the row so far; NaN at a row's last token.
    choices: by router.  inputs: (m, d) float32 by router, of the tokens asked for.
    """

    losses: np.ndarray
    choices: dict[str, Choices]
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


def why_no_routes(model: nn.Module) -> str | None:
    """Why a model's tokens have no routes that could be looked at; None where they have."""
    if attached(model) is None:
        return "it trains the weights themselves: no experts, no routes"
    found = routers(model)
    if not found:
        return "it has no router: all tokens take the same way"
    if any(router.forced is not None for router in found.values()):
        return "its gate reads the task's number, so all tokens of a task take the same way"
    return None


def watch(
    model: Any,
    old: OldExamples,
    pad_id: int,
    *,
    inputs_of: Sequence[str] = (),
    input_tokens: np.ndarray | None = None,
    after_rows: Callable[[int], None] | None = None,
) -> Watched:
    """Pass over the examples in evaluation mode; the model is left as it was.

    Args:
        model: a decoder of transformers with adapters that have routers.
        inputs_of: routers whose inputs are kept, for the tokens with the numbers `input_tokens` (rising).
        after_rows: called with the number of examples of each pass.
    """
    named = routers(model)
    losses: list[np.ndarray] = []
    winners: dict[str, list[Choices]] = {name: [] for name in named}
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in inputs_of}
    wanted = np.zeros(len(old.token_row), dtype=bool)
    if input_tokens is not None:
        wanted[input_tokens] = True
    seen = 0
    with _evaluating(model), torch.no_grad(), _kept_inputs({name: named[name] for name in inputs_of}) as kept:
        for chosen in passes([len(row) for row in old.rows]):
            batch = on_device_of(model, token_batch(old.rows, chosen, pad_id))
            with mixed_products(model):
                logits = model(**model_inputs(batch), use_cache=False).logits
            real = batch["attention_mask"].bool()
            losses.append(next_token_losses(logits, batch)[real].double().cpu().numpy())
            here = wanted[seen : seen + len(losses[-1])]
            seen += len(losses[-1])
            for name, router in named.items():
                assert router.last_routing is not None
                winners[name].append(Choices.of(router.last_routing))
            for name in inputs_of:
                flat = kept[name].reshape(-1, kept[name].shape[-1])[real.reshape(-1)]
                inputs[name].append(flat.float().cpu().numpy()[here])
            if after_rows is not None:
                after_rows(len(chosen))
    return Watched(
        np.concatenate(losses),
        {name: _joined(parts) for name, parts in winners.items()},
        {name: np.concatenate(parts) for name, parts in inputs.items()},
    )


def next_token_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) float32 nats of each next token; NaN in padding and at a row's last token."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    found = torch.full(ids.shape, torch.nan, device=ids.device)
    both = real[:, :-1] & real[:, 1:]
    found[:, :-1][both] = functional.cross_entropy(logits[:, :-1][both].float(), ids[:, 1:][both], reduction="none")
    return found


def passes(lengths: Sequence[int], most: int = TOKENS_PER_PASS) -> Iterator[list[int]]:
    """Consecutive row numbers whose padded batch has at most `most` tokens; a longer row comes alone."""
    group: list[int] = []
    longest = 0
    for row, length in enumerate(lengths):
        if group and max(longest, length) * (len(group) + 1) > most:
            yield group
            group, longest = [], 0
        group.append(row)
        longest = max(longest, length)
    if group:
        yield group


def _joined(parts: Sequence[Choices]) -> Choices:
    return Choices(np.concatenate([part.winners for part in parts]), parts[0].n_experts, parts[0].is_dense)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _kept_inputs(named: dict[str, Router]) -> Iterator[dict[str, Tensor]]:
    """{router: its input in the last pass}."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple], None]:
        def keep(module: nn.Module, args: tuple) -> None:
            kept[name] = args[0]

        return keep

    handles = [router.register_forward_pre_hook(keeper(name)) for name, router in named.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
