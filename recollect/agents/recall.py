"""Retrieval for agents: past memories, interest tags and items through one derived index; item vectors at hand.

Vectors are journaled embeddings. The index (Chroma or exact) has three collections, all of which can be rebuilt from
the journal at any time: every version of every private memory, the tags of the current interest groups, and every item
that a simulated user or a slate touches. Queries are ranked exactly, so the index never changes an order; what is not
filtered may miss a row in large Chroma collections (see `chroma_store`). Clustering and slate evidence read the
journaled vectors themselves: a store renormalises its own, which moves last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recollect.agents.memory_index import Hit, IndexRow, MemoryIndex

MEMORIES, TAGS, ITEMS = "memories", "tags", "items"
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


@dataclass(frozen=True)
class TagHit:
    """A tag found, the rank of its group (0 = first), and its cosine with the question."""

    tag: str
    group: int
    similarity: float


class Recall:
    """Similarities between candidates, histories and memories.

    Args:
        item_rows: item index -> row of `item_vectors`.
        item_vectors: (M, D) float32 unit rows.
        describe: item index -> (its text, the name of its domain), for the index.
        open_index: opens the index that must hold the rows its source gives; called once, by `restore`.
        embed: texts -> (B, D) unit rows, journaled.
    """

    def __init__(
        self,
        item_rows: dict[int, int],
        item_vectors: np.ndarray,
        describe: Callable[[int], tuple[str, str]],
        open_index: Callable[[Source], MemoryIndex],
        embed: Callable[[Sequence[str]], np.ndarray],
    ) -> None:
        self._item_rows = item_rows
        self._item_vectors = item_vectors
        self._describe = describe
        self._open_index = open_index
        self._index: MemoryIndex | None = None
        self._embed = embed
        self._pending: list[Version] = []
        self._tags: list[Sequence[str]] = []
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

        def source() -> Iterator[tuple[str, IndexRow]]:
            for name, listed in ((MEMORIES, rows), (TAGS, self._tag_rows()), (ITEMS, self._item_index_rows())):
                yield from ((name, row) for row in listed)

        self._index = self._open_index(source)

    def index_pending(self, before_step: int) -> None:
        """Embed and index what was written before `before_step`, in the order of steps."""
        rows = self._due(before_step)
        if rows:
            self._opened().upsert(MEMORIES, rows)

    def put_tags(self, tags: Sequence[Sequence[str]]) -> None:
        """Replace the tags of the groups, best group first; before `restore` they only wait for it."""
        before = _tag_ids(self._tags)
        self._tags = list(tags)
        if self._index is not None:
            kept = set(_tag_ids(self._tags))
            self._index.upsert(TAGS, self._tag_rows())
            self._index.delete(TAGS, [name for name in before if name not in kept])

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
        hits = self._opened().query(MEMORIES, self.vectors(candidates), 1, where={"owner": owner})
        return np.asarray([found[0].similarity if found else 0.0 for found in hits])

    def nearest_tags(self, text: str, k: int) -> list[TagHit]:
        """The k tags of interest groups most similar to a text, best first; fewer when there are fewer."""
        (hits,) = self._opened().query(TAGS, self._embed([text]), k)
        return [self._tag_hit(hit) for hit in hits]

    def nearest_groups(self, text: str) -> list[TagHit]:
        """Every interest group by its tag most similar to a text (a user's memory, say), best group first."""
        vector = self._embed([text])
        best = [self._opened().query(TAGS, vector, 1, where={"group": rank})[0] for rank in range(len(self._tags))]
        found = [self._tag_hit(hits[0]) for hits in best if hits]
        return sorted(found, key=lambda hit: (-hit.similarity, hit.group))

    def nearest_items(self, text: str, k: int, domain: str | None = None) -> list[tuple[int, float]]:
        """(item index, cosine) of the k items most similar to a text, of one domain or of all, best first."""
        where = None if domain is None else {"domain": domain}
        (hits,) = self._opened().query(ITEMS, self._embed([text]), k, where=where)
        return [(int(hit.id), hit.similarity) for hit in hits]

    def _tag_hit(self, hit: Hit) -> TagHit:
        rank, place = map(int, hit.id.split("|"))
        return TagHit(self._tags[rank][place], rank, hit.similarity)

    def _tag_rows(self) -> list[IndexRow]:
        texts = [tag for owned in self._tags for tag in owned]
        ranks = [rank for rank, owned in enumerate(self._tags) for _ in owned]
        vectors = self._embed(texts) if texts else ()
        return [
            IndexRow(name, text, vector, {"group": rank})
            for name, text, vector, rank in zip(_tag_ids(self._tags), texts, vectors, ranks, strict=True)
        ]

    def _item_index_rows(self) -> list[IndexRow]:
        rows = []
        for item, at in self._item_rows.items():
            text, domain = self._describe(item)
            rows.append(IndexRow(str(item), text, self._item_vectors[at], {"domain": domain}))
        return rows

    def close(self) -> None:
        """Let go of the index; similarities of items stay at hand."""
        if self._index is not None:
            self._index.close()

    def dense_vectors(self, n_items: int) -> np.ndarray:
        """(n_items, D) float32; zero rows for items that no simulated user and no slate touches."""
        dense = np.zeros((n_items, self._item_vectors.shape[1]), dtype=np.float32)
        dense[list(self._item_rows)] = self._item_vectors[list(self._item_rows.values())]
        return dense


def _tag_ids(tags: Sequence[Sequence[str]]) -> list[str]:
    """RANK|PLACE of every tag: text of a model is no id."""
    return [f"{rank}|{place}" for rank, owned in enumerate(tags) for place in range(len(owned))]
