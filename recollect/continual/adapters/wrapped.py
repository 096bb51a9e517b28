"""A frozen linear with low-rank experts beside it: y = W0·x + s·Σ_j Σ_e gate_{j,e}·B_{j,e}·A_{j,e}·x^{(j)}.

The base class of every adapter of this folder.  It stands where the linear stood, by the same name; `base` is the
linear itself, untouched.  A method that computes something else overrides `add_delta`.
Not covered: finding and replacing the linears of a model (`attach`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.config import MoELoraConfig
from recollect.continual.adapters.experts import ExpertBank
from recollect.continual.adapters.routing import MaskHolder, Router, Routing, bank_loss, weigh_losses
from recollect.errors import ConfigError


class AdapterLinear(nn.Module):
    """A frozen `nn.Linear` and its experts.

    Args:
        base: the linear; its parameters stop requiring gradients.
        config: of the method; `heads` must divide the linear's input width.
        name: the linear's name in the model: keys its initial weights and stands in messages.
        mask: shared by the model's adapters; None = a mask of its own (every token is real).
        router: one shared by the FFN's linears; None = one of its own, over its own input.

    Attributes:
        base, config, name, scaling.
        bank: the experts.
        router: the router it uses (its own submodule unless shared).
        enabled: False = the frozen linear alone.

    Raises:
        ConfigError: the heads do not divide the input width.
    """

    has_router = True

    def __init__(
        self,
        base: nn.Linear,
        config: MoELoraConfig,
        *,
        name: str = "linear",
        mask: MaskHolder | None = None,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config, self.name, self.scaling = config, name, config.scaling
        self.in_features, self.out_features = base.in_features, base.out_features
        self.enabled = True
        check_heads(config.heads, base.in_features, name)
        device = base.weight.device
        self.bank = ExpertBank(
            config.heads,
            config.experts,
            config.rank,
            base.in_features,
            base.out_features,
            seed=config.seed,
            name=name,
            device=device,
        )
        self._shared = () if router is None else (router,)  # in a tuple, so that it is nobody's submodule twice
        if router is None and self.has_router:
            self.own_router = make_router(config, base.in_features, name, mask or MaskHolder(), device)

    @property
    def router(self) -> Router | None:
        """The router in use; None where the method has none."""
        return self._shared[0] if self._shared else getattr(self, "own_router", None)

    @property
    def last_routing(self) -> Routing | None:
        """What the router decided in the last pass; None before one, or without a router."""
        return None if self.router is None else self.router.last_routing

    def route(self, x: Tensor, rows: Tensor | None = None) -> Routing | None:
        """The routing of x (…, d): by the own router, or what the shared one decided for these tokens.

        rows: for the own router, see `Router.forward`.
        """
        if self._shared:
            return self._shared[0].last_routing
        return None if self.router is None else self.router(x, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) to (…, d_out)."""
        output = self.base(x)
        return self.add_delta(output, x) if self.enabled else output

    def add_delta(self, output: Tensor, x: Tensor) -> Tensor:
        """The output (…, d_out) of the frozen linear plus what the experts add for x (…, d)."""
        dropped = functional.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
        own = None if self._shared or dropped is not x else self.router
        routing = self.route(x, None if own is None else self.bank.rows_beside(own, x))
        flat = self.bank(dropped.flatten(0, -2), routing, self.scaling, output.flatten(0, -2))
        return flat.view(output.shape)

    def delta(self, x: Tensor) -> Tensor:
        """What the experts add for x (…, d), in float32."""
        return self.add_delta(x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.float32), x)

    def routing_loss(self, sample_types: Tensor | None = None) -> Tensor:
        """The weighted routing losses of the last pass (0 where none is on); see `routing.bank_loss`.

        Raises:
            ConfigError: the record has no graph although the router is trained (reentrant checkpointing).
        """
        return routing_loss_of([self.router] if self.router is not None else [], self.config, sample_types)

    def resize_for(self, state: Mapping[str, Tensor]) -> None:
        """Take the shapes of a saved state about to be loaded, where a method's shapes change in training."""

    def extra_repr(self) -> str:
        return f"heads={self.bank.heads}, experts={self.bank.n_experts}, rank={self.bank.rank}"


def make_router(config: MoELoraConfig, width: int, name: str, mask: MaskHolder, device: torch.device | None) -> Router:
    """The router of one bank over inputs of `width`."""
    return Router(
        config.heads,
        width,
        config.experts,
        config.gate,
        config.top_k,
        seed=config.seed,
        name=name,
        mask=mask,
        device=device,
    )


def routing_loss_of(routers: list[Router], config: MoELoraConfig, sample_types: Tensor | None = None) -> Tensor:
    """The weighted routing losses of the routers' last pass; a scalar, 0 where no loss is on.

    Raises:
        ConfigError: see `AdapterLinear.routing_loss`.
    """
    banks = []
    for router in routers:
        routing = router.last_routing
        if routing is None or router.forced is not None:
            continue
        trained = any(rows.requires_grad for rows in router.rows)
        if torch.is_grad_enabled() and router.training and trained and not routing.logits.requires_grad:
            raise ConfigError(
                "the routing of the last pass carries no gradient: use non-reentrant gradient checkpointing "
                "(gradient_checkpointing_kwargs={'use_reentrant': False}) and run the pass with gradients on"
            )
        losses = bank_loss(routing, config, sample_types)
        if losses:
            banks.append(losses)
    return weigh_losses(banks, config)


def check_heads(heads: int, width: int, name: str) -> None:
    """Raise `ConfigError` unless `heads` divides the input width of the layer `name`."""
    if width % heads:
        divisors = [str(number) for number in range(1, min(width, 64) + 1) if width % number == 0]
        raise ConfigError(
            f"{name} has inputs of width {width}, which {heads} heads do not divide; use one of {', '.join(divisors)}"
        )
