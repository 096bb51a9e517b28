"""Options of the LLM recommender; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError
from recollect.loop import LoopConfig

Supervision = Literal["last", "dense"]
SUPERVISIONS: tuple[Supervision, ...] = ("last", "dense")
Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class LlmConfig:
    """Options of the LLM recommender; the defaults suit two CPU cores (the paper: every block, last position)."""

    base: str = "smollm2"
    """Decoder: smollm2, hf:ID, path:DIR or a folder."""
    keep_layers: int | None = 8
    """Keep the first so many blocks and the final norm; none = all."""
    supervision: Supervision = "dense"
    """Train one sample per pass (last, as the paper) or every position of a history at once (dense)."""
    max_length: int = 50
    """Most recent items the decoder reads (E4SRec: 50)."""
    batch_size: int = 16
    """Rows in a training batch (E4SRec: 16)."""
    epochs: int = 3
    """Passes over the training samples (E4SRec: 3)."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW, cosine (E4SRec: 3e-4 at one sample a row; dense passes have far fewer steps)."""
    warmup_steps: int = 20
    """Linear warm-up (E4SRec: 100, at one sample a row)."""
    lora_rank: int = 16
    """Rank of the adapters (E4SRec: 16)."""
    lora_alpha: float = 16.0
    """Scale of the adapters (E4SRec: 16)."""
    lora_dropout: float = 0.05
    """Dropout before the adapters (E4SRec: .05)."""
    lora_targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter (E4SRec: the feed-forward ones)."""
    text: str | None = None
    """Embedder whose item text vectors are added to the input, e.g. minilm; none = ids only (the paper)."""
    semantic_init: str | None = None
    """Embedder whose item text vectors start the output layer; none = random."""
    precision: Precision = "auto"
    """Arithmetic of the decoder: bf16 where the hardware is faster with it."""
    seed: int = 0
    """Of initial weights, order of batches and dropout."""

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "epochs", "lora_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.supervision not in SUPERVISIONS:
            raise ConfigError(f"supervision must be one of {', '.join(SUPERVISIONS)}, got {self.supervision!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if not self.lora_targets:
            raise ConfigError("lora_targets must name at least one kind of linear layer, e.g. gate_proj")
        self.loop()

    def loop(self, epochs: int | None = None) -> LoopConfig:
        """The training loop's part of the options, for some number of epochs."""
        return LoopConfig(
            epochs=self.epochs if epochs is None else epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            schedule="cosine",
            patience=None,
            seed=self.seed,
        )
