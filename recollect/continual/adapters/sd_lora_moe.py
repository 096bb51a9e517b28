"""SD-LoRA-MoE: a common adapter holds the directions all experts share, and routed experts write outside of them.

    y = W0·x + s·(B_c·A_c + B_f·A_f)·x + s·Σ_j Σ_e gate_{j,e}·(I - P_U)·B_{j,e}·A_{j,e}·(I - P_V^(j))·x^(j)

U spans the columns of the common B, V^(j) the rows of the common A cut to slice j (one U for all banks, a V per slice;
with one head, H = 1, V spans the rows themselves).  While B_c is 0 there is no U.  The projections act on the experts'
factors, (I - P_U)·B and A·(I - P_V), which is the same function and costs nothing per token.  Gradients of the experts
stay in the complement by themselves, those of the common adapter are its own.  Bases are constants between refreshes.

The pair (A_f, B_f) is frozen: `absorb` moves into it, after a task, the common adapter and the strongest directions
the experts still share.  What is trained later stays outside of its rows and columns.

Our design (spec sd_moe 6); SD-MoE itself (arXiv 2602.12556) splits full experts, see `recollect.continual.spectral`.
`before_step` and `after_step` must surround every optimiser step; `SpectralProjector(model)` calls them.
Not covered: a bank beside a whole FFN (placement "parallel_ffn").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.complement import ROUNDING, WEAK, ComplementBank, factored_svd, orthonormal
from recollect.continual.adapters.config import MoELoraConfig, SDLoraMoEConfig, largest_common_rank
from recollect.continual.adapters.routing import MaskHolder, Router, Routing
from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.errors import ConfigError
from recollect.rng import stream


@dataclass(frozen=True)
class Absorbed:
    """What `absorb` moved into the frozen pair of one linear.

    frozen_rank: rows of the frozen pair now.  froze_common: whether the common adapter was frozen and a new one begun;
    False once the cap leaves no room, then it stays trainable.  directions: of the experts' mean update, moved.
    shared_energy: their share of the squared norm of that mean.  kept: share of what the experts' mean lost that the
    frozen pair took over; 1 up to rounding for one head, less for several.
    """

    frozen_rank: int
    froze_common: bool
    directions: int
    shared_energy: float
    kept: float


class SDLoraMoELinear(AdapterLinear):
    """A frozen linear, its common adapter, the frozen pair and routed experts in the complement of both.

    Args: as `AdapterLinear`; `config` is an `SDLoraMoEConfig`.

    Attributes:
        common_A (k, d_in), common_B (k, d_out): the trained common adapter (B transposed, as in the bank).
        frozen_A (f, d_in), frozen_B (f, d_out): buffers; rows of frozen_A are orthonormal.
        frozen_left (d_out, f): buffer, output directions the experts avoided when the pair was frozen.
        steps: buffer, optimiser steps seen.
        largest_rank: of common adapter and frozen pair together.

    Raises:
        ConfigError: the common rank leaves an expert's slice or the output no room, or the config is of another method.
    """

    frozen_A: Tensor
    frozen_B: Tensor
    frozen_left: Tensor
    steps: Tensor
    bank: ComplementBank

    def __init__(
        self,
        base: nn.Linear,
        config: MoELoraConfig,
        *,
        name: str = "linear",
        mask: MaskHolder | None = None,
        router: Router | None = None,
    ) -> None:
        if not isinstance(config, SDLoraMoEConfig):
            raise ConfigError(f"{name} needs an SDLoraMoEConfig, got {type(config).__name__}")
        super().__init__(base, config, name=name, mask=mask, router=router)
        self.options = config
        smallest = min(self.in_features // config.heads, self.out_features)
        if (config.common_rank_max or config.common_rank) >= smallest:
            which = "common_rank" if config.common_rank_max is None else "common_rank_max"
            raise ConfigError(
                f"{which} must be below {smallest} in {name} (the width of an expert's slice or output), "
                f"got {getattr(config, which)!r}; lower it or use fewer heads"
            )
        self.largest_rank = largest_common_rank(config, self.in_features, self.out_features)
        device, rank = base.weight.device, config.common_rank
        self.bank = ComplementBank(
            config.heads,
            config.experts,
            config.rank,
            base.in_features,
            base.out_features,
            seed=config.seed,
            name=name,
            basis_width=rank,
            device=device,
        )
        self.common_A = nn.Parameter(self._drawn_rows(0, self.bank.left))
        self.common_B = nn.Parameter(torch.zeros(rank, self.out_features, device=device))
        self.register_buffer("frozen_A", torch.zeros(0, self.in_features, device=device))
        self.register_buffer("frozen_B", torch.zeros(0, self.out_features, device=device))
        self.register_buffer("frozen_left", torch.zeros(self.out_features, 0, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        with torch.no_grad():
            self._set_bases()
            self.bank.settle()

    def add_delta(self, output: Tensor, x: Tensor) -> Tensor:
        """The output (…, d_out) of the frozen linear plus experts, common adapter and frozen pair for x (…, d)."""
        routing = self.route(x)
        if self.training and routing is not None:
            self._count(routing)
        dropped = functional.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        tokens = dropped.flatten(0, -2)
        flat = self.bank(tokens, routing, self.scaling, output.flatten(0, -2))
        down, up = torch.cat([self.common_A, self.frozen_A]), torch.cat([self.common_B, self.frozen_B])
        if not torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(down.dtype)
        hidden = (tokens @ down.T) * self.scaling
        return (flat + (hidden @ up).to(flat.dtype)).view(output.shape)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to note: what is projected after a step is the weights themselves."""

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the stored weights back where they belong; refresh the bases every `refresh_every` steps."""
        self.bank.settle()
        self._off_frozen()
        self.steps += 1
        if self.common_A.requires_grad and int(self.steps) % self.options.refresh_every == 0:
            self.refresh(optimizer)

    @torch.no_grad()
    def refresh(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """New bases from the common adapter; the mean of what the experts lose to them moves into that adapter.

        First the left side: A_c gains B_c⁺·M, so that B_c·A_c gains P_U·M, with M the gate-weighted mean update.  Then,
        with V of the new A_c, the right side: B_c gains (I - P_U)·M·P_V·A_c⁺.  In this order the two do not mix, and
        for one head the mean update of adapter and experts together is unchanged.  For several heads A_c⁺ spans less
        than the slices' V together and the right side is a least-squares fit.
        """
        self.bank.settle()
        self._off_frozen()
        up, down = self._mean_factors()
        self.bank.left.copy_(self._left_basis())
        inverse = torch.linalg.pinv(self.common_B.T, rtol=WEAK)  # (k, d_out)
        self.common_A.add_((inverse @ up.T) @ down)
        self.bank.right.copy_(self._right_basis())
        up = self.bank.off_left(up)
        dropped = self._onto_right(down)  # rows of M restricted to the slices' common directions
        self.common_B.add_((up.T @ (dropped @ torch.linalg.pinv(self.common_A))).T)
        self.bank.settle()
        if optimizer is not None:
            self._project_first_moments(optimizer)

    @torch.no_grad()
    def absorb(self) -> Absorbed:
        """Freeze what the task taught to all: to be called after a task, without an optimiser of its own.

        The common adapter joins the frozen pair and a new one begins (A random outside of everything learnt, B zero);
        then the `absorb_rank` strongest directions of the experts' gate-weighted mean update move from the experts into
        the frozen pair.  Frozen rows never change again.  The rank of both pairs stays within `largest_rank`: where
        it leaves no room the common adapter stays trainable and fewer directions move.
        """
        self.refresh()
        rank = self.options.common_rank
        room = self.largest_rank - rank - len(self.frozen_A)
        froze = room >= rank
        if froze:
            rows, mix = torch.linalg.qr(self.common_A.T)  # A_c = mixᵀ·rowsᵀ
            self._append_frozen(rows.T, mix @ self.common_B, self.bank.left[:, len(self.frozen_A) :])
            self.common_B.zero_()
            room -= rank
        up, down = self._mean_factors()
        outputs, strengths, inputs = self._slice_directions(up, down)
        strong = strengths > WEAK * strengths[:1].clamp_min(torch.finfo(strengths.dtype).tiny)
        n_moved = min(self.options.absorb_rank, room, int(strong.sum()))
        energy = float(strengths.square().sum())
        moved_energy, kept = 0.0, 1.0
        if n_moved:
            outputs, inputs = orthonormal(outputs[:, :n_moved], ROUNDING), inputs[:n_moved]
            moved_energy = float(strengths[:n_moved].square().sum())
            before = up.T @ down  # (d_out, d_in), once per task
            self._append_frozen(inputs, torch.zeros_like(outputs.T), outputs)
            self._set_bases()
            self.bank.settle()
            up, down = self._mean_factors()
            lost = before - up.T @ down
            self.frozen_B[-n_moved:] = (lost @ inputs.T).T
            missing = lost - (lost @ inputs.T) @ inputs
            kept = 1 - float(missing.square().sum() / lost.square().sum())
        if froze:
            self.common_A.copy_(self._drawn_rows(len(self.frozen_A), self.common_A, self._occupied()))
        self._set_bases()
        self.bank.settle()
        self.forget_gates()
        return Absorbed(len(self.frozen_A), froze, n_moved, moved_energy / energy if energy else 0.0, kept)

    @torch.no_grad()
    def forget_gates(self) -> None:
        """Count the gates' weights anew: `gate_means` is of the tokens of one task."""
        self.bank.gate_sum.zero_()
        self.bank.token_count.zero_()

    @torch.no_grad()
    def leak(self) -> tuple[float, float]:
        """Largest share of a stored expert's factors inside the common directions, (B along U, A along V).

        Experts that were frozen before the common adapter moved on are counted too, and may lie inside of it.
        """
        shares = [0.0, 0.0]
        for number in range(self.bank.n_open):
            for side, (factor, outside) in enumerate(
                [
                    (self.bank.lora_B[number], self.bank.off_left(self.bank.lora_B[number])),
                    (self.bank.lora_A[number], self.bank.off_right(self.bank.lora_A[number])),
                ]
            ):
                norms = factor.flatten(2).norm(dim=-1)
                inside = (factor - outside).flatten(2).norm(dim=-1)
                shares[side] = max(shares[side], float((inside / norms.clamp_min(1e-30)).max()))
        return shares[0], shares[1]

    @torch.no_grad()
    def expert_updates(self) -> Tensor:
        """(H, E, d_out, d_in / H) each expert's s·B·A as it acts; for diagnostics."""
        down, up = self.bank.weights()
        return self.scaling * torch.einsum("hero,heri->heoi", up, down)

    @torch.no_grad()
    def common_update(self) -> Tensor:
        """(d_out, d_in) s·(B_c·A_c + B_f·A_f)."""
        return self.scaling * (self.common_B.T @ self.common_A + self.frozen_B.T @ self.frozen_A)

    def gate_means(self) -> Tensor:
        """(H, E) mean gate weight of each expert over the tokens of the task so far; equal shares before any.

        Under torchrun all processes must call it together: their counts are added, so that they refresh alike.
        """
        experts = self.bank.n_experts
        counts = torch.cat([self.bank.gate_sum[:, :experts].flatten(), self.bank.token_count[None]])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if not float(counts[-1]):
            return torch.full((self.config.heads, experts), 1 / experts, device=counts.device)
        return (counts[:-1] / counts[-1]).view(self.config.heads, experts)

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """Take the ranks of a saved state about to be loaded."""
        for owner, prefix, names in (
            (self, "", ("frozen_A", "frozen_B", "frozen_left")),
            (self.bank, "bank.", ("left", "right", "gate_sum")),
        ):
            for name in names:
                saved = state.get(prefix + name)
                if saved is not None and saved.shape != getattr(owner, name).shape:
                    setattr(owner, name, torch.zeros_like(saved, device=self.common_A.device))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, common_rank={len(self.common_A)}, frozen_rank={len(self.frozen_A)}"

    @torch.no_grad()
    def _count(self, routing: Routing) -> None:
        real = routing.real()
        self.bank.gate_sum[:, : routing.n_experts] += torch.einsum("n,nhe->he", real, routing.gates().float())
        self.bank.token_count += real.sum()

    def _drawn_rows(self, generation: int, like: Tensor, outside: Tensor | None = None) -> Tensor:
        """(k, d_in) rows of Kaiming-uniform(a=√5) size, orthogonal to the rows of `outside`."""
        bound = 1 / math.sqrt(self.in_features)
        generator = stream(self.config.seed, "common adapter", self.name, generation)
        values = generator.uniform(-bound, bound, (self.options.common_rank, self.in_features))
        rows = torch.tensor(values).to(like)
        if outside is None or not len(outside):
            return rows
        span = orthonormal(outside.T, ROUNDING)
        return rows - (rows @ span) @ span.T

    def _occupied(self) -> Tensor:
        """Rows the next common adapter should avoid: the frozen ones, and the experts' where the width has room."""
        rows = [self.frozen_A]
        experts = torch.cat([self._whole_rows(self.bank.lora_A[number]) for number in self.bank.trained()] or rows)
        per_slice = len(experts) // self.config.heads + len(self.frozen_A) + self.options.common_rank
        if per_slice < self.in_features // self.config.heads:
            rows.append(experts)
        return torch.cat(rows)

    def _whole_rows(self, down: Tensor) -> Tensor:
        """(H·E·r, d_in): rows (H, E, r, d/H) of the slices, zero outside their slice."""
        heads, width = down.shape[0], down.shape[-1]
        blocks = down.flatten(1, 2)  # (H, E·r, d/H)
        whole = blocks.new_zeros(heads, blocks.shape[1], heads, width)
        index = torch.arange(heads, device=down.device)
        whole[index, :, index] = blocks
        return whole.view(-1, heads * width)

    def _mean_factors(self) -> tuple[Tensor, Tensor]:
        """Factors (R, d_out) and (R, d_in) of the gate-weighted mean update of the trained experts, upᵀ·down."""
        means = self.gate_means()
        ups, downs, first = [self.common_B[:0]], [self.common_A[:0]], 0
        for number in range(self.bank.n_open):
            experts = self.bank.lora_A[number].shape[1]
            if number in self.bank.trained():
                share = means[:, first : first + experts, None, None]
                weighted = self.bank.lora_B[number] * share
                ups.append(weighted.flatten(0, 2))
                downs.append(self._whole_rows(self.bank.lora_A[number]))
            first += experts
        return torch.cat(ups), torch.cat(downs)

    def _slice_directions(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Singular triplets of the mean update of every slice, all slices' strongest first.

        Returns:
            outputs (d_out, c) unit columns, strengths (c,) falling, inputs (c, d_in) orthonormal rows, each zero
            outside its slice: a direction across slices would take more from the experts than it gives back.
        """
        left, strengths, right = factored_svd(up, self._sliced(down))  # (H, d_out, c), (H, c), (H, c, d/H)
        order = strengths.flatten().argsort(descending=True, stable=True)
        inputs = self._whole_rows(right[:, None])
        return left.transpose(1, 2).flatten(0, 1)[order].T, strengths.flatten()[order], inputs[order]

    def _set_bases(self) -> None:
        """Recompute both bases, whose width may have changed."""
        self.bank.left = self._left_basis()
        self.bank.right = self._right_basis()

    def _left_basis(self) -> Tensor:
        """(d_out, f + k): the frozen directions first, then the common adapter's remainder."""
        return torch.cat([self.frozen_left, orthonormal(self.common_B.T, WEAK, self.frozen_left)], dim=1)

    def _right_basis(self) -> Tensor:
        """(H, d/H, f + k): per slice, the frozen rows first, then the common adapter's remainder."""
        frozen = self._sliced(self.frozen_A).transpose(1, 2)  # (H, d/H, f)
        common = self._sliced(self.common_A).transpose(1, 2)
        span = orthonormal(frozen, ROUNDING)
        return torch.cat([span, orthonormal(common, ROUNDING, span)], dim=2)

    def _onto_right(self, rows: Tensor) -> Tensor:
        """(R, d_in) rows restricted, slice by slice, to the common directions."""
        slices = self._sliced(rows)
        inside = torch.bmm(torch.bmm(slices, self.bank.right), self.bank.right.transpose(1, 2))
        return inside.transpose(0, 1).reshape(rows.shape)

    def _sliced(self, rows: Tensor) -> Tensor:
        """(R, d_in) -> (H, R, d/H)."""
        return rows.unflatten(1, (self.config.heads, self.in_features // self.config.heads)).transpose(0, 1)

    def _off_frozen(self) -> None:
        """Keep the common adapter outside of the frozen rows and columns."""
        if len(self.frozen_A) and self.common_A.requires_grad:
            self.common_A.sub_((self.common_A @ self.frozen_A.T) @ self.frozen_A)
            self.common_B.sub_((self.common_B @ self.frozen_left) @ self.frozen_left.T)

    def _append_frozen(self, rows: Tensor, columns: Tensor, outputs: Tensor) -> None:
        self.frozen_A = torch.cat([self.frozen_A, rows])
        self.frozen_B = torch.cat([self.frozen_B, columns])
        self.frozen_left = torch.cat([self.frozen_left, outputs], dim=1)

    def _project_first_moments(self, optimizer: torch.optim.Optimizer) -> None:
        for number in self.bank.trained():
            for parameter, project in (
                (self.bank.lora_A[number], self.bank.off_right),
                (self.bank.lora_B[number], self.bank.off_left),
            ):
                moment = optimizer.state.get(parameter, {}).get("exp_avg")
                if isinstance(moment, Tensor):
                    moment.copy_(project(moment))


def absorb_shared(model: nn.Module) -> dict[str, Absorbed]:
    """`SDLoraMoELinear.absorb` of every such layer of a model, by the layer's name; to be called after a task.

    Raises:
        ConfigError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, SDLoraMoELinear)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no SD-LoRA-MoE adapters; attach(model, SDLoraMoEConfig()) first")
    return {layer.name: layer.absorb() for layer in layers}
