"""Methods by name: which there are, their options and their adapters; torch comes in only when one is opened.

All methods have one scale of their updates, s = alpha / rank = 4, and one dropout, 0, unless options say otherwise: a
difference between two of them is no difference of step sizes.  The scale is that of the benchmark's own LoRA (rank 8,
alpha 32; trace_benchmark 3.1), whose dropout of 0.1 is not taken over [our design].  What the released codes have is an
option away: LoRAMoE rank 4, alpha 32, dropout 0.05; O-LoRA dropout 0.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from recollect.config import build
from recollect.continual.adapters.config import CONFIGS, MoELoraConfig, with_scaling
from recollect.continual.methods import config as configs
from recollect.continual.methods.config import MethodConfig
from recollect.errors import UnknownName

if TYPE_CHECKING:
    from recollect.continual.methods.protocol import ContinualMethod

SCALING = 4.0
"""alpha / rank of every method's update; with rslora, alpha is what it is at rank 8."""
DROPOUT = 0.0
_RSLORA_ALPHA = SCALING * 8


@dataclass(frozen=True)
class MethodSpec:
    """One method of the table.

    class_home: "module:name" below `recollect.continual.methods`.  config_class, adapter_class: dataclasses of its
    options and its adapters' options.  defaults, adapter_defaults: options that make it what its name says.
    is_joint: all tasks are given to it at once, as one.  needs_task: it must be told the task at test time.
    keeps_data: it reads samples of earlier tasks.  per_task: what it adds for every task after the first, beside the
    adapters' `grow`: nothing, a pair, or a copy of all adapters.  has_adapters: False where it tunes the weights.
    """

    name: str
    class_home: str
    summary: str
    config_class: type[MethodConfig] = MethodConfig
    adapter_class: type[MoELoraConfig] = CONFIGS["lora"]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adapter_defaults: Mapping[str, Any] = field(default_factory=dict)
    is_joint: bool = False
    needs_task: bool = False
    keeps_data: bool = False
    per_task: Literal["nothing", "pair", "copy"] = "nothing"
    has_adapters: bool = True

    def options(self, values: Mapping[str, Any], source: str) -> MethodConfig:
        """Its config from `values` over the defaults.

        Raises:
            ConfigError: unknown key, wrong type or illegal value.
        """
        return build(self.config_class, {**self.defaults, **values}, source)

    def adapter_options(self, values: Mapping[str, Any], source: str) -> MoELoraConfig:
        """Its adapters' config from `values` over the defaults; alpha follows the rank unless it is given.

        Raises:
            ConfigError: as `options`.
        """
        built = build(self.adapter_class, {"dropout": DROPOUT, **self.adapter_defaults, **values}, source)
        if "alpha" in values:
            return built
        return replace(built, alpha=_RSLORA_ALPHA) if built.rslora else with_scaling(built, SCALING)

    @property
    def method_class(self) -> type[ContinualMethod]:
        """The class, imported now."""
        module, _, name = self.class_home.partition(":")
        return getattr(importlib.import_module(f"recollect.continual.methods.{module}"), name)

    def open(self, options: MethodConfig | None = None, adapter: MoELoraConfig | None = None) -> ContinualMethod:
        """The method with the given options, or its defaults."""
        return self.method_class(
            options if options is not None else self.options({}, f"the defaults of {self.name}"),
            adapter if adapter is not None else self.adapter_options({}, f"the adapters of {self.name}"),
        )


_LORA, _LORAMOE, _MH_MOE, _SD = (CONFIGS[kind] for kind in ("lora", "loramoe", "mh_moe", "sd_lora_moe"))
_SPARSE = {"experts": 4, "gate": "topk_full", "top_k": 1, "rank": 8}


def _experts(name: str, adapter: type[MoELoraConfig], summary: str, **more: Any) -> MethodSpec:
    return MethodSpec(name, "experts:RoutedExperts", summary, configs.ExpertsConfig, adapter, **more)


_SPECS = (
    MethodSpec(
        "seq-lora",
        "seq_lora:SeqLora",
        "one LoRA pair per linear, and one optimiser, through all tasks",
        defaults={"reset_optimizer": False},
    ),
    MethodSpec(
        "o-lora",
        "o_lora:OLora",
        "a pair per task, orthogonal to the earlier ones",
        configs.OLoraConfig,
        per_task="pair",
    ),
    MethodSpec("ewc", "ewc:EWC", "a quadratic pull to where earlier tasks ended", configs.EWCConfig),
    MethodSpec(
        "gem", "gem:GEM", "gradients that no memory objects to (quadratic program)", configs.GEMConfig, keeps_data=True
    ),
    MethodSpec(
        "a-gem",
        "gem:AGEM",
        "gradients that a draw of all memories does not object to",
        configs.AGEMConfig,
        keeps_data=True,
    ),
    MethodSpec("lwf", "lwf:LwF", "the adapters before the task teach on its own batches", configs.LwFConfig),
    MethodSpec(
        "replay", "replay:Replay", "a share of each earlier task trained again", configs.ReplayConfig, keeps_data=True
    ),
    MethodSpec(
        "inflora",
        "inflora:InfLora",
        "a pair per task that reads only directions unused so far",
        configs.InfLoraConfig,
        per_task="pair",
    ),
    _experts("loramoe", _LORAMOE, "routed experts over whole inputs, top-1 (4 of rank 8)", adapter_defaults=_SPARSE),
    _experts("loramoe-dense", _LORAMOE, "the dense gate of the released LoRAMoE (8 of rank 4)"),
    _experts("mh-moe", _MH_MOE, "a router and experts per slice of the input"),
    _experts("sd-moe", _SD, "a common adapter, and experts that write outside of its directions"),
    _experts("hydra-lora", CONFIGS["hydra_lora"], "one shared A, a routed B per expert"),
    MethodSpec(
        "moelora",
        "moelora:MOELora",
        "experts mixed by a gate that reads the task",
        adapter_class=CONFIGS["moelora"],
        needs_task=True,
    ),
    MethodSpec(
        "sapt",
        "sapt:SAPT",
        "a LoRA block per task, mixed by the prompt's attention over the tasks' keys",
        configs.SAPTConfig,
        CONFIGS["sapt"],
        per_task="pair",
    ),
    _experts("mixlora", CONFIGS["mixlora"], "whole FFNs with their own updates as experts, top-2"),
    _experts(
        "loramoe-replay",
        _LORAMOE,
        "LoRAMoE that grows an expert per task, then replays to the routers alone",
        adapter_defaults={**_SPARSE, "grow": 1, "router_replay": 0.2},
        keeps_data=True,
    ),
    _experts(
        "mh-moe-replay",
        _MH_MOE,
        "MH-MoE that grows an expert per task, then replays to the routers alone",
        adapter_defaults={"grow": 1, "router_replay": 0.2},
        keeps_data=True,
    ),
    _experts(
        "mh-moe-gated",
        _MH_MOE,
        "MH-MoE whose experts move as far as the new task uses them more than the old ones did",
        adapter_defaults={"update_gate": "usage"},
    ),
    MethodSpec(
        "osf",
        "osf:OSF",
        "the weights' weakest singular directions (PEFT's implementation; no adapters)",
        has_adapters=False,
    ),
    MethodSpec(
        "per-task",
        "bounds:PerTask",
        "separate adapters per task, told which it is: the ceiling",
        needs_task=True,
        per_task="copy",
    ),
    MethodSpec("joint", "seq_lora:SeqLora", "all tasks at once", is_joint=True, keeps_data=True),
)
METHODS = {spec.name: spec for spec in _SPECS}


def method_spec(name: str) -> MethodSpec:
    """The method called `name`.

    Raises:
        UnknownName: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise UnknownName("method", name, list(METHODS))
    return METHODS[name]
