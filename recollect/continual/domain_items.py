"""The words of a recommender that reads items: its vocabulary, its training rows, and a vector for every item.

The vocabulary has an id for every item, then for every word of the instruction, then for every catalogue.  A row is
[start token] instruction catalogue item item …, and every item from the second new one on is predicted from all before
it.  The catalogue's id says what is ranked: scores of other items do not exist for the row.

An item's vector comes from its text: the mean of the decoder's own vectors of the words, weighted by a / (a + p(word))
with a = 1e-3, without the first principal component of all items (the SIF embedding of Arora et al., ICLR 2017), or an
embedder's vector.  Vectors of a fitted recommender, which E4SRec takes, would have been fitted on the stream's future.
Statistics of words and items are over the catalogues of all tasks of the run; no interaction enters.
Source: llmd4rec 3.2 (items as input vectors, one output column per item, dense supervision); the rest is [our design].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recollect.continual.domain_tasks import DomainStream, TrainingRow
from recollect.continual.examples import NO_LOSS, Example, TaskTokenizer
from recollect.data.item_text import item_texts
from recollect.errors import InputError
from recollect.rng import stream
from recollect.types import Dataset

INSTRUCTION = "The next item a user chooses after these, oldest first, from"
SMOOTHING = 1e-3  # a of the weights a / (a + p)
TEXT_TOKENS = 64  # of an item's text that are read
WORDS = "words"


@dataclass(frozen=True)
class ItemVocabulary:
    """Ids 0..n_items-1 are items, then the instruction's words, then the catalogues.

    words: token ids of the start token and the instruction in the decoder's own vocabulary.
    """

    n_items: int
    words: tuple[int, ...]
    n_catalogues: int

    @property
    def first_catalogue(self) -> int:
        """Id of catalogue 0."""
        return self.n_items + len(self.words)

    @property
    def pad_id(self) -> int:
        """An id that says nothing about the catalogue; masked wherever it stands."""
        return 0

    def prompt(self, catalogue: int) -> list[int]:
        """Ids before the items."""
        return [*range(self.n_items, self.first_catalogue), self.first_catalogue + catalogue]

    def training_row(self, catalogue: int, row: TrainingRow) -> Example:
        """Ids and labels of a stretch of history."""
        prompt = self.prompt(catalogue)
        ids = np.array([*prompt, *row.items.tolist()], dtype=np.int64)
        labels = np.full(len(ids), NO_LOSS, dtype=np.int64)
        first = len(prompt) + row.first_target
        labels[first:] = ids[first:]
        return Example(ids, labels, len(prompt))

    def question(self, catalogue: int, history: np.ndarray) -> Example:
        """Ids of a history whose next item is asked for."""
        ids = np.array([*self.prompt(catalogue), *history.tolist()], dtype=np.int64)
        return Example(ids, np.full(len(ids), NO_LOSS, dtype=np.int64), len(ids))


@dataclass(frozen=True)
class ItemVectors:
    """What the network is built from; rows are ids of the vocabulary.

    inputs: (V, D) float32 what the decoder reads.  outputs: (n_items, D) float32 unit vectors that scores are taken
    against.  offered: (catalogues, n_items) bool.  n_random: items without text, whose vectors are random.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    offered: np.ndarray
    n_random: int


def catalogue_names(dataset: Dataset, tasks: Sequence[str], period: str | None) -> list[str]:
    """What each task's catalogue is called: domains by name, all periods alike, so that no row tells its period."""
    return [", ".join(dataset.domains)] * len(tasks) if period is not None else list(tasks)


def texts_of(tasks: DomainStream) -> list[str]:
    """Text of every item of the stream.

    Raises:
        InputError: no item has any.
    """
    everything = item_texts(tasks.dataset.catalog)
    texts = [everything[item] for item in tasks.items]
    if not any(texts):
        raise InputError(
            f"{tasks.dataset.name!r} has no title, category or text of any item; a language model cannot read its items"
        )
    return texts


def item_vectors(
    tasks: DomainStream,
    vocabulary: ItemVocabulary,
    names: Sequence[str],
    tokens: TaskTokenizer,
    table: np.ndarray,
    kind: str,
    seed: int,
) -> ItemVectors:
    """Vectors of items, words and catalogues in the decoder's space.

    Args:
        names: of the catalogues.
        table: (words, D) float32, the decoder's own word vectors.
        kind: "words", or an embedder's name (`recollect.open_embedder`).
        seed: of the vectors of items without text, and of the map from an embedder's space.

    Raises:
        InputError: no item has text.  ModelFileError: the embedder cannot be had.
    """
    texts = texts_of(tasks)
    found = _of_words(texts, tokens, table) if kind == WORDS else _of_embedder(tasks.dataset, tasks.items, kind)
    has_text = np.array([bool(text) for text in texts]) & (np.abs(found).sum(axis=1) > 0)
    common = found[has_text]
    found = found - common.mean(axis=0)
    if kind == WORDS:
        found = _without_first_component(found, found[has_text])
    if found.shape[1] != table.shape[1]:
        found = found @ _isometry(found.shape[1], table.shape[1], seed)
    for at in np.flatnonzero(~has_text | (np.linalg.norm(found, axis=1) < 1e-9)):
        found[at] = stream(seed, "item without text", tasks.item_ids[at]).standard_normal(table.shape[1])
    unit = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    # An item lies as far from the mean word as words do, so that the blocks read it as they read words.
    centre = table.mean(axis=0, dtype=np.float64)
    radius = float(np.sqrt(((table - centre) ** 2).sum(axis=1).mean()))
    catalogues = [table[_tokens_of(name, tokens)].mean(axis=0) for name in names]
    inputs = np.concatenate([centre + radius * unit, table[list(vocabulary.words)], np.stack(catalogues)])
    offered = np.zeros((len(tasks.tasks), len(unit)), dtype=bool)
    for number, task in enumerate(tasks.tasks):
        offered[number, task.catalogue] = True
    return ItemVectors(inputs.astype(np.float32), unit, offered, int((~has_text).sum()))


def _tokens_of(text: str, tokens: TaskTokenizer) -> list[int]:
    return tokens.encode_answer(" " + text)[:TEXT_TOKENS]


def _of_words(texts: Sequence[str], tokens: TaskTokenizer, table: np.ndarray) -> np.ndarray:
    """(N, D) float64 weighted means of word vectors; zeros where there is no text."""
    ids = [np.array(_tokens_of(text, tokens) if text else [], dtype=np.int64) for text in texts]
    counts = np.bincount(np.concatenate(ids), minlength=len(table))
    weight = SMOOTHING / (SMOOTHING + counts / counts.sum())
    found = np.zeros((len(ids), table.shape[1]))
    for at, row in enumerate(ids):
        if len(row):
            own = weight[row]
            found[at] = own @ table[row] / own.sum()
    return found


def _of_embedder(dataset: Dataset, items: np.ndarray, kind: str) -> np.ndarray:
    from recollect.recommenders.text import item_vectors as embedded

    return embedded(dataset, kind)[items].astype(np.float64)


def _without_first_component(vectors: np.ndarray, fitted_on: np.ndarray) -> np.ndarray:
    _, directions = np.linalg.eigh(fitted_on.T @ fitted_on)
    first = directions[:, -1]
    return vectors - np.outer(vectors @ first, first)


def _isometry(before: int, after: int, seed: int) -> np.ndarray:
    """(before, after) random map with orthonormal rows; orthonormal columns where `after` is smaller."""
    drawn = stream(seed, "item vectors").standard_normal((max(before, after), min(before, after)))
    basis, _ = np.linalg.qr(drawn)
    return basis.T if before <= after else basis
