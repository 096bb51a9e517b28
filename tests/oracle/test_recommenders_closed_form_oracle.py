"""The closed-form recommenders against the definitions written out, on small logs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recommender_worlds import random_log, small_log

from recollect.data import leave_one_out
from recollect.recommenders.ease import Ease, EaseConfig
from recollect.recommenders.itemknn import ItemKNN, ItemKNNConfig
from recollect.recommenders.markov import Markov
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.text import TextSimilarity, TextSimilarityConfig, item_texts, item_vectors

logs = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=6)


@given(logs)
@settings(max_examples=60, deadline=None)
def test_markov_and_popularity_count_what_a_loop_counts(sequences):
    dataset = small_log(sequences, 6)
    pairs, counts = np.zeros((6, 6)), np.zeros(6)
    for items in sequences:
        for index, item in enumerate(items):
            counts[item] += 1
            if index:
                pairs[items[index - 1], item] += 1
    histories = [np.array([3, item]) for item in range(6)]
    np.testing.assert_array_equal(Markov().fit(dataset).score(histories), pairs)
    np.testing.assert_array_equal(Popularity().fit(dataset).score(histories[:1]), counts[None])


def binary(dataset):
    matrix = np.zeros((dataset.n_users, dataset.n_items))
    matrix[dataset.interactions.user, dataset.interactions.item] = 1
    return matrix


@pytest.mark.parametrize(("precision", "digits"), [("float64", 1e-6), ("float32", 1e-3)])
def test_ease_is_the_constrained_ridge_regression(precision, digits):
    """B minimises |X - XB|^2 + lambda |B|^2 with a zero diagonal: each column is a ridge without its own item."""
    dataset = random_log()
    x, ridge = binary(dataset), 3.0
    weights = Ease(EaseConfig(regularization=ridge, precision=precision)).fit(dataset).weights
    for item in range(dataset.n_items):
        rest = np.delete(np.arange(dataset.n_items), item)
        solved = np.linalg.solve(x[:, rest].T @ x[:, rest] + ridge * np.eye(len(rest)), x[:, rest].T @ x[:, item])
        np.testing.assert_allclose(weights[rest, item], solved, atol=digits)
        assert weights[item, item] == 0


def test_ease_and_itemknn_sum_over_distinct_history_items():
    dataset = random_log()
    for model in (Ease().fit(dataset), ItemKNN().fit(dataset)):
        rows = model.score([np.array([item]) for item in (2, 9)])
        np.testing.assert_allclose(model.score([np.array([2, 9, 2])])[0], rows.sum(axis=0), rtol=1e-6)


@given(logs, st.integers(1, 6), st.sampled_from([0.0, 2.5]))
@settings(max_examples=60, deadline=None)
def test_itemknn_votes_for_the_nearest_items_by_definition(sequences, neighbours, shrinkage):
    dataset = small_log(sequences, 6)
    x = binary(dataset)
    common, count = x.T @ x, x.sum(axis=0)
    with np.errstate(invalid="ignore"):
        similarity = np.nan_to_num(common / (np.sqrt(np.outer(count, count)) + shrinkage))
    np.fill_diagonal(similarity, 0)
    for row in similarity:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    model = ItemKNN(ItemKNNConfig(neighbours=neighbours, shrinkage=shrinkage)).fit(dataset)
    scores = model.score([np.array([item]) for item in range(6)])
    np.testing.assert_allclose(scores, similarity, rtol=1e-6, atol=1e-7)
    assert (np.diff(model.similarity.indptr) <= neighbours).all()


def test_itemknn_does_not_depend_on_how_many_rows_it_takes_at_once(monkeypatch):
    dataset = random_log()
    whole = ItemKNN().fit(dataset).similarity.toarray()
    monkeypatch.setattr("recollect.recommenders.itemknn._ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(ItemKNN().fit(dataset).similarity.toarray(), whole)


class Axes:
    """Embeds "item i" as the i-th axis, slightly turned towards the next."""

    fingerprint = "axes"

    def __init__(self):
        self.calls = 0

    def embed(self, texts):
        self.calls += 1
        rows = np.eye(len(texts), dtype=np.float32)
        rows += 0.5 * np.roll(rows, 1, axis=1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def close(self):
        raise AssertionError("an opened embedder is the caller's to close")


def test_text_similarity_is_the_cosine_to_the_mean_or_to_the_closest():
    dataset = small_log([[0, 1, 2, 3, 4]], 5)
    vectors = Axes().embed(item_texts(dataset.catalog))
    history = np.array([4, 0, 2])
    mean = vectors[[0, 2]].mean(axis=0)
    model = TextSimilarity(TextSimilarityConfig(last=2), embedder=Axes()).fit(dataset)
    np.testing.assert_allclose(model.score([history])[0], vectors @ (mean / np.linalg.norm(mean)), rtol=1e-5)
    model = TextSimilarity(TextSimilarityConfig(last=2, pool="closest"), embedder=Axes()).fit(dataset)
    np.testing.assert_allclose(model.score([history])[0], (vectors @ vectors[[0, 2]].T).max(axis=1), rtol=1e-5)


def test_item_vectors_are_embedded_once_per_texts_and_embedder(tmp_path):
    dataset, embedder = small_log([[0, 1, 2]], 3), Axes()
    first = item_vectors(dataset, embedder, tmp_path)
    np.testing.assert_array_equal(item_vectors(dataset, embedder, tmp_path), first)
    assert embedder.calls == 1
    other = Axes()
    other.fingerprint = "other axes"
    item_vectors(dataset, other, tmp_path)
    item_vectors(small_log([[0, 1, 2]], 3, titles=["a", "b", "c"]), embedder, tmp_path)
    item_vectors(small_log([[0, 2, 1]], 3), embedder, tmp_path)  # the same texts in another order of events
    assert (embedder.calls, other.calls, len(list(tmp_path.iterdir()))) == (2, 1, 3)


def test_text_of_an_item_is_title_categories_and_text():
    dataset = small_log([[0, 1]], 2, titles=["Brush", ""])
    catalog = dataset.catalog
    texts = np.array([None, "soft"], dtype=object)
    described = type(catalog)(catalog.item_ids, catalog.titles, catalog.domain, [("hair", "care"), ()], texts)
    assert item_texts(described) == ["Brush. hair, care", "soft"]


def test_minilm_ranks_a_film_nearer_to_its_sequel_than_to_a_stranger(minilm_dir):
    titles = ["Star Wars (1977)", "The Empire Strikes Back (1980)", "Pride and Prejudice (1995)"]
    dataset = small_log([[0, 1, 2]], 3, titles=titles)
    scores = TextSimilarity().fit(dataset, leave_one_out(dataset)).score([np.array([0])])[0]
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[1] > scores[2]
