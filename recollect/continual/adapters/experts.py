"""Batched banks of low-rank experts: every expert of every slice in a few matrix products.

Two ways to the same numbers, chosen by a measured rule: *stacked* multiplies all experts' A at once, scales each
expert's part by its gate (zero where not chosen) and multiplies by all B at once, so its cost is linear in the total
rank; *grouped* sorts the (token, slice) assignments by expert into blocks of rows that share an expert, so its cost
does not depend on experts that nobody chose.  Neither loops over tokens or experts, and in both every expert stays in
the graph (an unchosen one gets an exactly zero gradient), so distributed data parallel training needs no
`find_unused_parameters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.routing import Router, Routing, slice_products
from recollect.rng import stream

# Stacked wins while E·r is at most this many times k (one thread, 1 024 tokens, widths 576 and 1 536: the two cross at
# E·r about 130 for one slice of rank 8 and about 90 for four slices of rank 3).
STACKED_RANK = 128
BLOCK_ROWS = 16
# Tokens per row of A from which it pays to multiply by the router's rows and A at once, which copies both.
JOINED_TOKENS = 2


class ExpertBank(nn.Module):
    """H slices × E experts E_{j,e}(u) = B_{j,e}·σ(A_{j,e}·u), each from its slice to the full output width.

    Experts arrive in generations (growth), each a pair of tensors, so that a generation can be frozen by
    `requires_grad` alone.  A is Kaiming-uniform(a=√5) over the slice, B zero: the bank starts as the zero function.

    Args:
        heads, experts, rank: H, E of the first generation, r.
        in_features, out_features: d (a multiple of H) and d_out.
        activation: σ is SiLU instead of the identity (a bank beside a whole FFN).
        seed, name: of the initial weights.
    """

    def __init__(
        self,
        heads: int,
        experts: int,
        rank: int,
        in_features: int,
        out_features: int,
        *,
        seed: int,
        name: str,
        activation: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.rank = heads, rank
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self._seed, self._name = seed, name
        self.lora_A = nn.ParameterList()  # each (H, E_g, r, d/H)
        self.lora_B = nn.ParameterList()  # each (H, E_g, r, d_out): B transposed, so that stacking is a view
        self.n_open = 0
        self.grow(experts, device=device)
        self.open_all()

    @property
    def n_experts(self) -> int:
        """E over the open generations."""
        return sum(part.shape[1] for part in list(self.lora_A)[: self.n_open])

    def grow(self, experts: int, device: torch.device | None = None) -> None:
        """Add a generation of experts, closed until `open_all`."""
        width = self.in_features // self.heads
        bound = 1 / math.sqrt(width)
        generator = stream(self._seed, "experts", self._name, len(self.lora_A))
        values = generator.uniform(-bound, bound, (self.heads, experts, self.rank, width))
        self.lora_A.append(nn.Parameter(torch.tensor(values, dtype=torch.float32, device=device)))
        zeros = torch.zeros(self.heads, experts, self.rank, self.out_features, device=device)
        self.lora_B.append(nn.Parameter(zeros))

    def open_all(self) -> None:
        """Let every generation take part."""
        self.n_open = len(self.lora_A)

    def weights(self) -> tuple[Tensor, Tensor]:
        """A (H, E, r, d/H) and B (H, E, r, d_out) of the open generations."""
        down, up = list(self.lora_A)[: self.n_open], list(self.lora_B)[: self.n_open]
        if len(down) == 1:
            return down[0], up[0]
        return torch.cat(down, dim=1), torch.cat(up, dim=1)

    def rows_beside(self, router: Router, x: Tensor) -> Tensor | None:
        """A of all experts (H, E·r, d/H) for `router` to multiply x (…, d) by along with its own rows.

        None where the products are not the same or one is no cheaper than two: under autocast, in another precision
        than the router's, in the grouped form, for few tokens.
        """
        n_tokens, n_rows = x.numel() // self.in_features, self.n_experts * self.rank
        if n_tokens < JOINED_TOKENS * n_rows or self._is_wide(router.n_chosen):
            return None
        down = self.weights()[0]
        if torch.is_autocast_enabled(x.device.type) or down.dtype != torch.float32:
            return None
        return down.flatten(1, 2)

    def forward(self, tokens: Tensor, routing: Routing | None, scaling: float, output: Tensor | None = None) -> Tensor:
        """output + scaling·Σ_j Σ_e gate_{j,e}·E_{j,e}(slice j), for tokens (n, d) and output (n, d_out).

        Without routing every expert counts with weight 1; without output, zeros stand for it.  A routing that has the
        products with `rows_beside` saves them here.
        """
        down, up = self.weights()
        if not torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(down.dtype)
        if routing is not None and not routing.is_dense and self._is_wide(routing.indices.shape[-1]):
            return self._grouped(tokens, routing, scaling, output, down, up)
        return self._stacked(tokens, routing, scaling, output, down, up)

    def _is_wide(self, chosen: int) -> bool:
        return chosen < self.n_experts and self.n_experts * self.rank > STACKED_RANK * chosen

    def _stacked(
        self, tokens: Tensor, routing: Routing | None, scaling: float, output: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        heads, experts, rank, width = down.shape
        if routing is not None and routing.products is not None:
            hidden = routing.products  # (n, H, E·r)
        else:
            hidden = slice_products(tokens.reshape(-1, heads, width), down.reshape(heads, experts * rank, width))
        if self.activation:
            hidden = functional.silu(hidden)
        if routing is None:
            hidden = hidden * scaling
        else:
            gates = (routing.gates() * scaling).to(hidden.dtype)
            hidden = hidden.unflatten(-1, (experts, rank)) * gates[..., None]
        return _add_product(output, hidden.reshape(len(tokens), -1), up.reshape(heads * experts * rank, -1))

    def _grouped(
        self, tokens: Tensor, routing: Routing, scaling: float, output: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        experts, width = down.shape[1], down.shape[3]
        blocks = Blocks.of(routing.indices, experts)
        # Slots without a row read and write the first one; their gate is 0.  index_select, not [], for its gradient.
        rows = tokens.reshape(-1, width).index_select(0, blocks.slots(blocks.slice_row)).unflatten(0, (-1, BLOCK_ROWS))
        hidden = torch.bmm(rows, down.flatten(0, 1).index_select(0, blocks.expert).transpose(1, 2))
        if self.activation:
            hidden = functional.silu(hidden)
        gates = (routing.weights.reshape(-1)[blocks.assignment] * scaling).to(hidden.dtype)
        hidden = hidden * blocks.spread(gates[:, None])
        parts = torch.bmm(hidden, up.flatten(0, 1).index_select(0, blocks.expert))  # (blocks, rows, d_out)
        if output is None:
            output = parts.new_zeros(len(tokens), self.out_features)
        return output.index_add(0, blocks.slots(blocks.token), parts.flatten(0, 1).to(output.dtype))


@dataclass(frozen=True)
class Blocks:
    """Assignments sorted by (slice, expert) and laid out in blocks of `BLOCK_ROWS` rows of one expert each.

    assignment: (m,) position in the flat (n, H, k) assignments, sorted by expert.  slice_row: (m,) its row among the
    (n·H) slices.  token: (m,) its token.  place: (m,) its row among the blocks.  expert: (blocks,) j·E + e of each.
    """

    assignment: Tensor
    slice_row: Tensor
    token: Tensor
    place: Tensor
    expert: Tensor

    @classmethod
    def of(cls, indices: Tensor, experts: int) -> Blocks:
        """The layout of chosen experts (n, H, k); only experts that were chosen get blocks."""
        _, heads, chosen = indices.shape
        device = indices.device
        owner = (indices + experts * torch.arange(heads, device=device)[:, None]).reshape(-1)
        owner, assignment = owner.sort(stable=True)
        used, counts = owner.unique_consecutive(return_counts=True)
        blocks_of = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
        first_row = (blocks_of.cumsum(0) - blocks_of) * BLOCK_ROWS
        first_assignment = counts.cumsum(0) - counts
        place = torch.arange(len(owner), device=device) + (first_row - first_assignment).repeat_interleave(counts)
        slice_row = assignment // chosen
        return cls(assignment, slice_row, slice_row // heads, place, used.repeat_interleave(blocks_of))

    def slots(self, numbers: Tensor) -> Tensor:
        """Integers (m,) at their places among the blocks' rows (blocks · BLOCK_ROWS,), zeros elsewhere."""
        return numbers.new_zeros(len(self.expert) * BLOCK_ROWS).index_copy(0, self.place, numbers)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows (m, c) at their places in zero-filled blocks (blocks, BLOCK_ROWS, c)."""
        filled = rows.new_zeros(len(self.expert) * BLOCK_ROWS, rows.shape[1]).index_copy(0, self.place, rows)
        return filled.view(len(self.expert), BLOCK_ROWS, -1)


def _add_product(output: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """output + left @ right in output's precision; one fused product where the precisions agree."""
    if output is None:
        return left @ right
    if output.dtype == left.dtype == right.dtype:
        return torch.addmm(output, left, right)
    return output + (left @ right).to(output.dtype)
