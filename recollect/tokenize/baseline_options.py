"""Options of the tokenizers that RQ-GMM is compared with; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recollect.errors import ConfigError
from recollect.tokenize.residual_config import ResidualConfig


@dataclass(frozen=True)
class KMeansConfig(ResidualConfig):
    """A codebook found by k-means (faiss), run until it has converged."""

    seeding: Literal["k-means++", "random", "partition", "alternate"] = "k-means++"
    """First centres: greedy k-means++, points drawn at random, the means of a random partition of the points, or
    k-means++ and a partition in turn, so that the better way is kept at each level."""
    restarts: int = 3
    """Runs from other first centres; the one with the least error is kept."""
    iterations: int = 300
    """Most Lloyd iterations of a run."""
    tolerance: float = 1e-6
    """A run ends when an iteration lowers the squared error by less than this share of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1 or self.iterations < 1:
            raise ConfigError(
                f"restarts and iterations must be at least 1, got {self.restarts!r} and {self.iterations!r}"
            )
        if self.seeding == "alternate" and self.restarts < 2:
            raise ConfigError("seeding alternate needs one restart of each kind; set restarts to 2 or more")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance must be in [0, 1), got {self.tolerance!r}")


@dataclass(frozen=True)
class RQKMeansConfig(KMeansConfig):
    """Options of RQ-KMeans."""

    normalize_residuals: bool = False
    """Unit residuals before every level, as one published library does; nothing can be reconstructed then."""


@dataclass(frozen=True)
class VQConfig(KMeansConfig):
    """Options of plain vector quantisation: one level."""

    levels: int = 1
    """Codes per item; always 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != 1:
            raise ConfigError(f"levels of vq is 1, got {self.levels!r}; use rq-kmeans for more levels")


@dataclass(frozen=True)
class PQConfig(KMeansConfig):
    """Options of product quantisation: `levels` blocks of dimensions, a codebook each."""


@dataclass(frozen=True)
class OPQConfig(PQConfig):
    """Options of product quantisation after a learned rotation."""

    rotation_iterations: int = 50
    """Alternations between codebooks and rotation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotation_iterations < 1:
            raise ConfigError(f"rotation_iterations must be at least 1, got {self.rotation_iterations!r}")


@dataclass(frozen=True)
class BalancedConfig(ResidualConfig):
    """Options of balanced RQ-KMeans."""

    balancing: Literal["greedy", "constrained"] = "greedy"
    """greedy = each centre in turn takes its share of the nearest items (OneRec); constrained = k-means whose sizes
    stay within one of N/K (MiniOneRec), for at most 25.6 million items x codes."""
    rounds: int = 100
    """Most rounds of filling and recomputing the centres."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds!r}")


@dataclass(frozen=True)
class PRQKMeansConfig(ResidualConfig):
    """Options of PRQ-KMeans."""

    neighbours: int = 2
    """Nearest centres an item pulls at while fitting; the paper takes 2 for small codes, else 5."""
    sharpness: float = 15.0
    """beta: multiplies cosines in the softmax over those centres."""
    iterations: int = 25
    """Soft updates per level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1 or self.iterations < 1:
            raise ConfigError(
                f"neighbours and iterations must be at least 1, got {self.neighbours!r} and {self.iterations!r}"
            )
        if not self.sharpness > 0:
            raise ConfigError(f"sharpness must be positive, got {self.sharpness!r}")


@dataclass(frozen=True)
class RandomCodesConfig(ResidualConfig):
    """Options of random codes, the floor of every comparison."""
