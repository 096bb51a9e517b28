"""MH-MoE (arXiv 2602.12587): sub-representations are routed apart.  The paper's equations are known at second hand.

The input h is cut into H contiguous slices; each has a private router and a private bank whose experts map the slice to
the full output; the chosen experts' outputs are summed:

    y = W0·h + Σ_{j=1..H} Σ_{e ∈ TopK(p^(j))} p^(j)_e · E_{j,e}(h^(j)),   p^(j) = softmax(W_r^(j)·h^(j)).

Low-rank experts, the placements and the slice source are our design.  Three placements: every linear with routers
over slices of its own input (`MHMoELinear`), routes made once per FFN and shared by its linears (`SharedRoutes`), one
bank of slice → low rank → SiLU → d beside the whole FFN (`AdapterFFN`).  With `slice_source="pre_o"` that bank reads
the attention heads' outputs before the output projection mixes them (`AttentionTap`), so a slice is a group of heads.
Slices of the FFN's own input are not guaranteed to be attention heads, for the output projection has mixed those.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.experts import ExpertBank
from recollect.continual.adapters.routing import MaskHolder, Router, Routing
from recollect.continual.adapters.wrapped import AdapterLinear, check_heads, make_router, routing_loss_of
from recollect.errors import ConfigError


class MHMoELinear(AdapterLinear):
    """A frozen linear with one router and one bank per slice of its input."""


def route_numbers(routing: Routing) -> Tensor:
    """(n,) int64: the route of each token as one number, Σ_j e_j·E^j over its winners; there are E^H routes.

    Source: the paper's path count, 4^8 = 65 536 for E = 4 and H = 8.  With k > 1 only the first winner counts.
    """
    winners = routing.indices[..., 0] if not routing.is_dense else routing.probabilities.argmax(-1)
    powers = routing.n_experts ** torch.arange(winners.shape[1], device=winners.device)
    return (winners * powers).sum(-1)


class SharedRoutes:
    """Routes of one FFN, made from its input and used by all its linears."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def before_forward(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the FFN."""
        self.router(args[0])


class AttentionTap:
    """The concatenated outputs of the attention heads in the pass under way, before the output projection."""

    def __init__(self) -> None:
        self.heads: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> AttentionTap:
        """A copied model starts without a pass under way."""
        return AttentionTap()

    def take(self) -> Tensor | None:
        """The outputs, once: nothing holds on to them after the FFN has read them."""
        heads, self.heads = self.heads, None
        return heads

    def before_forward(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the output projection."""
        self.heads = args[0]


class AdapterFFN(nn.Module):
    """A frozen FFN and one bank beside it: FFN(h) + s·Σ_j Σ_e gate_{j,e}·B_{j,e}·SiLU(A_{j,e}·u^(j)).

    u is h itself, or what `tap` holds of the attention under `slice_source="pre_o"`.

    Args:
        base: the FFN; frozen.
        config: of the method.
        in_features, out_features: width of u and of the model.
        tap: None = the bank reads the FFN's input.

    Attributes: as `AdapterLinear`.
    """

    def __init__(
        self,
        base: nn.Module,
        config: MoELoraConfig,
        in_features: int,
        out_features: int,
        *,
        name: str,
        mask: MaskHolder,
        tap: AttentionTap | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config, self.name, self.scaling = config, name, config.scaling
        self.in_features, self.out_features = in_features, out_features
        self.enabled = True
        self._tap = tap
        check_heads(config.heads, in_features, name)
        device = next(base.parameters()).device
        self.bank = ExpertBank(
            config.heads,
            config.experts,
            config.rank,
            in_features,
            out_features,
            seed=config.seed,
            name=name,
            activation=True,
            device=device,
        )
        self.own_router = make_router(config, in_features, name, mask, device)

    @property
    def router(self) -> Router:
        """The bank's routers."""
        return self.own_router

    @property
    def last_routing(self) -> Routing | None:
        """What the routers decided in the last pass; None before one."""
        return self.own_router.last_routing

    def forward(self, h: Tensor) -> Tensor:
        """(…, d) to (…, d)."""
        output = self.base(h)
        if not self.enabled:
            return output
        source = h if self._tap is None else self._tap.take()
        if source is None:
            raise ConfigError(f"{self.name} reads the attention's heads, but no attention ran before it")
        dropped = functional.dropout(source, self.config.dropout, self.training) if self.config.dropout else source
        routing = self.own_router(source, self.bank.rows_beside(self.own_router, source) if dropped is source else None)
        flat = self.bank(dropped.flatten(0, -2), routing, self.scaling, output.flatten(0, -2))
        return flat.view(output.shape)

    def routing_loss(self, sample_types: Tensor | None = None) -> Tensor:
        """As `AdapterLinear.routing_loss`."""
        return routing_loss_of([self.own_router], self.config, sample_types)

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """As `AdapterLinear.resize_for`: these shapes do not change in training."""


def check_head_groups(heads: int, attention_heads: int, key_value_heads: int, name: str) -> None:
    """Raise `ConfigError` unless each slice of the heads' outputs holds whole groups sharing a key-value head."""
    if key_value_heads % heads:
        allowed = [str(number) for number in range(1, key_value_heads + 1) if key_value_heads % number == 0]
        raise ConfigError(
            f"{name} has {attention_heads} attention heads in {key_value_heads} key-value groups, which {heads} slices "
            f"would cut; use one of {', '.join(allowed)}"
        )
