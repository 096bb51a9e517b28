"""A small decoder-only transformer that writes the codes of the next item after the codes of a history.

A history of n items is the sequence

    BOS, c_1(i_1) … c_L(i_1), c_1(i_2) … c_L(i_n),

one token per code, every level with its own range of one embedding table. The state at a token predicts the next code;
only codes of that code's level are possible, so the softmax runs over one level (a head per level, tied to its rows of
the table). The probability of an item is the product over its L codes. Training sees every item of a window as a
target (teacher forcing); a padded item is on the right, where a causal state cannot look.

`CodeDecoder` continues many beams of one request: the keys and values of the history are computed once per request and
shared by its beams, those of the codes written since belong to a beam.

Source: the sequence and the loss are those of decoder-only semantic-ID models (generative_recommendation 2.1-2.2, a
head per level as in GRID [paper]); size, learned item positions and tied heads are ours.
Not covered: text, user tokens, several targets at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.errors import ConfigError, InputError
from recollect.tokenize.vocabulary import SemanticVocabulary


@dataclass(frozen=True)
class GeneratorShape:
    """Width D, blocks, heads, inner width of the feed-forward network, dropout, items of a history that are read."""

    width: int = 64
    blocks: int = 2
    heads: int = 2
    inner: int = 256
    dropout: float = 0.2
    history: int = 20

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "inner", "history"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ConfigError(f"width must be a multiple of heads ({self.heads}), got {self.width!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}")


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and beside a residual path."""

    def __init__(self, shape: GeneratorShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.projection = nn.Linear(shape.width, 3 * shape.width)
        self.output = nn.Linear(shape.width, shape.width)
        self.network = nn.Sequential(
            nn.LayerNorm(shape.width),
            nn.Linear(shape.width, shape.inner),
            nn.ReLU(),
            nn.Linear(shape.inner, shape.width),
        )
        self.dropout = nn.Dropout(shape.dropout)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (…, H, C) of states (…, D)."""
        mixed = self.projection(self.attention_norm(x))
        query, key, value = mixed.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return query, key, value

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, T, D) -> states, keys and values, the last two (B, H, T, C)."""
        query, key, value = (part.transpose(1, 2) for part in self.heads_of(x))
        # Written out: torch's fused kernel takes three times as long on a CPU for sequences and heads this small.
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)  # (B, H, T, T)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return self.after(x, mixed.transpose(1, 2).flatten(2)), key, value

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the attention, whose result `mixed` has the shape of the states `x`."""
        x = x + self.dropout(self.output(mixed))
        return x + self.dropout(self.network(x))


class CodeTransformer(nn.Module):
    """The transformer of this module's text.

    Args:
        codes: (N, L) int, an ID per item without ends (-1).
        codebook_sizes: K_0..K_{L-1}.
        shape: its size.

    Raises:
        InputError: codes outside their codebooks.
    """

    tokens: Tensor

    def __init__(self, codes: np.ndarray, codebook_sizes: Sequence[int], shape: GeneratorShape) -> None:
        super().__init__()
        sizes = np.asarray(codebook_sizes, dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] != len(sizes) or (codes < 0).any() or (codes >= sizes).any():
            raise InputError(
                f"a generator needs codes (N, {len(sizes)}) in 0..K-1 with K = {sizes.tolist()}, got shape "
                f"{codes.shape}; absent last digits cannot be written"
            )
        self.shape = shape
        self.codebook_sizes = tuple(int(size) for size in sizes)
        self.first = tuple(int(start) for start in np.r_[0, np.cumsum(sizes)[:-1]])
        self.begin = int(sizes.sum())
        self.register_buffer("tokens", torch.from_numpy(codes.astype(np.int64) + self.first), persistent=False)
        self.embedding = nn.Embedding(self.begin + 1, shape.width)
        self.places = nn.Embedding(shape.history + 2, shape.width)  # of the item a token belongs to; 0 = BOS
        self.bias = nn.Parameter(torch.zeros(self.begin))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        nn.init.normal_(self.embedding.weight, std=shape.width**-0.5)
        nn.init.normal_(self.places.weight, std=0.02)

    @property
    def n_levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    def states(self, items: Tensor, *, drop_last: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """States behind BOS and the codes of items, and the keys and values of every block.

        Args:
            items: (B, n) int64; -1 = padding, on the right.
            drop_last: leave out the very last code, behind which nothing is predicted while training.

        Returns:
            (B, 1 + n L, D) before the last norm, one position less with `drop_last`; per block (B, H, T, C) twice.
        """
        count = items.shape[1]
        tokens = self.tokens[items.clamp(min=0)].flatten(1)  # (B, n L)
        place = torch.arange(1, count + 1, device=items.device).repeat_interleave(self.n_levels)
        tokens = functional.pad(tokens, (1, 0), value=self.begin)
        place = functional.pad(place, (1, 0))
        if drop_last:
            tokens, place = tokens[:, :-1], place[:-1]
        x = self.dropout(self.embedding(tokens) + self.places(place))
        pairs = []
        for block in self.blocks:
            x, key, value = block(x)
            pairs.append((key, value))
        return x, pairs

    def logits(self, states: Tensor, level: int) -> Tensor:
        """(…, K_level) of the code of `level` that follows states (…, D)."""
        rows = slice(self.first[level], self.first[level] + self.codebook_sizes[level])
        return functional.linear(self.norm(states), self.embedding.weight[rows], self.bias[rows])

    def level_losses(self, items: Tensor) -> Tensor:
        """(M, L) nats: cross-entropy of each code of each of the M items of windows (B, n), padding left out."""
        states, _ = self.states(items, drop_last=True)
        there = items >= 0
        states = states.unflatten(1, (items.shape[1], self.n_levels))[there]  # (M, L, D)
        targets = self.tokens[items[there]]  # (M, L)
        losses = [
            functional.cross_entropy(
                self.logits(states[:, level], level).float(), targets[:, level] - first, reduction="none"
            )
            for level, first in enumerate(self.first)
        ]
        return torch.stack(losses, dim=1)

    def training_loss(self, items: Tensor) -> Tensor:
        """() mean cross-entropy per code of windows (B, n)."""
        return self.level_losses(items).mean()

    @property
    def vocabulary(self) -> SemanticVocabulary:
        """Levels share the ids 0..K-1, as a step's logits are of one level; the end token is never written."""
        return SemanticVocabulary(tuple(np.arange(size) for size in self.codebook_sizes), max(self.codebook_sizes))


class CodeDecoder:
    """Beams behind histories of one length, for `recollect.tokenize.constrained.beam_search`.

    Args:
        model: in eval mode.
        histories: (B, n) int64 items, oldest first, none missing, n at most the model's history.
    """

    def __init__(self, model: CodeTransformer, histories: Tensor) -> None:
        self._model = model
        self._histories = histories
        self._item = histories.shape[1] + 1
        self._written: list[tuple[Tensor, Tensor]] = []
        self._level = 0
        with torch.inference_mode():
            self._states, self._prefix = model.states(histories, drop_last=False)

    def start(self) -> Tensor:
        """(B, V) logits of the first code; V is one more than the largest codebook."""
        self._level, self._written = 0, []
        with torch.inference_mode():
            return self._padded(self._states[:, -1])

    def advance(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """(R, V) logits of the next code, R = B times beams in the order of the requests; see `Decoder`."""
        model, first = self._model, self._model.first[self._level]
        n_requests, width = len(self._histories), len(parents) // len(self._histories)
        with torch.inference_mode():
            codes = tokens.clamp(max=model.codebook_sizes[self._level] - 1)  # beams off the tree carry any token
            place = model.places.weight[self._item]
            x = model.embedding(codes + first) + place  # (R, D)
            written = []
            for number, block in enumerate(model.blocks):
                query, key, value = block.heads_of(x)  # type: ignore[operator]  # a Block
                if self._level:
                    held_key, held_value = self._written[number]
                    key = torch.cat([held_key[parents], key[:, None]], dim=1)  # (R, s, H, C)
                    value = torch.cat([held_value[parents], value[:, None]], dim=1)
                else:
                    key, value = key[:, None], value[:, None]
                written.append((key, value))
                mixed = _attend(query, self._prefix[number], key, value, n_requests, width)
                x = block.after(x, mixed)  # type: ignore[operator]
            self._written = written
            self._level += 1
            return self._padded(x)

    def _padded(self, states: Tensor) -> Tensor:
        logits = self._model.logits(states, self._level)
        missing = max(self._model.codebook_sizes) + 1 - logits.shape[1]
        return functional.pad(logits, (0, missing), value=-torch.inf)


def _attend(
    query: Tensor, prefix: tuple[Tensor, Tensor], key: Tensor, value: Tensor, n_requests: int, width: int
) -> Tensor:
    """(R, D): attention of one new position per beam over the request's history and the beam's own codes.

    Args:
        query: (R, H, C).  prefix: keys and values (B, H, T, C) of the requests.  key, value: (R, s, H, C) of the beams.
    """
    rows, heads, size = query.shape
    query = query / math.sqrt(size)
    by_request = query.view(n_requests, width, heads, size).transpose(1, 2)  # (B, H, b, C)
    of_prefix = by_request @ prefix[0].transpose(-2, -1)  # (B, H, b, T)
    of_written = torch.einsum("rhc,rshc->rhs", query, key)  # (R, H, s)
    scores = torch.cat([of_prefix.transpose(1, 2).reshape(rows, heads, -1), of_written], dim=-1)
    weights = scores.softmax(-1)
    length = of_prefix.shape[-1]
    on_prefix = weights[..., :length].view(n_requests, width, heads, length).transpose(1, 2) @ prefix[1]
    on_written = torch.einsum("rhs,rshc->rhc", weights[..., length:], value)
    return (on_prefix.transpose(1, 2).reshape(rows, heads, size) + on_written).flatten(1)
