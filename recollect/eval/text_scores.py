"""TF-IDF and BM25 between a user's history and the candidates: what the words alone give away.

TF-IDF follows scikit-learn's defaults with English stop words, fitted on the catalogue; the history is one document,
its items' texts joined, and the score is the cosine. BM25 (k1 1.2, b 0.75) splits on anything but letters, digits and
underscore, keeps stop words, takes its statistics from the candidates of the case and counts a history word as often
as it occurs; idf = log(1 + (S - df + 0.5) / (df + 0.5)). So read, both meet the published anchors to three digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from recollect.types import Catalog

BM25_K1 = 1.2
BM25_B = 0.75

_TFIDF_WORD = re.compile(r"\b\w\w+\b")
_BM25_WORD = re.compile(r"\w+")


def item_texts(catalog: Catalog, *, with_text: bool = False) -> list[str]:
    """Title and categories of every item in one line, with the description where asked and present."""
    lines = []
    for title, categories, text in zip(catalog.titles, catalog.categories, catalog.texts, strict=True):
        parts = [title, *categories, *([text] if with_text and text else [])]
        lines.append(" ".join(parts))
    return lines


def tfidf_words(text: str) -> list[str]:
    """Lower-case words of two or more letters, digits or underscores that are no English stop words."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return [word for word in _TFIDF_WORD.findall(text.lower()) if word not in ENGLISH_STOP_WORDS]


def bm25_words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores."""
    return _BM25_WORD.findall(text.lower())


def word_counts(texts: Sequence[str], words_of: Callable[[str], list[str]]) -> csr_array:
    """(n_texts, n_words) occurrences; words numbered as they come."""
    from scipy import sparse

    vocabulary: dict[str, int] = {}
    columns: list[int] = []
    starts = [0]
    for text in texts:
        columns.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text))
        starts.append(len(columns))
    shape = (len(texts), max(len(vocabulary), 1))
    table = sparse.csr_array(
        (np.ones(len(columns)), np.array(columns, dtype=np.int64), np.array(starts, dtype=np.int64)), shape=shape
    )
    table.sum_duplicates()
    return table


def history_counts(histories: Sequence[np.ndarray], n_items: int) -> csr_array:
    """(C, n_items) how often each item occurs in each case's history."""
    from scipy import sparse

    starts = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    items = np.concatenate([*histories, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    table = sparse.csr_array((np.ones(len(items)), items, starts), shape=(len(histories), n_items))
    table.sum_duplicates()
    return table


def _scale_rows(table: csr_array, factor: np.ndarray) -> csr_array:
    scaled = table.copy()
    scaled.data = scaled.data * np.repeat(factor, np.diff(table.indptr))
    return scaled


def _unit_rows(table: csr_array) -> csr_array:
    norm = np.sqrt(np.asarray(table.multiply(table).sum(axis=1)).ravel())
    return _scale_rows(table, 1.0 / np.where(norm > 0, norm, 1.0))


def tfidf_history(counts: csr_array, histories: csr_array, candidates: np.ndarray) -> np.ndarray:
    """Cosine of each candidate's TF-IDF row with that of the joined history.

    Args:
        counts: (n_items, V) word counts of the catalogue, on which document frequencies are taken.
        histories: (C, n_items) from `history_counts`.
        candidates: (C, S) item indices.

    Returns:
        (C, S) float64 in 0..1; 0 where either side has no word.
    """
    n_items = counts.shape[0]
    document_frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((1.0 + n_items) / (1.0 + document_frequency)) + 1.0

    def weighted(table: csr_array) -> csr_array:
        table = table.copy()
        table.data = table.data * idf[table.indices]
        return _unit_rows(table)

    items = weighted(counts)
    queries = weighted((histories @ counts).tocsr())
    columns = [
        np.asarray(queries.multiply(items[candidates[:, slot]]).sum(axis=1)).ravel()
        for slot in range(candidates.shape[1])
    ]
    return np.stack(columns, axis=1)


def bm25_history(counts: csr_array, histories: csr_array, candidates: np.ndarray) -> np.ndarray:
    """BM25 of each candidate for the words of the history; (C, S) float64, arguments as `tfidf_history`."""
    n_cases, size = candidates.shape
    queries = (histories @ counts).tocsr()
    document_frequency = None
    for slot in range(size):
        present = counts[candidates[:, slot]]
        present.data = np.ones_like(present.data)
        document_frequency = present if document_frequency is None else document_frequency + present
    if document_frequency is None or n_cases == 0:
        return np.zeros((n_cases, size))
    idf = document_frequency.tocsr()
    idf.data = np.log1p((size - idf.data + 0.5) / (idf.data + 0.5))
    weight = queries.multiply(idf).tocsr()
    length = np.asarray(counts.sum(axis=1)).ravel()[candidates]  # (C, S)
    mean_length = np.maximum(length.mean(axis=1, keepdims=True), 1e-12)
    softening = BM25_K1 * (1.0 - BM25_B + BM25_B * length / mean_length)
    columns = []
    for slot in range(size):
        term = counts[candidates[:, slot]]
        term.data = term.data * (BM25_K1 + 1.0) / (term.data + np.repeat(softening[:, slot], np.diff(term.indptr)))
        columns.append(np.asarray(weight.multiply(term).sum(axis=1)).ravel())
    return np.stack(columns, axis=1)
