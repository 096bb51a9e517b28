"""Passes through a causal language model with branching key/value caches.

A pass reads a block of token rows, each behind its own past. Rows and pasts of unequal length are padded on the left
and masked, positions are explicit, so that the last token of every row sits in the last column. Token prefixes shared
by several rows are read once and their cache copied to each (`read_tree`).
Not covered: recurrent (state-space) layers and caches that evict; every layer keeps its full past.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from recollect.backbones.decoding import stack_rows
from recollect.backbones.prefix_tree import Segment, level_batches
from recollect.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

# These scale or clip the head's output, so the logits have to come from the model's own forward.
_HEAD_MODIFIERS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class Past(NamedTuple):
    """Keys (n_layers, H, P, D) and values (n_layers, H, P, D') of one row's P tokens."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class Block:
    """Rows being read together: their cache, its mask (B, S) and the true length (B,) of each row."""

    cache: DynamicCache
    mask: torch.Tensor
    lengths: torch.Tensor

    def select(self, rows: list[int]) -> Block:
        """The block of these rows alone."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        return Block(self.cache, self.mask[index], self.lengths[index])


class CausalReader:
    """Reads tokens with a causal model and gives float32 logits where asked.

    The head runs in float32 whatever the model's dtype: bfloat16 logits near 20 are 0.06 to 0.125 apart, which would
    make different options tie.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.computed_tokens = 0
        self.padded_tokens = 0
        self.passes = 0
        head = model.get_output_embeddings()
        plain = isinstance(head, torch.nn.Linear)
        config = model.config.get_text_config()
        plain = plain and all(getattr(config, name, None) in (None, 1, 1.0) for name in _HEAD_MODIFIERS)
        self._head_weight = head.weight.detach().float() if plain else None
        self._head_bias = head.bias.detach().float() if plain and head.bias is not None else None

    def hidden(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (B, L, d) of rows without a past, and the mask (B, L) of their real tokens."""
        block = self.stack([None] * len(rows))
        ids, positions = self._place(block, rows)
        with torch.inference_mode():
            output = self.model.base_model(
                input_ids=ids, attention_mask=block.mask.long(), position_ids=positions, use_cache=False
            )
        return output.last_hidden_state, block.mask

    def read(self, block: Block, rows: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Append `rows` (non-empty) to the block; returns logits (len(wanted), V) float32.

        Args:
            wanted: (row, position inside the row) whose next-token logits are needed.
        """
        ids, positions = self._place(block, rows)
        width = ids.shape[1]
        where = torch.tensor([row for row, _ in wanted], dtype=torch.long, device=ids.device)
        columns = [width - len(rows[row]) + position for row, position in wanted]
        arguments = {
            "input_ids": ids,
            "attention_mask": block.mask.long(),
            "position_ids": positions,
            "past_key_values": block.cache,
            "use_cache": True,
        }
        with torch.inference_mode():
            if self._head_weight is not None:
                states = self.model.base_model(**arguments).last_hidden_state
                states = states[where, torch.tensor(columns, dtype=torch.long, device=ids.device)]
                return torch.nn.functional.linear(states.float(), self._head_weight, self._head_bias)
            tail = width - min(columns, default=width - 1)
            logits = self.model(**arguments, logits_to_keep=tail).logits
            shifted = torch.tensor([column - width + tail for column in columns], dtype=torch.long, device=ids.device)
            return logits[where, shifted].float()

    def read_tree(self, segments: list[Segment], keep: Iterable[int] = ()) -> Iterable[tuple[list[int], list, dict]]:
        """Read planned segments, each once, pass by pass.

        Yields:
            The segments of the pass, the (want, logits row) pairs, and the `Past` of those in `keep`. The rows are
            views of one (wants, V) float32 block, the largest thing in memory: the list is emptied on the next pass.
        """
        keep = frozenset(keep)
        pasts: dict[int, Past] = {}
        waiting = [segment.n_children for segment in segments]
        for batch in level_batches(segments, self.batch_tokens):
            parents = [segments[index].parent for index in batch]
            block = self.stack([pasts[parent] if parent >= 0 else None for parent in parents])
            wants = [(row, want) for row, index in enumerate(batch) for want in segments[index].wants]
            places = sorted({(row, want[0]) for row, want in wants})
            logits = self.read(block, [segments[index].tokens for index in batch], places)
            for parent in parents:
                if parent >= 0:
                    waiting[parent] -= 1
                    if waiting[parent] == 0:
                        pasts.pop(parent)
            kept: dict[int, Past] = {}
            for row, index in enumerate(batch):
                if waiting[index] or index in keep:
                    past = self._past(block, row)
                    if waiting[index]:
                        pasts[index] = past
                    if index in keep:
                        kept[index] = past
            at = {place: line for line, place in enumerate(places)}
            answers = [(want, logits[at[row, want[0]]]) for row, want in wants]
            del logits, block  # else two passes' blocks would be held at once
            yield batch, answers, kept
            answers.clear()

    def stack(self, pasts: Sequence[Past | None]) -> Block:
        """A block whose rows have these pasts (None: nothing read yet)."""
        from transformers.cache_utils import DynamicCache

        device = self.model.device
        lengths = torch.tensor([0 if past is None else past.keys.shape[2] for past in pasts], device=device)
        width = int(lengths.max()) if len(pasts) else 0
        mask = torch.arange(width, device=device)[None] >= width - lengths[:, None]
        cache = DynamicCache()
        known = next((past for past in pasts if past is not None), None)
        if known is not None:
            for layer, (keys, values) in enumerate(
                zip(*(_padded(pasts, known, part, width) for part in (0, 1)), strict=True)
            ):
                cache.update(keys, values, layer)
        return Block(cache, mask, lengths)

    def _place(self, block: Block, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions (B, L) of the rows to come; extends the block's mask and lengths."""
        device = self.model.device
        ids = torch.from_numpy(stack_rows(rows)).to(device)
        counts = torch.tensor([len(row) for row in rows], device=device)
        width = ids.shape[1]
        real = torch.arange(width, device=device)[None] >= width - counts[:, None]
        positions = (block.lengths[:, None] + real.long().cumsum(1) - 1).clamp_min(0)
        block.mask = torch.cat([block.mask, real], dim=1)
        block.lengths = block.lengths + counts
        self.passes += 1
        self.computed_tokens += sum(len(row) for row in rows)
        self.padded_tokens += width * len(rows)
        return ids, positions

    def _past(self, block: Block, row: int) -> Past:
        real = block.mask[row].nonzero()[:, 0]
        layers: list[Any] = list(block.cache.layers)
        if len({layer.keys.shape[1:] for layer in layers}) > 1:
            raise InputError("models whose layers have caches of different shapes are not supported; serve it instead")
        whole = len(real) == block.mask.shape[1]
        parts = []
        for name in ("keys", "values"):
            stacked = torch.stack([getattr(layer, name)[row] for layer in layers])
            parts.append(stacked if whole else stacked[:, :, real])
        return Past(*parts)


def _padded(pasts: Sequence[Past | None], known: Past, part: int, width: int) -> torch.Tensor:
    """(n_layers, B, H, width, D): the rows' keys or values, right-aligned."""
    example = known[part]
    if all(past is known for past in pasts):
        return example[:, None].expand(-1, len(pasts), -1, -1, -1)
    n_layers, heads, _, size = example.shape
    block = example.new_zeros(n_layers, len(pasts), heads, width, size)
    for row, past in enumerate(pasts):
        if past is not None:
            block[:, row, :, width - past[part].shape[2] :] = past[part]
    return block
