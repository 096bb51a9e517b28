"""One answer being written token by token: sampling, stop strings, schema, length.

Holds no model: the engine feeds it logits. A sampled answer depends on its own logits and seed only, never on its
neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from recollect.backbones.protocol import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from recollect.backbones.constrained import Constraint


class Answering:
    """State of one request.

    n_prompt: tokens of its prompt.  room: tokens the window leaves for the answer.  pending: tokens the model has to
    read next (the sampled one and those a schema forces after it).
    """

    def __init__(
        self,
        request: Request,
        n_prompt: int,
        room: int,
        tokenizer: PreTrainedTokenizerFast,
        end_tokens: frozenset[int],
        constraint: Constraint | None,
    ) -> None:
        self.request = request
        self.n_prompt = n_prompt
        self.limit = min(request.max_tokens, room)
        self.tokens: list[int] = []
        self.pending: list[int] = []
        self.completion: Completion | None = None
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._constraint = constraint
        self._generator = torch.Generator().manual_seed(request.seed) if request.temperature > 0 else None

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from (V,) float32 CPU logits; sets `pending`, or `completion` at the end."""
        if self._constraint is not None:
            logits = logits.masked_fill(~torch.from_numpy(self._constraint.allowed()), -torch.inf)
        token = int(logits.argmax()) if self._generator is None else self._sample(logits)
        self.tokens.append(token)
        if token in self._end_tokens:
            self._finish("stop", self.tokens[:-1])
            return
        self.pending = [token]
        if self._constraint is not None:
            forced = [forced for forced in self._constraint.accept(token) if forced not in self._end_tokens]
            self.pending += forced
            self.tokens += forced
        if len(self.tokens) >= self.limit:
            complete = len(self.tokens) == self.limit and self._constraint is not None and self._constraint.complete
            self._finish("stop" if complete else "length", self.tokens[: self.limit])
        elif self._constraint is not None and self._constraint.complete:
            self._finish("stop", self.tokens)
        elif self.request.stop:
            self._stop_at(self.tokens)

    def _sample(self, logits: torch.Tensor) -> int:
        """Inverse-transform sampling in float64: one uniform number a token."""
        probabilities = torch.softmax(logits.double() / self.request.temperature, dim=-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        if self.request.top_p >= 1.0:
            cumulative = probabilities.cumsum(0)
            position = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
            return min(position, len(cumulative) - 1)
        ordered, index = probabilities.sort(descending=True, stable=True)
        cumulative = ordered.cumsum(0)
        kept = min(
            int(torch.searchsorted(cumulative, torch.tensor(self.request.top_p, dtype=torch.float64))) + 1, len(index)
        )
        position = int(torch.searchsorted(cumulative[:kept], uniform * cumulative[kept - 1], right=True))
        return int(index[min(position, kept - 1)])

    def _stop_at(self, tokens: list[int]) -> None:
        text = self._text(tokens)
        if any(stop in text for stop in self.request.stop):
            self._finish("stop", tokens)

    def _finish(self, reason: str, tokens: list[int]) -> None:
        text = self._text(tokens)
        cuts = [at for at in (text.find(stop) for stop in self.request.stop) if at >= 0]
        if cuts:
            text, reason = text[: min(cuts)], "stop"
        n_tokens = min(len(self.tokens), self.limit)
        self.completion = Completion(text, self.n_prompt, n_tokens, "stop" if reason == "stop" else "length")
        self.pending = []

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def order_of(request: Request, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], str, float, float, int, int]:
    """Sort key that fixes the place of a request in a batch, whatever order the batch was given in."""
    return tokens, request.schema, request.temperature, request.top_p, request.max_tokens, request.seed


def stack_rows(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, L) int64 token ids, shorter rows padded with zeros on the left."""
    longest = max(len(row) for row in rows)
    block = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        block[index, longest - len(row) :] = row
    return block
