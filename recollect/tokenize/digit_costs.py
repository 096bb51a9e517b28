"""What another code would cost an item: squared errors, of whole tuples or of every last digit.

Errors are measured where a method quantises, as that is what its codes minimise: after preprocessing, and in the
latent space of a trained encoder. There most methods add up one codebook row per level. Methods whose codebooks are
not such a sum (product quantisers, FSQ) are measured by `decode`, their input carried through preprocessing and back
so that what is lost there does not sway the choice. PRQ-KMeans, which cannot decode, prices its last digits itself.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.protocol import ItemTokenizer

_TOLERANCE = 1e-3  # of the largest number compared; float32 sums of a few levels stay far below
_ENTRIES = 1 << 22  # float64 numbers held at a time


@runtime_checkable
class HasLatents(Protocol):
    """A tokenizer that quantises what an encoder makes of its input, as a sum of codebook rows."""

    def latents(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, d) what the levels' codebook rows (K_l, d) add up to, nearly, of embeddings (N, D)."""
        ...


@runtime_checkable
class PricesLastDigits(Protocol):
    """A tokenizer without additive reconstruction that still says how near each last digit is."""

    def last_digit_costs(self, embeddings: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(N, K) float64 >= 0 of embeddings (N, D) for every last digit after the first L-1 of codes (N, L)."""
        ...


def check_reconstruction(tokenizer: ItemTokenizer) -> None:
    """Refuse a method whose tuples have no price; needs no fit.

    Raises:
        InputError: it has no reconstruction.
    """
    if not tokenizer.reconstructs:
        raise InputError(
            f"{tokenizer.name} has no reconstruction, so no code can be called nearer than another; "
            "use the collision strategy suffix, variable_suffix or hash_last"
        )


def check_last_digits(tokenizer: ItemTokenizer) -> None:
    """Refuse a method whose last digits have no price by what its options say; needs no fit.

    Raises:
        InputError: it has no reconstruction, or one in which digits depend on each other.
    """
    if isinstance(tokenizer, PricesLastDigits):
        return
    check_reconstruction(tokenizer)
    if tokenizer.has_joint_decoder:
        raise _joint_digits(tokenizer)


def _joint_digits(tokenizer: ItemTokenizer) -> InputError:
    return InputError(
        f"{tokenizer.name}: what a last digit adds depends on the digits before it, so last digits cannot be priced "
        "one by one; use the collision strategy neighbour_repair or suffix"
    )


class CodeSpace:
    """Where codes are compared with the items they stand for.

    Args:
        tokenizer: fitted, with a reconstruction.

    Raises:
        InputError: not fitted; a method without reconstruction.
    """

    def __init__(self, tokenizer: ItemTokenizer) -> None:
        tokenizer.check_fitted()
        check_reconstruction(tokenizer)
        self._tokenizer = tokenizer
        preprocess = getattr(tokenizer, "preprocess", None)
        self._preprocess = preprocess if isinstance(preprocess, Preprocess) else Preprocess()
        arrays = tokenizer.arrays()
        books = [arrays.get(f"codebook.{level}") for level in range(len(tokenizer.codebook_sizes))]
        self._codebooks = [book.astype(np.float64) for book in books if book is not None]
        self.is_sum = len(self._codebooks) == len(books) and self._adds_up()

    def _adds_up(self) -> bool:
        """Whether a tuple is the sum of its codebook rows; a decoded probe tells it from other uses of a codebook."""
        if len({book.shape[1] for book in self._codebooks}) > 1:
            return False
        if isinstance(self._tokenizer, HasLatents):
            return True
        probe = np.array([[0] * len(self._codebooks), [len(book) - 1 for book in self._codebooks]], dtype=np.int32)
        total = self._sum(probe)
        decoded = self._tokenizer.decode(probe)
        if total.shape[1] != (self._preprocess.output_dimension or decoded.shape[1]):
            return False
        expected = self._preprocess.invert(total.astype(np.float32))
        return bool(np.abs(expected - decoded).max() <= _TOLERANCE * max(float(np.abs(decoded).max()), 1e-30))

    def _sum(self, codes: np.ndarray) -> np.ndarray:
        total = np.zeros((len(codes), self._codebooks[0].shape[1]))
        for level in range(codes.shape[1]):
            total += self._codebooks[level][codes[:, level]]
        return total

    def targets(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, d) float64 of embeddings (n, D): what tuples should come near."""
        if self.is_sum and isinstance(self._tokenizer, HasLatents):
            return self._tokenizer.latents(embeddings).astype(np.float64)
        kept = self._preprocess.apply(embeddings)
        return (kept if self.is_sum else self._preprocess.invert(kept)).astype(np.float64)

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """(n, d) float64 of codes (n, l <= L)."""
        return self._sum(codes) if self.is_sum else self._tokenizer.decode(codes).astype(np.float64)

    def digit_vectors(self) -> np.ndarray:
        """(K, d) float64: what each last digit adds to a tuple, up to a vector common to all digits.

        Raises:
            InputError: what a digit adds depends on the digits before it.
        """
        if self.is_sum:
            return self._codebooks[-1]
        sizes = self._tokenizer.codebook_sizes
        found = []
        for prefix in (np.zeros(len(sizes), dtype=np.int32), np.array(sizes, dtype=np.int32) - 1):
            tuples = np.repeat(prefix[None], sizes[-1], axis=0)
            tuples[:, -1] = np.arange(sizes[-1])
            decoded = self.reconstruct(tuples)
            found.append(decoded - decoded[0])
        if np.abs(found[0] - found[1]).max() > _TOLERANCE * max(float(np.abs(found[0]).max()), 1e-30):
            raise _joint_digits(self._tokenizer)
        return found[0]


def finite_rows(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, D) float32 embeddings of items `rows`.

    Raises:
        InputError: one of them holds NaN or infinity.
    """
    chosen = np.asarray(embeddings[rows], dtype=np.float32)
    wrong = np.flatnonzero(~np.isfinite(chosen).all(axis=1))
    if len(wrong):
        raise InputError(f"embedding of item {int(rows[wrong[0]])} holds NaN or infinity; re-embed that item")
    return chosen


class ReconstructionCosts:
    """Squared errors of codes against the embeddings they stand for.

    Args:
        tokenizer: fitted.
        embeddings: (N, D), row i belongs to item i; may be memory-mapped.

    Raises:
        InputError: not fitted; rows of another D; a method without reconstruction.
    """

    def __init__(self, tokenizer: ItemTokenizer, embeddings: np.ndarray) -> None:
        tokenizer.check_rows(embeddings)
        self.tokenizer = tokenizer
        self._space = CodeSpace(tokenizer)
        self.sizes = tokenizer.codebook_sizes
        self._embeddings = embeddings

    def of_codes(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(n,) float64 squared error of items `rows` under codes (n, l <= L)."""
        error = np.empty(len(rows))
        step = max(1, _ENTRIES // self._embeddings.shape[1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            targets = self._space.targets(finite_rows(self._embeddings, rows[part]))
            left = targets - self._space.reconstruct(codes[part])
            error[part] = np.einsum("nd,nd->n", left, left)
        return error


class LastDigitCosts:
    """Squared error of an item for every digit of the last level, its first L-1 digits kept.

    Args:
        tokenizer, embeddings: see `ReconstructionCosts`.

    Raises:
        InputError: as `ReconstructionCosts`; what a last digit adds depends on the digits before it.
    """

    def __init__(self, tokenizer: ItemTokenizer, embeddings: np.ndarray) -> None:
        tokenizer.check_rows(embeddings)
        self.sizes = tokenizer.codebook_sizes
        self._embeddings = embeddings
        self._own = tokenizer if isinstance(tokenizer, PricesLastDigits) else None
        if self._own is None:
            self._space = CodeSpace(tokenizer)
            vectors = self._space.digit_vectors()
            self._vectors = vectors - vectors[0]
            self._squares = np.einsum("kd,kd->k", self._vectors, self._vectors)

    @property
    def most_rows(self) -> int:
        """Rows to ask for at a time so that a table stays near 32 MiB."""
        return max(1, _ENTRIES // max(self.sizes[-1], self._embeddings.shape[1]))

    def table(self, rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """(n, K) float64 costs of items `rows` whose codes are (n, L); the last column of `codes` is not read."""
        chosen = finite_rows(self._embeddings, rows)
        if self._own is not None:
            return self._own.last_digit_costs(chosen, codes)
        first = codes.copy()
        first[:, -1] = 0
        left = self._space.targets(chosen) - self._space.reconstruct(first)
        squares = np.einsum("nd,nd->n", left, left)
        return np.maximum(squares[:, None] - 2 * (left @ self._vectors.T) + self._squares, 0)
