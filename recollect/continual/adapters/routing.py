"""Routers of low-rank experts: gates, the record of a pass, and the losses that shape routing.

Sources: LoRAMoE (arXiv 2312.09979) for the dense gate and the localised balancing constraint; MH-MoE (arXiv 2602.12587)
for one private router per slice.  Logits and softmax are computed in float32 whatever the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from recollect.continual.adapters.config import Gate, MoELoraConfig
from recollect.errors import ConfigError, InputError
from recollect.rng import stream


@dataclass(frozen=True)
class Routing:
    """What the routers of one bank decided in one pass over n = batch·sequence tokens.

    logits, probabilities: (n, H, E) float32, with their graph.  weights, indices: (n, H, k) the gate weight of each
    chosen expert and its number.  mask: (n,) bool, True = real token, None = all are.  batch_shape: the leading
    dimensions of the input, e.g. (B, T).  products: (n, H, m) of the tokens with the rows a caller gave the router to
    multiply along with its own; never part of the record a router keeps.
    """

    logits: Tensor
    probabilities: Tensor
    weights: Tensor
    indices: Tensor
    mask: Tensor | None
    batch_shape: tuple[int, ...]
    products: Tensor | None = None

    @property
    def n_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def is_dense(self) -> bool:
        """Every expert is used by every token, in order."""
        return self.indices.shape[-1] == self.n_experts

    def gates(self) -> Tensor:
        """(n, H, E) weights with exact zeros where an expert was not chosen."""
        if self.is_dense:
            return self.weights
        return torch.zeros_like(self.probabilities).scatter(-1, self.indices, self.weights)

    def real(self) -> Tensor:
        """(n,) float32: 1 = real token, 0 = padding."""
        if self.mask is None:
            return torch.ones(len(self.logits), device=self.logits.device)
        return self.mask.float()

    def __deepcopy__(self, memo: dict) -> Routing:
        """Tensors with a graph cannot be copied deeply; a copied model keeps the values."""
        return self.detached()

    def detached(self) -> Routing:
        """A copy without the graph, safe to keep."""
        return replace(
            self,
            logits=self.logits.detach().clone(),
            probabilities=self.probabilities.detach().clone(),
            weights=self.weights.detach().clone(),
            indices=self.indices.clone(),
        )

    def usage(self) -> Tensor:
        """(H, E) float64: how many real tokens chose each expert; under a dense gate, the sum of its weights."""
        real = self.real()[:, None, None]
        if self.is_dense:
            return (self.weights.detach() * real).double().sum(0)
        chosen = torch.zeros_like(self.probabilities).scatter(-1, self.indices, 1.0)
        return (chosen * real).double().sum(0)


class MaskHolder:
    """The attention mask of the pass under way, shared by every adapter of a model.

    It stays in place until the next pass, so that checkpointed layers find it again in the backward pass.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.pinned = False

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of a decoder: remember `attention_mask` (its second argument) where it is (B, T)."""
        if not self.pinned:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def tokens(self, batch_shape: Sequence[int]) -> Tensor | None:
        """(n,) bool of an input of shape (*batch_shape, d), or None when every token is real.

        In generation the mask covers the cached past too; the tokens at hand are its last columns.

        Raises:
            InputError: the mask does not fit the tokens.
        """
        if self.mask is None:
            return None
        mask = self.mask
        if len(batch_shape) == 2 and mask.shape[0] == batch_shape[0] and mask.shape[1] >= batch_shape[1]:
            mask = mask[:, mask.shape[1] - batch_shape[1] :]
        elif mask.numel() != math.prod(batch_shape):
            raise InputError(
                f"the attention mask of shape {tuple(mask.shape)} does not fit tokens of shape {tuple(batch_shape)}; "
                "give the layers' own mask with token_mask(model, mask)"
            )
        return mask.reshape(-1).bool()


class Router(nn.Module):
    """One linear router per slice: W_r ∈ R^{E×d/H}, no bias, weights and softmax in float32.

    Experts arrive in generations (growth); rows of a generation that is not yet open do not exist for the softmax.

    Args:
        heads, width, experts: H, d and the E of the first generation.
        gate, top_k: see `MoELoraConfig`.
        seed, name: of the initial weights, U(±1/√(d/H)) as `nn.Linear` has them.
        mask: shared by the model's adapters.
    """

    def __init__(
        self,
        heads: int,
        width: int,
        experts: int,
        gate: Gate,
        top_k: int,
        *,
        seed: int,
        name: str,
        mask: MaskHolder,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.width, self.gate, self.top_k = heads, width, gate, top_k
        self._seed, self._name = seed, name
        self._mask = mask
        self.forced: Tensor | None = None
        self.last_routing: Routing | None = None
        self.rows = nn.ParameterList()
        self.n_open = 0
        self.grow(experts, device=device)
        self.open_all()

    @property
    def n_experts(self) -> int:
        """E over the open generations."""
        return sum(rows.shape[1] for rows in list(self.rows)[: self.n_open])

    @property
    def n_chosen(self) -> int:
        """Experts a token gets a weight for in each slice."""
        return self.n_experts if self.forced is not None or self.gate == "dense" else self.top_k

    def grow(self, experts: int, device: torch.device | None = None) -> nn.Parameter:
        """Add the rows (H, experts, d/H) of a generation, closed until `open_all`."""
        slice_width = self.width // self.heads
        bound = 1 / math.sqrt(slice_width)
        generator = stream(self._seed, "router", self._name, len(self.rows))
        values = generator.uniform(-bound, bound, (self.heads, experts, slice_width))
        rows = nn.Parameter(torch.tensor(values, dtype=torch.float32, device=device))
        self.rows.append(rows)
        return rows

    def open_all(self) -> None:
        """Let every generation take part."""
        self.n_open = len(self.rows)

    def weight(self) -> Tensor:
        """(H, E, d/H) rows of the open generations."""
        rows = list(self.rows)[: self.n_open]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Routing:
        """Route x (…, d); the record is returned and kept as `last_routing`.

        With rows (H, m, d/H) float32, what is returned has their `products` too: x is then read once for both, and its
        gradient written once.
        """
        batch_shape = tuple(x.shape[:-1])
        tokens = x.reshape(-1, self.heads, self.width // self.heads)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight().float()
            both = weight if rows is None else torch.cat([weight, rows], dim=1)
            logits = slice_products(tokens.float(), both)  # (n, H, E) or (n, H, E + m)
            if rows is not None:
                logits, products = logits.split([weight.shape[1], rows.shape[1]], dim=-1)
                logits = logits.contiguous()  # a record that is kept must not keep the products
            weights, indices, probabilities = choose(logits, self.gate, self.top_k)
        mask = self._mask.tokens(batch_shape)
        routing = Routing(logits, probabilities, weights, indices, mask, batch_shape)
        if self.forced is not None:
            routing = _with_gates(routing, self.forced)
        self.last_routing = routing
        return routing if rows is None else replace(routing, products=products)


def _with_gates(routing: Routing, gates: Tensor) -> Routing:
    """The same record with the constant gates (H, E) for every token."""
    n, heads, experts = routing.logits.shape
    indices = torch.arange(experts, device=gates.device).expand(n, heads, experts)
    return replace(routing, weights=gates.to(routing.logits.device).expand(n, heads, experts), indices=indices)


def slice_products(tokens: Tensor, weight: Tensor) -> Tensor:
    """(n, H, m): every slice of tokens (n, H, c) times its own matrix of weight (H, m, c)."""
    if weight.shape[0] == 1:  # squeeze, not [:, 0]: the gradient of an index is written into new zeros
        return functional.linear(tokens.squeeze(1), weight.squeeze(0))[:, None]
    return torch.bmm(tokens.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)


def choose(logits: Tensor, gate: Gate, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate weights (…, k), chosen experts (…, k) and the full softmax (…, E) of logits (…, E).

    With k = 1, topk_renorm gives the constant weight 1, whose gradient to the router is exactly zero; topk_full keeps
    the winner's probability and with it a task gradient.
    """
    probabilities = logits.softmax(-1)
    if gate == "dense" or top_k == logits.shape[-1]:
        return probabilities, torch.arange(logits.shape[-1], device=logits.device).expand_as(logits), probabilities
    source = probabilities if gate == "topk_full" else logits
    if top_k == 1:
        values, indices = source.max(-1, keepdim=True)
    else:
        values, indices = source.topk(top_k, dim=-1)
    return (values if gate == "topk_full" else values.softmax(-1)), indices, probabilities


# Losses.  Each takes the record of one bank and is a scalar; padding never counts.


def load_balance_loss(routing: Routing) -> Tensor:
    """E·Σ_e f_e·P̄_e averaged over slices: 1 for uniform top-1 routing, E when one expert takes every token with p = 1.

    f_e = share of (token, slot) assignments (a constant), P̄_e = mean probability, both over real tokens.  Under a
    dense gate every f_e is 1/E and the value is 1 without a gradient.
    """
    real = routing.real()
    count = real.sum().clamp_min(1.0)
    if routing.is_dense:
        share = torch.full_like(routing.probabilities[0], 1 / routing.n_experts)
    else:
        share = routing.usage().float() / (count * routing.indices.shape[-1])
    mean = torch.einsum("n,nhe->he", real, routing.probabilities) / count
    return routing.n_experts * (share * mean).sum(-1).mean()


def z_loss(routing: Routing) -> Tensor:
    """Mean over real tokens and slices of logsumexp(logits)²."""
    real = routing.real()
    squares = routing.logits.logsumexp(-1).square().mean(-1)
    return (squares * real).sum() / real.sum().clamp_min(1.0)


def localized_balancing(probabilities: Tensor, importance: Tensor) -> Tensor:
    """Var(I∘Q) / (Mean(I∘Q)² + 1e-10), unbiased variance over all entries.

    Args:
        probabilities: Q (B, E), expert probabilities summed (or averaged) over each sample's tokens.
        importance: I (B, E), 1+δ where the expert's type is the sample's, 1−δ elsewhere.

    Source: the authors' code; the paper, as recalled, writes Var/Mean, which is not scale-free.
    """
    weighted = importance * probabilities
    return weighted.var() / (weighted.mean().square() + 1e-10)


def localized_balancing_loss(routing: Routing, sample_types: Tensor, delta: float, length_normalize: bool) -> Tensor:
    """The localised balancing constraint of one bank, averaged over slices.

    Experts 1..E/2 are of type 1, the rest of type 0.  Minimising it makes the group whose entries carry 1−δ serve a
    type, so which group serves which is a matter of names.

    Args:
        routing: of a pass over (B, T) tokens.
        sample_types: (B,) 0 or 1.
        delta: δ in [0, 1).
        length_normalize: mean over real tokens; False = sum over all tokens, padding included, as in the authors' code.

    Raises:
        InputError: the pass was not over samples of tokens, or the types are not one 0 or 1 per sample.
    """
    if len(routing.batch_shape) != 2 or sample_types.shape != routing.batch_shape[:1]:
        raise InputError(
            f"sample_types of shape {tuple(sample_types.shape)} do not fit a pass over tokens of shape "
            f"{routing.batch_shape}; give one type per sample of a (batch, sequence) input"
        )
    if not bool(((sample_types == 0) | (sample_types == 1)).all()):
        raise InputError(f"sample_types must be 0 or 1, got {sample_types.unique().tolist()}")
    heads, experts = routing.logits.shape[1:]
    probabilities = routing.probabilities.view(*routing.batch_shape, heads, experts)
    if length_normalize:
        real = routing.real().view(routing.batch_shape)
        sums = torch.einsum("bt,bthe->bhe", real, probabilities) / real.sum(1).clamp_min(1.0)[:, None, None]
    else:
        sums = probabilities.sum(1)
    types = (torch.arange(experts, device=sums.device) < experts // 2).long()
    importance = torch.where(types[None] == sample_types.to(sums.device)[:, None], 1 + delta, 1 - delta)
    return torch.stack([localized_balancing(sums[:, head], importance) for head in range(heads)]).mean()


def bank_loss(routing: Routing, config: MoELoraConfig, sample_types: Tensor | None = None) -> dict[str, Tensor]:
    """The unweighted losses of one bank that `config` switches on: any of "balance", "z", "lbc".

    Raises:
        ConfigError: the localised balancing constraint is on and no sample types were given.
    """
    losses = {}
    if config.balance:
        losses["balance"] = load_balance_loss(routing)
    if config.z_loss:
        losses["z"] = z_loss(routing)
    if config.lbc:
        if sample_types is None:
            raise ConfigError("lbc is above 0: the routing loss needs sample_types, one 0 or 1 per sample")
        losses["lbc"] = localized_balancing_loss(routing, sample_types, config.lbc_delta, config.lbc_length_normalize)
    return losses


def weigh_losses(banks: Sequence[dict[str, Tensor]], config: MoELoraConfig) -> Tensor:
    """One scalar from the losses of all banks: lbc summed over banks (as published), the others averaged over them."""
    totals = {name: torch.stack([losses[name] for losses in banks]) for name in banks[0]} if banks else {}
    weights = {"balance": config.balance, "z": config.z_loss}
    parts = [weights[name] * values.mean() for name, values in totals.items() if name in weights]
    if "lbc" in totals:
        parts.append(config.lbc * totals["lbc"].sum())
    return torch.stack(parts).sum() if parts else torch.zeros(())
