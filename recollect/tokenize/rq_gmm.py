"""RQ-GMM: residual quantisation by a Gaussian mixture per level (arXiv 2602.12593).

Level l models the residual r by sum_k pi_k N(r; mu_k, Sigma_k), emits k* = argmax_k of the posterior and hands down
r - mu_{k*}, in fitting and in encoding alike; the reconstruction is the sum of the emitted means. Known of the paper:
this much, from its abstract and a third party's digest. Everything below is our choice where the sources are silent.

Defaults and their reasons. One variance for all codes and dimensions, and every second restart annealed: on eight seeds
and three catalogues this left a smaller error than residual k-means with as many restarts. A variance per code and
dimension, the paper's choice (`covariance="diag", annealing="none"`), did not on three seeds (docs/results.md).
Three restarts, as RQ-KMeans has, of which the likeliest is kept, so that neither is compared by its luck. k-means start
(random points left 3-12 % more error). Re-seeding of components below two points. Of the kinds with variances of their
own: shrinkage 10 and a variance floor, because at 256 components a few thousand items leave some fifteen points for D
variances, and duplicates of one item would make a component singular.

In many dimensions responsibilities are almost one-hot: EM then is variance-weighted hard clustering, and at one level
a k-means at its optimum has by definition the smaller squared error. Level densities
live on different residuals and are not summed over levels.

Where codes are lost: what a level leaves has few clusters and rows of uneven length. In hundreds of dimensions the mean
of a few rows is then far from every other row, that of many rows is near the origin, and a hard start (k-means++ seeds,
for either method) can end with most rows on few codes: on Amazon Scientific, 2 levels of 128, two seeds, the perplexity
of the second level was a fifth of K. Starting with all means near the origin made it .84 to .89 of K, by `annealing`
here as by `partition` seeding in RQ-KMeans [measured]. With `alternate` a level keeps the plain start where that is
likelier.

Not covered: full covariance matrices; joint training with a ranker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError
from recollect.progress import Progress
from recollect.tokenize.checkpoint import array_sha256
from recollect.tokenize.gmm import Mixture, Scorer, covariance_of, precision_needed
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.gmm_restarts import fit_best
from recollect.tokenize.nearest import product_bound, ranked, settled_argmax
from recollect.tokenize.residual import FittedLevel, ResidualTokenizer
from recollect.tokenize.rows import RowSource


class GaussianLevel(FittedLevel):
    """One fitted mixture as a codebook.

    Args:
        mixture: parameters in the residuals' coordinates; means are rounded to float32, the codebook's type.
        config: covariance, emission, residual rule, precision.
        report: what fitting said.
    """

    def __init__(self, mixture: Mixture, config: RQGMMConfig, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(mixture.means, report)
        self.mixture = Mixture(self.means.double(), mixture.variance, mixture.log_weight)
        self.config = config
        self._centre = self.mixture.means.mean(dim=0).float()
        self._centred = self.mixture.shifted(-self._centre.double())
        self._largest_precision = (1 / mixture.variance).max(dim=0).values.expand(self.means.shape[1])  # (D,)
        self._reach = float((self._centred.means.square() / mixture.variance).sum(dim=1).max())
        span = self._centred.means.abs().amax(dim=0) + 3 * mixture.variance.max(dim=0).values.sqrt()
        self._dtype = precision_needed(self._centred, span, config.precision)
        self._scorers = {
            dtype: Scorer(self._centred, config.covariance, dtype) for dtype in {self._dtype, torch.float64}
        }

    def candidates(self, residual: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """See `FittedLevel.candidates`; with m > 1 all is scored in float64."""
        dtype = self._dtype if m == 1 else torch.float64
        scores = self._scores(residual, dtype)[0]
        log_posterior = scores.log_softmax(dim=1)
        if self.config.emission == "nearest_mean":
            return self._nearest(residual, m), log_posterior
        first = settled_argmax(
            scores, self._slack(residual, dtype), lambda row, code: self.mixture.log_joint(residual[row], code)
        )
        return (first[:, None] if m == 1 else ranked(scores, first, m)), log_posterior

    def log_posterior(self, residual: Tensor) -> Tensor:
        """(B, K) log posterior of each component given residuals (B, D)."""
        return self._scores(residual, self._dtype)[0].log_softmax(dim=1)

    def log_likelihood(self, residual: Tensor) -> Tensor:
        """(B,) float64 log density (nats) of residuals (B, D) under the mixture."""
        scores, shared = self._scores(residual, self._dtype)
        return scores.double().logsumexp(dim=1) + shared

    def remainder(self, residual: Tensor, codes: Tensor) -> Tensor:
        """See `FittedLevel.remainder`; as `config.residual` says."""
        if self.config.residual == "soft":
            return residual - (self.log_posterior(residual).exp().to(self.means.dtype) @ self.means)
        if self.config.residual == "projection":
            mean = self.means[codes]
            along = (residual * mean).sum(dim=1) / mean.square().sum(dim=1).clamp_min(torch.finfo(mean.dtype).tiny)
            return residual - along[:, None] * mean
        return super().remainder(residual, codes)

    def arrays(self, level: int) -> dict[str, np.ndarray]:
        """`codebook.{level}`, `variance.{level}` and `log_weight.{level}` float64."""
        return super().arrays(level) | {
            f"variance.{level}": self.mixture.variance.cpu().numpy(),
            f"log_weight.{level}": self.mixture.log_weight.cpu().numpy(),
        }

    def _scores(self, residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
        scorer = self._scorers[dtype]
        rows = residual.to(dtype) - self._centre
        features = scorer.features(rows, rows.new_empty(len(rows), scorer.width))
        return scorer.relative(features, rows.new_empty(len(rows), len(self.means))), scorer.shared(rows)

    def _slack(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) how far rounding can have moved a difference of two scores."""
        centred = residual.to(dtype) - self._centre
        size = centred.square() @ self._largest_precision.to(dtype) + self._reach
        return 2 * product_bound(2 * residual.shape[1], dtype) * size


class RQGMM(ResidualTokenizer):
    """Residual-quantised Gaussian mixtures.

    Args:
        config: see `RQGMMConfig`.
        start: for the initialisation `given`: one (K, D) array of means per level.
    """

    name: ClassVar[str] = "rq-gmm"
    config_class: ClassVar[type] = RQGMMConfig
    config: RQGMMConfig

    def __init__(self, config: RQGMMConfig | None = None, start: Sequence[np.ndarray] | None = None) -> None:
        super().__init__(config)
        self.start = start
        self.reconstructs = self.config.residual != "projection"  # type: ignore[misc]  # a choice of the options here

    @property
    def is_additive(self) -> bool:
        """See `ResidualTokenizer.is_additive`: only the hard rule leaves r - mean."""
        return self.config.residual == "hard"

    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """See `ResidualTokenizer.fit_level`; the state of EM is kept in the checkpoint, if there is one."""
        k = self.level_sizes()[level]
        kept = None if self.checkpoint is None else self.checkpoint.state(level)
        found = fit_best(
            residuals,
            k,
            self.config,
            level=level,
            weight=weight,
            start=self._start(level, k, residuals.dimension),
            device=self.device,
            progress=progress,
            save=None if self.checkpoint is None else partial(self.checkpoint.save_state, level),
            saved=kept,
        )
        return GaussianLevel(found.mixture, self.config, found.report)

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """See `ResidualTokenizer.level_from_arrays`.

        Raises:
            InputError: arrays of the level are missing or are of another covariance than the options say.
        """
        names = [f"{part}.{level}" for part in ("codebook", "variance", "log_weight")]
        for name in names:
            if name not in arrays:
                raise InputError(f"{self.name}: the saved arrays hold no {name!r}")
        mixture = Mixture(*(torch.tensor(arrays[name], dtype=torch.float64, device=self.device) for name in names))
        k, d = mixture.means.shape
        wanted = {"diag": (k, d), "spherical": (k, 1), "tied_diag": (1, d), "tied_spherical": (1, 1)}
        if tuple(mixture.variance.shape) != wanted[self.config.covariance]:
            raise InputError(
                f"{self.name}: the saved {names[1]!r} is {tuple(mixture.variance.shape)} ({covariance_of(mixture)}) "
                f"where the options say covariance {self.config.covariance}"
            )
        return GaussianLevel(mixture, self.config)

    def _start(self, level: int, k: int, dimension: int) -> Tensor | None:
        if self.start is None or self.config.initialisation != "given":
            return None
        if len(self.start) != self.config.levels or self.start[level].shape != (k, dimension):
            shapes = [array.shape for array in self.start]
            raise InputError(f"start must be {self.config.levels} arrays of shape ({k}, {dimension}), got {shapes}")
        return torch.tensor(self.start[level], dtype=torch.float64)

    def _identity(self, embeddings: np.ndarray, rows: np.ndarray, weight: np.ndarray | None) -> dict[str, Any]:
        start = [array_sha256(array) for array in self.start or ()]
        return super()._identity(embeddings, rows, weight) | {"start": start}
