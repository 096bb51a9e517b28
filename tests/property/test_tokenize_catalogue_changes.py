"""Extending and refitting: who keeps an ID, and what the new codebooks call it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.additive_tokenizer import crowded_items, random_codebooks

from recollect.tokenize.catalogue import (
    churn,
    extend,
    overlap_labels,
    permuted_arrays,
    refit,
    relabel,
    resolve_refit,
)
from recollect.tokenize.collisions import STRATEGIES, resolve_collisions

SEED = st.integers(0, 10_000)


@settings(deadline=None, max_examples=15)
@given(SEED, st.sampled_from([name for name in STRATEGIES if name != "hash_last"]))
def test_extending_never_touches_an_existing_code_and_equals_resolving_around_it(seed, strategy):
    tokenizer = random_codebooks((3, 64), seed=seed)
    items = crowded_items(tokenizer, 30, seed=seed, spread=0.2)
    held = resolve_collisions(
        tokenizer.encode(items[:20]).codes, strategy, tokenizer=tokenizer, embeddings=items[:20]
    ).codes
    before = held.copy()
    books = {name: book.copy() for name, book in tokenizer.arrays().items()}
    found = extend(tokenizer, items[20:], held, strategy=strategy)
    np.testing.assert_array_equal(held, before)
    for name, book in tokenizer.arrays().items():
        np.testing.assert_array_equal(book, books[name])
    assert found.codes.shape == (10, held.shape[1])
    np.testing.assert_array_equal(found.encoding.codes, tokenizer.encode(items[20:]).codes)
    if strategy in ("suffix", "zcr", "capacity"):
        whole = np.concatenate([held, found.codes])
        assert len(np.unique(whole, axis=0)) == 30


def test_extending_a_full_prefix_group_says_that_it_is_full():
    tokenizer = random_codebooks((1, 4))
    items = crowded_items(tokenizer, 6)
    held = resolve_collisions(tokenizer.encode(items[:4]).codes, tokenizer=tokenizer, embeddings=items[:4])
    assert held.codes.shape[1] == 2
    found = extend(tokenizer, items[4:], held.codes)
    assert found.codes.shape[1] == 2
    assert found.resolution.unresolved == 2
    assert "refit" in found.resolution.notes[0]


def test_extending_a_catalogue_with_an_extra_digit_counts_on():
    tokenizer = random_codebooks((1, 4))
    items = crowded_items(tokenizer, 9)
    held = resolve_collisions(tokenizer.encode(items[:6]).codes, tokenizer=tokenizer, embeddings=items[:6])
    assert held.codes.shape[1] == 3
    found = extend(tokenizer, items[6:], held.codes)
    assert len(np.unique(np.concatenate([held.codes, found.codes]), axis=0)) == 9


@settings(deadline=None)
@given(SEED, st.integers(2, 12))
def test_renaming_recovers_a_permutation(seed, size):
    generator = np.random.default_rng(seed)
    old = np.r_[np.arange(size), generator.integers(0, size, 40)]
    permutation = generator.permutation(size)
    labels = overlap_labels(old, permutation[old], size)
    np.testing.assert_array_equal(labels[permutation[old]], old)


@settings(deadline=None)
@given(SEED, st.integers(2, 5))
def test_renaming_keeps_the_most_items(seed, size):
    from itertools import permutations

    generator = np.random.default_rng(seed)
    old, new = generator.integers(0, size, 30), generator.integers(0, size, 30)
    kept = int((overlap_labels(old, new, size)[new] == old).sum())
    assert kept == max(int((np.array(names)[new] == old).sum()) for names in permutations(range(size)))


@settings(deadline=None, max_examples=20)
@given(SEED)
def test_permuted_codebooks_decode_and_encode_as_before_under_the_new_names(seed):
    tokenizer = random_codebooks((5, 7), seed=seed)
    items = crowded_items(tokenizer, 40, seed=seed, spread=1.0)
    generator = np.random.default_rng(seed)
    labels = [generator.permutation(5), generator.permutation(7)]
    codes, decoded = tokenizer.encode(items).codes, tokenizer.decode(tokenizer.encode(items).codes)
    relabel(tokenizer, labels, items)
    renamed = np.stack([labels[level][codes[:, level]] for level in range(2)], axis=1)
    np.testing.assert_array_equal(tokenizer.encode(items).codes, renamed)
    np.testing.assert_array_equal(tokenizer.decode(renamed.astype(np.int32)), decoded)


def test_arrays_shared_by_all_codes_stay_in_place():
    arrays = {
        "codebook.0": np.arange(3)[:, None],
        "variance.0": np.ones((1, 3)),
        "log_weight.0": np.arange(3),
        "mean": 7,
    }
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    found = permuted_arrays(arrays, [np.array([2, 0, 1])])
    assert found["codebook.0"][:, 0].tolist() == [1, 2, 0]
    assert found["log_weight.0"].tolist() == [1, 2, 0]
    np.testing.assert_array_equal(found["variance.0"], arrays["variance.0"])
    assert found["mean"] == 7


def test_churn_counts_changed_prefixes():
    before = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]])
    after = before.copy()
    after[1, 2] = 9
    after[2, 0] = 9
    assert churn(before, after).tolist() == [0.25, 0.25, 0.5]
    assert churn(before[:0], after[:0]).tolist() == [0, 0, 0]


def clustered(n, seed=0):
    """8 well-separated clusters with 4 sub-clusters each, in 6 dimensions; the first 32 items hold one of each."""
    generator = np.random.default_rng(7)
    coarse, fine = 20 * generator.normal(size=(8, 6)), 3 * generator.normal(size=(4, 6))
    generator = np.random.default_rng(seed)
    members = np.r_[np.arange(32), generator.integers(0, 32, n - 32)]
    return (coarse[members // 4] + fine[members % 4] + 0.05 * generator.normal(size=(n, 6))).astype(np.float32)


def kmeans(seed):
    rq_kmeans = pytest.importorskip("recollect.tokenize.rq_kmeans")
    pytest.importorskip("faiss", reason="faiss is not installed")
    from recollect.tokenize.baseline_options import RQKMeansConfig

    return rq_kmeans.RQKMeans(RQKMeansConfig(levels=2, codebook_size=8, seed=seed))


def mixture(seed, covariance="diag"):
    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.rq_gmm import RQGMM

    return RQGMM(RQGMMConfig(levels=2, codebook_size=8, covariance=covariance, seed=seed, max_iterations=10))


OPENERS = {
    "rq-kmeans": kmeans,
    "rq-gmm diag": mixture,
    "rq-gmm tied_diag": lambda seed: mixture(seed, "tied_diag"),
    "rq-gmm spherical": lambda seed: mixture(seed, "spherical"),
}


@pytest.mark.parametrize("kind", OPENERS)
def test_refitting_keeps_the_names_of_codes_that_mean_the_same(kind):
    items = clustered(400)
    old = OPENERS[kind](0).fit(items[:300])
    previous = old.encode(items[:300]).codes
    new = OPENERS[kind](1)
    found = refit(new, items, previous)
    np.testing.assert_array_equal(new.encode(items).codes, found.codes)
    assert (found.churn <= found.churn_unlabelled).all()
    assert found.churn[0] < 0.3
    assert found.churn_unlabelled[0] > 0.3  # the seeds name the clusters differently, or this test shows nothing
    for level, names in enumerate(found.labels):
        np.testing.assert_array_equal(np.sort(names), np.arange(8), err_msg=f"level {level}")


@pytest.mark.parametrize("kind", OPENERS)
def test_a_relabelled_tokenizer_gives_the_same_posterior_under_the_new_names(kind):
    items = clustered(200)
    tokenizer = OPENERS[kind](0).fit(items)
    before = tokenizer.encode(items, return_posterior=True)
    labels = [np.random.default_rng(level).permutation(8) for level in range(2)]
    relabel(tokenizer, labels, items)
    after = tokenizer.encode(items, return_posterior=True)
    np.testing.assert_array_equal(after.codes, np.stack([labels[i][before.codes[:, i]] for i in range(2)], axis=1))
    np.testing.assert_array_equal(tokenizer.decode(after.codes).shape, items.shape)
    if before.confidence is not None:
        np.testing.assert_allclose(after.confidence, before.confidence, atol=1e-5)


def test_unchanged_items_keep_their_resolved_ids_over_a_refit():
    items = clustered(240)
    old = mixture(0).fit(items[:200])
    previous = old.encode(items[:200]).codes
    held = resolve_collisions(previous, "suffix", tokenizer=old, embeddings=items[:200]).codes
    new = mixture(1)
    found = refit(new, items, previous)
    resolution = resolve_refit(found.codes, previous, held, new, items, strategy="suffix")
    same = (found.codes[:200] == previous).all(axis=1)
    assert same.any()
    np.testing.assert_array_equal(resolution.codes[:200][same], held[same])
    assert resolution.unresolved == 0
    assert len(np.unique(resolution.codes, axis=0)) == 240
