"""Item text as the only signal: a sentence embedding per item, compared with those of the last history items.

Needs no training and no interaction, so it can rank items nobody has touched yet; what a model adds to text alone is
read against this row. Text models repeat what the history holds, so print them with and without the mask of seen
items (evaluation spec 3.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from recollect.data.item_text import item_texts
from recollect.errors import ConfigError, InputError
from recollect.eval.protocol import data_fingerprint
from recollect.io import canonical_json, sha256_text, write_arrays
from recollect.recommenders.closed_form import ClosedForm, check_question, of_candidates
from recollect.recommenders.configs import SASRecConfig
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    from recollect.backbones.embedding import Embedder


@dataclass(frozen=True)
class TextSimilarityConfig:
    """Options of the text-similarity model."""

    embedder: str = "minilm"
    """What embeds an item's text: minilm, or a backbone that embeds (`recollect.open_embedder`)."""

    last: int = 5
    """How many of the last history items stand for the user."""

    pool: Literal["mean", "closest"] = "mean"
    """Cosine to the mean of their vectors, or to the closest of them."""

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"last must be at least 1, got {self.last!r}")


@dataclass(frozen=True)
class SASRecTextConfig(SASRecConfig):
    """Options of SASRec with item text (`recollect.recommenders.sasrec_text`), beside those of SASRec."""

    embedder: str = "minilm"
    """What embeds an item's text: minilm, or a backbone that embeds (`recollect.open_embedder`)."""

    text_size: int = 384
    """Numbers in a text vector; 384 for minilm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_size < 1:
            raise ConfigError(f"text_size must be at least 1, got {self.text_size!r}")


def item_vectors(dataset: Dataset, embedder: str | Embedder, cache: str | Path | None = None) -> np.ndarray:
    """Unit vector of each item's text, (n_items, D) float32.

    Args:
        embedder: a name (`recollect.open_embedder`) or an opened one.
        cache: folder that keeps vectors; a file is found again by the texts and the embedder's fingerprint.

    Raises:
        InputError: no item has any text.  ModelFileError: the embedder cannot be had.
    """
    from safetensors.numpy import load_file

    from recollect.backbones.resolve import open_embedder

    texts = item_texts(dataset.catalog)
    if not any(texts):
        raise InputError(f"{dataset.name!r} has no title, category or text of any item; text models cannot rank it")
    opened = open_embedder(embedder)
    try:
        key = sha256_text(canonical_json([opened.fingerprint, texts]))[:32]
        path = None if cache is None else Path(cache) / f"{key}.safetensors"
        if path is not None and path.is_file():
            return load_file(path)["vectors"]
        vectors = opened.embed(texts)
    finally:
        if opened is not embedder:
            opened.close()
    if path is not None:
        write_arrays(path, {"vectors": vectors})
    return vectors


class TextSimilarity(ClosedForm):
    """Cosine of item text to the texts of the last history items; an empty history gives zeros.

    Args:
        config: options.
        embedder: an opened embedder, in place of the one `config` names.
        cache: folder for item vectors, see `item_vectors`.
    """

    name = "minilm"
    config_class = TextSimilarityConfig

    def __init__(
        self,
        config: TextSimilarityConfig = TextSimilarityConfig(),
        *,
        embedder: Embedder | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(config)
        self._embedder = embedder
        self._cache = cache

    def fit(self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None) -> Self:
        """Embed the catalogue; interactions are not read."""
        self.vectors = item_vectors(dataset, self._embedder or self.config.embedder, self._cache)
        self.n_items, self.data = dataset.n_items, data_fingerprint(dataset)
        return self

    def score(self, histories: Sequence[np.ndarray], candidates: np.ndarray | None = None) -> np.ndarray:
        """(B, n_items) or (B, C) float32 cosines in -1..1.

        Raises:
            InputError: not fitted, or an unknown item.
        """
        items, starts = check_question(self.name, self.n_items, histories, candidates)
        if self.config.pool == "mean":
            query = np.zeros((len(histories), self.vectors.shape[1]), dtype=np.float32)
            for row in range(len(histories)):
                recent = items[starts[row] : starts[row + 1]][-self.config.last :]
                if len(recent):
                    mean = self.vectors[recent].mean(axis=0)
                    query[row] = mean / max(float(np.linalg.norm(mean)), 1e-12)
            return of_candidates(query @ self.vectors.T, candidates)
        scores = np.zeros((len(histories), self.n_items), dtype=np.float32)
        for row in range(len(histories)):
            recent = items[starts[row] : starts[row + 1]][-self.config.last :]
            if len(recent):
                scores[row] = (self.vectors[recent] @ self.vectors.T).max(axis=0)
        return of_candidates(scores, candidates)

    def arrays(self) -> dict[str, np.ndarray]:
        """Vectors (n_items, D); the embedder is not stored."""
        return {"vectors": self.vectors}

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`."""
        self.vectors = arrays["vectors"]
