"""Options of the low-rank expert adapters; torch-free, one dataclass per method.

Not covered: how a method is trained (`recollect.continual.methods`) and what it is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from recollect.config import build, to_dict
from recollect.errors import ConfigError, UnknownName

Gate = Literal["dense", "topk_full", "topk_renorm"]
Placement = Literal["per_linear", "block_shared", "parallel_ffn"]
SliceSource = Literal["post_attn", "pre_o"]

FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
TASK_WIDTH = 16
"""Of the vectors MOELoRA has for tasks."""


@dataclass(frozen=True)
class MoELoraConfig:
    """Low-rank experts behind routers, beside frozen linears; the base of every method's options."""

    kind: ClassVar[str] = "moe_lora"

    rank: int = 8
    """Rank of each expert."""
    alpha: float = 16.0
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    dropout: float = 0.0
    """Dropout on the experts' input; the routers see the input whole."""
    experts: int = 4
    """Experts per bank."""
    heads: int = 1
    """Contiguous slices of the input, each with a router and a bank of its own."""
    gate: Gate = "topk_full"
    """dense = all softmax weights; topk_full = the winners' softmax weights; topk_renorm = softmax over the winners."""
    top_k: int = 1
    """Experts per token and slice; dense uses all."""
    target_modules: tuple[str, ...] = FFN_LINEARS
    """Last names of the linears to adapt."""
    placement: Placement = "per_linear"
    """per_linear = routers per linear; block_shared = one set of routes per FFN; parallel_ffn = one bank beside."""
    slice_source: SliceSource = "post_attn"
    """post_attn = slices of the FFN's input; pre_o = the attention heads' outputs (parallel_ffn only)."""
    balance: float = 0.0
    """Coefficient of the load-balancing loss."""
    z_loss: float = 0.0
    """Coefficient of the mean squared log-partition of the routers."""
    lbc: float = 0.0
    """Coefficient (beta) of the localised balancing constraint."""
    lbc_delta: float = 0.1
    """Strength (delta) of the localised balancing constraint, below 1."""
    lbc_length_normalize: bool = True
    """Mean over a sample's real tokens instead of the sum over all its tokens."""
    grow: int = 0
    """Experts added to every bank before each task after the first."""
    router_replay: float = 0.0
    """Share of the data of every task seen, the present one included, replayed to the routers alone after a task."""
    update_gate: Literal["none", "usage"] = "none"
    """usage = scale every expert's update by how much more the new task uses it than the old ones did."""
    seed: int = 0
    """Of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("rank", "experts", "heads", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("balance", "z_loss", "lbc", "router_replay", "grow"):
            value = getattr(self, name)
            if value < 0 or not math.isfinite(value):
                raise ConfigError(f"{name} must be a number not below 0, got {value!r}")
        _one_of("gate", self.gate, ("dense", "topk_full", "topk_renorm"))
        _one_of("placement", self.placement, ("per_linear", "block_shared", "parallel_ffn"))
        _one_of("slice_source", self.slice_source, ("post_attn", "pre_o"))
        _one_of("update_gate", self.update_gate, ("none", "usage"))
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise ConfigError(f"alpha must be a positive number, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not 0 <= self.lbc_delta < 1:
            raise ConfigError(f"lbc_delta must be in [0, 1), got {self.lbc_delta!r}")
        if self.gate != "dense" and self.top_k > self.experts:
            raise ConfigError(f"top_k must not exceed the {self.experts} experts, got {self.top_k!r}")
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name at least one linear, e.g. 'down_proj'")
        if self.slice_source == "pre_o" and self.placement != "parallel_ffn":
            raise ConfigError(
                "slice_source 'pre_o' adds to the FFN's output and needs placement 'parallel_ffn', "
                f"got {self.placement!r}"
            )

    @property
    def scaling(self) -> float:
        """s of the update s·B·A·x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def active_experts(self) -> int:
        """Experts a token uses in each slice."""
        return self.experts if self.gate == "dense" else self.top_k


@dataclass(frozen=True)
class PlainLoraConfig(MoELoraConfig):
    """One LoRA pair per linear and no router; the sequential baseline."""

    kind: ClassVar[str] = "lora"

    experts: int = 1
    gate: Gate = "topk_renorm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.experts, self.heads) != (1, 1) or self.placement != "per_linear" or self.grow:
            raise ConfigError(
                "plain LoRA is one expert, one slice and no router: got "
                f"experts {self.experts!r}, heads {self.heads!r}, placement {self.placement!r}, grow {self.grow!r}"
            )
        for name, neutral in (("balance", 0), ("z_loss", 0), ("lbc", 0), ("router_replay", 0), ("update_gate", "none")):
            value = getattr(self, name)
            if value != neutral:
                raise ConfigError(f"plain LoRA has no router for {name}: it must be {neutral!r}, got {value!r}")


@dataclass(frozen=True)
class LoRAMoEConfig(MoELoraConfig):
    """LoRAMoE (arXiv 2312.09979) with the defaults of its released script; sparse by `gate` and `top_k`."""

    kind: ClassVar[str] = "loramoe"

    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.05
    experts: int = 8
    gate: Gate = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != 1:
            raise ConfigError(f"LoRAMoE routes whole inputs: heads must be 1, got {self.heads!r}; see MHMoEConfig")


@dataclass(frozen=True)
class MHMoEConfig(MoELoraConfig):
    """MH-MoE (arXiv 2602.12587): every slice of the input has a router and experts of its own."""

    kind: ClassVar[str] = "mh_moe"

    heads: int = 4
    balance: float = 0.01


@dataclass(frozen=True)
class SDLoraMoEConfig(MoELoraConfig):
    """SD-LoRA-MoE: an always-on common adapter, and routed experts that write outside of its directions."""

    kind: ClassVar[str] = "sd_lora_moe"

    balance: float = 0.01
    common_rank: int = 8
    """Rank k of the common adapter."""
    common_rank_max: int | None = None
    """Rank that the common adapter and what it absorbed may reach together; none = what the width of a slice leaves
    beside one expert's rank.  T tasks ask for common_rank + T * (common_rank + absorb_rank): 104 for eight of them."""
    absorb_rank: int = 4
    """Directions moved from the experts to the common adapter after each task."""
    refresh_every: int = 16
    """Optimiser steps between refreshes of the bases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement == "parallel_ffn":
            raise ConfigError("SD-LoRA-MoE stands beside linears: placement must not be 'parallel_ffn'")
        if self.common_rank < 1 or self.refresh_every < 1 or self.absorb_rank < 0:
            raise ConfigError(
                "common_rank and refresh_every must be at least 1 and absorb_rank not below 0, got "
                f"{self.common_rank!r}, {self.refresh_every!r}, {self.absorb_rank!r}"
            )
        if self.common_rank_max is not None and self.common_rank_max < self.common_rank:
            raise ConfigError(
                f"common_rank_max must be at least common_rank {self.common_rank}, got {self.common_rank_max!r}"
            )


@dataclass(frozen=True)
class HydraLoraConfig(MoELoraConfig):
    """HydraLoRA: one A shared by all experts, a B per expert, a dense router."""

    kind: ClassVar[str] = "hydra_lora"

    gate: Gate = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != 1 or self.placement == "parallel_ffn" or self.grow or self.update_gate != "none":
            raise ConfigError(
                "HydraLoRA shares one A per linear and neither slices, grows nor gates: got "
                f"heads {self.heads!r}, placement {self.placement!r}, grow {self.grow!r}, "
                f"update_gate {self.update_gate!r}"
            )


@dataclass(frozen=True)
class MixLoraConfig(MoELoraConfig):
    """MixLoRA: whole FFNs as experts, top-2 with renormalised weights and one router per FFN."""

    kind: ClassVar[str] = "mixlora"

    experts: int = 8
    gate: Gate = "topk_renorm"
    top_k: int = 2
    placement: Placement = "block_shared"
    balance: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != 1 or self.placement != "block_shared" or self.gate != "topk_renorm":
            raise ConfigError(
                "MixLoRA routes whole FFNs with renormalised weights: needs heads 1, placement 'block_shared', gate "
                f"'topk_renorm', got {self.heads!r}, {self.placement!r}, {self.gate!r}"
            )
        if sorted(self.target_modules) != sorted(FFN_LINEARS):
            raise ConfigError(f"MixLoRA adapts {', '.join(FFN_LINEARS)} together, got {self.target_modules!r}")


@dataclass(frozen=True)
class TaskGatedConfig(MoELoraConfig):
    """MOELoRA: dense experts whose weights depend on the task alone."""

    kind: ClassVar[str] = "moelora"

    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.05
    experts: int = 8
    gate: Gate = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        _weighed_as_a_whole("MOELoRA", self)


@dataclass(frozen=True)
class SAPTAdapterConfig(MoELoraConfig):
    """SAPT (ACL 2024): a LoRA pair per task, mixed by the attention of a prompt over the tasks' keys."""

    kind: ClassVar[str] = "sapt"

    experts: int = 1
    gate: Gate = "dense"
    query_width: int = 64
    """Width of queries and keys."""
    sharpness: float = 16.0
    """Factor of the cosine of query and key before the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _weighed_as_a_whole("SAPT", self)
        if self.experts != 1 or self.query_width < 1 or not 0 < self.sharpness < math.inf:
            raise ConfigError(
                "SAPT starts with experts 1 and needs query_width of at least 1 and a positive sharpness, got "
                f"{self.experts!r}, {self.query_width!r}, {self.sharpness!r}"
            )


def largest_common_rank(config: SDLoraMoEConfig, in_features: int, out_features: int) -> int:
    """Rank that the common adapter of a linear and what it absorbed may reach together."""
    if config.common_rank_max is not None:
        return config.common_rank_max
    return max(config.common_rank, min(in_features // config.heads, out_features) - config.rank)


AnyConfig = TypeVar("AnyConfig", bound=MoELoraConfig)


def with_scaling(config: AnyConfig, scaling: float) -> AnyConfig:
    """The config with the alpha that makes `scaling` of its rank."""
    return replace(config, alpha=scaling * (math.sqrt(config.rank) if config.rslora else config.rank))


def with_rank(config: AnyConfig, rank: int) -> AnyConfig:
    """The config with another rank and the alpha that keeps the scale of its update."""
    return with_scaling(replace(config, rank=rank), config.scaling)


CONFIGS: dict[str, type[MoELoraConfig]] = {
    config.kind: config
    for config in (
        PlainLoraConfig,
        LoRAMoEConfig,
        MHMoEConfig,
        SDLoraMoEConfig,
        HydraLoraConfig,
        MixLoraConfig,
        TaskGatedConfig,
        SAPTAdapterConfig,
    )
}


def config_from_dict(kind: str, values: Mapping[str, Any], source: str) -> MoELoraConfig:
    """The options of a method from JSON values read from `source`.

    Raises:
        UnknownName: there is no method `kind`.
        ConfigError: an unknown option or an illegal value.
    """
    if kind not in CONFIGS:
        raise UnknownName("adapter", kind, tuple(CONFIGS))
    return build(CONFIGS[kind], values, source)


def config_to_dict(config: MoELoraConfig) -> dict[str, Any]:
    """Inverse of `config_from_dict`, without the kind."""
    return to_dict(config)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _weighed_as_a_whole(method: str, config: MoELoraConfig) -> None:
    """Refuse options of routers for a method that has none."""
    wanted = {"heads": 1, "gate": "dense", "placement": "per_linear", "grow": 0, "router_replay": 0.0}
    wanted |= {"balance": 0.0, "z_loss": 0.0, "lbc": 0.0, "update_gate": "none"}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{method} has no routers: {name} must be {value!r}, got {getattr(config, name)!r}")
