"""Greedy answers of many prompts at once on a CPU: prompts read without padding, finished answers leave the batch.

The cache is laid out once and written in place, a row per question, its tokens from the left; when an answer ends, the
last row takes its place.  One pass makes one token of every answer that is not finished, and only these tokens go
through the vocabulary's matrix.  The answers are those of `generate` with padded rows, but for rounding.
Source: trace_benchmark 4; our design.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recollect.continual.joined_rows import is_rounded, joined_lengths, mixed_products

READ_TOKENS = 4096
"""Prompt tokens read in one pass, at least one prompt."""
SPARE = 64
"""Cache columns laid out beyond what is needed now."""
CANDIDATES = 8
"""Tokens among which fp32 logits decide; bf16 ones of a clear winner are never that many places off."""


class RowCache:
    """Keys and values of rows of unequal length, as `past_key_values` of a transformers decoder.

    A pass of joined prompts fills the rows `reading`; a pass of one token a row adds to the first `active` rows.

    Attributes:
        lengths: (R,) int64, tokens held of each row.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.active = rows
        self.width = width
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._reading: range | None = None
        self._split: list[int] = []

    def read(self, rows: range, lengths: Sequence[int]) -> None:
        """The next pass is of the joined prompts of these rows."""
        self._reading, self._split = rows, list(lengths)
        self.lengths[rows.start : rows.stop] = torch.tensor(self._split)

    def extend(self) -> None:
        """The next pass is of one token for each active row."""
        self._reading = None
        needed = int(self.lengths[: self.active].max()) + 1
        if needed > self.width:
            self.width = needed + needed // 4 + SPARE
            for held in (self._keys, self._values):
                for layer, tensor in held.items():
                    grown = tensor.new_zeros(*tensor.shape[:2], self.width, tensor.shape[3])
                    grown[: self.active, :, : tensor.shape[2]] = tensor[: self.active]
                    held[layer] = grown

    def step_mask(self, dtype: torch.dtype) -> Tensor:
        """(A, 1, 1, S): 0 where an active row holds a token, that of the coming pass included, else −inf."""
        lengths = self.lengths[: self.active, None]
        columns = torch.arange(int(lengths.max()) + 1)
        mask = torch.zeros(self.active, len(columns), dtype=dtype).masked_fill_(columns > lengths, float("-inf"))
        return mask[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values (B, H, T, D) of a layer; what its queries attend to."""
        if layer not in self._keys:
            shape = (len(self.lengths), keys.shape[1], self.width)
            self._keys[layer] = keys.new_zeros(*shape, keys.shape[3])
            self._values[layer] = values.new_zeros(*shape, values.shape[3])
        own_keys, own_values = self._keys[layer], self._values[layer]
        if self._reading is not None:
            for held, new in ((own_keys, keys), (own_values, values)):
                for row, part in zip(self._reading, new[0].split(self._split, dim=1), strict=True):
                    held[row, :, : part.shape[1]] = part
            return keys, values
        rows, places = torch.arange(self.active), self.lengths[: self.active]
        own_keys[rows, :, places] = keys[:, :, 0].to(own_keys.dtype)
        own_values[rows, :, places] = values[:, :, 0].to(own_values.dtype)
        width = int(places.max()) + 1
        return own_keys[: self.active, :, :width], own_values[: self.active, :, :width]

    def advance(self) -> None:
        """The tokens of the pass just made are held now."""
        self.lengths[: self.active] += 1

    def drop(self, row: int) -> None:
        """Give up an active row; the last active one takes its place."""
        last = self.active - 1
        if row != last:
            length = int(self.lengths[last])
            for held in (*self._keys.values(), *self._values.values()):
                held[row, :, :length] = held[last, :, :length]
            self.lengths[row] = length
        self.active = last


@torch.no_grad()
def greedy_answers(model: Any, prompts: Sequence[Sequence[int]], ceiling: int, end_id: int) -> list[list[int]]:
    """The most likely tokens after each prompt, up to its end token (which is included) or `ceiling` of them.

    Args:
        model: a decoder that reads joined rows (`joined_rows.prepare_for_cpu`), in evaluation mode.
        prompts: ids, none empty.
    """
    cache = RowCache(len(prompts), max(map(len, prompts)) + min(ceiling, SPARE))
    answers: list[list[int]] = [[] for _ in prompts]
    head = _Head(model)
    with mixed_products(model):
        for start, stop in _passes([len(prompt) for prompt in prompts]):
            lengths = [len(prompt) for prompt in prompts[start:stop]]
            cache.read(range(start, stop), lengths)
            ids = torch.tensor([token for prompt in prompts[start:stop] for token in prompt])[None]
            places = torch.cat([torch.arange(length) for length in lengths])[None]
            ends = torch.tensor(lengths).cumsum(0) - 1
            states = _states(model, ids, places, joined_lengths(lengths), cache)
            for row, token in enumerate(head.best(states[ends])):
                answers[start + row].append(token)
        asking = list(range(len(prompts)))  # question of each cache row
        dtype = torch.bfloat16 if is_rounded(model) else model.get_input_embeddings().weight.dtype
        while True:
            for row in reversed(range(len(asking))):
                answer = answers[asking[row]]
                if answer[-1] == end_id or len(answer) == ceiling:
                    cache.drop(row)
                    asking[row] = asking[-1]
                    asking.pop()
            if not asking:
                return answers
            ids = torch.tensor([[answers[question][-1]] for question in asking])
            cache.extend()
            places = cache.lengths[: cache.active, None].clone()
            tokens = head.best(_states(model, ids, places, cache.step_mask(dtype), cache))
            cache.advance()
            for question, token in zip(asking, tokens, strict=True):
                answers[question].append(token)


def _passes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of runs of prompts of at most `READ_TOKENS` tokens together."""
    found: list[tuple[int, int]] = []
    start, held = 0, 0
    for at, length in enumerate(lengths):
        if at > start and held + length > READ_TOKENS:
            found.append((start, at))
            start, held = at, 0
        held += length
    return [*found, (start, len(lengths))]


class _Head:
    """The most likely tokens of last hidden states.

    Where frozen weights are bf16, the head's candidates come from bf16 logits and the choice among them from fp32 ones.
    What some models do to their logits (scales, caps) keeps their order, so the matrix and its bias are enough.
    """

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        self._weight, self._bias = head.weight, head.bias
        self._rounded = head.weight.bfloat16() if is_rounded(model) else None

    def best(self, states: Tensor) -> list[int]:
        """Tokens of states (n, d)."""
        if self._rounded is None:
            return functional.linear(states, self._weight, self._bias).argmax(-1).tolist()
        coarse = functional.linear(states, self._rounded)
        if self._bias is not None:
            coarse = coarse + self._bias
        candidates = coarse.topk(CANDIDATES).indices.sort(-1).values  # (n, c), in order: the first of equals wins
        exact = (states.float()[:, None] * self._weight[candidates]).sum(-1)
        if self._bias is not None:
            exact = exact + self._bias[candidates]
        return candidates.gather(1, exact.argmax(-1, keepdim=True))[:, 0].tolist()


def _states(model: Any, ids: Tensor, places: Tensor, mask: Tensor, cache: RowCache) -> Tensor:
    """Last hidden states (n, d) of all tokens of a pass."""
    read = model.base_model(
        input_ids=ids, position_ids=places, attention_mask=mask, past_key_values=cache, use_cache=True
    )
    return read.last_hidden_state.flatten(0, 1)
