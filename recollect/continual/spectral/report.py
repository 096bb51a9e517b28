"""`spectral_report`: how far the experts of one layer differ, for any mixture of experts (spec sd_moe 5).

Layers understood: blocks of transformers with fused experts (`.experts`, `.gate`), converted or not; an experts module
alone; `SpectralDecoupledLinear`; a linear wrapped by LoRA experts (each slice of the input is a bank of its own); or a
mapping of stacks of matrices (E, m, n), e.g. of MMoE towers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recollect.continual.adapters.wrapped import AdapterLinear
from recollect.continual.spectral.convert import LINEARS, SpectralExperts, expert_stacks, is_fused_experts
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.metrics import (
    common_energy_share,
    effective_rank,
    gate_alignment,
    input_alignment,
    linear_cka,
    mean_over_pairs,
    overlap_ranks,
    pairwise_overlap,
    routing_information,
    singular_directions,
)
from recollect.continual.spectral.projections import Basis, complement_leak, leading_basis
from recollect.errors import ConfigError, InputError

MICRO_BATCHES = 32
"""Fewest micro-batches whose gradients make a stable direction."""


@dataclass(frozen=True)
class SpectralReport:
    """Numbers by name, e.g. "gate_proj/overlap_left@4", each with its value under unrelated experts where one is known.

    metrics: values.  random: baseline of the same name (k / m, k / n).  pairs: (E, E) tables behind the means.
    """

    metrics: dict[str, float]
    random: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"metrics": self.metrics, "random": self.random, "pairs": self.pairs}


def expert_matrices(layer: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts' effective matrices (E, m, n) by the name of their linear, detached.

    Raises:
        InputError: the layer is of no kind this module understands.
    """
    if isinstance(layer, Mapping):
        stacks = {name: stack.detach() for name, stack in layer.items()}
    elif isinstance(layer, SpectralDecoupledLinear):
        stacks = {"linear": layer.merge()}
    elif isinstance(layer, AdapterLinear):
        down, up = (factor.detach() for factor in layer.bank.weights())
        updates = layer.scaling * torch.einsum("hero,heri->heoi", up, down)
        stacks = {f"slice_{number}": stack for number, stack in enumerate(updates)}
    else:
        stacks = expert_stacks(_experts(layer))
    for name, stack in stacks.items():
        if stack.dim() != 3:
            raise InputError(f"{name} must be a stack of matrices (E, m, n), got shape {tuple(stack.shape)}")
    return stacks


def spectral_report(
    layer: nn.Module | Mapping[str, Tensor],
    inputs: Tensor | None = None,
    *,
    gradients: Mapping[str, Tensor] | None = None,
    router: Tensor | None = None,
    selected: Tensor | None = None,
    labels: Tensor | None = None,
    ks: tuple[int, ...] | None = None,
) -> SpectralReport:
    """Diagnose one layer; what cannot be known from the arguments is left out.

    Args:
        layer: see the module.
        inputs: (N, n) hidden states that enter the layer, for alignment with the router, outputs and routing.
        gradients: from `expert_gradients`, for their overlap and common energy.
        router: (E, n) weights; default the layer's own.
        selected: (N, K) experts of the inputs; default what the block's own gate selects.
        labels: (N,) int64 domain of each input token, for the routing's information about it.
        ks: numbers of directions; default 1, 4, 8 and 1 % of the smaller side.

    Source: spec sd_moe 5, numbers 1 to 6; the loss after swapping experts is `swap_losses`.
    """
    stacks = expert_matrices(layer)
    gate = getattr(layer, "gate", None)
    routers = _routers(layer, stacks, router)
    if ks is None and isinstance(layer, AdapterLinear):
        ks = tuple(sorted({1, layer.bank.rank}))  # beyond their rank directions are arbitrary
    report = SpectralReport({})
    for name, stack in stacks.items():
        basis = _basis(layer, name, stack)
        _overlaps(report, name, stack, ks)
        report.metrics[f"{name}/common_energy"] = float(common_energy_share(stack, basis).mean())
        report.metrics[f"{name}/effective_rank"] = float(effective_rank(stack).mean())
        if gradients is not None and name in gradients:
            _overlaps(report, f"{name}/gradient", gradients[name], ks)
            energy = common_energy_share(gradients[name], basis)
            report.metrics[f"{name}/gradient/common_energy"] = float(energy.mean())
        if name in routers:
            _alignment(report, name, stack, routers[name], ks)
    for name, split in _spectral_linears(layer).items():
        left, right = complement_leak(split.unique, split.basis)
        report.metrics[f"{name}/leak_left"], report.metrics[f"{name}/leak_right"] = left, right
    if inputs is not None:
        _functional(report, layer, inputs, list(routers.values()), selected, labels, gate)
    return report


def expert_gradients(
    layer: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    *,
    fewest: int = MICRO_BATCHES,
) -> dict[str, Tensor]:
    """Gradients of the experts' effective matrices, summed over micro-batches, as float32 stacks (E, m, n).

    No `.grad` is touched.  For a split layer these are the gradients before any projection.

    Args:
        layer: a block or experts module, converted or not, or a `SpectralDecoupledLinear`, inside the model.
        losses: one function per micro-batch that runs the model and returns its loss.
        fewest: micro-batches below which the directions would be noise.

    Raises:
        ConfigError: fewer micro-batches than `fewest`.
    """
    total: dict[str, Tensor] = {}
    n_batches = 0
    with _kept_effective(layer):
        for loss in losses:
            value = loss()
            targets = _gradient_targets(layer)
            found = torch.autograd.grad(value, list(targets.values()))
            for name, gradient in zip(targets, found, strict=True):
                summed = gradient.float() if name not in total else total[name] + gradient
                total[name] = summed
            n_batches += 1
    if n_batches < fewest:
        raise ConfigError(f"gradients of {n_batches} micro-batches say little about directions; give {fewest} or more")
    if "gate_up_proj" in total:
        total["gate_proj"], total["up_proj"] = total.pop("gate_up_proj").chunk(2, dim=1)
    return total


def swap_losses(layer: nn.Module, loss: Callable[[], Tensor], pairs: Iterable[tuple[int, int]]) -> dict[str, float]:
    """How much the loss grows when two experts of a layer change places: 0 for interchangeable experts.

    Args:
        layer: a block with `.experts`, or an experts module of transformers, not converted (merge first), whose router
            stays as it is.
        loss: runs the model on fixed data.

    Returns:
        {"i-j": loss after the swap minus loss before}, nats per token if the loss is.
    """
    experts = _experts(layer)
    if not is_fused_experts(experts):
        raise InputError(f"experts of {type(experts).__name__} cannot be swapped in place; merge_moe the model first")
    weights = [experts.gate_up_proj, experts.down_proj]
    changes = {}
    with torch.no_grad():
        start = float(loss())
        for first, second in pairs:
            places, swapped = [first, second], [second, first]
            for weight in weights:
                weight[places] = weight[swapped]  # type: ignore[index, operator]
            try:
                changes[f"{first}-{second}"] = float(loss()) - start
            finally:
                for weight in weights:
                    weight[places] = weight[swapped]  # type: ignore[index, operator]
    return changes


def _overlaps(report: SpectralReport, name: str, stack: Tensor, ks: tuple[int, ...] | None) -> None:
    out_features, in_features = stack.shape[1:]
    chosen = ks or overlap_ranks(out_features, in_features)
    widest = singular_directions(stack, max(chosen))
    for k in chosen:
        for side, directions, width in (("left", widest.left, out_features), ("right", widest.right, in_features)):
            table = pairwise_overlap(directions[..., :k])
            metric = f"{name}/overlap_{side}@{k}"
            if len(stack) > 1:
                report.metrics[metric] = mean_over_pairs(table)
                report.random[metric] = k / width
            report.pairs[metric] = table.tolist()


def _alignment(report: SpectralReport, name: str, stack: Tensor, router: Tensor, ks: tuple[int, ...] | None) -> None:
    k = max(ks or (math.ceil(0.01 * min(stack.shape[1:])),))
    score, specificity = gate_alignment(router, singular_directions(stack, k).right)
    metric = f"{name}/gate_alignment@{k}"
    report.metrics[metric] = float(score.diagonal().mean())
    report.random[metric] = k / stack.shape[2]
    report.metrics[f"{name}/gate_specificity@{k}"] = float(specificity.mean())
    report.pairs[metric] = score.tolist()


def _functional(
    report: SpectralReport,
    layer: nn.Module | Mapping[str, Tensor],
    inputs: Tensor,
    routers: list[Tensor],
    selected: Tensor | None,
    labels: Tensor | None,
    gate: Any,
) -> None:
    if routers and routers[0].shape[1] == inputs.shape[1]:
        router = routers[0]
        k = min(8, *inputs.shape)
        report.metrics[f"router/input_alignment@{k}"] = float(input_alignment(router, inputs, k).mean())
        report.random[f"router/input_alignment@{k}"] = k / inputs.shape[1]
    outputs = _expert_outputs(layer, inputs)
    if outputs is not None and len(outputs) > 1:
        table = linear_cka(outputs)
        report.metrics["outputs/cka"] = mean_over_pairs(table)
        report.pairs["outputs/cka"] = table.tolist()
    if selected is None and isinstance(gate, nn.Module):
        with torch.no_grad():
            decided = gate(inputs)
        if isinstance(decided, tuple) and len(decided) == 3:  # logits, weights, indices: transformers' routers
            selected = decided[2]
    if labels is not None:
        if selected is None:
            raise ConfigError("labels were given, but not which experts were selected; give selected=")
        n_experts = len(next(iter(expert_matrices(layer).values())))
        report.metrics["routing/information"] = routing_information(selected, labels, n_experts)


def _expert_outputs(layer: nn.Module | Mapping[str, Tensor], inputs: Tensor) -> Tensor | None:
    """(E, N, m) what every expert makes of every input; None where the layer is bare matrices of other widths."""
    if isinstance(layer, (Mapping, SpectralDecoupledLinear, AdapterLinear)):
        stacks = expert_matrices(layer)
        if len(stacks) != 1 or next(iter(stacks.values())).shape[2] != inputs.shape[1]:
            return None
        stack = next(iter(stacks.values()))
        return torch.einsum("ni,emi->enm", inputs.to(stack.dtype), stack)
    experts: Any = _experts(layer)
    stacks = expert_stacks(experts)
    hidden = inputs.to(stacks["gate_proj"].dtype)
    with torch.no_grad():
        gate = torch.einsum("ni,emi->enm", hidden, stacks["gate_proj"])
        up = torch.einsum("ni,emi->enm", hidden, stacks["up_proj"])
        return torch.einsum("eni,emi->enm", experts.act_fn(gate) * up, stacks["down_proj"])


def _routers(
    layer: nn.Module | Mapping[str, Tensor], stacks: Mapping[str, Tensor], given: Tensor | None
) -> dict[str, Tensor]:
    """(E, n) router of every stack whose input it reads."""
    if given is None and isinstance(layer, AdapterLinear):
        if layer.router is None:
            return {}
        slices = {f"slice_{number}": rows for number, rows in enumerate(layer.router.weight().detach())}
        return {name: rows for name, rows in slices.items() if rows.shape[1] == stacks[name].shape[2]}
    weight = getattr(getattr(layer, "gate", None), "weight", None) if given is None else given
    if not isinstance(weight, Tensor):
        return {}
    return {name: weight.detach() for name, stack in stacks.items() if stack.shape[2] == weight.shape[1]}


def _experts(layer: nn.Module) -> nn.Module:
    inner = getattr(layer, "experts", None)
    return inner if isinstance(inner, nn.Module) else layer


def _spectral_linears(layer: nn.Module | Mapping[str, Tensor]) -> dict[str, SpectralDecoupledLinear]:
    if isinstance(layer, Mapping):
        return {}
    if isinstance(layer, SpectralDecoupledLinear):
        return {"linear": layer}
    experts = _experts(layer)
    return {name: experts.linear(name) for name in LINEARS} if isinstance(experts, SpectralExperts) else {}


def _basis(layer: nn.Module | Mapping[str, Tensor], name: str, stack: Tensor) -> Basis:
    """The layer's own basis, or the leading directions of the mean expert (up to 8)."""
    split = _spectral_linears(layer).get(name)
    if split is not None and split.common_rank:
        return split.basis
    return leading_basis(stack.mean(0), min(8, min(stack.shape[1:]) - 1))


def _gradient_targets(layer: nn.Module) -> dict[str, Tensor]:
    linears = _spectral_linears(layer)
    if linears:
        kept = {name: linear.last_effective for name, linear in linears.items()}
        missing = sorted(name for name, weights in kept.items() if weights is None)
        if missing:
            raise ConfigError(f"the loss did not use the layer: {missing[0]} was never multiplied")
        return kept  # type: ignore[return-value]  # None was refused above
    experts = _experts(layer)
    if not is_fused_experts(experts):
        raise InputError(f"{type(experts).__name__} holds no experts whose gradients could be taken")
    return {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}  # type: ignore[dict-item]


@contextlib.contextmanager
def _kept_effective(layer: nn.Module) -> Iterator[None]:
    linears = _spectral_linears(layer).values()
    for linear in linears:
        linear.keep_effective = True
    try:
        yield
    finally:
        for linear in linears:
            linear.keep_effective, linear.last_effective = False, None
