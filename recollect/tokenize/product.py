"""PQ and OPQ: independent codes for parts of the vector, by faiss.

PQ splits the D dimensions into L blocks and runs k-means in each; level l is the code of block l, so levels are not
coarse to fine. OPQ first turns the vectors by an orthogonal matrix that lowers PQ's error. The matrix is found by faiss
from a start drawn under the seed, on all rows (its own default is 65,536); the codebooks are then fitted anew to
convergence. Where L does not divide D, PQ's blocks differ by one dimension and OPQ turns into the next multiple of L.
Not covered: data larger than memory; faiss needs the rows as one array (4 n D bytes).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from recollect.errors import InputError
from recollect.progress import Progress, SilentProgress
from recollect.rng import stream
from recollect.tokenize.baseline_options import OPQConfig, PQConfig
from recollect.tokenize.kmeans import fit_kmeans, import_faiss, points_of
from recollect.tokenize.nearest import NearestMeans
from recollect.tokenize.preprocess import Preprocess, tiled_product
from recollect.tokenize.protocol import Encoding, FitReport, ItemTokenizer, check_embeddings, fit_rows
from recollect.tokenize.residual import check_source, torch_device
from recollect.tokenize.rows import ArrayRows, spans


def block_bounds(dimension: int, blocks: int) -> list[int]:
    """Where each of `blocks` parts of 0..dimension begins, and the end; the first parts may be one longer."""
    sizes = [dimension // blocks + (block < dimension % blocks) for block in range(blocks)]
    return [sum(sizes[:block]) for block in range(blocks + 1)]


class PQ(ItemTokenizer):
    """Product quantisation; see the module's text.

    mean: (d,) float32 of the fitted rows; stands for the blocks whose codes a shortened code lacks.
    """

    name: ClassVar[str] = "pq"
    config_class: ClassVar[type] = PQConfig
    config: PQConfig

    def __init__(self, config: PQConfig | None = None) -> None:
        super().__init__(config)
        self.device = torch_device(self.config.device)
        self.preprocess = Preprocess(self.config)
        self.codebooks: list[Tensor] = []
        self.mean = np.zeros(0, dtype=np.float32)
        self._searches: list[NearestMeans] = []

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
        """See `ItemTokenizer.fit`; nothing is kept in `checkpoint`, an interrupted fit begins again.

        Raises:
            InputError: as `ItemTokenizer.fit`; fewer dimensions than levels.
            MissingExtra: faiss is not installed.
        """
        if collaborative is not None:
            raise InputError(f"{self.name} does not use behaviour vectors; leave collaborative out")
        started = time.perf_counter()
        config = self.config
        rows, chosen_weight = fit_rows(embeddings, mask, weight)
        check_embeddings(embeddings[rows[:1]], 1)  # its form; values are checked as they are read
        check_source(ArrayRows(embeddings, rows), config.codebook_size, config.block_rows)
        self.preprocess.fit(embeddings, rows, chosen_weight)
        points = points_of(ArrayRows(embeddings, rows, self.preprocess.apply), config.block_rows)
        if points.shape[1] < config.levels:
            raise InputError(
                f"{self.name}: {points.shape[1]} dimensions cannot be split into {config.levels} levels; "
                f"use --levels {points.shape[1]} or fewer"
            )
        points = self._fit_turn(points, progress)
        mean = np.average(points, axis=0, weights=chosen_weight).astype(np.float32)
        bounds = block_bounds(points.shape[1], config.levels)
        progress.stage("k-means per block", config.levels)
        codebooks, self.report = [], FitReport()
        for level in range(config.levels):
            part = np.ascontiguousarray(points[:, bounds[level] : bounds[level + 1]])
            clusters = fit_kmeans(
                part, config.codebook_size, config, names=(self.name, "block", level), weight=chosen_weight
            )
            codebooks.append(clusters.means)
            self.report.levels.append(clusters.report())
            if not clusters.has_converged:
                self.report.warnings.append(
                    f"level {level + 1}: k-means had not converged after {config.iterations} iterations; "
                    "raise iterations"
                )
            progress.advance()
        self._take(codebooks, mean, int(embeddings.shape[1]))
        self.report.seconds = time.perf_counter() - started
        return self

    def _fit_turn(self, points: np.ndarray, progress: Progress) -> np.ndarray:
        """The rows whose blocks are coded, from rows (n, d) float32 after preprocessing."""
        return points

    def _turn(self, block: np.ndarray) -> np.ndarray:
        return block

    def _turn_back(self, block: np.ndarray) -> np.ndarray:
        return block

    def _take(self, codebooks: list[np.ndarray], mean: np.ndarray, dimension: int) -> None:
        self.codebooks = [torch.tensor(codebook, device=self.device) for codebook in codebooks]
        self._searches = [NearestMeans(codebook) for codebook in self.codebooks]
        self.mean, self.dimension = mean, dimension
        self.codebook_sizes = tuple(len(codebook) for codebook in self.codebooks)

    def encode(
        self, embeddings: np.ndarray, *, beam: int = 1, top_m: int = 1, return_posterior: bool = False
    ) -> Encoding:
        """See `ItemTokenizer.encode`; blocks are independent, so the greedy code is the best one and beam must be 1."""
        self.check_rows(embeddings)
        self.check_search(beam=beam, top_m=top_m)
        if not 1 <= top_m <= min(self.codebook_sizes):
            raise InputError(f"top_m must be between 1 and {min(self.codebook_sizes)}, got {top_m!r}")
        source = ArrayRows(embeddings, None, self.preprocess.apply)
        levels = len(self.codebooks)
        bounds = block_bounds(len(self.mean), levels)
        ranked = np.zeros((len(embeddings), levels, top_m), dtype=np.int32)
        distance = np.zeros(len(embeddings), dtype=np.float32)
        for start, stop in spans(len(embeddings), self.config.block_rows):
            turned = torch.from_numpy(self._turn(source.block(start, stop).numpy())).to(self.device)
            error = torch.zeros(len(turned), dtype=torch.float64, device=self.device)
            for level, search in enumerate(self._searches):
                part = turned[:, bounds[level] : bounds[level + 1]].contiguous()
                codes = search(part, top_m)
                error += search.squared_distance(part, codes[:, 0])
                ranked[start:stop, level] = codes.cpu().numpy()
            distance[start:stop] = error.cpu().numpy()
        return Encoding(np.ascontiguousarray(ranked[:, :, 0]), distance, alternatives=ranked if top_m > 1 else None)

    def check_search(self, *, beam: int = 1, top_m: int = 1) -> None:
        """See `ItemTokenizer.check_search`."""
        super().check_search(beam=beam, top_m=top_m)
        if beam > 1:
            raise InputError(f"{self.name}: greedy codes are already the best ones; use beam 1, got {beam!r}")

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See `ItemTokenizer.decode`; blocks without a code get the mean of the fitted rows."""
        self.check_codes(codes)
        bounds = block_bounds(len(self.mean), len(self.codebooks))
        out = np.zeros((len(codes), int(self.dimension or 0)), dtype=np.float32)
        books = [codebook.cpu().numpy() for codebook in self.codebooks]
        for start, stop in spans(len(codes), self.config.block_rows):
            rows = np.tile(self.mean, (stop - start, 1))
            for level in range(codes.shape[1]):
                rows[:, bounds[level] : bounds[level + 1]] = books[level][codes[start:stop, level]]
            out[start:stop] = self.preprocess.invert(self._turn_back(rows))
        return out

    def arrays(self) -> Mapping[str, np.ndarray]:
        """See `ItemTokenizer.arrays`; `codebook.{level}` is (K, width of the block), beside `mean`."""
        self.check_fitted()
        books: dict[str, Any] = {f"codebook.{level}": book.cpu().numpy() for level, book in enumerate(self.codebooks)}
        return books | {"mean": self.mean} | self.preprocess.arrays()

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `ItemTokenizer.take_arrays`.

        Raises:
            InputError: an array is missing or of another shape than the options say.
        """
        levels, size = self.config.levels, self.config.codebook_size
        names = [*(f"codebook.{level}" for level in range(levels)), "mean", *self._own_arrays]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise InputError(f"{self.name}: the saved arrays hold no {missing[0]!r}; levels is {levels}")
        mean = arrays["mean"]
        bounds = block_bounds(len(mean), levels)
        for level in range(levels):
            wanted = (size, bounds[level + 1] - bounds[level])
            found = arrays[f"codebook.{level}"].shape
            if found != wanted:
                raise InputError(f"{self.name}: codebook.{level} is {found} where the options say {wanted}")
        self.preprocess.take_arrays(arrays)
        inner = self._take_own(arrays, len(mean))
        self._take(
            [arrays[f"codebook.{level}"] for level in range(levels)], mean, self.preprocess.input_dimension or inner
        )

    _own_arrays: ClassVar[tuple[str, ...]] = ()

    def _take_own(self, arrays: Mapping[str, np.ndarray], width: int) -> int:
        """Read the method's own arrays; how many dimensions a row has before it is turned."""
        return width


class OPQ(PQ):
    """Product quantisation after a learned rotation.

    rotation: (d', d) float32 with orthonormal columns; a row x is coded as rotation @ x.
    """

    name: ClassVar[str] = "opq"
    config_class: ClassVar[type] = OPQConfig
    config: OPQConfig
    _own_arrays = ("rotation",)

    def __init__(self, config: OPQConfig | None = None) -> None:
        super().__init__(config)
        self.rotation = np.zeros((0, 0), dtype=np.float32)

    def _fit_turn(self, points: np.ndarray, progress: Progress) -> np.ndarray:
        progress.stage("rotation")
        self.rotation = fit_rotation(points, self.config)
        return self._turn(points)

    def _turn(self, block: np.ndarray) -> np.ndarray:
        return tiled_product(block.astype(np.float64), self.rotation.T.astype(np.float64)).astype(np.float32)

    def _turn_back(self, block: np.ndarray) -> np.ndarray:
        return tiled_product(block.astype(np.float64), self.rotation.astype(np.float64)).astype(np.float32)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """See `PQ.arrays`; and `rotation`."""
        return {**super().arrays(), "rotation": self.rotation}

    def _take_own(self, arrays: Mapping[str, np.ndarray], width: int) -> int:
        self.rotation = arrays["rotation"]
        if self.rotation.ndim != 2 or len(self.rotation) != width:
            raise InputError(f"{self.name}: rotation is {self.rotation.shape} where the codebooks span {width}")
        return int(self.rotation.shape[1])


def fit_rotation(points: np.ndarray, config: OPQConfig) -> np.ndarray:
    """(d', d) float32 with orthonormal columns, d' the next multiple of `levels`, found by faiss on all rows.

    faiss begins at a rotation of its own that no seed reaches; a rotation drawn under `config.seed` goes before it.
    """
    faiss = import_faiss("opq")
    n, dimension = points.shape
    width = -(-dimension // config.levels) * config.levels
    drawn, _ = np.linalg.qr(stream(config.seed, "opq", "rotation").standard_normal((dimension, dimension)))
    matrix = faiss.OPQMatrix(dimension, config.levels, width)
    matrix.niter = config.rotation_iterations
    matrix.max_train_points = n
    # faiss can only train with a power of two of codes here: the largest that is no more than asked for
    inner = faiss.ProductQuantizer(width, config.levels, max(1, config.codebook_size.bit_length() - 1))
    inner.cp.min_points_per_centroid = 1
    inner.cp.max_points_per_centroid = n
    matrix.pq = inner
    matrix.train(np.ascontiguousarray(points @ drawn.T.astype(np.float32)))
    learned = faiss.vector_to_array(matrix.A).reshape(width, dimension).astype(np.float64)
    rotation = learned @ drawn
    # the product of float32 matrices is orthogonal to their rounding; the nearest orthogonal one is taken
    left, _, right = np.linalg.svd(rotation, full_matrices=False)
    return np.ascontiguousarray(left @ right, dtype=np.float32)
