"""EM of one level: full-batch with annealing and re-seeding, or stepwise on mini-batches with a full last pass.

Rows are centred once (the likelihood does not change, rounding shrinks). Whatever the loop carries from one iteration
to the next is in `EMState`, which can be saved and gone on with to the same bits.

Stepwise EM: after batch t the statistics per unit of weight are s <- (1 - rho) s + rho s_batch with
rho = (t + 2)^-0.7, followed by an M-step. Annealing: responsibilities proportional to (pi_k N_k)^b with b growing
geometrically from 0.1 / D to 1 over the first third of the iterations; meanwhile variances stay as they began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.errors import TrainingDiverged
from recollect.progress import Progress, SilentProgress
from recollect.rng import stream
from recollect.tokenize.gmm import Mixture, Scorer, Statistics, maximise, normalise_, precision_needed
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.gmm_start import CentredRows, Moments, first_mixture, moments_of, smallest_variance
from recollect.tokenize.rows import RowSource

_STEP_EXPONENT = 0.7
_RUN_ROWS = 64  # rows read together when a mini-batch is drawn from all over the data
_SHAKE = 0.1  # standard deviations of a component by which annealing shakes its mean
_FIRST_POWER = 0.1  # annealing begins at this exponent divided by D

SaveState = Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], None]
SavedState = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]


@dataclass
class EMState:
    """What one iteration hands to the next.

    mixture: in centred coordinates.  iteration: M-steps that saw all rows.  trace: mean log-likelihood (nats) before
    each of them.  passes: stepwise passes done; updates: batches in them; pass_trace: mean log-likelihood of each.
    is_stepwise_done: whether the stepwise phase is over.  average: running statistics of stepwise EM.  last: what the
    next log-likelihood is compared with, None after a jump.  reseeded: components re-seeded, per round.  used: rows
    they were seeded at.
    """

    mixture: Mixture
    iteration: int = 0
    trace: list[float] = field(default_factory=list)
    passes: int = 0
    updates: int = 0
    pass_trace: list[float] = field(default_factory=list)
    is_stepwise_done: bool = False
    average: Statistics | None = None
    last: float | None = None
    reseeded: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    def save(self, save: SaveState) -> None:
        """Hand arrays and notes to `save`."""
        arrays = {name: getattr(self.mixture, name).cpu().numpy() for name in ("means", "variance", "log_weight")}
        if self.average is not None:
            arrays |= {
                f"average.{name}": getattr(self.average, name).cpu().numpy() for name in ("mass", "moments", "second")
            }
        names = (
            "iteration",
            "trace",
            "passes",
            "updates",
            "pass_trace",
            "is_stepwise_done",
            "last",
            "reseeded",
            "used",
        )
        notes: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.average is not None:
            notes["average"] = [self.average.log_likelihood, self.average.total]
        save(arrays, notes)

    @classmethod
    def restore(cls, saved: SavedState, device: torch.device) -> EMState:
        """Inverse of `save`."""
        tensors = {name: torch.from_numpy(array.copy()).to(device) for name, array in saved[0].items()}
        notes = dict(saved[1])
        scalars = notes.pop("average", None)
        mixture = Mixture(tensors["means"], tensors["variance"], tensors["log_weight"])
        average = None
        if scalars is not None:
            average = Statistics(
                tensors["average.mass"], tensors["average.moments"], tensors["average.second"], scalars[0], scalars[1]
            )
        return cls(mixture, average=average, **notes)


@dataclass(frozen=True)
class MixtureFit:
    """A fitted level.

    mixture: in the rows' own coordinates.  report: iterations, converged, log_likelihood (nats per item, of the final
    parameters), log_likelihood_trace, mean_entropy (nats), reseeded per round, below_minimum (components with fewer
    than `minimum_points`), precision; for stepwise fits also passes and pass_log_likelihoods.
    """

    mixture: Mixture
    report: dict[str, Any]


def fit_mixture(
    source: RowSource,
    k: int,
    config: RQGMMConfig,
    *,
    level: int = 0,
    restart: int = 0,
    weight: np.ndarray | None = None,
    start: Mixture | Tensor | None = None,
    device: torch.device | None = None,
    progress: Progress = SilentProgress(),  # noqa: B008 - stateless
    save: SaveState | None = None,
    saved: SavedState | None = None,
) -> MixtureFit:
    """Fit K components to the rows of a source, once; `gmm_restarts` keeps the best of several.

    Args:
        source: n >= K rows.
        k: components.
        config: the level's options; `levels` and `codebook_size` are not read.
        level, restart: name the random streams.
        weight: (n,) float64 >= 0; 2 is as good as the row twice.
        start: the mixture EM begins with, whatever `config.initialisation`; or means (K, D) for `given`.
        device: where products are computed; default the CPU.
        progress: told about iterations.
        save: called every `checkpoint_iterations` with the state so far.
        saved: a state to go on from.

    Raises:
        InputError: values too large for float32 squares; `given` without means; too few rows with weight.
        TrainingDiverged: the log-likelihood is no longer finite.
    """
    device = torch.device("cpu") if device is None else device
    moments = moments_of(source, weight, config.block_rows, device)
    rows = CentredRows(source, moments.centre, weight, config, device)
    centre = moments.centre.double()
    again = f", restart {restart}" if restart else ""
    progress.stage(f"level {level + 1}: mixture of {k}{again}", config.max_iterations)
    if saved is not None:
        state = EMState.restore(saved, device)
        progress.advance(state.iteration + state.passes)
    elif isinstance(start, Mixture):
        moved = Mixture(*(part.to(device, torch.float64) for part in (start.means, start.variance, start.log_weight)))
        state = EMState(moved.shifted(-centre))
    else:
        given = None if start is None else start.to(device, torch.float64) - centre
        generator = stream(config.seed, "gmm", level, restart, "start")
        state = EMState(first_mixture(rows, k, config, moments, generator, given))
    if save is not None and saved is None:
        state.save(save)
    em = _EM(rows, config, moments, level, restart)
    if config.batch_rows:
        em.run_stepwise(state, progress, save)
    is_converged = em.run(state, progress, save)
    return MixtureFit(state.mixture.shifted(centre), em.report(state, is_converged))


class _EM:
    """The loop over iterations for one level's rows."""

    def __init__(self, rows: CentredRows, config: RQGMMConfig, moments: Moments, level: int, restart: int) -> None:
        self.rows, self.config, self.moments, self.level, self.restart = rows, config, moments, level, restart
        self.is_annealed = config.anneals(restart)
        self.floor = smallest_variance(config, moments)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def run_stepwise(self, state: EMState, progress: Progress, save: SaveState | None) -> None:
        """Mini-batch passes until the passes' mean log-likelihood settles."""
        config = self.config
        while not state.is_stepwise_done:
            if state.average is None:
                state.average = Statistics.of(state.mixture, config.covariance)
            seen, total = 0.0, 0.0
            for runs in self._batches(state.passes):
                batch = self._statistics(state.mixture, runs=runs)
                if not batch.total > 0:
                    continue
                rate = (state.updates + 2) ** -_STEP_EXPONENT
                state.average = state.average.mixed(batch, rate)
                state.mixture = maximise(state.average, state.mixture, config, self.floor, self.moments.points)
                state.updates += 1
                seen, total = seen + batch.log_likelihood, total + batch.total
            state.passes += 1
            state.pass_trace.append(seen / total)
            settled = state.last is not None and abs(state.pass_trace[-1] - state.last) < config.tolerance
            state.last = state.pass_trace[-1]
            if settled or state.passes >= config.max_iterations:
                state.is_stepwise_done, state.last = True, None
            progress.advance(note=f"log-likelihood {state.pass_trace[-1]:.4f}")
            if save is not None and (state.is_stepwise_done or state.passes % config.checkpoint_iterations == 0):
                state.save(save)

    def run(self, state: EMState, progress: Progress, save: SaveState | None) -> bool:
        """Full-batch iterations; whether they converged before the limit."""
        config = self.config
        limit = 1 + config.reseed_rounds if config.batch_rows else config.max_iterations
        while state.iteration < limit:
            power = self._power(state.iteration)
            can_reseed = self._can_reseed(state, limit, power)
            lowest = _Lowest(len(state.mixture.means)) if can_reseed else None
            found = self._statistics(state.mixture, power=power, lowest=lowest)
            state.trace.append(found.log_likelihood / found.total)
            if state.last is not None and abs(state.trace[-1] - state.last) < config.tolerance:
                return True
            state.last = state.trace[-1] if power == 1 else None
            before = state.mixture
            state.mixture = maximise(found, before, config, self.floor, self.moments.points)
            if power < 1:
                state.mixture = self._annealed(state.mixture, before, state.iteration)
            state.iteration += 1
            is_reseeded = lowest is not None and self._reseed(state, found, lowest)
            progress.advance(note=f"log-likelihood {state.trace[-1]:.4f}")
            if config.batch_rows and not is_reseeded:
                return True
            if save is not None and state.iteration % config.checkpoint_iterations == 0:
                state.save(save)
        return False

    def report(self, state: EMState, is_converged: bool) -> dict[str, Any]:
        """The report of `MixtureFit`; one more pass over the rows."""
        entropy = _Entropy()
        final = self._statistics(state.mixture, entropy=entropy)
        below = int((final.mass < self.config.minimum_points).sum())
        report = {
            "iterations": state.iteration,
            "converged": is_converged,
            "log_likelihood": final.log_likelihood / final.total,
            "log_likelihood_trace": state.trace,
            "mean_entropy": entropy.total / final.total,
            "reseeded": state.reseeded,
            "below_minimum": below,
            "precision": str(self._dtype(state.mixture)).removeprefix("torch."),
        }
        if self.config.batch_rows:
            report |= {"passes": state.passes, "pass_log_likelihoods": state.pass_trace}
        return report

    def _power(self, iteration: int) -> float:
        """The exponent of the responsibilities: geometric from 0.1 / D to 1 over the first third, if annealed."""
        steps = self.config.max_iterations // 3
        if not self.is_annealed or iteration >= steps:
            return 1.0
        first = _FIRST_POWER / self.rows.source.dimension
        return float(first ** (1 - iteration / steps))

    def _annealed(self, mixture: Mixture, before: Mixture, iteration: int) -> Mixture:
        """What annealing makes of an M-step's result.

        Variances stay those of the start: they would swell to the data's and hold the components together up to power
        1. Means are shaken a little, for components that fell into one point would never part again.
        """
        generator = stream(self.config.seed, "gmm", self.level, self.restart, "annealing", iteration)
        noise = torch.from_numpy(generator.standard_normal(tuple(mixture.means.shape))).to(mixture.means.device)
        return replace(mixture, means=mixture.means + _SHAKE * before.variance.sqrt() * noise, variance=before.variance)

    def _dtype(self, mixture: Mixture) -> torch.dtype:
        return precision_needed(mixture, self.moments.largest, self.config.precision)

    def _batches(self, passes: int) -> list[list[tuple[int, int]]]:
        """All rows as mini-batches of short runs drawn without replacement, the draw named by the pass."""
        n = len(self.rows)
        starts = np.arange(0, n, _RUN_ROWS)
        stream(self.config.seed, "gmm", self.level, self.restart, "pass", passes).shuffle(starts)
        per_batch = max(1, self.config.batch_rows // _RUN_ROWS)
        runs = [(int(start), min(n, int(start) + _RUN_ROWS)) for start in starts]
        return [runs[first : first + per_batch] for first in range(0, len(runs), per_batch)]

    def _buffer(self, name: str, dtype: torch.dtype, width: int) -> Tensor:
        """Memory used again for every part: fresh pages cost more than small products."""
        key = (name, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.rows.rows_at_once, width, dtype=dtype, device=self.rows.device)
        return self._buffers[key]

    def _statistics(
        self,
        mixture: Mixture,
        *,
        power: float = 1.0,
        runs: list[tuple[int, int]] | None = None,
        lowest: _Lowest | None = None,
        entropy: _Entropy | None = None,
    ) -> Statistics:
        """The E-step over all rows or those of `runs`; responsibilities exist for one part at a time."""
        k, d = mixture.means.shape
        dtype = self._dtype(mixture)
        scorer = Scorer(mixture, self.config.covariance, dtype)
        scores_buffer = self._buffer("scores", dtype, k)
        features_buffer = self._buffer("features", dtype, scorer.width)
        found = Statistics.zeros(k, d, self.config.covariance, self.rows.device)
        for start, rows, weight in self.rows.parts(dtype) if runs is None else self.rows.batch(runs, dtype):
            features = scorer.features(rows, features_buffer[: len(rows)])
            scores = scorer.relative(features, scores_buffer[: len(rows)])
            if entropy is not None:
                entropy.add(scores, weight)
            if power < 1:
                log_density = scores.double().logsumexp(dim=1)
                normalise_(scores.mul_(power))
            else:
                log_density = normalise_(scores)
            log_density = log_density + scorer.shared(rows)
            found.log_likelihood += float(log_density.sum() if weight is None else log_density @ weight)
            if lowest is not None:
                lowest.add(log_density, start, weight)
            found.add(scores, features, rows, None if weight is None else weight.to(dtype))
        if not math.isfinite(found.log_likelihood):
            raise TrainingDiverged(
                f"level {self.level + 1}: the log-likelihood is {found.log_likelihood!r}; use precision auto and a "
                "variance_floor above 0"
            )
        return found

    def _can_reseed(self, state: EMState, limit: int, power: float) -> bool:
        config = self.config
        is_open = config.minimum_points > 0 and len(state.reseeded) < config.reseed_rounds
        return is_open and power == 1 and state.iteration + 1 < limit

    def _reseed(self, state: EMState, found: Statistics, lowest: _Lowest) -> bool:
        """Move dead components to the least likely rows, each row once and no two rows alike."""
        dead = torch.nonzero(found.mass < self.config.minimum_points)[:, 0]
        if not len(dead):
            return False
        seats: list[Tensor] = []
        for position in lowest.positions:
            if len(seats) == len(dead):
                break
            row = self.rows.at(np.array([position]))[0].double()
            if int(position) not in state.used and not any(torch.equal(row, seat) for seat in seats):
                seats.append(row)
                state.used.append(int(position))
        moved = dead[: len(seats)]
        if not len(moved):
            return False
        mixture, alive = state.mixture, found.mass.clone()
        if len(dead) < len(alive):
            alive[dead] = 0
        means, weight = mixture.means.clone(), mixture.log_weight.exp()
        means[moved] = torch.stack(seats)
        weight[moved] = 1 / self.moments.points
        variance = mixture.variance
        if variance.shape[0] > 1:
            variance = variance.clone()
            variance[moved] = alive @ variance / alive.sum()
        state.mixture = replace(mixture, means=means, variance=variance, log_weight=(weight / weight.sum()).log())
        state.reseeded.append(len(moved))
        state.last = None
        return True


class _Lowest:
    """The `size` least likely rows seen, the lower position first among equals."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = np.zeros(0)
        self.positions = np.zeros(0, dtype=np.int64)

    def add(self, log_density: Tensor, start: int, weight: Tensor | None) -> None:
        """Look at rows start.. with log-densities (B,); rows of weight 0 do not count."""
        values = log_density.cpu().numpy()
        bound = self.values[-1] if len(self.values) == self.size else np.inf
        chosen = np.flatnonzero(values < bound)
        if weight is not None:
            chosen = chosen[weight.cpu().numpy()[chosen] > 0]
        values = np.concatenate([self.values, values[chosen]])
        order = np.argsort(values, kind="stable")[: self.size]
        self.values, self.positions = values[order], np.concatenate([self.positions, start + chosen])[order]


class _Entropy:
    """Weighted sum of the entropies (nats) of the responsibilities."""

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, scores: Tensor, weight: Tensor | None) -> None:
        """Look at scores (B, K), which are left as they are."""
        log_posterior = scores.log_softmax(dim=1).clamp_min_(-60.0)  # no subnormal numbers; see `normalise_`
        entropy = -(log_posterior.exp() * log_posterior).sum(dim=1).double()
        self.total += float(entropy.sum() if weight is None else entropy @ weight)
