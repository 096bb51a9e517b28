"""Options of the models trained by gradient; free of torch, so that a command line can read them cheaply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError
from recollect.loop import LoopConfig


@dataclass(frozen=True)
class NeuralConfig:
    """How a sequence model is trained; defaults reproduce the published SASRec-CE rows (evaluation spec 8)."""

    max_length: int = 50
    """Most recent items a model sees; 200 for MovieLens."""
    batch_size: int = 256
    """Sequences in a training batch."""
    epochs: int = 200
    """Most passes over the training sequences."""
    patience: int | None = 10
    """Validations without improvement before training ends; none = never end early."""
    validate_every: int = 1
    """Epochs between validations on NDCG@10."""
    learning_rate: float = 1e-3
    """Of Adam."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    clip_norm: float | None = None
    """Largest gradient norm; none = no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = products in bfloat16, sums and weights in fp32."""
    seed: int = 0
    """Of initial weights, order of batches, dropout and negatives."""

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.batch_size < 1:
            raise ConfigError(
                f"max_length and batch_size must be at least 1, got {self.max_length!r} and {self.batch_size!r}"
            )
        sizes = {name: getattr(self, name, 1) for name in ("hidden", "recurrent", "blocks", "heads", "negatives")}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        if sizes["hidden"] % sizes["heads"]:
            raise ConfigError(f"hidden ({sizes['hidden']}) must be a multiple of heads ({sizes['heads']})")
        dropout = getattr(self, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {dropout!r}")
        self.loop  # noqa: B018 - the loop refuses what it cannot do before any data is read

    @property
    def loop(self) -> LoopConfig:
        """The part of the options that is the training loop's."""
        return LoopConfig(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            clip_norm=self.clip_norm,
            patience=self.patience,
            validate_every=self.validate_every,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True)
class SASRecConfig(NeuralConfig):
    """Options of SASRec; loss "gbce" with 256 negatives makes it gSASRec."""

    hidden: int = 64
    """Width of item vectors and hidden states."""
    blocks: int = 2
    """Self-attention blocks."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.3
    """Of embeddings, attention and feed-forward layers."""
    loss: Literal["ce", "bce", "gbce"] = "ce"
    """Full softmax, or k negatives with binary or generalised binary cross-entropy."""
    negatives: int = 1
    """Negatives per position of bce and gbce."""
    calibration: float = 0.75
    """gBCE's t: 0 = BCE, 1 = fully calibrated."""


@dataclass(frozen=True)
class GRU4RecConfig(NeuralConfig):
    """Options of GRU4Rec."""

    hidden: int = 64
    """Width of item vectors."""
    recurrent: int = 128
    """Width of the recurrent state."""
    blocks: int = 1
    """Recurrent layers."""
    dropout: float = 0.3
    """Of the input embeddings and between layers."""
    loss: Literal["ce", "bce", "gbce"] = "ce"
    """Full softmax, or k negatives with binary or generalised binary cross-entropy."""
    negatives: int = 1
    """Negatives per position of bce and gbce."""
    calibration: float = 0.75
    """gBCE's t."""


@dataclass(frozen=True)
class BERT4RecConfig(NeuralConfig):
    """Options of BERT4Rec; it needs more epochs than the causal models, hence the longer patience."""

    patience: int | None = 20
    """Validations without improvement before training ends; none = never end early."""
    hidden: int = 64
    """Width of item vectors and hidden states."""
    blocks: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads."""
    dropout: float = 0.2
    """Of embeddings, attention and feed-forward layers."""
    mask_probability: float = 0.2
    """Share of positions hidden and predicted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_probability <= 1:
            raise ConfigError(f"mask_probability must be in (0, 1], got {self.mask_probability!r}")
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 (an item and the mask), got {self.max_length!r}")


@dataclass(frozen=True)
class LRURecConfig(NeuralConfig):
    """Options of LRURec."""

    hidden: int = 64
    """Width of item vectors and hidden states."""
    blocks: int = 2
    """Blocks of a linear recurrent unit and a feed-forward layer."""
    dropout: float = 0.2
    """Of embeddings, recurrent and feed-forward layers."""
    min_radius: float = 0.8
    """Smallest initial modulus of the recurrence's eigenvalues."""
    max_radius: float = 0.99
    """Largest initial modulus of the recurrence's eigenvalues."""
    loss: Literal["ce", "bce", "gbce"] = "ce"
    """Full softmax, or k negatives with binary or generalised binary cross-entropy."""
    negatives: int = 1
    """Negatives per position of bce and gbce."""
    calibration: float = 0.75
    """gBCE's t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_radius < self.max_radius < 1:
            raise ConfigError(
                f"0 <= min_radius < max_radius < 1 must hold, got {self.min_radius!r} and {self.max_radius!r}"
            )


@dataclass(frozen=True)
class HSTUConfig(NeuralConfig):
    """Options of HSTU; l2_normalise with loss "sampled" is the published training."""

    hidden: int = 64
    """Width of item vectors and hidden states."""
    blocks: int = 2
    """HSTU blocks."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.2
    """Of embeddings and block outputs."""
    l2_normalise: bool = False
    """Score by cosine / temperature in place of the dot product."""
    temperature: float = 0.05
    """Divides cosines; unused without l2_normalise."""
    loss: Literal["ce", "sampled"] = "ce"
    """Full softmax, or softmax over the target and k negatives."""
    negatives: int = 128
    """Negatives per position of the sampled loss."""
    time_bias: bool = False
    """Also learn a bias of attention by the time between two events; needs data with a clock."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature!r}")


@dataclass(frozen=True)
class BPRConfig(NeuralConfig):
    """Options of BPR matrix factorisation."""

    hidden: int = 64
    """Number of factors."""
    negatives: int = 1
    """Negatives per training item."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, in place of BPR's L2 penalty."""
    max_length: int = 200
    """Most recent items that make up a user."""
