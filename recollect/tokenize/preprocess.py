"""What is done to embeddings before they are quantised: an explicit, fitted, stored chain of steps.

Steps: `l2` (rows to unit length), `centre` (subtract the mean), `pca` (centre, project on the leading principal
directions, optionally whiten) and `direction` (unit rows, their mean direction projected out, unit rows again: the
opening of PRQ-KMeans). Statistics are accumulated in float64 over blocks of rows, so memory-mapped arrays larger than
memory can be fitted, and `apply` works on any block.

Undoing: `centre` and a full `pca` give the input back; a shortened `pca` gives the nearest point of its subspace; `l2`
gives unit rows (the norm is lost) and `direction` unit rows without the mean direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from recollect.errors import ConfigError, InputError

Step = Literal["l2", "centre", "pca", "direction"]
_RANK_TOLERANCE = 1e-10  # eigenvalues below this share of the largest are noise of float32 input
_BLOCK = 16384  # rows read at a time while fitting
_TILE = 256  # rows multiplied at a time


@dataclass(frozen=True)
class PreprocessConfig:
    """What is done to the embeddings before they are quantised; every tokenizer has these options."""

    preprocess: tuple[Literal["l2", "centre", "pca", "direction"], ...] | None = None
    """Steps in order, comma separated; none = embeddings as they are."""
    pca_dimension: int = 0
    """Principal directions kept by pca; 0 = all."""
    whiten: bool = False
    """Give every principal direction the variance 1."""

    def __post_init__(self) -> None:
        steps = self.preprocess or ()
        known = ("l2", "centre", "pca", "direction")
        for step in steps:
            if step not in known:
                raise ConfigError(f"preprocess must be steps of {', '.join(known)}, got {step!r}")
        if len(set(steps)) < len(steps):
            raise ConfigError(f"preprocess must name each step once, got {','.join(steps)!r}")
        if self.pca_dimension < 0:
            raise ConfigError(f"pca_dimension must be 0 (all) or more, got {self.pca_dimension!r}")
        if "pca" not in steps and (self.pca_dimension or self.whiten):
            raise ConfigError("pca_dimension and whiten need the step pca; add pca to preprocess")


class Preprocess:
    """A chain of steps; does nothing when the config names none.

    input_dimension, output_dimension: D and d, None until fitted.
    """

    def __init__(self, config: PreprocessConfig | None = None) -> None:
        config = PreprocessConfig() if config is None else config
        self.steps: tuple[str, ...] = tuple(config.preprocess or ())
        self.pca_dimension = config.pca_dimension
        self.whiten = config.whiten
        self.input_dimension: int | None = None
        self.output_dimension: int | None = None
        self._fitted: list[dict[str, np.ndarray]] = []

    @property
    def is_invertible(self) -> bool:
        """Whether `invert(apply(x))` is x up to rounding."""
        if self.input_dimension is None or self.input_dimension != self.output_dimension:
            return False
        return not set(self.steps) & {"l2", "direction"}

    def fit(self, embeddings: np.ndarray, rows: np.ndarray | None = None, weight: np.ndarray | None = None) -> Self:
        """Learn each step on the output of the steps before it.

        Args:
            embeddings: (N, D) finite floats, may be memory-mapped; read block by block, once per statistic.
            rows: (n,) positions to learn from; default all.
            weight: (n,) float >= 0 of those rows; default equal.

        Raises:
            InputError: fewer directions than `pca_dimension`; whitening a direction without variance; rows that have
                no mean direction.
        """
        rows = np.arange(len(embeddings)) if rows is None else rows
        self.input_dimension = embeddings.shape[1]
        self._fitted = []
        for position, step in enumerate(self.steps):
            self._fitted.append(self._learn(step, _Pass(self, embeddings, rows, weight, position)))
        probe = np.asarray(embeddings[rows[:1]], dtype=np.float64)
        self.output_dimension = self._run(probe, len(self.steps)).shape[1]
        return self

    def _learn(self, step: str, data: _Pass) -> dict[str, np.ndarray]:
        if step == "l2":
            return {}
        if step == "direction":
            mean = data.mean(lambda block, share: share @ unit_rows(block))
            norm = np.linalg.norm(mean)
            if norm < 1e-8:
                raise InputError("the unit embeddings average to 0: there is no common direction; drop 'direction'")
            return {"direction": mean / norm}
        mean = data.mean(lambda block, share: share @ block)
        if step == "centre":
            return {"mean": mean}
        covariance = data.mean(lambda block, share: ((block - mean) * share[:, None]).T @ (block - mean))
        return self._principal(mean, covariance)

    def _principal(self, mean: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
        keep = self.pca_dimension or len(mean)
        if keep > len(mean):
            raise InputError(f"pca_dimension {keep} is more than the {len(mean)} dimensions there are")
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1][:keep], vectors[:, ::-1][:, :keep]
        # the sign of an eigenvector is the library's whim; the largest entry is made positive
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(keep)])
        scale = np.ones(keep)
        if self.whiten:
            rank = int((values > _RANK_TOLERANCE * values[0]).sum())
            if rank < keep:
                raise InputError(
                    f"only {rank} of {keep} principal directions have any variance to whiten; "
                    f"set pca_dimension to {rank} or less"
                )
            scale = np.sqrt(values)
        return {"mean": mean, "components": np.ascontiguousarray(vectors.T), "scale": scale}

    def apply(self, block: np.ndarray) -> np.ndarray:
        """(B, d) float32 of rows (B, D); the arithmetic is float64.

        Raises:
            InputError: steps that are not fitted; another D.
        """
        if not self.steps:
            return np.ascontiguousarray(block, dtype=np.float32)
        self._check(block, self.input_dimension)
        return self._run(np.asarray(block, dtype=np.float64), len(self.steps)).astype(np.float32)

    def invert(self, block: np.ndarray) -> np.ndarray:
        """(B, D) float32 from (B, d): the steps undone as far as they can be (see the module's text)."""
        if not self.steps:
            return np.ascontiguousarray(block, dtype=np.float32)
        self._check(block, self.output_dimension)
        rows = np.asarray(block, dtype=np.float64)
        for step, fitted in zip(reversed(self.steps), reversed(self._fitted), strict=True):
            if step == "centre":
                rows = rows + fitted["mean"]
            elif step == "pca":
                rows = tiled_product(rows * fitted["scale"], fitted["components"]) + fitted["mean"]
        return rows.astype(np.float32)

    def _check(self, block: np.ndarray, dimension: int | None) -> None:
        if dimension is None:
            raise InputError("preprocessing is not fitted yet; call fit(embeddings) or load a saved folder")
        if block.ndim != 2 or block.shape[1] != dimension:
            raise InputError(f"rows have shape {block.shape} where preprocessing was fitted for (B, {dimension})")

    def _run(self, rows: np.ndarray, done: int) -> np.ndarray:
        for step, fitted in zip(self.steps[:done], self._fitted[:done], strict=True):
            if step == "l2":
                rows = unit_rows(rows)
            elif step == "centre":
                rows = rows - fitted["mean"]
            elif step == "pca":
                rows = tiled_product(rows - fitted["mean"], fitted["components"].T) / fitted["scale"]
            else:
                unit = unit_rows(rows)
                along = (unit * fitted["direction"]).sum(axis=1, keepdims=True)
                rows = unit_rows(unit - along * fitted["direction"])
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """What fitting found, as `preprocess.{position}.{name}` float64, and the dimensions; empty without steps."""
        if not self.steps:
            return {}
        found = {
            f"preprocess.{position}.{name}": array
            for position, fitted in enumerate(self._fitted)
            for name, array in fitted.items()
        }
        found["preprocess.dimensions"] = np.array([self.input_dimension, self.output_dimension], dtype=np.int64)
        return found

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`; other names in `arrays` are ignored.

        Raises:
            InputError: an array of a step is missing.
        """
        if not self.steps:
            return
        names = {"l2": (), "centre": ("mean",), "direction": ("direction",), "pca": ("mean", "components", "scale")}
        try:
            self._fitted = [
                {name: arrays[f"preprocess.{position}.{name}"] for name in names[step]}
                for position, step in enumerate(self.steps)
            ]
            self.input_dimension, self.output_dimension = (int(size) for size in arrays["preprocess.dimensions"])
        except KeyError as error:
            raise InputError(
                f"the saved codebooks lack {error.args[0]!r}, which preprocess needs; fit again"
            ) from error

    def describe(self) -> dict[str, Any]:
        """For the manifest: the steps, their options and the dimensions."""
        return {
            "steps": list(self.steps),
            "pca_dimension": self.pca_dimension,
            "whiten": self.whiten,
            "input_dimension": self.input_dimension,
            "output_dimension": self.output_dimension,
            "is_invertible": self.is_invertible,
        }


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows (B, D) divided by their length; a row of zeros stays as it is."""
    norm = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return rows / np.where(norm > 0, norm, 1)


def tiled_product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows (B, D) @ matrix (D, d), each row's bits independent of B.

    A matrix product picks its kernel, and so the order of its sums, by the shapes; every call here has one shape.
    """
    product = np.empty((len(rows), matrix.shape[1]))
    tile = np.zeros((_TILE, rows.shape[1]))
    for start in range(0, len(rows), _TILE):
        part = rows[start : start + _TILE]
        tile[: len(part)] = part
        product[start : start + _TILE] = (tile @ matrix)[: len(part)]
    return product


class _Pass:
    """Weighted means over the rows as they are after the first `done` steps of `chain`."""

    def __init__(
        self, chain: Preprocess, embeddings: np.ndarray, rows: np.ndarray, weight: np.ndarray | None, done: int
    ) -> None:
        self._chain, self._embeddings, self._rows, self._weight, self._done = chain, embeddings, rows, weight, done

    def mean(self, reduce: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Sum of `reduce`(block (B, d) float64, weights (B,)) over all blocks, divided by the sum of the weights."""
        total = np.zeros(())
        mass = 0.0
        for start in range(0, len(self._rows), _BLOCK):
            chosen = self._rows[start : start + _BLOCK]
            block = self._chain._run(np.asarray(self._embeddings[chosen], dtype=np.float64), self._done)
            share = np.ones(len(chosen)) if self._weight is None else self._weight[start : start + _BLOCK]
            total = total + reduce(block, share)
            mass += float(share.sum())
        return total / mass
