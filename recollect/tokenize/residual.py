"""Residual quantisation: level l codes what the levels above left, r <- r - mean of the emitted code.

Training and serving see the same residuals: both are computed by the same float32 subtractions in the same order.
A method is a subclass that says how one level is fitted (`fit_level`) and read back (`level_from_arrays`).
Where the options name `preprocess` steps, the chain lives in the space after them: codebooks and `Encoding.distance`
are of that space, `decode` undoes the steps as far as they can be undone. Not covered: collisions.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recollect.config import to_dict, versions
from recollect.errors import ConfigError, InputError
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.checkpoint import FitCheckpoint, array_sha256, rows_sha256
from recollect.tokenize.nearest import NearestMeans
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.protocol import Encoding, FitReport, ItemTokenizer, check_embeddings, fit_rows
from recollect.tokenize.residual_config import ResidualConfig
from recollect.tokenize.rows import ArrayRows, RowSource, TensorRows, spans


class FittedLevel:
    """One codebook. This one emits the nearest mean; a method whose rule differs overrides.

    means: (K, D) float32.  report: JSON values about its fit (iterations, objective, …).
    """

    def __init__(self, means: Tensor, report: Mapping[str, Any] | None = None) -> None:
        self.means = means.to(torch.float32).contiguous()
        self.report: dict[str, Any] = dict(report or {})
        self._nearest = NearestMeans(self.means)

    def candidates(self, residual: Tensor, m: int) -> tuple[Tensor, Tensor | None]:
        """The m codes this level would emit, best first, for residuals (B, D) float32.

        Returns:
            codes (B, m) int64, the first a function of its row alone (`nearest`); log posterior (B, K) or None.
        """
        return self._nearest(residual, m), None

    def remainder(self, residual: Tensor, codes: Tensor) -> Tensor:
        """(B, D) what the next level sees of residuals (B, D) coded (B,)."""
        return residual - self.means[codes]

    def arrays(self, level: int) -> dict[str, np.ndarray]:
        """What is stored of it: at least `codebook.{level}` float32 (K, D)."""
        return {f"codebook.{level}": self.means.cpu().numpy()}


class ChainRows:
    """What a chain of levels leaves of a source, computed anew from the codes whenever a block is read."""

    def __init__(self, source: RowSource, levels: list[FittedLevel], codes: np.ndarray, device: torch.device) -> None:
        self._source, self._levels, self._codes, self._device = source, levels, codes, device
        self.dimension = source.dimension

    def __len__(self) -> int:
        return len(self._source)

    def block(self, start: int, stop: int) -> Tensor:
        """See `RowSource.block`."""
        residual = self._source.block(start, stop).to(self._device)
        codes = torch.from_numpy(self._codes[start:stop].astype(np.int64)).to(self._device)
        for level, fitted in enumerate(self._levels):
            residual = fitted.remainder(residual, codes[:, level])
        return residual


class ResidualTokenizer(ItemTokenizer):
    """The chain: fit level by level, encode greedily or with a beam, decode as a sum of codebook rows.

    checkpoint: where the fit in progress keeps its state, None outside `fit` or when nothing is kept.
    """

    config_class: ClassVar[type] = ResidualConfig
    config: ResidualConfig

    def __init__(self, config: ResidualConfig | None = None) -> None:
        super().__init__(config)
        self.device = torch_device(self.config.device)
        self.preprocess = Preprocess(self.config)
        self.levels: list[FittedLevel] = []
        self.checkpoint: FitCheckpoint | None = None

    @abstractmethod
    def fit_level(self, level: int, residuals: RowSource, weight: np.ndarray | None, progress: Progress) -> FittedLevel:
        """Fit one codebook of `level_sizes()[level]` rows on residuals (n, D), weights (n,) float64 or None."""

    def level_from_arrays(self, level: int, arrays: Mapping[str, np.ndarray]) -> FittedLevel:
        """Inverse of `FittedLevel.arrays`, on `self.device`."""
        return FittedLevel(torch.tensor(arrays[f"codebook.{level}"], device=self.device))

    def level_sizes(self) -> tuple[int, ...]:
        """Codes of each level, K_0..K_{L-1}."""
        return (self.config.codebook_size,) * self.config.levels

    def fit(
        self,
        embeddings: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        collaborative: np.ndarray | None = None,
        checkpoint: Path | None = None,
        progress: Progress = SilentProgress(),  # noqa: B008 - stateless
    ) -> Self:
        """See `ItemTokenizer.fit`; each level's report also has relative_mse and dead_codes."""
        if collaborative is not None:
            raise InputError(f"{self.name} does not use behaviour vectors; leave collaborative out")
        started = time.perf_counter()
        rows, chosen_weight = fit_rows(embeddings, mask, weight)
        check_embeddings(embeddings[rows[:1]], 1)  # its form; values are checked as they are read
        check_source(ArrayRows(embeddings, rows), max(self.level_sizes()), self.config.block_rows)
        self.preprocess.fit(embeddings, rows, chosen_weight)
        source = ArrayRows(embeddings, rows, self.preprocess.apply)
        self.levels, self.dimension, self.codebook_sizes, self.report = [], None, (), FitReport()
        if checkpoint is not None:
            self.checkpoint = FitCheckpoint(checkpoint, self._identity(embeddings, rows, chosen_weight))
        try:
            self._fit_chain(source, chosen_weight, progress)
        finally:
            self.checkpoint = None
        self.dimension = int(embeddings.shape[1])
        self.report.seconds = time.perf_counter() - started
        return self

    def _fit_chain(self, source: RowSource, weight: np.ndarray | None, progress: Progress) -> None:
        sizes = self.level_sizes()
        total = _total_variance(source, weight, self.config.block_rows)
        if not total > 0:
            raise InputError(f"{self.name}: nothing differs between the items after preprocess; use other steps")
        codes = np.zeros((len(source), len(sizes)), dtype=np.int32)
        in_memory = len(source) * source.dimension * 4 <= self.config.residual_memory_mb << 20
        residuals: RowSource = _loaded(source, self.device, self.config.block_rows) if in_memory else source
        levels: list[FittedLevel] = []
        for level in range(len(sizes)):
            kept = None if self.checkpoint is None else self.checkpoint.level(level)
            if kept is None:
                fitted = self.fit_level(level, residuals, weight, progress)
            else:
                fitted = self.level_from_arrays(level, kept[0])
                fitted.report = kept[1]
            error = 0.0
            for start, stop in spans(len(source), self.config.block_rows):
                block = residuals.block(start, stop).to(self.device)
                emitted = fitted.candidates(block, 1)[0][:, 0]
                left = fitted.remainder(block, emitted)
                codes[start:stop, level] = emitted.cpu().numpy()
                error += _weighted_squares(left, weight, start, stop)
                if isinstance(residuals, TensorRows):
                    residuals.values[start:stop] = left
            levels.append(fitted)
            if not in_memory:
                residuals = ChainRows(source, levels.copy(), codes, self.device)
            if kept is None:
                used = len(np.unique(codes[:, level]))
                fitted.report |= {"relative_mse": error / total, "dead_codes": sizes[level] - used}
                if self.checkpoint is not None:
                    self.checkpoint.save_level(level, fitted.arrays(level), fitted.report)
        self.levels = levels
        self.codebook_sizes = tuple(len(fitted.means) for fitted in levels)
        self.report.levels = [fitted.report for fitted in levels]
        self.report.warnings += [
            f"level {level + 1}: {fitted.report['dead_codes']} of {sizes[level]} codes are the code of no fitted item"
            for level, fitted in enumerate(levels)
            if fitted.report["dead_codes"]
        ]

    def _identity(self, embeddings: np.ndarray, rows: np.ndarray, weight: np.ndarray | None) -> dict[str, Any]:
        return {
            "method": self.name,
            "options": to_dict(self.config),
            "embeddings": rows_sha256(embeddings, rows),
            "rows": array_sha256(rows),
            "weight": array_sha256(weight),
            "torch": versions()["torch"],
        }

    def encode(
        self, embeddings: np.ndarray, *, beam: int = 1, top_m: int = 1, return_posterior: bool = False
    ) -> Encoding:
        """See `ItemTokenizer.encode`."""
        self.check_rows(embeddings)
        self.check_search(beam=beam, top_m=top_m)
        if not 1 <= top_m <= min(self.codebook_sizes):
            raise InputError(f"top_m must be between 1 and {min(self.codebook_sizes)}, got {top_m!r}")
        n, depth = len(embeddings), len(self.levels)
        source = ArrayRows(embeddings, None, self.preprocess.apply)
        codes = np.zeros((n, depth), dtype=np.int32)
        distance = np.zeros(n, dtype=np.float32) if self.reconstructs else None
        described: dict[str, list[np.ndarray]] = {}
        for start, stop in spans(n, max(1, self.config.block_rows // beam**2)):
            block = source.block(start, stop).to(self.device)
            emitted = self._beam(block, beam) if beam > 1 else None
            emitted, details = self._descend(block, emitted, top_m, return_posterior)
            codes[start:stop] = emitted.cpu().numpy()
            if distance is not None:
                distance[start:stop] = (block - self._sum_of_means(emitted)).square().sum(dim=1).cpu().numpy()
            for name, values in details.items():
                described.setdefault(name, []).append(values.cpu().numpy())
        whole = {name: np.concatenate(parts) for name, parts in described.items()}
        return Encoding(codes, distance, **whole)

    @property
    def is_additive(self) -> bool:
        """Whether each level leaves r - mean, so that partial tuples can be ranked by what they leave."""
        return self.reconstructs

    def check_search(self, *, beam: int = 1, top_m: int = 1) -> None:
        """See `ItemTokenizer.check_search`."""
        super().check_search(beam=beam, top_m=top_m)
        if beam > 1 and not self.is_additive:
            raise InputError(f"{self.name}: beam {beam} needs the hard residual rule; use beam 1")

    def _descend(
        self, block: Tensor, emitted: Tensor | None, top_m: int, with_posterior: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Walk down the levels along `emitted` (B, L), or greedily where None: the codes and what was asked of them."""
        path: list[Tensor] = []
        found: dict[str, list[Tensor]] = {}
        residual = block
        for level, fitted in enumerate(self.levels):
            ranked, log_posterior = fitted.candidates(residual, top_m)
            code = ranked[:, 0] if emitted is None else emitted[:, level]
            if top_m > 1:
                found.setdefault("alternatives", []).append(ranked.to(torch.int32))
            if log_posterior is not None and top_m > 1:
                found.setdefault("probability", []).append(log_posterior.gather(1, ranked).exp().float())
            if log_posterior is not None and with_posterior:
                found.setdefault("confidence", []).append(log_posterior.gather(1, code[:, None])[:, 0].exp().float())
                found.setdefault("entropy", []).append(entropy_of(log_posterior).float())
            residual = fitted.remainder(residual, code)
            path.append(code)
        return torch.stack(path, dim=1), {name: torch.stack(parts, dim=1) for name, parts in found.items()}

    def _beam(self, block: Tensor, beam: int) -> Tensor:
        """(B, L) codes: at each level the `beam` partial tuples with the least squared error survive."""
        n = len(block)
        residual = block[:, None]  # (B, b, D)
        codes = torch.zeros(n, 1, 0, dtype=torch.int64, device=block.device)
        for fitted in self.levels:
            width = residual.shape[1]
            flat = residual.reshape(n * width, -1)
            proposed = fitted.candidates(flat, min(beam, len(fitted.means)))[0]  # (B b, m)
            m = proposed.shape[1]
            left = fitted.remainder(flat.repeat_interleave(m, dim=0), proposed.reshape(-1))
            error = left.double().square().sum(dim=1).reshape(n, width * m)
            kept = error.argsort(dim=1, stable=True)[:, :beam]  # (B, b')
            residual = left.reshape(n, width * m, -1).gather(1, kept[..., None].expand(-1, -1, left.shape[1]))
            longer = torch.cat([codes.repeat_interleave(m, dim=1), proposed.reshape(n, width * m, 1)], dim=2)
            codes = longer.gather(1, kept[..., None].expand(-1, -1, longer.shape[2]))
        return codes[:, 0]

    def _sum_of_means(self, codes: Tensor) -> Tensor:
        """(B, D) float32 sum of the means of codes (B, l)."""
        total = self.levels[0].means[codes[:, 0]]
        for level in range(1, codes.shape[1]):
            total = total + self.levels[level].means[codes[:, level]]
        return total

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See `ItemTokenizer.decode`."""
        self.check_codes(codes)
        if not self.reconstructs:
            raise InputError(f"{self.name}: this residual rule has no additive reconstruction; codes cannot be decoded")
        if not codes.shape[1]:
            raise InputError(f"{self.name}: codes have no level; give at least one column")
        out = np.zeros((len(codes), int(self.dimension or 0)), dtype=np.float32)
        for start, stop in spans(len(codes), self.config.block_rows):
            block = torch.from_numpy(codes[start:stop].astype(np.int64)).to(self.device)
            out[start:stop] = self.preprocess.invert(self._sum_of_means(block).cpu().numpy())
        return out

    def arrays(self) -> Mapping[str, np.ndarray]:
        """See `ItemTokenizer.arrays`."""
        self.check_fitted()
        found = {
            name: array for level, fitted in enumerate(self.levels) for name, array in fitted.arrays(level).items()
        }
        return found | self.preprocess.arrays()

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `ItemTokenizer.take_arrays`.

        Raises:
            InputError: a codebook is missing or of another shape than the options say.
        """
        sizes = self.level_sizes()
        missing = [f"codebook.{level}" for level in range(len(sizes)) if f"codebook.{level}" not in arrays]
        if missing:
            raise InputError(f"{self.name}: the saved arrays hold no {missing[0]!r}; levels is {len(sizes)}")
        shapes = [arrays[f"codebook.{level}"].shape for level in range(len(sizes))]
        wrong = [shape for shape, size in zip(shapes, sizes, strict=True) if shape != (size, shapes[0][-1])]
        if wrong:
            raise InputError(f"{self.name}: a saved codebook is {wrong[0]} where the options say {sizes} codes")
        self.preprocess.take_arrays(arrays)
        self.levels = [self.level_from_arrays(level, arrays) for level in range(len(sizes))]
        self.dimension, self.codebook_sizes = self.preprocess.input_dimension or int(shapes[0][1]), sizes


def torch_device(name: str) -> torch.device:
    """The device an option names; auto = cuda where there is one.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device 'cuda' was asked for, but this machine offers none; use 'cpu' or 'auto'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def entropy_of(log_posterior: Tensor) -> Tensor:
    """(B,) entropy in nats of log probabilities (B, K); 0 log 0 = 0."""
    posterior = log_posterior.exp()
    return -torch.where(posterior > 0, posterior * log_posterior, 0.0).sum(dim=1)


def _loaded(source: RowSource, device: torch.device, block_rows: int) -> TensorRows:
    values = torch.empty(len(source), source.dimension, dtype=torch.float32, device=device)
    for start, stop in spans(len(source), block_rows):
        values[start:stop] = source.block(start, stop).to(device)
    return TensorRows(values)


def _weighted_squares(rows: Tensor, weight: np.ndarray | None, start: int, stop: int) -> float:
    squares = rows.double().square().sum(dim=1)
    if weight is not None:
        squares = squares * torch.from_numpy(weight[start:stop]).to(rows.device)
    return float(squares.sum())


def check_source(source: RowSource, codes: int, block_rows: int) -> None:
    """Refuse rows no codebook can be fitted on, as `check_embeddings` does."""
    if len(source) < codes:
        raise InputError(
            f"{len(source)} items cannot fill a codebook of {codes} codes; use --codebook-size {len(source)} or fewer"
        )
    if len(source) == 1:
        return
    first = source.block(0, 1)
    is_constant = True
    for start, stop in spans(len(source), block_rows):
        is_constant = bool((source.block(start, stop) == first).all()) and is_constant
    if is_constant:
        raise InputError("every item has the same embedding; check the text the embedder was given")


def _total_variance(source: RowSource, weight: np.ndarray | None, block_rows: int) -> float:
    """Weighted sum of squared distances to the mean, about the first row to keep digits."""
    origin = source.block(0, 1).double()[0]
    mass, sums, squares = 0.0, torch.zeros_like(origin), 0.0
    for start, stop in spans(len(source), block_rows):
        block = source.block(start, stop).double() - origin
        one = torch.ones(len(block), dtype=torch.float64)
        share = one if weight is None else torch.from_numpy(weight[start:stop])
        mass += float(share.sum())
        sums += share @ block
        squares += float(share @ block.square().sum(dim=1))
    return squares - float(sums @ sums) / mass
