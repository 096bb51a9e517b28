"""A tokenizer whose codebooks are given: the smallest additive one, for tests of what surrounds a tokenizer."""

from dataclasses import dataclass

import numpy as np

from recollect.errors import InputError
from recollect.tokenize.protocol import Encoding, ItemTokenizer


@dataclass(frozen=True)
class GivenConfig:
    """No option."""


class GivenCodebooks(ItemTokenizer):
    """Greedy nearest rows of given codebooks (K_l, D), level by level; a softmax of distances as its posterior."""

    name = "given"
    config_class = GivenConfig

    def __init__(self, *codebooks):
        super().__init__()
        if codebooks:
            self._take([np.asarray(book, dtype=np.float32) for book in codebooks])

    def _take(self, codebooks):
        self.codebooks = codebooks
        self.dimension = codebooks[0].shape[1]
        self.codebook_sizes = tuple(len(book) for book in codebooks)

    def fit(self, embeddings, **_):
        raise InputError("given codebooks are not fitted")

    def encode(self, embeddings, *, beam=1, top_m=1, return_posterior=False):
        self.check_rows(embeddings)
        left = embeddings.astype(np.float64)
        ranked, posterior = [], []
        for book in self.codebooks:
            squares = ((left[:, None] - book[None].astype(np.float64)) ** 2).sum(-1)
            order = np.argsort(squares, axis=1, kind="stable")[:, : max(top_m, 1)]
            weights = np.exp(-(squares - squares.min(axis=1, keepdims=True)))
            weights /= weights.sum(axis=1, keepdims=True)
            ranked.append(order)
            posterior.append(np.take_along_axis(weights, order, axis=1))
            left = left - book[order[:, 0]]
        codes = np.stack([order[:, 0] for order in ranked], axis=1).astype(np.int32)
        return Encoding(
            codes,
            (left**2).sum(axis=1).astype(np.float32),
            confidence=np.stack([p[:, 0] for p in posterior], axis=1).astype(np.float32) if return_posterior else None,
            alternatives=np.stack(ranked, axis=1).astype(np.int32) if top_m > 1 else None,
            probability=np.stack(posterior, axis=1).astype(np.float32) if top_m > 1 else None,
        )

    def decode(self, codes):
        self.check_codes(codes)
        total = np.zeros((len(codes), self.dimension), dtype=np.float32)
        for level in range(codes.shape[1]):
            total += self.codebooks[level][codes[:, level]]
        return total

    def arrays(self):
        return {f"codebook.{level}": book for level, book in enumerate(self.codebooks)}

    def take_arrays(self, arrays):
        self._take([arrays[f"codebook.{level}"] for level in range(len(arrays))])


def random_codebooks(sizes, dimension=4, seed=0):
    """A `GivenCodebooks` whose level l is normal with standard deviation 2^-l."""
    generator = np.random.default_rng(seed)
    return GivenCodebooks(*[generator.normal(size=(size, dimension)) * 0.5**level for level, size in enumerate(sizes)])


def crowded_items(tokenizer, n, seed=0, spread=0.05, centres=5):
    """(n, D) float32 items in a few tight bunches, so that many share their codes."""
    generator = np.random.default_rng(seed)
    middle = generator.normal(size=(centres, tokenizer.dimension))
    chosen = generator.integers(centres, size=n)
    return (middle[chosen] + spread * generator.normal(size=(n, tokenizer.dimension))).astype(np.float32)
