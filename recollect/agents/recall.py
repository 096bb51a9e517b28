"""Retrieval for agents: item vectors, and past memories through the derived index.

Vectors are journaled embeddings. The index (Chroma or exact) holds every version of every private memory and can be
rebuilt from the event log at any time; queries are re-ranked exactly, so the index never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.agents.memory_index import IndexRow, MemoryIndex

COLLECTION = "memories"
Source = Callable[[], Iterator[tuple[str, IndexRow]]]


@dataclass(frozen=True)
class Version:
    """A private memory as it stood after `step` (-1 = the warm start)."""

    step: int
    owner: str
    key: str
    number: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.owner}|{self.key}|{self.number}"


class Recall:
    """Similarities between candidates, histories and memories.

    Args:
        item_rows: item index -> row of `item_vectors`.
        item_vectors: (M, D) float32 unit rows.
        open_index: opens the index that must hold the rows its source gives; called once, by `restore`.
        embed: texts -> (B, D) unit rows, journaled.
    """

    def __init__(
        self,
        item_rows: dict[int, int],
        item_vectors: np.ndarray,
        open_index: Callable[[Source], MemoryIndex],
        embed: Callable[[Sequence[str]], np.ndarray],
    ) -> None:
        self._item_rows = item_rows
        self._item_vectors = item_vectors
        self._open_index = open_index
        self._index: MemoryIndex | None = None
        self._embed = embed
        self._pending: list[Version] = []
        self._text_vectors: dict[str, np.ndarray] = {}

    def vectors(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """(C, D) vectors of items."""
        return self._item_vectors[[self._item_rows[int(item)] for item in items]]

    def closest(self, candidates: np.ndarray, items: Sequence[int]) -> np.ndarray:
        """(C,) largest cosine of each candidate with any of `items`; 0 when there are none."""
        if not len(items):
            return np.zeros(len(candidates))
        return (self.vectors(candidates) @ self.vectors(items).T).max(axis=1)

    def similarity(self, text: str, candidates: np.ndarray) -> np.ndarray:
        """(C,) cosine of a text with each candidate; 0 for an empty text."""
        if not text:
            return np.zeros(len(candidates))
        if text not in self._text_vectors:
            self._text_vectors[text] = self._embed([text])[0]
        return self.vectors(candidates) @ self._text_vectors[text]

    def note(self, version: Version) -> None:
        """A memory version to index at the next barrier."""
        if version.text:
            self._pending.append(version)

    def restore(self, rebuilds: Sequence[int]) -> None:
        """Open the index as it stood after the last of the committed `rebuilds` (step numbers, ascending)."""
        rows = [row for number in rebuilds for row in self._due(number)]
        self._index = self._open_index(lambda: ((COLLECTION, row) for row in rows))

    def index_pending(self, before_step: int) -> None:
        """Embed and index what was written before `before_step`, in the order of steps."""
        rows = self._due(before_step)
        if rows:
            self._opened().upsert(COLLECTION, rows)

    def _opened(self) -> MemoryIndex:
        if self._index is None:
            raise RuntimeError("the index is not open; call restore() first")
        return self._index

    def _due(self, before_step: int) -> list[IndexRow]:
        """Rows written before a step; one barrier embeds its texts together, so a resumed run has the same batches."""
        due = sorted(
            (version for version in self._pending if version.step < before_step),
            key=lambda version: (version.step, version.owner, version.key, version.number),
        )
        self._pending = [version for version in self._pending if version.step >= before_step]
        vectors = self._embed([version.text for version in due]) if due else ()
        return [
            IndexRow(version.id, version.text, vector, {"owner": version.owner, "key": version.key})
            for version, vector in zip(due, vectors, strict=True)
        ]

    def past_memories(self, owner: str, candidates: np.ndarray) -> np.ndarray:
        """(C,) cosine of each candidate with the most similar past private memory of `owner`; 0 when none is kept."""
        hits = self._opened().query(COLLECTION, self.vectors(candidates), 1, where={"owner": owner})
        return np.asarray([found[0].similarity if found else 0.0 for found in hits])

    def close(self) -> None:
        """Let go of the index; similarities of items stay at hand."""
        if self._index is not None:
            self._index.close()

    def dense_vectors(self, n_items: int) -> np.ndarray:
        """(n_items, D) float32; zero rows for items that no simulated user and no slate touches."""
        dense = np.zeros((n_items, self._item_vectors.shape[1]), dtype=np.float32)
        dense[list(self._item_rows)] = self._item_vectors[list(self._item_rows.values())]
        return dense
