"""A bank of low-rank experts kept out of given input and output directions, for `sd_lora_moe`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recollect.continual.adapters.experts import ExpertBank

WEAK = 1e-2
"""Output directions of the common adapter weaker than this share of its strongest do not belong to the basis yet:
inverting them would blow up the pair that absorbs along them."""
ROUNDING = 1e-6
"""Directions weaker than this are rounding errors."""


class ComplementBank(ExpertBank):
    """Experts seen through two projections.

    Generations that are trained are projected on use; frozen ones are used as they are stored, so that a basis that
    moves on cannot change them.  `settle` writes the projection into the stored weights.

    Args: as `ExpertBank`; basis_width: columns of the two bases.

    Attributes:
        left (d_out, w), right (H, d/H, w): buffers, orthonormal columns or zero ones.
        gate_sum (H, E over all generations), token_count: buffers, gate weights summed over real tokens in training.
    """

    left: Tensor
    right: Tensor
    gate_sum: Tensor
    token_count: Tensor

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
        basis_width: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(heads, experts, rank, in_features, out_features, seed=seed, name=name, device=device)
        self.register_buffer("left", torch.zeros(out_features, basis_width, device=device))
        self.register_buffer("right", torch.zeros(heads, in_features // heads, basis_width, device=device))
        self.register_buffer("gate_sum", torch.zeros(heads, experts, device=device))
        self.register_buffer("token_count", torch.zeros((), device=device))

    def weights(self) -> tuple[Tensor, Tensor]:
        """A (H, E, r, d/H) and B (H, E, r, d_out) of the open generations, projected."""
        down, up = [], []
        for number in range(self.n_open):
            own_down, own_up = self.lora_A[number], self.lora_B[number]
            down.append(self.off_right(own_down) if own_down.requires_grad else own_down)
            up.append(self.off_left(own_up) if own_up.requires_grad else own_up)
        return (down[0], up[0]) if len(down) == 1 else (torch.cat(down, dim=1), torch.cat(up, dim=1))

    def grow(self, experts: int, device: torch.device | None = None) -> None:
        """As `ExpertBank.grow`; the new rows start in the complement."""
        super().grow(experts, device)
        if len(self.lora_A) > 1:  # the first generation is made before there are bases
            with torch.no_grad():
                self.lora_A[-1].copy_(self.off_right(self.lora_A[-1]))
            self.gate_sum = functional.pad(self.gate_sum, (0, experts))

    def off_left(self, up: Tensor) -> Tensor:
        """(…, d_out) without its components along the common output directions."""
        return up - (up @ self.left) @ self.left.T

    def off_right(self, down: Tensor) -> Tensor:
        """(H, E, r, d/H) without its components along each slice's common input directions."""
        flat = down.flatten(1, 2)
        return (flat - torch.bmm(torch.bmm(flat, self.right), self.right.transpose(1, 2))).view(down.shape)

    @torch.no_grad()
    def settle(self) -> None:
        """Write the projection into the trained generations."""
        for number in self.trained():
            self.lora_A[number].copy_(self.off_right(self.lora_A[number]))
            self.lora_B[number].copy_(self.off_left(self.lora_B[number]))

    def trained(self) -> list[int]:
        """Numbers of the open generations whose experts are trained."""
        return [number for number in range(self.n_open) if self.lora_B[number].requires_grad]


def orthonormal(columns: Tensor, tolerance: float, outside: Tensor | None = None) -> Tensor:
    """(…, d, c): an orthonormal basis of the columns' directions, other columns zero.

    Args:
        tolerance: directions weaker than this share of the strongest are left out.
        outside: (…, d, o) orthonormal or zero; the basis is of what the columns have outside of it.
    """
    if not columns.shape[-1]:
        return columns
    largest = torch.linalg.matrix_norm(columns, 2)[
        ..., None
    ]  # before anything is taken away: rounding errors stay weak
    if outside is not None:
        columns = columns - outside @ (outside.transpose(-1, -2) @ columns)
    basis, strengths, _ = torch.linalg.svd(columns, full_matrices=False)
    strong = strengths > tolerance * largest.clamp_min(torch.finfo(strengths.dtype).tiny)
    return basis * strong[..., None, :]


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of upᵀ·down for factors (R, a) and (H, R, b): (H, a, c), (H, c), (H, c, b)."""
    out_span, out_mix = torch.linalg.qr(up.T)
    in_span, in_mix = torch.linalg.qr(down.transpose(1, 2))
    left, strengths, right = torch.linalg.svd(out_mix @ in_mix.transpose(1, 2), full_matrices=False)
    return out_span @ left, strengths, right @ in_span.transpose(1, 2)
