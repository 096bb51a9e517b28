"""Options of residual-quantised Gaussian mixtures; free of torch. The reasons for the defaults are in `rq_gmm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from recollect.errors import ConfigError
from recollect.tokenize.residual_config import ResidualConfig

Covariance = Literal["diag", "spherical", "tied_diag", "tied_spherical"]
Annealing = Literal["auto", "none", "all", "alternate"]


@dataclass(frozen=True)
class RQGMMConfig(ResidualConfig):
    """How the mixture of each level is fitted and how codes are emitted."""

    covariance: Covariance = "tied_spherical"
    """Variances of a component: one per dimension (diag; the paper), one (spherical), or shared by all (tied_…)."""
    shrinkage: float = 10.0
    """Points of pooled variance mixed into each component's own; 0 = none. The tied kinds have nothing to shrink."""
    variance_floor: float = 1e-3
    """Smallest variance as a share of the mean variance of the level's residuals; 0 = none."""
    regularisation: float = 1e-6
    """Smallest variance in absolute terms."""
    annealing: Annealing = "auto"
    """Which restarts begin with flattened responsibilities and sharpen them over the first third of the iterations:
    none, all, or every second one (alternate), so that the likelier way is kept at each level. auto = alternate where
    there are restarts and no batch_rows, else none."""
    minimum_points: float = 2.0
    """A component with less total responsibility is re-seeded at the least likely item; 0 = never."""
    reseed_rounds: int = 5
    """Most iterations of a level after which dead components are re-seeded."""
    max_iterations: int = 50
    """Most iterations of EM per level; passes over the data where batch_rows is set."""
    tolerance: float = 1e-4
    """EM ends when the mean log-likelihood (nats) changes by less; 0 = run all iterations."""
    batch_rows: int = 0
    """Rows per update of stepwise EM, which ends with one pass over all rows; 0 = every update sees all rows."""
    initialisation: Literal["kmeans", "kmeans++", "random_points", "given"] = "kmeans"
    """First means: k-means, its seeds alone, random items, or codebooks handed over in Python."""
    lloyd_steps: int = 25
    """Most Lloyd steps of the initialisation kmeans."""
    restarts: int = 3
    """Fits of a level from other first means, as many as RQ-KMeans has; the likeliest is kept. `given` means have 1."""
    emission: Literal["posterior", "nearest_mean"] = "posterior"
    """The emitted code: the most probable component, or the one with the nearest mean."""
    residual: Literal["hard", "soft", "projection"] = "hard"
    """What a level leaves: r - mean of the code, r - posterior mean, or r without its part along the code's mean."""
    precision: Literal["auto", "float32", "float64"] = "auto"
    """Of the products; auto = float32 while its rounding cannot move a log-density by more than about 0.02 nats."""
    checkpoint_iterations: int = 5
    """Iterations between saved states of the level in progress, where a checkpoint folder is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = {
            "shrinkage": 0,
            "variance_floor": 0,
            "regularisation": 0,
            "minimum_points": 0,
            "reseed_rounds": 0,
            "max_iterations": 1,
            "tolerance": 0,
            "batch_rows": 0,
            "lloyd_steps": 0,
            "restarts": 1,
            "checkpoint_iterations": 1,
        }
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if 0 < self.batch_rows < self.codebook_size:
            raise ConfigError(
                f"batch_rows must be 0 or at least codebook_size ({self.codebook_size}), got {self.batch_rows!r}"
            )
        if self.annealing not in get_args(Annealing):
            raise ConfigError(f"annealing must be one of {', '.join(get_args(Annealing))}, got {self.annealing!r}")
        if self.annealing in ("all", "alternate") and self.batch_rows:
            raise ConfigError("annealing needs updates that see all rows; set batch_rows to 0 or annealing to none")
        if self.annealing == "alternate" and self.restarts < 2:
            raise ConfigError("annealing alternate needs one restart of each kind; set restarts to 2 or more")

    def anneals(self, restart: int) -> bool:
        """Whether this restart (from 0) begins with flattened responsibilities."""
        is_alternate = self.annealing == "alternate" or (self.annealing == "auto" and not self.batch_rows)
        return self.annealing == "all" or (is_alternate and restart % 2 == 1)
