"""Words that describe items, and in which domains they mean anything.

The structured memory writer stores tastes as weights over these features: categories as phrases, title and text
words, and adjacent title words that recur. Rows are L2-normalised TF-IDF, so a match is a cosine-like sum.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from recollect.types import Catalog

_WORD = re.compile(r"[^\W_]{3,}", re.UNICODE)
_MAX_WORDS_OF_TEXT = 60
SMALL_CATALOGUE = 50
COMMON_SHARE = 0.25
"""A term that more than this share of a domain's items carry says nothing about taste there."""


def item_terms(title: str, categories: Sequence[str], text: str | None, stop_words: frozenset[str]) -> list[str]:
    """Features of one item: category phrases, title words and word pairs, first words of its text."""
    words = [word for word in _WORD.findall(title.lower()) if word not in stop_words]
    pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
    phrases = [" ".join(_WORD.findall(category.lower())) for category in categories]
    body = [word for word in _WORD.findall((text or "").lower())[:_MAX_WORDS_OF_TEXT] if word not in stop_words]
    return [term for term in [*phrases, *words, *pairs, *body] if term]


@dataclass(frozen=True)
class ItemFeatures:
    """TF-IDF of a catalogue.

    matrix: (n_items, n_terms) float32 CSR with unit rows.  terms: (n_terms,) object array.
    in_domain: (n_domains, n_terms) bool, whether any item of the domain carries the term.
    """

    matrix: scipy.sparse.csr_matrix
    terms: np.ndarray
    in_domain: np.ndarray

    @classmethod
    def of(cls, catalog: Catalog, n_domains: int) -> ItemFeatures:
        """Describe every item; terms that occur once are kept only when no other describes the item."""
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

        stop_words = frozenset(ENGLISH_STOP_WORDS)
        documents = [
            item_terms(str(title), categories, text, stop_words)
            for title, categories, text in zip(catalog.titles, catalog.categories, catalog.texts, strict=True)
        ]
        documents = _without_common_terms(documents, np.asarray(catalog.domain), n_domains)
        documents = _without_rare_terms(documents)
        if not any(documents):  # nothing but short words and stop words
            nothing = np.zeros(0, dtype=object)
            return cls(
                scipy.sparse.csr_matrix((len(documents), 0), dtype=np.float32),
                nothing,
                np.zeros((n_domains, 0), dtype=bool),
            )
        vectorizer = TfidfVectorizer(analyzer=_identity, dtype=np.float32)
        matrix = vectorizer.fit_transform(documents).tocsr()
        matrix.sort_indices()
        in_domain = np.zeros((n_domains, matrix.shape[1]), dtype=bool)
        for domain in range(n_domains):
            in_domain[domain] = np.asarray(matrix[catalog.domain == domain].sum(axis=0)).ravel() > 0
        return cls(matrix, vectorizer.get_feature_names_out(), in_domain)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Term -> column."""
        return {term: column for column, term in enumerate(self.terms)}

    def of_item(self, item: int) -> dict[str, float]:
        """Term -> weight of one item."""
        start, stop = self.matrix.indptr[item], self.matrix.indptr[item + 1]
        return dict(
            zip(
                self.terms[self.matrix.indices[start:stop]].tolist(),
                self.matrix.data[start:stop].astype(float).tolist(),
                strict=True,
            )
        )

    def match(self, weights: Mapping[str, float], items: np.ndarray) -> np.ndarray:
        """(C,) float64 inner product of a taste with each item; terms the catalogue lacks count nothing."""
        dense = np.zeros(self.matrix.shape[1])
        for term, weight in weights.items():
            column = self.index.get(term)
            if column is not None:
                dense[column] = weight
        return np.asarray(self.matrix[items] @ dense)

    def known_in(self, domain: int, terms: Iterable[str]) -> set[str]:
        """Those of `terms` that some item of the domain carries."""
        known = self.in_domain[domain]
        return {term for term in terms if (column := self.index.get(term)) is not None and known[column]}


def _without_common_terms(documents: list[list[str]], domain: np.ndarray, n_domains: int) -> list[list[str]]:
    """Drop, in each domain of at least 20 items, the terms that over a quarter of its items carry (boilerplate)."""
    common: list[set[str]] = []
    for index in range(n_domains):
        members = np.flatnonzero(domain == index)
        counts = Counter(term for item in members for term in set(documents[item]))
        limit = COMMON_SHARE * len(members) if len(members) >= 20 else len(members)
        common.append({term for term, count in counts.items() if count > limit})
    return [
        [term for term in terms if term not in common[index]]
        for terms, index in zip(documents, domain.tolist(), strict=True)
    ]


def _without_rare_terms(documents: list[list[str]]) -> list[list[str]]:
    """Without terms of a single item, unless nothing else describes it; small catalogues keep all."""
    if len(documents) <= SMALL_CATALOGUE:
        return documents
    n_items = Counter(term for terms in documents for term in dict.fromkeys(terms))
    return [[term for term in terms if n_items[term] > 1] or terms for terms in documents]


def _identity(terms: list[str]) -> list[str]:
    return terms
