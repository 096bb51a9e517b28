"""PRQ-KMeans: spherical codebooks by top-k soft updates, and projection residuals (2026, read in full).

x_ = x / |x|;  mu = mean of x_;  r1 = norm(x_ - proj_mu x_).  Per level: s_ij = cos(r_i, c_j); an item pulls at its k
nearest centres with weights softmax(beta s) over them; c_j = weighted mean; 25 updates; then hard cosine assignment and
r' = norm(r - (r . c / |c|^2) c), the unit vector nearest to r among those orthogonal to c.
No additive reconstruction exists: `decode` refuses, and there is no RMSE to report.
Ours, where the paper is silent: centres begin at k-means++ seeds; a centre nobody pulls at stays where it is; a
residual of length 0 (an item that lies along its centre) stays 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recollect.progress import Progress
from recollect.rng import call_seed
from recollect.tokenize.baseline_options import PRQKMeansConfig
from recollect.tokenize.kmeans import first_means, points_of
from recollect.tokenize.nearest import NearestMeans
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.residual import FittedLevel, ResidualTokenizer
from recollect.tokenize.rows import RowSource, spans
from recollect.tokenize.rq_kmeans import unit


def soft_update(
    residual: Tensor, centres: Tensor, neighbours: int, sharpness: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What one block of items adds to the weighted means.

    Args:
        residual: (B, D) float32 unit rows r.
        centres: (K, D) float32 unit rows c.
        neighbours: k nearest centres an item pulls at.
        sharpness: beta of the softmax over their cosines.
        weight: (B,) weights of the items; None = 1.

    Returns:
        Sums (K, D) of weight x r and masses (K,), both float64.
    """
    cosines, nearest = (residual @ centres.T).topk(neighbours, dim=1)  # (B, k)
    pull = (sharpness * cosines.double()).softmax(dim=1)
    if weight is not None:
        pull = pull * weight[:, None]
    # each of k sums in the order of the rows, on the CPU: a GPU's scattered sums differ from run to run
    exact, nearest, pull = residual.double().cpu(), nearest.cpu(), pull.cpu()
    sums = torch.zeros(centres.shape, dtype=torch.float64)
    masses = torch.zeros(len(centres), dtype=torch.float64)
    for rank in range(neighbours):
        sums.index_add_(0, nearest[:, rank], pull[:, rank, None] * exact)
        masses.index_add_(0, nearest[:, rank], pull[:, rank])
    return sums.to(residual.device), masses.to(residual.device)


def projection_residual(residual: Tensor, centre: Tensor) -> Tensor:
    """norm(r - (r . c / |c|^2) c) of rows r (B, D) and centres c (B, D); float64 arithmetic, float32 result."""
    exact, along = residual.double(), centre.double()
    share = (exact * along).sum(dim=1, keepdim=True) / along.square().sum(dim=1, keepdim=True)
    return unit(exact - share * along)


class _ProjectionLevel(FittedLevel):
    """Codes by cosine, leaves the projection residual."""

    def __init__(self, means: Tensor, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(means, report)
        self._nearest = NearestMeans(unit(self.means))  # the nearest unit centre has the largest cosine

    def remainder(self, residual: Tensor, codes: Tensor) -> Tensor:
        return projection_residual(residual, self.means[codes])


class PRQKMeans(ResidualTokenizer):
    """See the module's text; the step `direction` is part of the method and follows any other preprocessing."""

    name: ClassVar[str] = "prq-kmeans"
    config_class: ClassVar[type] = PRQKMeansConfig
    reconstructs: ClassVar[bool] = False
    config: PRQKMeansConfig

    def __init__(self, config: PRQKMeansConfig | None = None) -> None:
        super().__init__(config)
        steps = tuple(step for step in self.config.preprocess or () if step != "direction")
        self.preprocess = Preprocess(replace(self.config, preprocess=(*steps, "direction")))

    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """See `ResidualTokenizer.fit_level`."""
        config = self.config
        n_codes = self.level_sizes()[level]
        progress.stage(f"soft updates, level {level + 1}", config.iterations)
        seed = call_seed(config.seed, self.name, level)
        first = first_means(points_of(residuals, config.block_rows), n_codes, "k-means++", seed, weight)
        means = torch.tensor(first, dtype=torch.float64, device=self.device)
        idle = 0
        for _ in range(config.iterations):
            sums, masses = self._pulls(residuals, unit(means), weight)
            is_pulled = masses > 0
            means = torch.where(is_pulled[:, None], sums / torch.where(is_pulled, masses, 1)[:, None], means)
            idle = int((~is_pulled).sum())
            progress.advance()
        return _ProjectionLevel(means.float(), {"iterations": config.iterations, "centres_nobody_pulls_at": idle})

    def _pulls(self, residuals: RowSource, centres: Tensor, weight: np.ndarray | None) -> tuple[Tensor, Tensor]:
        neighbours = min(self.config.neighbours, len(centres))
        sums = torch.zeros(centres.shape, dtype=torch.float64, device=self.device)
        masses = torch.zeros(len(centres), dtype=torch.float64, device=self.device)
        for start, stop in spans(len(residuals), self.config.block_rows):
            block = residuals.block(start, stop).to(self.device)
            share = None if weight is None else torch.from_numpy(weight[start:stop]).to(self.device)
            block_sums, block_masses = soft_update(block, centres, neighbours, self.config.sharpness, share)
            sums += block_sums
            masses += block_masses
        return sums, masses

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """See `ResidualTokenizer.level_from_arrays`."""
        return _ProjectionLevel(torch.tensor(arrays[f"codebook.{level}"], device=self.device))

    def last_digit_costs(self, embeddings: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(N, K) float64 squared distances of what the first L-1 digits of codes (N, L) leave to the last unit centres.

        Raises:
            InputError: as `encode`.
        """
        self.check_rows(embeddings)
        residual = torch.from_numpy(self.preprocess.apply(embeddings)).to(self.device)
        for level, fitted in enumerate(self.levels[:-1]):
            residual = fitted.remainder(residual, torch.from_numpy(codes[:, level].astype(np.int64)).to(self.device))
        centres = unit(self.levels[-1].means).double()
        costs = residual.double().square().sum(dim=1, keepdim=True) - 2 * residual.double() @ centres.T + 1
        return costs.clamp_min(0).cpu().numpy()
