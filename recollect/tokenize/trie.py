"""The prefix tree of a catalogue's semantic IDs as flat arrays, walked for many prefixes at once.

Nodes of depth d are the distinct prefixes of length d in lexicographic order, numbered from 0; so the children of a
node are neighbours at depth d + 1, and two arrays per depth say everything: where each node's children begin, and the
sorted key (parent, code) of each node. A step gathers slices, an advance is one binary search; nothing loops over
beams.

Built from sorted codes in O(N L); 12 bytes per node and 4 per item (1e6 random items, three levels of 256: 16 MB, half
a second on one core [measured]). An absent last digit (-1) is an edge of its own, the first of its node.
Source: generative_recommendation 3.1 (the layout is ours, after STATIC's compressed rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from recollect.errors import InputError


class Edges(NamedTuple):
    """The edges out of some nodes: of row[e]'s node, to `child[e]` by `code[e]` (-1 = the ID ends), all (E,) int64."""

    row: torch.Tensor
    code: torch.Tensor
    child: torch.Tensor


class PrefixTrie:
    """Prefixes of (N, L) codes and the items behind each full one.

    Args:
        codes: (N, L) integers in -1..K_l-1, -1 only at the end of a row; N >= 1.
        codebook_sizes: K_0..K_{L-1}.
        device: where the arrays live.

    Raises:
        InputError: no items, or codes outside the codebooks.
    """

    def __init__(self, codes: np.ndarray, codebook_sizes: Sequence[int], device: str | torch.device = "cpu") -> None:
        if codes.ndim != 2 or not codes.size or codes.shape[1] != len(codebook_sizes):
            raise InputError(f"a prefix tree needs codes (N >= 1, {len(codebook_sizes)}), got {codes.shape}")
        low, high = codes.min(axis=0), codes.max(axis=0)
        wrong = [level for level, size in enumerate(codebook_sizes) if low[level] < -1 or high[level] >= size]
        if wrong:
            level = wrong[0]
            raise InputError(
                f"codes at level {level} range over {low[level]}..{high[level]}; "
                f"allowed: 0..{codebook_sizes[level] - 1}"
            )
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.n_items = len(codes)
        self._widths = tuple(size + 1 for size in self.codebook_sizes)  # code -1 comes first
        self._build(codes, torch.device(device))

    def _build(self, codes: np.ndarray, device: torch.device) -> None:
        order = _sorted_rows(codes, self._widths)
        node = np.zeros(len(codes), dtype=np.int64)  # of each item in sorted order, at the depth reached
        firsts, keys, n_nodes = [], [], [1]
        for level, width in enumerate(self._widths):
            key = node * width + (codes[order, level].astype(np.int64) + 1)
            is_new = np.r_[True, key[1:] != key[:-1]]
            kept = key[is_new]
            firsts.append(np.searchsorted(kept, np.arange(n_nodes[-1] + 1) * width).astype(np.int32))
            keys.append(kept)
            n_nodes.append(len(kept))
            node = np.cumsum(is_new) - 1
        firsts.append(np.searchsorted(node, np.arange(n_nodes[-1] + 1)).astype(np.int32))
        self.n_nodes = tuple(n_nodes)
        self._first = [torch.from_numpy(first).to(device) for first in firsts]
        self._key = [torch.from_numpy(key).to(device) for key in keys]
        self._items = torch.from_numpy(order.astype(np.int32)).to(device)

    @property
    def n_levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    @property
    def n_ids(self) -> int:
        """Distinct full IDs."""
        return self.n_nodes[-1]

    @property
    def has_short_ids(self) -> bool:
        """Whether some ID ends before the last level."""
        return bool((self._key[-1] % self._widths[-1] == 0).any())

    @property
    def device(self) -> torch.device:
        return self._items.device

    def to(self, device: str | torch.device) -> PrefixTrie:
        """The same tree on another device."""
        moved = object.__new__(PrefixTrie)
        moved.__dict__ |= self.__dict__
        moved._first = [array.to(device) for array in self._first]
        moved._key = [array.to(device) for array in self._key]
        moved._items = self._items.to(device)
        return moved

    def roots(self, n: int) -> torch.Tensor:
        """(n,) int64 nodes of depth 0: the empty prefix."""
        return torch.zeros(n, dtype=torch.int64, device=self.device)

    def counts(self, depth: int, nodes: torch.Tensor) -> torch.Tensor:
        """Children of each node (any shape) of `depth`, int64; 0 for node -1. At depth L: items."""
        first = self._first[depth]
        safe = nodes.clamp(min=0)
        return torch.where(nodes < 0, 0, (first[safe + 1] - first[safe]).long())

    def step(self, depth: int, nodes: torch.Tensor) -> Edges:
        """The edges out of `nodes` (B,) of `depth` < L, by row and then by code; none for node -1."""
        counts = self.counts(depth, nodes)
        row = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        before = counts.cumsum(0) - counts
        child = torch.arange(len(row), device=nodes.device) + (self._first[depth][nodes.clamp(min=0)] - before)[row]
        return Edges(row, self._key[depth][child] - nodes[row] * self._widths[depth] - 1, child)

    def mask(self, depth: int, nodes: torch.Tensor) -> torch.Tensor:
        """(B, K) bool: codes that may follow `nodes` (B,) of `depth` < L; the end of an ID (-1) is not among them."""
        edges = self.step(depth, nodes)
        allowed = torch.zeros(len(nodes), self._widths[depth], dtype=torch.bool, device=nodes.device)
        allowed[edges.row, edges.code + 1] = True
        return allowed[:, 1:]

    def children(self, depth: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(child, code), each (B, C) int64 with C the most children of any of `nodes` (B,); -1 and -2 where none."""
        counts = self.counts(depth, nodes)
        column = torch.arange(int(counts.max()) if len(nodes) else 0, device=nodes.device)
        is_real = column < counts[:, None]
        child = torch.where(is_real, self._first[depth][nodes.clamp(min=0)].long()[:, None] + column, -1)
        code = self._key[depth][child.clamp(min=0)] - nodes[:, None] * self._widths[depth] - 1
        return child, torch.where(is_real, code, -2)

    def advance(self, depth: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The node of `depth` + 1 reached from `nodes` by `codes` (of equal shape); -1 where there is none."""
        width = self._widths[depth]
        is_legal = (nodes >= 0) & (codes >= -1) & (codes < width - 1)
        wanted = torch.where(is_legal, nodes * width + codes + 1, 0)
        keys = self._key[depth]
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(is_legal & (keys[found] == wanted), found, -1)

    def walk(self, codes: torch.Tensor) -> torch.Tensor:
        """Nodes (B,) of depth l reached by the prefixes `codes` (B, l) int64, -1 where a prefix does not exist."""
        nodes = self.roots(len(codes))
        for depth in range(codes.shape[1]):
            nodes = self.advance(depth, nodes, codes[:, depth])
        return nodes

    def codes_at(self, depth: int, nodes: torch.Tensor) -> torch.Tensor:
        """(B, depth) int64: the prefixes of `nodes` (B,) of `depth`; -1 where an ID has no digit."""
        columns = []
        for at in range(depth, 0, -1):
            key = self._key[at - 1][nodes]
            nodes = torch.div(key, self._widths[at - 1], rounding_mode="floor")
            columns.append(key - nodes * self._widths[at - 1] - 1)
        return torch.stack(columns[::-1], dim=-1) if columns else nodes.new_zeros((len(nodes), 0))

    def items_at(self, leaf: int) -> np.ndarray:
        """Rows (g,) int64 of the items whose ID is leaf `leaf` (a node of depth L), ascending."""
        first = self._first[-1]
        return self._items[int(first[leaf]) : int(first[leaf + 1])].cpu().numpy().astype(np.int64)

    def leaf_items(self, leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row, item), each (E,) int64: the items of `leaves` (B,), by row of `leaves` and then ascending."""
        counts = self.counts(self.n_levels, leaves)
        row = torch.repeat_interleave(torch.arange(len(leaves), device=leaves.device), counts)
        before = counts.cumsum(0) - counts
        place = torch.arange(len(row), device=leaves.device) + (self._first[-1][leaves.clamp(min=0)] - before)[row]
        return row, self._items[place].long()

    def open_nodes(self, allowed: torch.Tensor) -> list[torch.Tensor]:
        """Which nodes lead to an allowed item: (B, n_nodes[d]) bool for d = 0..L.

        Args:
            allowed: (B, N) bool, the items each request may get (fresh ones, a category, not yet seen).

        Memory: B bytes per node. With it, a constrained search equals one over the tree of the allowed items alone.
        """
        if allowed.ndim != 2 or allowed.shape[1] != self.n_items or allowed.dtype != torch.bool:
            raise InputError(
                f"allowed must be (requests, {self.n_items}) bool, got {allowed.dtype} {tuple(allowed.shape)}"
            )
        level = allowed.to(self.device)[:, self._items.long()]
        found = []
        for first in reversed(self._first):
            total = torch.nn.functional.pad(level.to(torch.int32).cumsum(1), (1, 0))
            level = total[:, first[1:].long()] > total[:, first[:-1].long()]
            found.append(level)
        return found[::-1]


def _sorted_rows(codes: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Rows (N,) int64 in lexicographic order of their codes, equal codes by row."""
    total = 1
    for width in widths:
        total *= width
    if total >= 1 << 62:
        return np.lexsort(codes.T[::-1])
    packed = np.zeros(len(codes), dtype=np.int64)
    for level, width in enumerate(widths):
        packed = packed * width + (codes[:, level].astype(np.int64) + 1)
    return np.argsort(packed, kind="stable")
