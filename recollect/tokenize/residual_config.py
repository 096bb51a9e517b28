"""Options every residual tokenizer has; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError
from recollect.tokenize.preprocess import PreprocessConfig

MAX_LEVELS = 32


@dataclass(frozen=True)
class ResidualConfig(PreprocessConfig):
    """A chain of codebooks, each on what the ones before it left."""

    levels: int = 3
    """Codes per item, L."""
    codebook_size: int = 256
    """Codes per level, K."""
    seed: int = 0
    """Of initial centres and everything else drawn."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where the products are computed; auto = cuda where there is one."""
    block_rows: int = 8192
    """Rows read and scored at a time; memory grows with block_rows x codebook_size."""
    residual_memory_mb: int = 2048
    """Residuals are kept in memory up to this size (MiB), else computed again from the codes at every pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ConfigError(f"levels must be between 1 and {MAX_LEVELS}, got {self.levels!r}")
        for name, least in (("codebook_size", 1), ("block_rows", 1), ("residual_memory_mb", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
