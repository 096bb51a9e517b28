"""Balanced RQ-KMeans: every code of a level gets its share of the fitted items.

Two ways to balanced centres: `greedy` (OneRec): each centre in turn takes its share of the nearest items nobody has
taken yet, the centres are recomputed, until nothing changes; `constrained` (MiniOneRec): the k-means-constrained
package, sizes within [N//K - 1, N//K + 1]; a minimum-cost flow a round, refused beyond 25.6 million items x codes.

Either way items are assigned with the others in view, which a new item has not. So each level also stores a price per
code, and an item's code is the cheapest of cost + price: a function of the item alone, that gives the fitted items
their balance. For `constrained` (cost = distance, as the package optimises) the prices are the dual of its flow and
reproduce its assignment, ties aside; for `greedy` (cost = squared distance) they come from entropic transport and
balance approximately. Each level's report says how large the largest code is. Ours: the prices, and shares of N//K or
N//K + 1 where ceil(N/K) for all would leave the last codes empty. Identical items cannot be told apart by any price.
Not covered: data larger than memory; a level needs its N x K distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError, MissingExtra
from recollect.progress import Progress
from recollect.rng import call_seed
from recollect.tokenize.baseline_options import BalancedConfig
from recollect.tokenize.kmeans import first_means, points_of
from recollect.tokenize.nearest import ranked, settled_argmax
from recollect.tokenize.residual import FittedLevel, ResidualTokenizer
from recollect.tokenize.rows import RowSource, spans

MAX_CONSTRAINED_CELLS = 25_600_000  # 1e5 items x 256 codes; a flow beyond takes hours
_LONGEST = 1e5  # the package rounds 1000 x distance to 32-bit integers; distances are brought to this scale first
_SHARPENINGS, _SWEEPS = 12, 10  # of the entropic transport: halvings of its temperature, sweeps at each


def greedy_fill(cost: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Labels (N,) int64: code 0, 1, … in turn takes its `shares` (K,) cheapest items of those left; cost (N, K)."""
    labels = np.full(len(cost), -1, dtype=np.int64)
    free = np.arange(len(cost))
    for code, share in enumerate(shares):
        order = np.argsort(cost[free, code], kind="stable")
        labels[free[order[:share]]] = code
        free = np.sort(free[order[share:]])
    return labels


def fitting_shares(n: int, n_codes: int) -> np.ndarray:
    """(K,) sizes that differ by at most 1 and sum to n, the larger first."""
    return np.where(np.arange(n_codes) < n % n_codes, n // n_codes + 1, n // n_codes)


def size_bounds(n: int, n_codes: int, balancing: str) -> tuple[int, int]:
    """Fewest and most of n items that a code gets: a share of `fitting_shares`, or with `constrained` N//K -+ 1."""
    even = n // n_codes
    return (max(0, even - 1), even + 1) if balancing == "constrained" else (even, -(-n // n_codes))


def filling_prices(cost: Tensor, shares: np.ndarray) -> Tensor:
    """(K,) float64 prices under which argmin_k(cost + price) gives each code about its share of the items.

    The dual of entropic optimal transport (Sinkhorn in the log domain) with the temperature halved step by step from
    the mean excess cost, so that the last assignment is nearly hard. cost: (N, K).
    """
    target = torch.as_tensor(shares, dtype=torch.float64, device=cost.device)
    lowest = cost.min(dim=1, keepdim=True).values
    temperature = float((cost - lowest).double().mean())
    price = torch.zeros(cost.shape[1], dtype=torch.float64, device=cost.device)
    if not temperature > 0:
        return price
    for _ in range(_SHARPENINGS):
        for _ in range(_SWEEPS):
            mass = torch.zeros_like(price)
            for start, stop in spans(len(cost), 8192):
                block = (lowest[start:stop] - cost[start:stop] - price.float()) / temperature
                mass += block.softmax(dim=1).sum(dim=0).double()
            price += temperature * (mass / target).clamp(min=1e-12).log()
        temperature /= 2
    return price - price.mean()


def flow_prices(cost: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K,) float64 prices under which argmin_k(cost + price) is `labels`, given that those are an optimal assignment.

    Moving an item from code a to k must not pay: price_a - price_k <= W_ak = min over items of a of cost_k - cost_a.
    Shortest paths over W solve such differences (optimal labels have no negative cycle); the mean of the solutions from
    all ends lies inside, so that items on no cycle of ties keep a margin. cost: (N, K) float64.
    """
    n_codes = cost.shape[1]
    paths = np.full((n_codes, n_codes), np.inf)
    for code in range(n_codes):
        members = cost[labels == code]
        if len(members):
            paths[code] = (members - members[:, [code]]).min(axis=0)
    np.fill_diagonal(paths, 0.0)
    for middle in range(n_codes):
        np.minimum(paths, paths[:, [middle]] + paths[middle], out=paths)
    used = np.bincount(labels, minlength=n_codes) > 0
    price = np.full(n_codes, np.inf)
    price[used] = paths[np.ix_(used, used)].mean(axis=1)
    # nobody may choose a code the assignment left empty
    price[~used] = price[used].max() + cost.max() - cost.min() + 1.0
    return price - price[used].mean()


class PricedLevel(FittedLevel):
    """Emits the code with the least cost + price.

    prices: (K,) float64.  power: 2 = the cost is the squared distance, 1 = the distance.
    """

    def __init__(self, means: Tensor, prices: Tensor, power: int, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(means, report)
        self.prices = prices
        self._power = power
        self._exact_means = self.means.double()
        self._squares = self._exact_means.square().sum(dim=1)

    def candidates(self, residual: Tensor, m: int) -> tuple[Tensor, Tensor | None]:
        rows = residual.double()
        squares = rows.square().sum(dim=1, keepdim=True) - 2 * rows @ self._exact_means.T + self._squares
        squares.clamp_(min=0)
        scores = -((squares if self._power == 2 else squares.sqrt()) + self.prices)
        # cancellation costs a few units of the last place of the largest square, more under the root
        scale = 1e-13 * (rows.square().sum(dim=1) + self._squares.max())
        slack = scale if self._power == 2 else scale.sqrt()
        first = settled_argmax(scores, slack, lambda row, code: -self._price_of(residual[row], code))
        return (first[:, None] if m == 1 else ranked(scores, first, m)), None

    def _price_of(self, rows: Tensor, codes: Tensor) -> Tensor:
        squares = self._nearest.squared_distance(rows, codes)
        return (squares if self._power == 2 else squares.sqrt()) + self.prices[codes]

    def arrays(self, level: int) -> dict[str, np.ndarray]:
        return {**super().arrays(level), f"prices.{level}": self.prices.cpu().numpy()}


class BalancedRQKMeans(ResidualTokenizer):
    """See the module's text. `weight` moves the centres of `greedy`; shares count items."""

    name: ClassVar[str] = "balanced-rq-kmeans"
    config_class: ClassVar[type] = BalancedConfig
    config: BalancedConfig

    def fit(self, embeddings: np.ndarray, **arguments: Any) -> Self:
        """See `ItemTokenizer.fit`.

        Raises:
            InputError: with `constrained`, weights or more than 25.6 million items x codes.
            MissingExtra: k-means-constrained is not installed and `constrained` was asked for.
        """
        if arguments.get("weight") is not None:
            self.check_weighted()
        super().fit(embeddings, **arguments)
        self.report.warnings += [
            f"level {level + 1}: filling had not settled after {self.config.rounds} rounds; the best round was kept"
            for level, found in enumerate(self.report.levels)
            if not found["is_stable"]
        ]
        return self

    def check_weighted(self) -> None:
        """See `ItemTokenizer.check_weighted`."""
        if self.config.balancing == "constrained":
            raise InputError("balancing 'constrained' takes no weights; leave weight out or use balancing 'greedy'")

    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """See `ResidualTokenizer.fit_level`."""
        progress.stage(f"balanced k-means, level {level + 1}", self.config.rounds)
        points = points_of(residuals, self.config.block_rows)
        n_codes = self.level_sizes()[level]
        seed = call_seed(self.config.seed, self.name, level)
        if self.config.balancing == "greedy":
            means, report = self._greedy(points, n_codes, seed, weight, progress)
            shares = fitting_shares(len(points), n_codes)
            prices = filling_prices(torch.from_numpy(_squared_distances(points, means)), shares).numpy()
        else:
            means, prices, report = self._constrained(points, n_codes, seed)
        power = 2 if self.config.balancing == "greedy" else 1
        fitted = PricedLevel(
            torch.tensor(means, device=self.device), torch.tensor(prices, device=self.device), power, report
        )
        counts = np.zeros(n_codes, dtype=np.int64)
        for start, stop in spans(len(points), self.config.block_rows):
            block = torch.from_numpy(points[start:stop]).to(self.device)
            counts += np.bincount(fitted.candidates(block, 1)[0][:, 0].cpu().numpy(), minlength=n_codes)
        fitted.report |= {"smallest_code": int(counts.min()), "largest_code": int(counts.max())}
        return fitted

    def _greedy(
        self, points: np.ndarray, n_codes: int, seed: int, weight: np.ndarray | None, progress: Progress
    ) -> tuple[np.ndarray, dict[str, Any]]:
        shares = fitting_shares(len(points), n_codes)
        means = first_means(points, n_codes, "k-means++", seed, weight)
        labels = np.full(len(points), -1, dtype=np.int64)
        best, best_error, is_stable, done = means, np.inf, False, 0
        for _ in range(self.config.rounds):
            done += 1
            cost = _squared_distances(points, means)
            filled = greedy_fill(cost, shares)
            is_stable = bool((filled == labels).all())
            error = float(np.average(cost[np.arange(len(points)), filled], weights=weight)) * len(points)
            if is_stable or error < best_error:
                best, best_error = means, error
            if is_stable:
                break
            labels = filled
            means = _means_of(points, labels, means, weight)
            progress.advance()
        return best, {"iterations": done, "objective_last": best_error, "is_stable": is_stable}

    def _constrained(
        self, points: np.ndarray, n_codes: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        if points.shape[0] * n_codes > MAX_CONSTRAINED_CELLS:
            raise InputError(
                f"{len(points)} items x {n_codes} codes are too many for balancing 'constrained' (at most "
                f"{MAX_CONSTRAINED_CELLS // n_codes} items with {n_codes} codes); use balancing 'greedy'"
            )
        try:
            from k_means_constrained import KMeansConstrained
        except ImportError as error:
            raise MissingExtra("k-means-constrained", "tokenize", "balancing 'constrained'") from error
        origin = points.mean(axis=0, dtype=np.float64)
        centred = points.astype(np.float64) - origin
        longest = float(np.sqrt(np.square(centred).sum(axis=1)).max())
        scale = _LONGEST / longest if longest else 1.0  # rows that earlier levels left nothing of
        first = first_means(points, n_codes, "k-means++", seed)
        fewest, most = size_bounds(len(points), n_codes, "constrained")
        model = KMeansConstrained(
            n_codes,
            size_min=fewest,
            size_max=most,
            init=(first - origin) * scale,
            n_init=1,
            max_iter=self.config.rounds,
            random_state=seed,
        )
        model.fit(centred * scale)
        means = (model.cluster_centers_ / scale + origin).astype(np.float32)
        # what the package returns may belong to the centres before the last ones; asked again, it is their optimum
        labels = model.predict(centred * scale)
        cost = np.sqrt(_squared_distances(points, means, exact=True))
        chosen = cost[np.arange(len(points)), labels]
        report = {
            "iterations": int(model.n_iter_),
            "objective_last": float(np.square(chosen).sum()),
            "is_stable": int(model.n_iter_) < self.config.rounds,
        }
        return means, flow_prices(cost, labels), report

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """See `ResidualTokenizer.level_from_arrays`."""
        if f"prices.{level}" not in arrays:
            raise InputError(f"{self.name}: the saved arrays hold no 'prices.{level}'; fit again")
        means, prices = (torch.tensor(arrays[f"{name}.{level}"], device=self.device) for name in ("codebook", "prices"))
        return PricedLevel(means, prices, 2 if self.config.balancing == "greedy" else 1)


def _squared_distances(points: np.ndarray, means: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """(N, K) squared distances, float64 where `exact`, else float32."""
    dtype = np.float64 if exact else np.float32
    origin = means.mean(axis=0, dtype=np.float64)
    rows, centres = (points - origin).astype(dtype), (means - origin).astype(dtype)
    squares = np.square(rows).sum(axis=1)[:, None] - 2 * (rows @ centres.T) + np.square(centres).sum(axis=1)
    return np.maximum(squares, 0, out=squares)


def _means_of(points: np.ndarray, labels: np.ndarray, before: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """(K, D) float32 means of the items of each code; a code without weight keeps its mean `before`."""
    share = np.ones(len(points)) if weight is None else weight
    sums = torch.zeros(before.shape, dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(labels), torch.from_numpy(points * share[:, None]))
    masses = np.bincount(labels, weights=share, minlength=len(before))
    found = sums.numpy() / np.where(masses > 0, masses, 1)[:, None]
    return np.where((masses > 0)[:, None], found, before).astype(np.float32)
