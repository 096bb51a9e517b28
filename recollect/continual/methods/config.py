"""Options of the methods; torch-free, one dataclass per method.  Options of the adapters are `adapters.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError


@dataclass(frozen=True)
class MethodConfig:
    """Sequential training, and the base of every method's options."""

    seed: int = 0
    """Of the method's own draws."""
    reset_optimizer: bool = True
    """Begin every task with a new optimiser and schedule; false = one of each for the whole sequence, as in TRACE's own
    LoRA run (a task's phases then share the task's part of the schedule)."""


@dataclass(frozen=True)
class OLoraConfig(MethodConfig):
    """O-LoRA (arXiv 2310.14152): a pair per task, orthogonal to the earlier ones."""

    orthogonality: float = 0.5
    """Coefficient (lambda 1) of the sum of |A_i A_t^T| over earlier pairs i."""
    size: float = 0.0
    """Coefficient (lambda 2) of the Frobenius norms of A_t and B_t."""

    def __post_init__(self) -> None:
        _not_negative(self, "orthogonality", "size")


@dataclass(frozen=True)
class EWCConfig(MethodConfig):
    """Elastic weight consolidation on the adapters' weights."""

    strength: float = 400.0
    """Coefficient (lambda) of half the Fisher-weighted squared distance."""
    fisher: Literal["per_sample", "trace_online"] = "per_sample"
    """per_sample = squared gradients of single samples of the finished task; trace_online = of training batches."""
    decay: float = 1.0
    """Factor of the old Fisher information when a task is added (per_sample only)."""
    samples: int = 200
    """Samples of a task behind its Fisher information; 0 = all (per_sample only)."""

    def __post_init__(self) -> None:
        _not_negative(self, "strength", "samples")
        _one_of(self, "fisher", ("per_sample", "trace_online"))
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be in [0, 1], got {self.decay!r}")


@dataclass(frozen=True)
class GEMConfig(MethodConfig):
    """Gradient episodic memory: steps that no memory objects to."""

    samples: int = 100
    """Samples kept of each task."""
    batches_per_step: int = 0
    """Memory batches of each task behind a step's constraint, drawn anew each step; 0 = all."""
    margin: float = 0.0
    """Smallest multiplier of a memory's gradient (gem only)."""

    def __post_init__(self) -> None:
        _not_negative(self, "batches_per_step", "margin")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples!r}")


@dataclass(frozen=True)
class AGEMConfig(GEMConfig):
    """A-GEM: one constraint, the mean gradient over a batch of all memories."""

    batches_per_step: int = 1
    """Memory batches, over all tasks, behind a step's constraint, drawn anew each step; 0 = all."""


@dataclass(frozen=True)
class LwFConfig(MethodConfig):
    """Learning without forgetting: the adapters before the task teach on the task's own batches."""

    weight: float = 1.0
    """Coefficient of the distillation loss."""
    temperature: float = 2.0
    """Softens both distributions."""

    def __post_init__(self) -> None:
        _not_negative(self, "weight")
        if not self.temperature > 0 or not math.isfinite(self.temperature):
            raise ConfigError(f"temperature must be a positive number, got {self.temperature!r}")


@dataclass(frozen=True)
class ReplayConfig(MethodConfig):
    """Replay of a share of each earlier task."""

    ratio: float = 0.1
    """Share of each earlier task's samples that is kept."""
    mode: Literal["after", "mix"] = "after"
    """after = extra epochs on the kept samples after each task (as TRACE does); mix = among the task's batches."""
    replay_epochs: int = 1
    """Extra epochs of mode after."""
    general: bool = True
    """Replay general instructions too, where there are some."""

    def __post_init__(self) -> None:
        _share(self, "ratio")
        _one_of(self, "mode", ("after", "mix"))
        if self.replay_epochs < 1:
            raise ConfigError(f"replay_epochs must be at least 1, got {self.replay_epochs!r}")


@dataclass(frozen=True)
class InfLoraConfig(MethodConfig):
    """InfLoRA: a pair per task whose A reads only directions that earlier tasks did not use."""

    energy: float = 0.95
    """Share of the inputs' energy that is protected after the first task; rises to 1 at the last."""
    covariance_batches: int = 32
    """Batches of a task behind its input covariance; 0 = all."""

    def __post_init__(self) -> None:
        _not_negative(self, "covariance_batches")
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy must be in (0, 1], got {self.energy!r}")


@dataclass(frozen=True)
class ExpertsConfig(MethodConfig):
    """Routed experts; growing, router replay and usage-gated updates are options of the adapters."""

    replay_epochs: int = 1
    """Epochs of the router replay after a task."""
    gate_batches: int = 8
    """Batches behind the measured usage of a task, before and after it (usage-gated updates only)."""

    def __post_init__(self) -> None:
        for name in ("replay_epochs", "gate_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class SAPTConfig(MethodConfig):
    """SAPT: a block per task, mixed by the attention of a prompt over the tasks' keys."""

    attention: float = 1.0
    """Coefficient of the KL term that keeps the attention of earlier tasks."""
    pseudo_samples: int = 64
    """Pseudo-samples of each earlier task behind that term."""
    statistics_batches: int = 16
    """Batches of a task behind its key's start and its pseudo-samples."""

    def __post_init__(self) -> None:
        _not_negative(self, "attention")
        for name in ("pseudo_samples", "statistics_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")


def _not_negative(config: MethodConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"{name} must be a number not below 0, got {value!r}")


def _share(config: MethodConfig, name: str) -> None:
    value = getattr(config, name)
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}")


def _one_of(config: MethodConfig, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
