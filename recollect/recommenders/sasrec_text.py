"""SASRec that also reads: an item's vector is its id vector plus a linear projection of its frozen text vector.

Items nobody has touched are ranked by their text alone, and similar texts share what is learned of one. This is the
additive form (id + text); it stands beside `sasrec` with the same options, so that the gain of text can be told from
the gain of a larger model.

Source: [our design], after the id-plus-text sequence models that EnsRec and others compare with.
Not covered: text encoders trained with the recommender.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from recollect.errors import ConfigError
from recollect.recommenders.neural import NeuralRecommender
from recollect.recommenders.packing import Batch
from recollect.recommenders.sasrec import SASRecModule
from recollect.recommenders.text import SASRecTextConfig, item_vectors
from recollect.rng import call_seed
from recollect.types import Dataset, Split

if TYPE_CHECKING:
    from recollect.backbones.embedding import Embedder


class SASRecTextModule(SASRecModule):
    """SASRec over item vectors id + projection(text); the text vectors are a buffer and are never trained."""

    text: Tensor

    def __init__(self, config: SASRecTextConfig, n_items: int, text: Tensor) -> None:
        """text: (n_items, text_size)."""
        super().__init__(config, n_items)
        self.register_buffer("text", text)
        self.projection = nn.Linear(text.shape[1], config.hidden, bias=False)
        nn.init.xavier_normal_(self.projection.weight)

    def read(self, batch: Batch) -> Tensor:
        """(M, D): as SASRec's, on the item vectors with text."""
        vectors = self.items(batch.items) + self.projection(self.text[batch.items])
        return self.dropout(vectors * math.sqrt(self.config.hidden) + self.positions(batch.place))

    def item_vectors(self) -> Tensor:
        """(n_items, D)."""
        return self.items.weight + self.projection(self.text)


class SASRecText(NeuralRecommender):
    """SASRec with item text as a recommender; see the module's text and `SASRecTextConfig`.

    Args:
        config: options.
        embedder: an opened embedder, in place of the one `config` names.
        cache: folder for text vectors, see `recollect.recommenders.text.item_vectors`.
    """

    name = "sasrec-text"
    config_class = SASRecTextConfig
    module_class = SASRecTextModule

    def __init__(
        self,
        config: SASRecTextConfig | None = None,
        *,
        embedder: Embedder | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(config)
        self._embedder = embedder
        self._cache = cache
        self._text: np.ndarray | None = None

    def build(self, n_items: int) -> nn.Module:
        """A module with fresh weights; its text vectors are zeros until `fit` or a file gives them."""
        config: Any = self.config
        text = np.zeros((n_items, config.text_size), dtype=np.float32) if self._text is None else self._text
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(call_seed(config.seed, self.name, "initial weights"))
            return SASRecTextModule(config, n_items, torch.from_numpy(text.copy()))

    def frozen_inputs(self) -> list[np.ndarray]:
        """The text vectors."""
        return [] if self._text is None else [self._text]

    def fit(
        self, dataset: Dataset, split: Split | None = None, *, rows: np.ndarray | None = None, **training: Any
    ) -> Self:
        """Embed the catalogue, then train as `NeuralRecommender.fit`, which explains `training`.

        Raises:
            ConfigError: the embedder's vectors have another size than `text_size`.
        """
        config: Any = self.config
        self._text = item_vectors(dataset, self._embedder or config.embedder, self._cache)
        if self._text.shape[1] != config.text_size:
            raise ConfigError(
                f"the embedder gives vectors of {self._text.shape[1]} numbers where text_size is "
                f"{config.text_size!r}; set text_size: {self._text.shape[1]}"
            )
        return super().fit(dataset, split, rows=rows, **training)
