"""A residual tokenizer with given codebooks, for tests of what is done with codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recollect.rng import stream
from recollect.tokenize.protocol import Encoding, ItemTokenizer


@dataclass(frozen=True)
class ChainedConfig:
    """Sizes and seed."""

    levels: int = 3
    codebook_size: int = 8
    seed: int = 0


class ChainedTokenizer(ItemTokenizer):
    """Codebooks drawn from the rows themselves; nearest code of the residual, level by level, in float64."""

    name = "chained"
    config_class = ChainedConfig

    def fit(self, embeddings: np.ndarray, **_: Any) -> ChainedTokenizer:
        rest = np.asarray(embeddings, dtype=np.float64)
        self.books: list[np.ndarray] = []
        for level in range(self.config.levels):
            draw = stream(self.config.seed, "chained", level)
            book = rest[draw.choice(len(rest), self.config.codebook_size, replace=False)].astype(np.float32)
            self.books.append(book)
            rest = rest - book[self._nearest(rest, book)]
        self._settle()
        return self

    def _settle(self) -> None:
        self.dimension = self.books[0].shape[1]
        self.codebook_sizes = tuple(len(book) for book in self.books)

    @staticmethod
    def _nearest(rows: np.ndarray, book: np.ndarray) -> np.ndarray:
        return ((rows[:, None] - book[None].astype(np.float64)) ** 2).sum(-1).argmin(1)

    def encode(self, embeddings: np.ndarray, **_: Any) -> Encoding:
        self.check_rows(embeddings)
        rest = np.asarray(embeddings, dtype=np.float64)
        codes = np.zeros((len(rest), len(self.books)), dtype=np.int32)
        for level, book in enumerate(self.books):
            codes[:, level] = self._nearest(rest, book)
            rest = rest - book[codes[:, level]]
        return Encoding(codes, distance=(rest**2).sum(1).astype(np.float32))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        self.check_codes(codes)
        total = np.zeros((len(codes), self.dimension), dtype=np.float32)
        for level in range(codes.shape[1]):
            total += self.books[level][codes[:, level]]
        return total

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {f"codebook.{level}": book for level, book in enumerate(self.books)}

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.books = [arrays[f"codebook.{level}"] for level in range(self.config.levels)]
        self._settle()
