"""One mixture of Gaussians with diagonal covariance: densities, sufficient statistics, the maximisation step.

log pi_k N(x; mu_k, Sigma_k) is a row-independent constant plus a product of features of x with a matrix, so that both
steps of EM are matrix products:

    diag            features [x^2, x]      statistics sum gamma x^2, sum gamma x
    spherical       features [|x|^2, x]
    tied_…          features [x]           (the quadratic term is the same for all components)

Parameters and accumulated statistics are float64, products are float32 or float64. Rows are expected near the origin
(the caller centres them): float32 loses what |x|^2 / variance exceeds 2^24 by. Equations: section "Model" of
arXiv 2602.12593 as digested; shrinkage, floor and the tied kinds are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recollect.tokenize.gmm_config import Covariance, RQGMMConfig
from recollect.tokenize.nearest import UNIT_ROUNDOFF

_NEGLIGIBLE = 1e-12  # responsibilities below it are left out of the statistics where most are
_SPARSE_SHARE = 0.1  # share of responsibilities above `_NEGLIGIBLE` up to which the sparse product is the faster one
_SMALLEST_WEIGHT = 1e-30
_TOLERATED_ROUNDING = 0.02  # nats


@dataclass(frozen=True)
class Mixture:
    """Parameters, all float64.

    means: (K, D).  variance: (K, D) diag, (K, 1) spherical, (1, D) tied_diag, (1, 1) tied_spherical.
    log_weight: (K,) log mixture weights.
    """

    means: Tensor
    variance: Tensor
    log_weight: Tensor

    def shifted(self, offset: Tensor) -> Mixture:
        """The mixture of x + offset (D,) float64 where this is that of x."""
        return replace(self, means=self.means + offset)

    def constants(self) -> Tensor:
        """(K,) float64: log pi_k minus half of log det(2 pi Sigma_k)."""
        k, d = self.means.shape
        log_determinant = self.variance.log().expand(k, d).sum(dim=1)
        return self.log_weight - 0.5 * (log_determinant + d * math.log(2 * math.pi))

    def log_joint(self, rows: Tensor, codes: Tensor) -> Tensor:
        """(P,) float64 log pi_k N(x; mu_k, Sigma_k) of rows (P, D) under codes (P,), straight from the definition."""
        precision = (1 / self.variance).expand_as(self.means)[codes]
        squares = (rows.double() - self.means[codes]).square()
        return self.constants()[codes] - 0.5 * (squares * precision).sum(dim=1)


def covariance_of(mixture: Mixture) -> Covariance:
    """The kind a mixture's variance has by its shape; for K = 1 or D = 1 the first of diag, spherical, tied_diag."""
    k, d = mixture.means.shape
    kinds: dict[tuple[int, int], Covariance] = {
        (1, 1): "tied_spherical",
        (1, d): "tied_diag",
        (k, 1): "spherical",
        (k, d): "diag",
    }
    return kinds[(mixture.variance.shape[0], mixture.variance.shape[1])]


def variance_of_kind(variance: Tensor, weight: Tensor, covariance: Covariance) -> Tensor:
    """(K, D) variances reduced to a kind: averaged over dimensions (spherical), components (tied) by weight (K,)."""
    if covariance in ("tied_diag", "tied_spherical"):
        variance = (weight @ variance / weight.sum())[None]
    if covariance in ("spherical", "tied_spherical"):
        variance = variance.mean(dim=1, keepdim=True)
    return variance


def precision_needed(mixture: Mixture, largest: Tensor, wanted: str) -> torch.dtype:
    """The dtype of products for rows whose absolute values stay below `largest` (D,) per dimension."""
    if wanted != "auto":
        return torch.float64 if wanted == "float64" else torch.float32
    worst = float((largest.square() / mixture.variance).expand_as(mixture.means).sum(dim=1).max())
    return torch.float64 if worst * UNIT_ROUNDOFF > _TOLERATED_ROUNDING else torch.float32


class Scorer:
    """Log-densities of rows under a mixture, as one matrix product.

    Args:
        mixture: its parameters, in the coordinates of the rows.
        covariance: its kind.
        dtype: of the products.
    """

    def __init__(self, mixture: Mixture, covariance: Covariance, dtype: torch.dtype) -> None:
        precision = 1 / mixture.variance  # broadcasts to (K, D)
        linear = mixture.means * precision  # (K, D)
        constant = mixture.constants() - 0.5 * (mixture.means * linear).sum(dim=1)
        parts = {
            "diag": [-0.5 * precision, linear],
            "spherical": [-0.5 * precision, linear],
            "tied_diag": [linear],
            "tied_spherical": [linear],
        }[covariance]
        self.covariance = covariance
        self.dtype = dtype
        self._product = torch.cat(parts, dim=1).T.to(dtype).contiguous()  # (F, K)
        self._constant = constant.to(dtype)
        self._shared_precision = precision[0].to(dtype).expand(mixture.means.shape[1])  # (D,), read by tied kinds only

    @property
    def width(self) -> int:
        """F, features per row."""
        return self._product.shape[0]

    def features(self, rows: Tensor, out: Tensor) -> Tensor:
        """(B, F) of rows (B, D) of this dtype; written into `out` (B, F) except for the tied kinds, which give rows."""
        d = rows.shape[1]
        if self.covariance == "diag":
            torch.mul(rows, rows, out=out[:, :d])
        elif self.covariance == "spherical":
            out[:, 0] = torch.linalg.vecdot(rows, rows)
        else:
            return rows
        out[:, -d:] = rows
        return out

    def relative(self, features: Tensor, out: Tensor) -> Tensor:
        """(B, K) log joint densities but for a term shared by the components (see `shared`), written into `out`."""
        return torch.addmm(self._constant, features, self._product, out=out)

    def shared(self, rows: Tensor) -> Tensor | float:
        """(B,) the term `relative` leaves out: the tied kinds' quadratic form."""
        if self.covariance in ("diag", "spherical"):
            return 0.0
        return -0.5 * (rows.square() @ self._shared_precision)


def normalise_(scores: Tensor) -> Tensor:
    """Turn scores (B, K) into responsibilities, in place, and return their log-sum-exp (B,) float64.

    The largest score is subtracted first, so rows sum to 1 whatever the scores' size. Responsibilities stop falling
    at e^-60 (float64: e^-600): smaller ones would be subnormal numbers, which processors handle a hundred times slower.
    """
    largest = scores.max(dim=1, keepdim=True).values
    lowest = -600.0 if scores.dtype == torch.float64 else -60.0
    total = scores.sub_(largest).clamp_min_(lowest).exp_().sum(dim=1, keepdim=True)
    scores.div_(total)
    return (largest.double() + total.double().log())[:, 0]


@dataclass
class Statistics:
    """Weighted sums over rows, float64.

    mass: (K,) sum of gamma.  moments: (K, F) sum of gamma times features.  second: (D,) sum of w x^2.
    log_likelihood: sum of w log p(x).  total: sum of w.
    """

    mass: Tensor
    moments: Tensor
    second: Tensor
    log_likelihood: float = 0.0
    total: float = 0.0

    @classmethod
    def zeros(cls, k: int, d: int, covariance: Covariance, device: torch.device) -> Statistics:
        """Nothing seen yet."""
        width = {"diag": 2 * d, "spherical": d + 1}.get(covariance, d)
        mass, moments, second = (
            torch.zeros(size, dtype=torch.float64, device=device) for size in ((k,), (k, width), (d,))
        )
        return cls(mass, moments, second)

    @classmethod
    def of(cls, mixture: Mixture, covariance: Covariance) -> Statistics:
        """What rows drawn from `mixture` have on average, per row."""
        weight = mixture.log_weight.exp()
        squares = mixture.means.square() + mixture.variance  # (K, D)
        first = weight[:, None] * mixture.means
        parts = {
            "diag": [weight[:, None] * squares, first],
            "spherical": [(weight[:, None] * squares).sum(dim=1, keepdim=True), first],
        }.get(covariance, [first])
        return cls(weight, torch.cat(parts, dim=1), weight @ squares, 0.0, 1.0)

    def add(self, gamma: Tensor, features: Tensor, rows: Tensor, weight: Tensor | None) -> None:
        """Count rows (B, D) with responsibilities gamma (B, K), which is overwritten, and weights (B,)."""
        if weight is not None:
            gamma.mul_(weight[:, None])
            self.second += weight.double() @ rows.square().double()
            self.total += float(weight.double().sum())
        else:
            self.second += rows.square().sum(dim=0).double()
            self.total += len(rows)
        self.mass += gamma.sum(dim=0).double()
        self.moments += weighted_sums(gamma, features).double()

    def mixed(self, other: Statistics, rate: float) -> Statistics:
        """(1 - rate) self + rate other, each per unit of weight."""
        keep, take = (1 - rate) / self.total, rate / other.total
        return Statistics(
            keep * self.mass + take * other.mass,
            keep * self.moments + take * other.moments,
            keep * self.second + take * other.second,
            keep * self.log_likelihood + take * other.log_likelihood,
            1.0,
        )


def weighted_sums(gamma: Tensor, features: Tensor) -> Tensor:
    """(K, F) gamma (B, K) transposed times features (B, F).

    In many dimensions responsibilities are almost one-hot. On the CPU the product then runs over those above 1e-12
    only; what is left out is less than K x 1e-12 of a row's weight.
    """
    if gamma.device.type != "cpu":
        return gamma.T @ features
    values = gamma.numpy()
    kept = np.flatnonzero(values.ravel() > _NEGLIGIBLE)
    if len(kept) > _SPARSE_SHARE * values.size:
        return gamma.T @ features
    import scipy.sparse

    b, k = values.shape
    rows, columns = np.divmod(kept, k)
    starts = np.searchsorted(rows, np.arange(b + 1)).astype(np.int32)
    table = scipy.sparse.csc_array((values.ravel()[kept], columns.astype(np.int32), starts), shape=(k, b))
    return torch.from_numpy(table @ features.numpy())


def maximise(statistics: Statistics, previous: Mixture, config: RQGMMConfig, floor: float, points: float) -> Mixture:
    """The M-step: mu_k, sigma^2_k and pi_k from the statistics, with shrinkage and floor.

    Args:
        statistics: of the last E-step.
        previous: gives the mean of a component nothing was counted for.
        config: covariance and shrinkage.
        floor: smallest variance.
        points: the rows' total weight; statistics may be per unit of weight, shrinkage counts points.
    """
    d = previous.means.shape[1]
    mass = statistics.mass
    seen = mass > _SMALLEST_WEIGHT * statistics.total
    share = torch.where(seen, mass, 1.0)[:, None]
    means = torch.where(seen[:, None], statistics.moments[:, -d:] / share, previous.means)
    if config.covariance in ("diag", "spherical"):
        squares = means.square()
        if config.covariance == "spherical":
            squares = squares.sum(dim=1, keepdim=True)
        own = statistics.moments[:, :-d] / share - squares
        if config.covariance == "spherical":
            own = own / d
        pooled = mass @ own.clamp_min(0) / mass.sum()
        count = mass[:, None] * (points / statistics.total)
        own = torch.where(seen[:, None], own, pooled)
        if config.shrinkage > 0:
            own = (count * own + config.shrinkage * pooled) / (count + config.shrinkage)
        variance = own
    else:
        variance = ((statistics.second - mass @ means.square()) / statistics.total)[None]
        if config.covariance == "tied_spherical":
            variance = variance.mean(dim=1, keepdim=True)
    weight = mass / mass.sum()
    return Mixture(means, variance.clamp_min(floor), weight.clamp_min(_SMALLEST_WEIGHT).log())
