"""Options of the tokenizers trained by gradient; free of torch, so that a command line can read them cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError
from recollect.loop import LoopConfig
from recollect.tokenize.preprocess import PreprocessConfig
from recollect.tokenize.residual_config import MAX_LEVELS

ROUND_STEPS = 200
"""Optimiser steps between two checkpoints; the training loop's epoch."""
MIN_SCALAR_VALUES = 3
"""Fewest values of an FSQ scalar: the library's rounding is not defined for two."""


@dataclass(frozen=True)
class AutoencoderConfig(PreprocessConfig):
    """An encoder and a decoder around a quantiser, and how they are trained.

    The budget is in steps, not in passes over the items, so that it means the same for every catalogue.
    """

    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths between the embedding and the code, ReLU after each; the decoder mirrors them."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 1024
    """Items in a training batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: constant, or half a cosine to 0."""
    clip_norm: float | None = None
    """Largest gradient norm; none = no clipping."""
    reconstruction_reduction: Literal["sum", "mean"] = "sum"
    """Over the dimensions of the embedding, in the squared error of an item; the mean over items is always taken."""
    seed: int = 0
    """Of initial weights and codes, order of batches and codes that are placed anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden must be widths of at least 1, got {self.hidden!r}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.reconstruction_reduction not in ("sum", "mean"):
            raise ConfigError(
                f"reconstruction_reduction must be 'sum' or 'mean', got {self.reconstruction_reduction!r}"
            )
        self.loop  # noqa: B018 - the loop refuses what it cannot do before any data is read

    @property
    def loop(self) -> LoopConfig:
        """The part of the options that is the training loop's; an epoch of it is a round of `ROUND_STEPS`."""
        return LoopConfig(
            epochs=-(-self.steps // ROUND_STEPS),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            clip_norm=self.clip_norm,
            patience=None,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RQVAEConfig(AutoencoderConfig):
    """Options of RQ-VAE; widths, levels, codes, code dimension and commitment are TIGER's."""

    levels: int = 3
    """Codes per item, L."""
    codebook_size: int = 256
    """Codes per level, K."""
    code_dim: int = 32
    """Dimension of the latent space and of every code."""
    commitment: float = 0.25
    """Weight of the term that pulls the encoder's output to its code (TIGER's beta, LETTER's mu)."""
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    """How the decoder's gradient reaches the encoder: copied, or turned as the latent would turn to its code."""
    residual_gradient: Literal["detach_code", "straight_through"] = "detach_code"
    """What a level hands on: r - sg[e], whose commitment reaches the encoder, or r - ST(r), whose does not."""
    quantisation_reduction: Literal["sum", "mean"] = "sum"
    """Over the dimensions of the code, in the codebook and commitment terms; levels are always summed."""
    reseed_every: int | None = 200
    """Steps after which codes that no item used are placed on residuals of the batch; none = never."""
    initial_rows: int = 16384
    """Items whose latents the initial codes are the k-means centres of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ConfigError(f"levels must be between 1 and {MAX_LEVELS}, got {self.levels!r}")
        for name in ("codebook_size", "code_dim", "initial_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not self.commitment >= 0:
            raise ConfigError(f"commitment must be at least 0, got {self.commitment!r}")
        if self.reseed_every is not None and self.reseed_every < 1:
            raise ConfigError(f"reseed_every must be at least 1 or none, got {self.reseed_every!r}")
        closed = {
            "estimator": ("straight-through", "rotation"),
            "residual_gradient": ("detach_code", "straight_through"),
            "quantisation_reduction": ("sum", "mean"),
        }
        for name, allowed in closed.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class VQVAEConfig(RQVAEConfig):
    """Options of VQ-VAE: one level of RQ-VAE."""

    levels: int = 1
    """Always 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != 1:
            raise ConfigError(f"vq-vae has 1 level, got levels={self.levels!r}; use rq-vae for more")


@dataclass(frozen=True)
class LETTERConfig(RQVAEConfig):
    """Options of LETTER: those of RQ-VAE, whose code dimension must be that of the behaviour vectors."""

    collaborative_weight: float = 0.01
    """Weight of the collaborative loss (LETTER's alpha)."""
    diversity_weight: float = 1e-4
    """Weight of the diversity loss (LETTER's beta)."""
    diversity_clusters: int = 10
    """Clusters the codes of a level are grouped into; at most half as many as there are codes."""
    regroup_every: int = 200
    """Steps after which the codes are grouped anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("collaborative_weight", "diversity_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if self.regroup_every < 1:
            raise ConfigError(f"regroup_every must be at least 1, got {self.regroup_every!r}")
        if self.diversity_clusters < 1:
            raise ConfigError(f"diversity_clusters must be at least 1, got {self.diversity_clusters!r}")
        if self.codebook_size < 2 and self.diversity_weight > 0:
            raise ConfigError("letter's diversity loss needs 2 codes per level; set diversity_weight to 0")


@dataclass(frozen=True)
class FSQConfig(AutoencoderConfig):
    """Options of finite scalar quantisation."""

    counts: tuple[int, ...] = (8, 5, 5, 5)
    """Values each scalar can take: one level of the ID per scalar, with that many codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.counts) <= MAX_LEVELS:
            raise ConfigError(f"counts must hold between 1 and {MAX_LEVELS} numbers, got {self.counts!r}")
        if any(count < MIN_SCALAR_VALUES for count in self.counts):
            raise ConfigError(f"counts must be at least {MIN_SCALAR_VALUES}, got {self.counts!r}")
