"""Data and references for tests of mixtures."""

import math

import numpy as np
import torch

from recollect.tokenize.gmm import Mixture
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.rows import TensorRows

COVARIANCES = ("diag", "spherical", "tied_diag", "tied_spherical")


def plain(covariance: str = "diag", **options) -> RQGMMConfig:
    """EM of the textbook: no shrinkage, floor, annealing or re-seeding, in float64, all iterations."""
    values = {
        "shrinkage": 0.0,
        "variance_floor": 0.0,
        "regularisation": 0.0,
        "minimum_points": 0.0,
        "tolerance": 0.0,
        "precision": "float64",
        "annealing": "none",
    }
    return RQGMMConfig(covariance=covariance, **(values | options))


def clouds(seed: int, n: int, d: int, k: int, spread: float = 2.0) -> np.ndarray:
    """(n, d) float32 rows around k centres with their own scale per dimension."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(k, d)) * spread
    scales = generator.uniform(0.4, 1.2, size=(k, d))
    labels = generator.integers(k, size=n)
    return (centres[labels] + scales[labels] * generator.normal(size=(n, d))).astype(np.float32)


def rows_of(values: np.ndarray) -> TensorRows:
    """The array as a source."""
    return TensorRows(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))


def start_at(values: np.ndarray, k: int, covariance: str, seed: int = 0) -> Mixture:
    """A mixture at k rows of the data with uneven weights and variances of the kind."""
    generator = np.random.default_rng(seed)
    means = torch.from_numpy(values[generator.choice(len(values), k, replace=False)].astype(np.float64))
    shape = {"diag": means.shape, "spherical": (k, 1), "tied_diag": (1, means.shape[1]), "tied_spherical": (1, 1)}
    variance = torch.from_numpy(generator.uniform(0.5, 2.0, size=tuple(shape[covariance])) * values.var())
    weight = torch.from_numpy(generator.dirichlet(np.full(k, 5.0)))
    return Mixture(means, variance, weight.log())


def log_densities(values: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """(N, K) float64 log pi_k N(x; mu_k, Sigma_k) written out, one component at a time."""
    columns = []
    for k in range(len(mixture.means)):
        variance = mixture.variance.expand_as(mixture.means)[k]
        squares = (values - mixture.means[k]) ** 2
        density = -0.5 * (squares / variance + variance.log() + math.log(2 * math.pi)).sum(dim=1)
        columns.append(mixture.log_weight[k] + density)
    return torch.stack(columns, dim=1)


def textbook_step(values: torch.Tensor, mixture: Mixture, covariance: str) -> Mixture:
    """One E-step and M-step in float64 with loops over components."""
    gamma = log_densities(values, mixture).softmax(dim=1)
    mass = gamma.sum(dim=0)
    means, scatter = [], []
    for k in range(len(mass)):
        mean = (gamma[:, k, None] * values).sum(dim=0) / mass[k]
        means.append(mean)
        scatter.append((gamma[:, k, None] * (values - mean) ** 2).sum(dim=0))
    summed = torch.stack(scatter)
    if covariance in ("tied_diag", "tied_spherical"):
        variance = summed.sum(dim=0, keepdim=True) / len(values)
    else:
        variance = summed / mass[:, None]
    if covariance in ("spherical", "tied_spherical"):
        variance = variance.mean(dim=1, keepdim=True)
    return Mixture(torch.stack(means), variance, (mass / len(values)).log())
