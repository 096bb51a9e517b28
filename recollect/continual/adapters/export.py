"""One fixed route as an ordinary LoRA adapter that PEFT and vLLM load.

Experts chosen by the input cannot be merged into the frozen weights.  Where the task is known at serving time, one
route can: with constant gates g (H, E), Σ_j Σ_e g_{j,e}·s·B_{j,e}·A_{j,e} is a single pair whose A holds the experts'
rows, zero outside their slice, and whose B holds their columns.  It equals the adapters exactly on tokens whose gates
are g: under topk_renorm with top_k 1 on every token that follows the route, otherwise under `forced_route`, since
softmax weights differ from token to token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recollect.continual.adapters.attach import adapters, attached_config, routers
from recollect.continual.adapters.mh_moe import AdapterFFN
from recollect.continual.adapters.routing import Router
from recollect.errors import ConfigError, InputError
from recollect.io import atomic_open, write_json

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Route:
    """Constant gates per router: name of the linear or FFN -> (H, E) float32, zero = expert not on the route.

    share: part of the observed tokens whose choices were exactly the route's, averaged over routers; None where the
    route was written down, not observed.
    """

    gates: Mapping[str, Tensor]
    share: float | None = None


def chosen_route(model: nn.Module, experts: Sequence[int] | Mapping[str, Sequence[int]]) -> Route:
    """The route that takes the given expert in each slice with weight 1.

    Args:
        model: with adapters.
        experts: H numbers, for every router or by the router's name (`attach.routers`).

    Raises:
        ConfigError: a router is not named, or there is no such expert.
    """
    gates = {}
    for name, router in routers(model).items():
        own = experts.get(name) if isinstance(experts, Mapping) else experts
        if own is None or len(own) != router.heads or not all(0 <= expert < router.n_experts for expert in own):
            raise ConfigError(
                f"the route of {name} must name {router.heads} experts in 0..{router.n_experts - 1}, got {own!r}"
            )
        gates[name] = torch.zeros(router.heads, router.n_experts)
        gates[name][torch.arange(router.heads), torch.tensor(list(own))] = 1.0
    return Route(gates)


class RouteObserver:
    """Finds the commonest route of the tokens seen: per router and slice the k most used experts, with the mean weight
    of the tokens that chose each; under a dense gate, every expert with its mean weight."""

    def __init__(self, model: nn.Module) -> None:
        self._routers: dict[str, Router] = routers(model)
        self._top_k = attached_config(model).top_k
        self._weights: dict[str, Tensor] = {}  # (H, E) sums
        self._counts: dict[str, Tensor] = {}  # (H, E)
        self._choices: dict[str, list[Tensor]] = {name: [] for name in self._routers}  # each (n, H, k) int16

    def observe(self) -> None:
        """Take in the last pass."""
        for name, router in self._routers.items():
            routing = router.last_routing
            if routing is None:
                raise InputError(f"the router of {name} has seen no tokens; run a pass before observe()")
            real = routing.real().bool()
            gates = routing.gates().detach()[real]
            self._weights[name] = self._weights.get(name, 0) + gates.double().sum(0).cpu()
            self._counts[name] = self._counts.get(name, 0) + (gates > 0).double().sum(0).cpu()
            if not routing.is_dense:
                self._choices[name].append(routing.indices[real].to(torch.int16).cpu())

    def route(self) -> Route:
        """The commonest route; its gates are the mean weights over the tokens that chose the expert.

        Raises:
            InputError: nothing was observed.
        """
        gates, shares = {}, []
        for name in self._routers:
            counts = self._counts.get(name, torch.zeros(1, 1))
            if not bool(counts.any()):
                raise InputError("no token was observed; run passes, each with observe()")
            kept = torch.ones_like(counts, dtype=torch.bool)
            if self._choices[name]:
                kept = torch.zeros_like(kept).scatter(1, counts.topk(self._top_k, dim=1).indices, True)
                choices = torch.cat(self._choices[name]).long()
                heads = torch.arange(choices.shape[1])[:, None]
                shares.append(kept[heads, choices].flatten(1).all(1).double().mean())
            means = self._weights[name] / counts.clamp_min(1.0)
            gates[name] = torch.where(kept, means, torch.zeros_like(means)).float()
        return Route(gates, float(torch.stack(shares).mean()) if shares else 1.0)


@contextlib.contextmanager
def forced_route(model: nn.Module, route: Route) -> Iterator[None]:
    """Send every token over `route` inside the block, whatever the routers say."""
    found = routers(model)
    for name, router in found.items():
        router.forced = _gates_of(route, name, router)
    try:
        yield
    finally:
        for router in found.values():
            router.forced = None


def export_route(model: nn.Module, route: Route, folder: str | Path) -> Path:
    """Write `route` as a PEFT LoRA adapter (`adapter_config.json`, `adapter_model.safetensors`) into `folder`.

    All linears get one rank, the largest any needs (zero rows fill the rest), for engines without per-layer ranks.

    Raises:
        ConfigError: the adapters are not pairs beside linears (placement parallel_ffn, or a method with other parts).
        InputError: the route does not fit the routers.
    """
    from safetensors.torch import save

    folder = Path(folder)
    config = attached_config(model)
    if config.placement == "parallel_ffn" or config.kind not in ("lora", "loramoe", "mh_moe"):
        raise ConfigError(
            f"adapters of kind {config.kind!r} with placement {config.placement!r} are not pairs beside linears and "
            "have no LoRA form; export loramoe or mh_moe with placement per_linear or block_shared"
        )
    names = {id(router): name for name, router in routers(model).items()}
    pairs = {}
    for name, module in adapters(model).items():
        if isinstance(module, AdapterFFN):
            raise ConfigError(f"{name} is a bank beside an FFN, which has no LoRA form")
        gates = None
        if module.router is not None:
            gates = _gates_of(route, names[id(module.router)], module.router)
        pairs[name] = route_pair(module.bank.weights(), gates, module.scaling)
    rank = max(down.shape[0] for down, _ in pairs.values())
    tensors = {}
    for name, (down, up) in pairs.items():
        spare = rank - down.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, spare)).cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(up, (0, spare)).cpu().contiguous()
    with atomic_open(folder / PEFT_WEIGHTS, "wb") as handle:
        handle.write(save(tensors))
    write_json(
        folder / PEFT_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "bias": "none",
            "target_modules": list(config.target_modules),
            "inference_mode": True,
        },
    )
    return folder


def route_pair(weights: tuple[Tensor, Tensor], gates: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """One LoRA pair A (R, d_in), B (d_out, R) with B·A = scaling·Σ gate·B_{j,e}·A_{j,e} over the experts on a route.

    Args:
        weights: A (H, E, r, d/H) and B (H, E, r, d_out) of a bank.
        gates: (H, E), or None for all experts with weight 1.
        scaling: s.
    """
    down, up = weights[0].detach(), weights[1].detach()
    heads, experts, rank, width = down.shape
    if gates is None:
        gates = torch.ones(heads, experts)
    chosen = gates.nonzero()  # (m, 2)
    placed = down.new_zeros(len(chosen), rank, heads, width)
    head, expert = chosen[:, 0].to(down.device), chosen[:, 1].to(down.device)
    placed[torch.arange(len(chosen), device=down.device), :, head] = down[head, expert]
    weight = gates.to(down.device)[head, expert] * scaling
    columns = up[head, expert] * weight[:, None, None]  # (m, r, d_out)
    return placed.reshape(len(chosen) * rank, heads * width), columns.flatten(0, 1).t()


def _gates_of(route: Route, name: str, router: Router) -> Tensor:
    gates = route.gates.get(name)
    if gates is None or tuple(gates.shape) != (router.heads, router.n_experts):
        found = None if gates is None else tuple(gates.shape)
        raise InputError(f"the route has gates {found} for {name}, which needs {(router.heads, router.n_experts)}")
    return gates
