"""Native mixture-of-experts blocks of transformers, split spectrally in place and merged back (SD-MoE, 2602.12556).

Works on every model whose experts transformers keep as two stacks, `gate_up_proj` (E, 2 I, H) with the gate's rows
first and `down_proj` (E, H, I), without biases: Qwen2-MoE, Qwen3-MoE, DeepSeek V2 and V3, Mixtral and others.  The
three linears gate, up and down are split independently.  Shared experts, routers and attention stay as they are.

    report = convert_moe(model, common_rank=8)     # lossless: the same logits
    ... train with SpectralProjector(model) ...
    merge_moe(model).save_pretrained(folder)       # an ordinary checkpoint

Not covered: experts with biases or transposed stacks, expert parallelism, saving a model that is not merged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recollect.continual.spectral.grouped import group_by_expert
from recollect.continual.spectral.linear import SpectralDecoupledLinear
from recollect.continual.spectral.projections import check_common_rank, check_usage
from recollect.errors import ConfigError, InputError

LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    common_energy, dropped_energy: share of the experts' squared norm in the common matrix (counted once per expert),
    and in what only `lossless` keeps, per linear ("model.layers.0.mlp.experts.gate_proj").  perplexity_before,
    perplexity_after: None unless measured.
    """

    common_energy: dict[str, float]
    dropped_energy: dict[str, float]
    perplexity_before: float | None = None
    perplexity_after: float | None = None


class SpectralExperts(nn.Module):
    """The experts of one block, each linear of them spectrally decoupled; called as transformers calls its own.

    Args:
        stock: the experts module this one replaces; its weights are read, then released.
        common_rank: k.
        lossless: see `SpectralDecoupledLinear.from_experts`.
        usage: (E,) weights of the mean expert, or None.
        options: of `SpectralDecoupledLinear`.
    """

    _stock: Any

    def __init__(self, stock: Any, common_rank: int, *, lossless: bool, usage: Tensor | None, **options: Any) -> None:
        super().__init__()
        stacks = expert_stacks(stock)
        trained = {
            "gate_proj": stock.gate_up_proj.requires_grad,
            "up_proj": stock.gate_up_proj.requires_grad,
            "down_proj": stock.down_proj.requires_grad,
        }
        for name in LINEARS:
            linear = SpectralDecoupledLinear.from_experts(
                stacks[name], common_rank, lossless=lossless, usage=usage, **options
            )
            self.add_module(name, linear.requires_grad_(trained[name]))
        self.num_experts = len(stacks["down_proj"])
        self.act_fn = stock.act_fn
        # Outside the module tree: it holds no weights and only knows how an ordinary experts module is made.
        object.__setattr__(self, "_stock", stock.to("meta"))

    def linear(self, name: str) -> SpectralDecoupledLinear:
        """The split linear called `name`."""
        linear = self.get_submodule(name)
        assert isinstance(linear, SpectralDecoupledLinear)
        return linear

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H), (N, K) int64 and (N, K) -> (N, H)."""
        grouping = group_by_expert(top_k_index, self.num_experts)
        gate = self.linear("gate_proj").expert_outputs(hidden_states, grouping, shared_input=True)
        up = self.linear("up_proj").expert_outputs(hidden_states, grouping, shared_input=True)
        inner = self.act_fn(gate) * up  # (S, I)
        each = self.linear("down_proj").expert_outputs(inner, grouping, shared_input=False)  # (S, H)
        by_slot = each.index_select(0, grouping.place).view(*top_k_index.shape, each.shape[1])
        return (by_slot * top_k_weights[..., None].to(each.dtype)).sum(1).to(hidden_states.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The ordinary experts module of the same function, in the same dtype and on the same device."""
        merged: nn.Module = copy.deepcopy(self._stock)
        gate, up, down = (self.linear(name).merge() for name in LINEARS)
        trained = {name: self.linear(name).unique.requires_grad for name in LINEARS}
        merged.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1), requires_grad=trained["gate_proj"])
        merged.down_proj = nn.Parameter(down.contiguous(), requires_grad=trained["down_proj"])
        merged.train(self.training)
        return merged


class ComplementInput:
    """Forward pre-hook of a router: it sees x - V (V^T x) and so cannot follow the shared directions (spec 3.5)."""

    def __init__(self, linear: SpectralDecoupledLinear) -> None:
        self.linear = linear

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        right = self.linear.right.to(x.dtype)
        return (x - (x @ right) @ right.T, *rest)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds gated experts as the two stacks this file understands."""
    stacks = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if any(stack is None or stack.dim() != 3 for stack in stacks):
        return False
    # Set by transformers on every experts class; other layouts (gpt-oss, llama4) say so here.
    return (
        getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
        and getattr(module, "is_concatenated", False)
    )


def expert_stacks(module: nn.Module) -> dict[str, Tensor]:
    """The experts' matrices (E, out, in) of a fused or a converted experts module, by the name of the linear.

    Raises:
        InputError: it is neither.
    """
    if isinstance(module, SpectralExperts):
        return {name: module.linear(name).merge() for name in LINEARS}
    if not is_fused_experts(module):
        raise InputError(
            f"{type(module).__name__} does not hold experts as stacks gate_up_proj (E, 2 I, H) and down_proj (E, H, I) "
            "without biases; supported are the Qwen- and DeepSeek-style blocks of transformers 5"
        )
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)  # type: ignore[operator]
    return {"gate_proj": gate, "up_proj": up, "down_proj": module.down_proj.detach()}  # type: ignore[operator, dict-item]


def convert_moe(
    model: nn.Module,
    common_rank: int = 8,
    *,
    lossless: bool = True,
    usage: dict[str, Tensor] | None = None,
    gate_input: Literal["full", "complement"] = "full",
    perplexity: Callable[[nn.Module], float] | None = None,
    **options: Any,
) -> ConversionReport:
    """Replace the experts of every block of `model` by spectrally decoupled ones, in place.

    Args:
        lossless: every expert keeps its function; otherwise what it alone does in the common space is dropped, which
            changes the model, so `perplexity` must measure by how much.
        usage: name of an experts module -> (E,) weights of its mean expert, e.g. tokens seen.
        gate_input: "complement" hides the common space of the gate linear from the router, which changes the model.
        perplexity: of the model on the user's text; called before and after.
        options: of `SpectralDecoupledLinear`.

    Raises:
        InputError: no block of the supported layout, or `usage` names a module that is none.
        ConfigError: an illegal option or rank, or a lossy conversion whose effect is not measured.
    """
    if gate_input not in ("full", "complement"):
        raise ConfigError(f"gate_input must be 'full' or 'complement', got {gate_input!r}")
    if (not lossless or gate_input == "complement") and perplexity is None:
        raise ConfigError(
            f"lossless={lossless} with gate_input={gate_input!r} changes the model; give perplexity=, "
            "a function of the model, so that the report can say by how much"
        )
    blocks = _blocks(model)
    unknown = set(usage or {}) - {f"{name}.experts".lstrip(".") for name, _ in blocks}
    if unknown:
        raise InputError(f"usage names {sorted(unknown)[0]!r}, which is no experts module of this model")
    for name, block in blocks:
        path = f"{name}.experts".lstrip(".")
        for stack in expert_stacks(block.experts).values():  # all are checked before any is touched
            n_experts, out_features, in_features = stack.shape
            check_common_rank(common_rank, out_features, in_features, where=path)
            SpectralDecoupledLinear(n_experts, out_features, in_features, common_rank, device="meta", **options)
        if path in (usage or {}):
            check_usage((usage or {})[path], n_experts, where=f"usage[{path!r}]")
    before = perplexity(model) if perplexity is not None else None
    common, dropped = {}, {}
    for name, block in blocks:
        path = f"{name}.experts".lstrip(".")
        stacks = expert_stacks(block.experts)
        energies = {linear: float(stack.float().square().sum()) for linear, stack in stacks.items()}
        own_usage = (usage or {}).get(path)
        block.experts = SpectralExperts(block.experts, common_rank, lossless=lossless, usage=own_usage, **options)
        for linear, stack in stacks.items():
            split = block.experts.linear(linear)
            shared = split.common.detach()
            lost = stack - shared - split.unique.detach()
            common[f"{path}.{linear}"] = len(stack) * float(shared.float().square().sum()) / energies[linear]
            dropped[f"{path}.{linear}"] = float(lost.float().square().sum()) / energies[linear]
        if gate_input == "complement":
            hook = ComplementInput(block.experts.linear("gate_proj"))
            block.gate._complement_input = (hook, block.gate.register_forward_pre_hook(hook))
    after = perplexity(model) if perplexity is not None else None
    return ConversionReport(common, dropped, before, after)


@torch.no_grad()
def merge_moe(model: nn.Module) -> nn.Module:
    """Undo `convert_moe` in place: ordinary experts of the same function, loadable by the stock class.

    A router that saw only the complement gets weights W (I - V V^T), which is the same function of the full input.

    Raises:
        InputError: the model holds no converted block.
    """
    converted: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "experts", None), SpectralExperts)
    ]
    if not converted:
        raise InputError("the model holds no spectrally decoupled experts; nothing to merge")
    for block in converted:
        complement = block.gate.__dict__.pop("_complement_input", None)
        if complement is not None:
            hook, handle = complement
            handle.remove()
            right = hook.linear.right.to(block.gate.weight.dtype)
            block.gate.weight.sub_((block.gate.weight @ right) @ right.T)
        block.experts = block.experts.merged()
    return model


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, block) of every module with fused experts under `experts`."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module) and is_fused_experts(module.experts)
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no mixture-of-experts block with stacks gate_up_proj (E, 2 I, H) and "
            "down_proj (E, H, I) without biases; supported are the Qwen- and DeepSeek-style blocks of transformers 5"
        )
    return found
