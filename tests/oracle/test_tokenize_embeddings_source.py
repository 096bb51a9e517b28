"""Where item vectors come from: texts embedded once, files memory-mapped, behaviour vectors in closed form."""

from dataclasses import replace

import numpy as np
import pytest
from support.recommender_worlds import random_log
from support.token_worlds import CountingEmbedder, described, themed_vectors

from recollect.data import leave_one_out
from recollect.data.item_text import item_texts
from recollect.errors import InputError
from recollect.tokenize import embeddings
from recollect.tokenize.collaborative import collaborative_vectors
from recollect.tokenize.embeddings import embed_texts, items_of_dataset, read_vectors
from recollect.tokenize.fit_inputs import popularity_weight
from recollect.tokenize.run_config import BenchConfig
from recollect.tokenize.source import preprocessed


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embeddings, "PART", 4)


def test_vectors_stand_in_the_order_of_the_items_and_equal_texts_share_one_to_the_last_bit(tmp_path):
    texts = ["a", "bb", "a", "ccc", "dddd", "e", "f", "bb", "g"]
    embedder = CountingEmbedder()
    vectors, _ = embed_texts(texts, embedder, tmp_path)
    assert embedder.texts == 7
    assert isinstance(vectors, np.memmap)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[1], vectors[7])
    alone = CountingEmbedder().embed(texts)
    np.testing.assert_allclose(vectors, alone, rtol=1e-5)


def test_a_second_call_embeds_nothing_and_other_texts_are_embedded_anew(tmp_path):
    first, key = embed_texts(["a", "b"], CountingEmbedder(), tmp_path)
    again = CountingEmbedder()
    second, same = embed_texts(["a", "b"], again, tmp_path)
    assert again.texts == 0
    assert key == same
    np.testing.assert_array_equal(first, second)
    other, changed = embed_texts(["a", "c"], again, tmp_path)
    assert again.texts == 2
    assert changed != key
    assert not np.array_equal(other, first)


def test_a_catalogue_is_embedded_by_title_categories_and_text(tmp_path):
    dataset = described(random_log(n_items=3), ["Brush", "", "Pan"], texts=["soft", None, None])
    assert item_texts(dataset.catalog) == ["Brush. soft", "", "Pan"]
    items = items_of_dataset(dataset, leave_one_out(dataset), tmp_path, embedder=CountingEmbedder())
    assert items.source["items_without_text"] == 1
    assert items.titles == ("Brush", "", "Pan")
    assert items.item_ids == ("i0", "i1", "i2")


def test_a_catalogue_without_any_text_is_refused(tmp_path):
    dataset = described(random_log(n_items=3), ["", "", ""])
    with pytest.raises(InputError, match="no item has a title"):
        items_of_dataset(dataset, leave_one_out(dataset), tmp_path, embedder=CountingEmbedder())


def test_minilm_gives_the_vectors_the_embedder_gives(tmp_path, minilm_dir):
    from recollect.backbones.resolve import open_embedder

    texts = ["a red car", "a blue car", "how to bake bread", "a red car", "bread and butter"]
    vectors, _ = embed_texts(texts, "minilm", tmp_path)
    embedder = open_embedder("minilm")
    np.testing.assert_allclose(vectors, embedder.embed(texts), atol=1e-6)
    embedder.close()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_a_file_is_mapped_read_only_and_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(3, dtype=np.float32))
    vectors = read_vectors(tmp_path / "x.npy")
    assert isinstance(vectors, np.memmap)
    assert not vectors.flags.writeable
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="without pickled objects"):
        read_vectors(tmp_path / "o.npy")


def test_behaviour_vectors_are_the_leading_singular_vectors_of_the_scaled_matrix():
    dataset = random_log(n_users=40, n_items=20)
    split = leave_one_out(dataset)
    log = dataset.interactions.take(split.train)
    matrix = np.zeros((dataset.n_users, dataset.n_items))
    matrix[log.user, log.item] = 1
    scaled = matrix / np.sqrt(np.maximum(matrix.sum(axis=0), 1))
    _, values, directions = np.linalg.svd(scaled)
    expected = (directions[:5] * values[:5, None]).T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = collaborative_vectors(dataset, split, 5, seed=3)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(collaborative_vectors(dataset, split, 5, seed=9), found, atol=1e-5)


def test_popularity_weights_are_one_and_the_training_events(tmp_path):
    dataset = random_log(n_users=10, n_items=6)
    split = leave_one_out(dataset)
    items = items_of_dataset(dataset, split, tmp_path, embedder=CountingEmbedder())
    events = dataset.interactions.item[split.train].tolist()
    assert popularity_weight(items).tolist() == [1 + events.count(item) for item in range(6)]


def warm_and_cold(folder, cold_row):
    """Items of a log with given vectors; the last of them has no event, and `cold_row` for a vector."""
    vectors = np.concatenate([themed_vectors(20, dimension=4), [cold_row]]).astype(np.float32)
    np.save(folder / "x.npy", vectors)
    dataset = random_log(n_users=40, n_items=21)
    warm = dataset.interactions.take(dataset.interactions.item < 20)
    dataset = replace(dataset, interactions=warm)
    return items_of_dataset(dataset, leave_one_out(dataset), folder, vectors=folder / "x.npy")


def centred(items, folder, **options):
    """What the step `centre` makes of the items' vectors in a comparison."""
    return np.array(preprocessed(items, BenchConfig(preprocess=("centre",), **options), folder).embeddings)


def test_preprocessing_of_a_comparison_learns_from_the_items_and_by_the_weights_of_the_fits(tmp_path):
    near = warm_and_cold(tmp_path, [0, 0, 0, 0])
    vectors = np.array(near.embeddings, dtype=np.float64)
    share = popularity_weight(near)
    assert share[20] == 1
    assert len(set(share)) > 2
    expected = {
        (False, "none"): vectors.mean(axis=0),
        (True, "none"): vectors[:20].mean(axis=0),
        (False, "popularity"): np.average(vectors, axis=0, weights=share),
        (True, "popularity"): np.average(vectors[:20], axis=0, weights=share[:20]),
    }
    for (hold_out_cold, weight), mean in expected.items():  # one folder: none takes the file of another
        found = centred(near, tmp_path, hold_out_cold=hold_out_cold, weight=weight)
        np.testing.assert_allclose(found, vectors - mean, atol=1e-6)
    far = warm_and_cold(tmp_path, [1e3, 1e3, 1e3, 1e3])
    held = centred(far, tmp_path, hold_out_cold=True)
    np.testing.assert_array_equal(held[:20], centred(near, tmp_path, hold_out_cold=True)[:20])


def test_items_without_training_events_get_zeros_and_too_many_directions_are_refused():
    dataset = random_log(n_users=30, n_items=20)
    split = leave_one_out(dataset)
    cold = int(dataset.interactions.item[split.test_row[0]])
    train = split.train & (dataset.interactions.item != cold)
    only = type(split)(train=train, valid_row=split.valid_row, test_row=split.test_row, rule=split.rule)
    found = collaborative_vectors(dataset, only, 4)
    assert not found[cold].any()
    with pytest.raises(InputError, match="need more than 20 users and items"):
        collaborative_vectors(dataset, split, 20)
