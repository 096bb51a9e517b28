"""A linear layer of E experts whose shared dominant part is one matrix (SD-MoE, arXiv 2602.12556).

    W_e = W_c + W_u[e] + residual[e]        P_U W_u[e] = 0,  W_u[e] P_V = 0
    y   = sum_e g_e W_e x = (sum_e g_e) W_c x + sum_e g_e (W_u[e] + residual[e]) x

Split of gradients: with G_e the gradient of the effective W_e, the common matrix is to follow the common parts of all
G_e and each unique matrix the unique part of its own.  Autograd alone would give both everything, so the layer projects
gradients in the backward pass (`project="grad"`), or what the optimiser made of them after its step
(`project="update"`), or both.  Only the latter two keep W_u in the complement under Adam (spec 3.4), up to the rounding
of the weights' dtype: about 1e-7 of its norm in float32, 1e-3 in bfloat16.

`before_step` and `after_step` must surround every optimiser step; `SpectralProjector` calls them.
Not covered: biases; routing, which is the caller's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.spectral.grouped import Grouping, group_by_expert, grouped_linear
from recollect.continual.spectral.projections import (
    Basis,
    check_common_rank,
    common_part,
    complement_leak,
    project_unique_,
    random_basis,
    refreshed_basis,
    split_experts,
    unique_part,
    working,
)
from recollect.errors import ConfigError
from recollect.rng import call_seed

Project = Literal["update", "grad", "both"]
Realign = Literal["absorb_mean", "keep", "drop"]
CommonReduce = Literal["sum", "usage_mean"]
Forward = Literal["auto", "shared", "merged"]

MERGE_ABOVE = 32
"""Tokens per expert above which adding W_c to every expert is cheaper than multiplying every token by W_c."""


class SpectralDecoupledLinear(nn.Module):
    """E experts (m, n) = one common matrix + a unique matrix each in the complement of the common space.

    Args:
        n_experts: E.
        out_features, in_features: m and n.
        common_rank: k of the basis; the paper's main setting is 8 [secondary].
        project: what is projected, see the module.  "grad" is the paper to the letter and leaks under Adam [measured].
        realign: after a refresh, what becomes of the part of W_u inside the new common space.  "absorb_mean" moves its
            mean over experts into W_c and drops the rest (the mean expert is unchanged); "keep" moves the rest into a
            frozen matrix per expert (every expert unchanged, twice the memory); "drop" drops all of it.
        common_reduce: W_c's gradient: the sum over experts, or their mean weighted by their share of the tokens.
        refresh_every: optimiser steps between refreshes of the basis (16 [secondary]); 0 = never.
        common_rate: multiplier of W_c's updates.
        forward_common: "shared" multiplies a token by W_c once; "merged" adds W_c to the experts first; "auto" takes
            the cheaper one for the number of tokens.  The results are equal up to rounding.
        residual_rank: rank of the frozen per-expert factors a lossless conversion needs; 0 = none.
        seed: of the initial weights.

    Initial weights: N_e uniform with nn.Linear's variance 1 / (3 n), unique = c (I - P_U) N_e (I - P_V), common =
    P_U N P_V, with c such that the expected squared norm of an effective expert is that of nn.Linear.  The spec's c
    ignores the common core (k^2 of m n entries); this one does not.

    Attributes:
        common: parameter (m, n).  unique: parameter (E, m, n).  left, right: buffers U (m, k), V (n, k).
        steps: buffer, optimiser steps seen.
        keep_effective: while True, `last_effective` holds the (E, m, n) weights of the last forward, for gradients.

    Raises:
        ConfigError: an option that is not allowed.
    """

    common: nn.Parameter
    unique: nn.Parameter
    left: Tensor
    right: Tensor
    steps: Tensor
    residual: Tensor | None
    residual_left: Tensor | None
    residual_right: Tensor | None

    def __init__(
        self,
        n_experts: int,
        out_features: int,
        in_features: int,
        common_rank: int = 8,
        *,
        project: Project = "update",
        realign: Realign = "absorb_mean",
        common_reduce: CommonReduce = "sum",
        refresh_every: int = 16,
        common_rate: float = 1.0,
        forward_common: Forward = "auto",
        residual_rank: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check("project", project, ("update", "grad", "both"))
        _check("realign", realign, ("absorb_mean", "keep", "drop"))
        _check("common_reduce", common_reduce, ("sum", "usage_mean"))
        _check("forward_common", forward_common, ("auto", "shared", "merged"))
        if n_experts < 1 or refresh_every < 0 or residual_rank < 0 or not common_rate >= 0:
            raise ConfigError(
                "n_experts must be at least 1 and refresh_every, residual_rank and common_rate not negative, got "
                f"{n_experts!r}, {refresh_every!r}, {residual_rank!r}, {common_rate!r}"
            )
        if common_reduce == "usage_mean" and forward_common == "shared":
            raise ConfigError("common_reduce='usage_mean' needs each expert's gradient: use forward_common='auto'")
        check_common_rank(common_rank, out_features, in_features)
        self.n_experts, self.out_features, self.in_features = n_experts, out_features, in_features
        self.common_rank = common_rank
        self.project, self.realign, self.common_reduce = project, realign, common_reduce
        self.refresh_every, self.common_rate, self.forward_common = refresh_every, common_rate, forward_common
        self.keep_effective = False
        self.last_effective: Tensor | None = None
        self._before: Tensor | None = None

        made: dict[str, Any] = {"dtype": dtype, "device": device}
        basis_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.common = nn.Parameter(torch.empty(out_features, in_features, **made))
        self.unique = nn.Parameter(torch.empty(n_experts, out_features, in_features, **made))
        self.register_buffer("left", torch.empty(out_features, common_rank, dtype=basis_dtype, device=device))
        self.register_buffer("right", torch.empty(in_features, common_rank, dtype=basis_dtype, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        dense = realign == "keep"
        factors = residual_rank if not dense else 0
        self.register_buffer("residual", torch.zeros(self.unique.shape, **made) if dense else None)
        self.register_buffer(
            "residual_left", torch.zeros(n_experts, out_features, factors, **made) if factors else None
        )
        self.register_buffer(
            "residual_right", torch.zeros(n_experts, factors, in_features, **made) if factors else None
        )
        if self.unique.device.type != "meta":
            self._draw(seed)

    @property
    def basis(self) -> Basis:
        """The current U and V."""
        return Basis(self.left, self.right)

    @classmethod
    def from_experts(
        cls,
        experts: Tensor,
        common_rank: int = 8,
        *,
        lossless: bool = True,
        usage: Tensor | None = None,
        **options: Any,
    ) -> SpectralDecoupledLinear:
        """The split of pretrained experts (E, m, n), in their dtype and on their device.

        Args:
            lossless: keep what the common space of an expert has beyond the mean's, frozen, so that every expert's
                function is what it was; otherwise it is dropped.
            usage: see `split_experts`.
            options: of the constructor.
        """
        split = split_experts(experts, common_rank, usage)
        n_experts, out_features, in_features = experts.shape
        layer = cls(
            n_experts,
            out_features,
            in_features,
            common_rank,
            residual_rank=2 * common_rank if lossless else 0,
            dtype=experts.dtype,
            device="meta",
            **options,
        ).to_empty(device=experts.device)
        with torch.no_grad():
            layer.common.copy_(split.common)
            layer.unique.copy_(split.unique)
            layer.left.copy_(split.basis.left)
            layer.right.copy_(split.basis.right)
            layer.steps.zero_()
            if layer.residual is not None:
                layer.residual.copy_(split.dropped_left @ split.dropped_right) if lossless else layer.residual.zero_()
            elif layer.residual_left is not None and layer.residual_right is not None:
                layer.residual_left.copy_(split.dropped_left)
                layer.residual_right.copy_(split.dropped_right)
        return layer

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(call_seed(seed, "spectral linear"))
        with torch.no_grad():
            basis = random_basis(self.out_features, self.in_features, self.common_rank, generator)
            self.left.copy_(basis.left)
            self.right.copy_(basis.right)
            bound = 1 / math.sqrt(self.in_features)  # of nn.Linear's uniform weights
            plain = torch.empty(self.out_features, self.in_features).uniform_(-bound, bound, generator=generator)
            self.common.copy_(basis.left @ (basis.left.T @ plain @ basis.right) @ basis.right.T)
            size, core = self.out_features * self.in_features, self.common_rank**2
            free = (self.out_features - self.common_rank) * (self.in_features - self.common_rank)
            drawn = torch.empty(self.unique.shape).uniform_(-bound, bound, generator=generator)
            self.unique.copy_(drawn * math.sqrt((size - core) / free))
            project_unique_(self.unique, self.basis)

    def extra_repr(self) -> str:
        return (
            f"{self.n_experts} experts of {self.out_features} x {self.in_features}, common_rank={self.common_rank}, "
            f"project={self.project}, realign={self.realign}"
        )

    def forward(self, x: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
        """Mix the outputs of the selected experts.

        Args:
            x: (N, n).
            selected: (N, K) int64 experts of each token.
            gates: (N, K) their weights.

        Returns:
            (N, m) in x's dtype.
        """
        grouping = group_by_expert(selected, self.n_experts)
        gates = gates.to(x.dtype)
        if self._merges(len(x)):
            each = grouped_linear(x.index_select(0, grouping.token), self.effective(grouping.counts), grouping)
            return _mixed(each, gates, grouping)
        common = functional.linear(x, self._common().to(x.dtype))  # (N, m), once per token
        own = self._own(x.index_select(0, grouping.token), grouping)
        return gates.sum(1, keepdim=True) * common + _mixed(own, gates, grouping)

    def expert_outputs(self, x: Tensor, grouping: Grouping, *, shared_input: bool) -> Tensor:
        """Each expert's output for each of its rows, before any mixing: what a gated FFN needs.

        Args:
            x: (N, n) one row per token if `shared_input`, else (S, n) one per sorted (token, slot) pair.

        Returns:
            (S, m) in the sorted order of `grouping`.
        """
        rows = x.index_select(0, grouping.token) if shared_input else x
        if self._merges(len(x)):
            return grouped_linear(rows, self.effective(grouping.counts), grouping)
        common = functional.linear(x, self._common().to(x.dtype))
        return self._own(rows, grouping) + (common.index_select(0, grouping.token) if shared_input else common)

    def effective(self, counts: Tensor | None = None) -> Tensor:
        """(E, m, n) the experts as they act, differentiable; gradients are projected as `project` says.

        Args:
            counts: (E,) tokens per expert of this batch, for common_reduce="usage_mean"; None = equal.
        """
        share = None
        if self.common_reduce == "usage_mean":
            used = torch.ones(self.n_experts, device=self.unique.device) if counts is None else counts.float()
            share = used / used.sum().clamp_min(1)
        projected = self.basis if self.project != "update" else None
        weights: Tensor = _Effective.apply(self.common, self.unique, share, projected)  # type: ignore[no-untyped-call]
        if self.residual is not None:
            weights = weights + self.residual
        elif self.residual_left is not None and self.residual_right is not None:
            weights = torch.baddbmm(weights, self.residual_left, self.residual_right)
        if self.keep_effective:
            self.last_effective = weights
        return weights

    @torch.no_grad()
    def merge(self) -> Tensor:
        """(E, m, n) ordinary experts with the same function, detached."""
        return self.effective().detach()

    def leak(self) -> tuple[float, float]:
        """Largest share of a unique matrix inside the common space, (left, right)."""
        return complement_leak(self.unique, self.basis)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note W_c before the optimiser moves it."""
        self._before = self.common.detach().clone()

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Project the update, and every `refresh_every` steps refresh the basis.

        Raises:
            ConfigError: `before_step` was not called.
        """
        if self._before is None:
            raise ConfigError("call before_step before the optimiser's step and after_step after it")
        before, self._before = self._before, None
        if self.project != "grad":
            change = common_part(self.common.sub_(before), self.basis)
            self.common.copy_(before.add_(change, alpha=self.common_rate))
            if self.unique.requires_grad:
                project_unique_(self.unique, self.basis)
        elif self.common_rate != 1:
            self.common.copy_(torch.lerp(before, self.common, self.common_rate))
        self.steps += 1
        refreshes = self.refresh_every and self.common.requires_grad  # a frozen W_c keeps its basis
        if refreshes and int(self.steps) % self.refresh_every == 0:
            self.refresh(optimizer)

    @torch.no_grad()
    def refresh(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Recompute the basis from W_c, re-align all matrices and project the optimiser's first moments.

        What W_c has outside of the new common space (it followed the old one) goes to every unique matrix, which
        changes no expert; left in W_c it could never be trained again.  The spec is silent on this.
        """
        basis = refreshed_basis(self.common, self.basis)
        self.left.copy_(basis.left)
        self.right.copy_(basis.right)
        before = self.unique.clone() if self.residual is not None else None
        mean = working(self.unique).mean(0)
        project_unique_(self.unique, self.basis)
        mean = mean - working(self.unique).mean(0)  # of what lay inside the new common space
        if self.realign != "drop":
            self.common.add_(mean.to(self.common.dtype))
        if before is not None and self.residual is not None:
            self.residual.add_(before.sub_(self.unique).sub_(mean.to(before.dtype)))
        outside = unique_part(self.common, self.basis)
        self.common.sub_(outside)
        self.unique.add_(outside)
        if optimizer is not None:
            _project_first_moment(optimizer, self.common, self.basis, unique=False)
            _project_first_moment(optimizer, self.unique, self.basis, unique=True)

    def _merges(self, n_tokens: int) -> bool:
        if self.keep_effective or self.common_reduce == "usage_mean":
            return True
        if self.forward_common == "auto":
            return n_tokens > MERGE_ABOVE * self.n_experts
        return self.forward_common == "merged"

    def _common(self) -> Tensor:
        if self.project == "update":
            return self.common
        projected: Tensor = _ProjectedGradient.apply(self.common, self.basis, False)  # type: ignore[no-untyped-call]
        return projected

    def _own(self, rows: Tensor, grouping: Grouping) -> Tensor:
        """(S, m) what the experts add to the common output of their rows (S, n)."""
        unique: Tensor = self.unique
        if self.project != "update":
            unique = _ProjectedGradient.apply(unique, self.basis, True)  # type: ignore[no-untyped-call]
        if self.residual is not None:
            unique = unique + self.residual
        own = grouped_linear(rows, unique, grouping)
        if self.residual_left is not None and self.residual_right is not None:
            own = own + grouped_linear(
                grouped_linear(rows, self.residual_right, grouping), self.residual_left, grouping
            )
        return own


class _Effective(torch.autograd.Function):
    """W_c + W_u[e]; backward gives W_c the (weighted) sum of the gradients and W_u[e] its own, projected on request."""

    @staticmethod
    def forward(ctx: Any, common: Tensor, unique: Tensor, share: Tensor | None, basis: Basis | None) -> Tensor:
        ctx.share, ctx.basis = share, basis
        return common + unique

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        common = unique = None
        if ctx.needs_input_grad[0]:
            weighted = gradient if ctx.share is None else gradient * ctx.share.to(gradient.dtype)[:, None, None]
            common = weighted.sum(0)
            common = common if ctx.basis is None else common_part(common, ctx.basis)
        if ctx.needs_input_grad[1]:
            unique = gradient if ctx.basis is None else unique_part(gradient, ctx.basis)
        return common, unique, None, None


class _ProjectedGradient(torch.autograd.Function):
    """The weight itself; backward keeps one part of its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, basis: Basis, unique: bool) -> Tensor:
        ctx.basis, ctx.unique = basis, unique
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (unique_part if ctx.unique else common_part)(gradient, ctx.basis), None, None


def _mixed(each: Tensor, gates: Tensor, grouping: Grouping) -> Tensor:
    """(S, m) sorted outputs and (N, K) gates -> (N, m)."""
    return (each.index_select(0, grouping.place).view(*gates.shape, each.shape[1]) * gates[..., None]).sum(1)


def _project_first_moment(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, basis: Basis, *, unique: bool
) -> None:
    """Adam's mean gradient or SGD's momentum; the second moment is a scale, not a direction, and stays."""
    state = optimizer.state.get(parameter, {})
    for name in ("exp_avg", "momentum_buffer"):
        moment = state.get(name)
        if isinstance(moment, Tensor):
            if unique:
                project_unique_(moment, basis)
            else:
                moment.copy_(common_part(moment, basis))


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
