"""What every item tokenizer can do, and what it gives back.

A tokenizer turns item embeddings (N, D) into codes (N, L): L small integers per item, level 0 the coarsest. Fitting
may use a part of the items (`mask`) and weigh them; encoding is a pure function of the fitted codebooks, so a row's
codes never depend on its batch mates. Collisions are somebody else's matter (`collisions`): here equal rows get equal
codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from recollect.errors import InputError
from recollect.progress import Progress, SilentProgress
from recollect.tokenize.rows import finite_block


@dataclass(frozen=True)
class Encoding:
    """Codes of N items and how sure they are.

    codes: (N, L) int32, 0-based.  distance: (N,) float32, squared error of the reconstruction, or None where a method
    has none.  confidence: (N, L) float32, posterior probability of the emitted code, or None without a posterior.
    entropy: (N, L) float32 nats, or None.  alternatives: (N, L, m) int32, the m best codes of each level, best first
    (each level given the emitted codes of the levels above), and `probability` (N, L, m) float32 of them; None unless
    asked for.
    """

    codes: np.ndarray
    distance: np.ndarray | None = None
    confidence: np.ndarray | None = None
    entropy: np.ndarray | None = None
    alternatives: np.ndarray | None = None
    probability: np.ndarray | None = None


@dataclass
class FitReport:
    """What happened while fitting, for the manifest and the page.

    levels: one mapping per level (iterations, objective before and after, re-seeded components, dead codes, …).
    seconds: wall time.  warnings: sentences a user must read.
    """

    levels: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class ItemTokenizer(ABC):
    """Base of all tokenizers; a subclass is one method.

    `config` is the method's frozen dataclass; `codebook_sizes` (K_0..K_{L-1}) and `dimension` D are known once fitted.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    reconstructs: ClassVar[bool] = True
    """Whether `decode` gives back an approximation of the input."""
    uses_collaborative: ClassVar[bool] = False
    """Whether `fit` needs behaviour vectors beside the embeddings (LETTER)."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.dimension: int | None = None
        self.codebook_sizes: tuple[int, ...] = ()
        self.report = FitReport()

    @abstractmethod
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
        """Learn the codebooks.

        Args:
            embeddings: (N, D) float array, may be memory-mapped; never modified.
            mask: (N,) bool, the items allowed in fitting; default all.
            weight: (N,) float >= 0, e.g. popularity; default 1.
            collaborative: (N, d) float, behaviour vectors; only for methods with `uses_collaborative`.
            checkpoint: folder in which finished levels are kept, so that an interrupted fit goes on with the same
                result; None keeps nothing.
            progress: told about levels and iterations.

        Raises:
            InputError: see `check_embeddings`; fewer items than codes; a weight below 0.
        """

    @abstractmethod
    def encode(
        self, embeddings: np.ndarray, *, beam: int = 1, top_m: int = 1, return_posterior: bool = False
    ) -> Encoding:
        """Codes of each row.

        Args:
            embeddings: (N, D), D as fitted.
            beam: partial tuples kept per item, ranked by squared reconstruction error; 1 = greedy.
            top_m: alternatives per level to return; 1 = none.
            return_posterior: fill `confidence` and `entropy` where the method has them.

        Raises:
            InputError: not fitted; another D; NaN or infinity; an option the method does not have.
        """

    @abstractmethod
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """(N, D) float32 in the space of the input, from codes (N, l <= L): the first l levels' reconstruction.

        Raises:
            InputError: not fitted; a code outside its codebook; a method without reconstruction.
        """

    @abstractmethod
    def arrays(self) -> Mapping[str, np.ndarray]:
        """Everything `encode` needs: `codebook.0` … `codebook.{L-1}` float32 (K_l, d), and the method's own arrays."""

    @abstractmethod
    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`; afterwards `encode` is bit-identical to before."""

    @property
    def has_joint_decoder(self) -> bool:
        """Whether, by the options, what a digit adds to the decoded row depends on the other digits."""
        return False

    def check_search(self, *, beam: int = 1, top_m: int = 1) -> None:
        """Refuse a beam or alternatives that `encode` does not have with these options; needs no fit.

        Raises:
            InputError: a beam below 1, or more than the method searches for.
        """
        if beam < 1:
            raise InputError(f"{self.name}: beam must be at least 1, got {beam!r}")

    def check_weighted(self) -> None:  # noqa: B027 - most methods take weights
        """Refuse weights that `fit` does not take with these options; needs no fit.

        Raises:
            InputError: the method counts every item once.
        """

    def check_fitted(self) -> None:
        """Raises InputError when `fit` or `take_arrays` has not been called."""
        if self.dimension is None:
            raise InputError(f"{self.name}: not fitted yet; call fit(embeddings) or load a saved folder")

    def check_rows(self, embeddings: np.ndarray) -> None:
        """Refuse rows this fitted tokenizer cannot encode.

        Raises:
            InputError: not fitted; not (N, D); another D than fitted.
        """
        self.check_fitted()
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            raise InputError(
                f"{self.name}: embeddings have shape {embeddings.shape} where the codebooks were fitted on "
                f"(N, {self.dimension}); encode with the embedder that was used for fitting"
            )

    def check_codes(self, codes: np.ndarray) -> None:
        """Refuse codes outside the codebooks.

        Raises:
            InputError: not fitted; not (N, l <= L) integers; a code out of range.
        """
        self.check_fitted()
        if codes.ndim != 2 or codes.shape[1] > len(self.codebook_sizes) or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"{self.name}: codes must be integers of shape (N, 1..{len(self.codebook_sizes)}), "
                f"got {codes.dtype} {codes.shape}"
            )
        for level, size in enumerate(self.codebook_sizes[: codes.shape[1]]):
            column = codes[:, level]
            wrong = np.flatnonzero((column < 0) | (column >= size))
            if len(wrong):
                raise InputError(
                    f"{self.name}: code {int(column[wrong[0]])} of row {int(wrong[0])} at level {level} is outside "
                    f"0..{size - 1}"
                )


def fit_rows(
    embeddings: np.ndarray, mask: np.ndarray | None, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions (n,) int64 of the rows to fit on, and their weights (n,) float64 or None for equal ones.

    Raises:
        InputError: a mask or weight of another length, nothing left to fit on, a negative or non-finite weight.
    """
    n = len(embeddings)
    if mask is not None and (mask.shape != (n,) or mask.dtype != bool):
        raise InputError(f"mask must be ({n},) bool, got {mask.dtype} {mask.shape}")
    rows = np.arange(n) if mask is None else np.flatnonzero(mask)
    if not len(rows):
        raise InputError("mask allows no item in fitting; allow at least one")
    if weight is None:
        return rows, None
    if weight.shape != (n,):
        raise InputError(f"weight must be ({n},), got {weight.shape}")
    chosen = np.asarray(weight[rows], dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(chosen) | (chosen < 0))
    if len(wrong):
        raise InputError(
            f"weight of item {int(rows[wrong[0]])} is {chosen[wrong[0]]!r}; weights must be finite and >= 0"
        )
    if not chosen.sum() > 0:
        raise InputError("all weights are 0; give at least one item a positive weight")
    return rows, chosen


def check_embeddings(
    embeddings: np.ndarray, codes: int, *, names: Sequence[str] | None = None, block: int = 65536
) -> None:
    """Refuse embeddings no codebook can be fitted on; reads memory-mapped arrays block by block.

    Args:
        embeddings: the rows to fit on, (N, D).
        codes: the largest codebook K asked for.
        names: item ids for messages; default their rows.
        block: rows read at a time.

    Raises:
        InputError: not a (N, D) float array with D >= 1; N < K; a value that is NaN, infinite or beyond float32 (its
            item is named); every row the same.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] < 1 or not np.issubdtype(embeddings.dtype, np.floating):
        raise InputError(f"embeddings must be a float array (N, D), got {embeddings.dtype} {embeddings.shape}")
    n = len(embeddings)
    if n < codes:
        raise InputError(f"{n} items cannot fill a codebook of {codes} codes; use --codebook-size {n} or fewer")
    constant, first = True, None
    for start in range(0, n, block):
        rows = finite_block(
            embeddings[start : start + block],
            lambda row: start + row if names is None else f"{names[start + row]!r} (row {start + row})",  # noqa: B023
        )
        first = rows[0] if start == 0 else first
        constant = constant and bool((rows == first).all())
    if constant and n > 1:
        raise InputError("every item has the same embedding; check the text the embedder was given")
