"""RQ-KMeans: k-means on the residuals of each level, r <- r - c (faiss); and plain VQ, its single level.

With `normalize_residuals` every level sees residuals of unit length, as one published library does by default: its
codes may be useful, but the sum of its centroids is no reconstruction of anything, so none is offered.
Not covered: data larger than memory; faiss needs the residuals of a level as one array (4 n D bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recollect.progress import Progress
from recollect.tokenize.baseline_options import KMeansConfig, RQKMeansConfig, VQConfig
from recollect.tokenize.kmeans import fit_kmeans, points_of
from recollect.tokenize.residual import FittedLevel, ResidualTokenizer
from recollect.tokenize.rows import RowSource

NO_RECONSTRUCTION = (
    "normalize_residuals is on: residuals are scaled to unit length before every level, so the sum of centroids is not "
    "a reconstruction and no RMSE is reported; turn it off to reconstruct"
)


class _KMeansChain(ResidualTokenizer):
    """What RQ-KMeans and VQ share."""

    config: KMeansConfig

    def fit(self, embeddings: np.ndarray, **arguments: Any) -> Self:
        """See `ItemTokenizer.fit`; warns of levels that had not converged."""
        super().fit(embeddings, **arguments)
        self.report.warnings += [
            f"level {level + 1}: k-means had not converged after {self.config.iterations} iterations; raise iterations"
            for level, found in enumerate(self.report.levels)
            if not found["has_converged"]
        ]
        return self

    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """See `ResidualTokenizer.fit_level`."""
        progress.stage(f"k-means, level {level + 1}")
        n_codes = self.level_sizes()[level]
        points = self._prepared(points_of(residuals, self.config.block_rows))
        clusters = fit_kmeans(points, n_codes, self.config, names=(self.name, level), weight=weight)
        return self._level(torch.tensor(clusters.means, device=self.device), clusters.report())

    def _prepared(self, points: np.ndarray) -> np.ndarray:
        return points

    def _level(self, means: Tensor, report: Mapping[str, Any] | None = None) -> FittedLevel:
        return FittedLevel(means, report)


class VQ(_KMeansChain):
    """Vector quantisation: one codebook."""

    name: ClassVar[str] = "vq"
    config_class: ClassVar[type] = VQConfig


class RQKMeans(_KMeansChain):
    """Residual k-means; the strong baseline of every comparison."""

    name: ClassVar[str] = "rq-kmeans"
    config_class: ClassVar[type] = RQKMeansConfig
    config: RQKMeansConfig

    def __init__(self, config: RQKMeansConfig | None = None) -> None:
        super().__init__(config)
        self.reconstructs = not self.config.normalize_residuals  # type: ignore[misc]  # a choice of the options here

    def fit(self, embeddings: np.ndarray, **arguments: Any) -> Self:
        """See `ItemTokenizer.fit`; warns where nothing can be reconstructed."""
        super().fit(embeddings, **arguments)
        if self.config.normalize_residuals:
            self.report.warnings.append(NO_RECONSTRUCTION)
            for found in self.report.levels:
                found.pop("relative_mse", None)  # of scaled residuals; it would be read as an error of the items
        return self

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """See `ResidualTokenizer.level_from_arrays`."""
        return self._level(torch.tensor(arrays[f"codebook.{level}"], device=self.device))

    def _prepared(self, points: np.ndarray) -> np.ndarray:
        return unit(torch.from_numpy(points)).numpy() if self.config.normalize_residuals else points

    def _level(self, means: Tensor, report: Mapping[str, Any] | None = None) -> FittedLevel:
        return (_UnitLevel if self.config.normalize_residuals else FittedLevel)(means, report)


class _UnitLevel(FittedLevel):
    """Scales what it is given to unit length before anything else."""

    def candidates(self, residual: Tensor, m: int) -> tuple[Tensor, Tensor | None]:
        return super().candidates(unit(residual), m)

    def remainder(self, residual: Tensor, codes: Tensor) -> Tensor:
        return super().remainder(unit(residual), codes)


def unit(rows: Tensor) -> Tensor:
    """Rows (B, D) float32 divided by their length (float64 arithmetic); a row of zeros stays as it is."""
    exact = rows.double()
    norm = exact.square().sum(dim=1, keepdim=True).sqrt()
    return (exact / torch.where(norm > 0, norm, 1)).float()
