"""First parameters of a mixture: k-means++ seeds, Lloyd steps, and the variances inside their cells.

k-means++ draws its seeds from a sample where rows are many; Lloyd steps and variances use all rows. Everything drawn
comes from a named stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError
from recollect.tokenize.gmm import Mixture, variance_of_kind, weighted_sums
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.greedy_seeds import greedy_seeds, positive_rows, seed_sample
from recollect.tokenize.nearest import NearestMeans
from recollect.tokenize.rows import RowSource, spans

SCORED_ROWS = 2048
"""Rows multiplied at a time on the CPU: their scores stay in its cache."""
_TINY = 1e-30
_SETTLED = 1e-4  # Lloyd ends when the error falls by less than this share


@dataclass(frozen=True)
class Moments:
    """Of a level's rows, about their mean.

    centre: (D,) float32, the mean rounded.  variance: (D,) float64.  largest: (D,) float64, largest |x - centre|.
    points: total weight.
    """

    centre: Tensor
    variance: Tensor
    largest: Tensor
    points: float


class CentredRows:
    """The rows of a source minus a centre (D,), on a device, with their weights, a part at a time."""

    def __init__(
        self, source: RowSource, centre: Tensor, weight: np.ndarray | None, config: RQGMMConfig, device: torch.device
    ) -> None:
        self.source, self.centre, self.device = source, centre, device
        self.weight = None if weight is None else torch.from_numpy(weight).to(device)
        self.block_rows = config.block_rows
        self.rows_at_once = min(config.block_rows, SCORED_ROWS if device.type == "cpu" else config.block_rows)

    def __len__(self) -> int:
        return len(self.source)

    def parts(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(start, rows (B, D), weight (B,) float64 or None) with B <= `rows_at_once`, over all rows."""
        for first, last in spans(len(self), self.block_rows):
            block = self.source.block(first, last).to(self.device, dtype).sub_(self.centre)
            for start, stop in spans(last - first, self.rows_at_once):
                share = None if self.weight is None else self.weight[first + start : first + stop]
                yield first + start, block[start:stop], share

    def batch(self, runs: list[tuple[int, int]], dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """`parts` of the rows of `runs` of (start, stop) alone; start counts from the first run."""
        rows = torch.cat([self.source.block(*run) for run in runs]).to(self.device, dtype).sub_(self.centre)
        share = None if self.weight is None else torch.cat([self.weight[start:stop] for start, stop in runs])
        for start, stop in spans(len(rows), self.rows_at_once):
            yield start, rows[start:stop], None if share is None else share[start:stop]

    def numpy_weight(self) -> np.ndarray | None:
        """(n,) float64 weights, None for equal ones."""
        return None if self.weight is None else self.weight.cpu().numpy()

    def at(self, positions: np.ndarray) -> Tensor:
        """(P, D) float32 rows at positions (P,)."""
        return torch.cat([self.source.block(int(row), int(row) + 1) for row in positions]).to(self.device) - self.centre


def moments_of(source: RowSource, weight: np.ndarray | None, block_rows: int, device: torch.device) -> Moments:
    """One pass over the rows; sums are taken about the first row to keep digits.

    Raises:
        InputError: a square overflows float64 sums or float32 products.
    """
    origin = source.block(0, 1).to(device).double()[0]
    sums, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    lowest, highest = torch.zeros_like(origin), torch.zeros_like(origin)
    points = 0.0
    for start, stop in spans(len(source), block_rows):
        block = source.block(start, stop).to(device).double() - origin
        lowest = torch.minimum(lowest, block.amin(dim=0))
        highest = torch.maximum(highest, block.amax(dim=0))
        if weight is None:
            points += stop - start
            sums += block.sum(dim=0)
            squares += block.square_().sum(dim=0)
        else:
            share = torch.from_numpy(weight[start:stop]).to(device)
            points += float(share.sum())
            sums += share @ block
            squares += share @ block.square_()
    mean = sums / points
    centre = (origin + mean).float()
    largest = torch.maximum(highest - mean, mean - lowest)
    if float(largest.square().sum()) > torch.finfo(torch.float32).max / 16:
        raise InputError(f"embeddings reach {float(largest.max()):.3g} from their mean; scale them to about unit size")
    return Moments(centre, (squares / points - mean.square()).clamp_min(0), largest, points)


def first_mixture(
    rows: CentredRows,
    k: int,
    config: RQGMMConfig,
    moments: Moments,
    generator: np.random.Generator,
    given: Tensor | None,
) -> Mixture:
    """The parameters EM begins with, in centred coordinates, as `config.initialisation` says.

    Args:
        given: (K, D) float64 means in centred coordinates, for the initialisation `given`.
    """
    if config.initialisation == "given":
        if given is None:
            raise InputError("initialisation is 'given', but no codebooks were handed over; pass start=[...]")
        means = given
    elif config.initialisation == "random_points":
        means = rows.at(random_positions(rows, k, generator)).double()
    else:
        means = seeds(rows, k, generator).double()
    steps = config.lloyd_steps if config.initialisation == "kmeans" else 0
    last = math.inf
    cells = Cells.around(means, rows)
    for _ in range(steps):
        means = cells.means(means)
        if last - cells.error <= _SETTLED * cells.error:
            break
        last = cells.error
        cells = Cells.around(means, rows)
    counts = cells.mass
    pooled = cells.within().expand(k, -1)
    floor = smallest_variance(config, moments)
    variance = variance_of_kind(pooled, counts + 1, config.covariance).clamp_min(floor).contiguous()
    log_weight = ((counts + 1) / (counts.sum() + k)).log()
    return Mixture(means, variance, log_weight)


def smallest_variance(config: RQGMMConfig, moments: Moments) -> float:
    """The floor of all variances of a level; positive even where the options ask for none."""
    return max(config.regularisation, config.variance_floor * float(moments.variance.mean()), _TINY)


@dataclass
class Cells:
    """Rows divided among their nearest means: mass (K,), sums (K, D), second (D,) sum of w x^2; float64."""

    mass: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def around(cls, means: Tensor, rows: CentredRows) -> Cells:
        """One pass over the rows."""
        k, d = means.shape
        sizes = ((k,), (k, d), (d,))
        found = cls(*(torch.zeros(size, dtype=torch.float64, device=rows.device) for size in sizes))
        nearest = NearestMeans(means.float())
        for _, part, share in rows.parts():
            labels = nearest(part)
            one_hot = torch.zeros(len(part), k, device=rows.device)
            one_hot.scatter_(1, labels, 1.0 if share is None else share.float()[:, None])
            found.mass += one_hot.sum(dim=0).double()
            found.sums += weighted_sums(one_hot, part).double()
            squares = part.double().square()
            found.second += squares.sum(dim=0) if share is None else share @ squares
        return found

    def means(self, previous: Tensor) -> Tensor:
        """(K, D) the cells' means; an empty cell keeps its previous one."""
        return torch.where(self.mass[:, None] > 0, self.sums / self.mass.clamp_min(_TINY)[:, None], previous)

    def within(self) -> Tensor:
        """(D,) mean squared distance to the own cell's mean, per dimension."""
        explained = (self.sums.square() / self.mass.clamp_min(_TINY)[:, None]).sum(dim=0)
        return ((self.second - explained) / self.mass.sum()).clamp_min(0)

    @property
    def error(self) -> float:
        """Summed squared distance to the own cell's mean."""
        return float(self.within().sum() * self.mass.sum())


def random_positions(rows: CentredRows, k: int, generator: np.random.Generator) -> np.ndarray:
    """(K,) distinct rows, drawn by weight, ascending.

    Raises:
        InputError: see `positive_rows`.
    """
    chance = None
    if (weight := rows.numpy_weight()) is not None:
        positive_rows(weight, k)
        chance = weight / weight.sum()
    return np.sort(generator.choice(len(rows), size=k, replace=False, p=chance))


def seeds(rows: CentredRows, k: int, generator: np.random.Generator) -> Tensor:
    """(K, D) float32 greedy k-means++ seeds.

    Raises:
        InputError: see `positive_rows`.
    """
    weight = rows.numpy_weight()
    chosen = seed_sample(len(rows), k, weight, generator)
    positions = np.arange(len(rows)) if chosen is None else chosen
    sample = _gathered(rows, positions)  # (S, D)
    share = None if weight is None else weight[positions]
    return sample[torch.from_numpy(greedy_seeds(sample, k, share, generator)).to(rows.device)]


def _gathered(rows: CentredRows, positions: np.ndarray) -> Tensor:
    """(S, D) rows at ascending positions (S,), read block by block."""
    found = []
    for start, stop in spans(len(rows), rows.block_rows):
        low, high = np.searchsorted(positions, (start, stop))
        if low < high:
            inside = torch.from_numpy(positions[low:high] - start)
            found.append(rows.source.block(start, stop)[inside].to(rows.device) - rows.centre)
    return torch.cat(found)
