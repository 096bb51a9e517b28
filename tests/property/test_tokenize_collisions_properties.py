"""What every collision strategy promises, on random catalogues."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.additive_tokenizer import crowded_items, random_codebooks

from recollect.tokenize.collisions import STRATEGIES, resolve_collisions
from recollect.tokenize.groups import canonical_rank, rank_in_group, sizes_of, tuple_ids

WEIGHING = ("sinkhorn", "constrained", "capacity", "neighbour_repair", "zcr")
SEED = st.integers(0, 10_000)


def catalogue(seed, n, sizes=(3, 6), twins=0):
    """A tokenizer, items of which the last `twins` are exact copies of the first, and their codes."""
    tokenizer = random_codebooks(sizes, dimension=3, seed=seed)
    items = crowded_items(tokenizer, n, seed=seed, spread=0.2)
    if twins:
        items[-twins:] = items[:twins]
    return tokenizer, items, tokenizer.encode(items).codes


def resolved(strategy, tokenizer, items, codes, **more):
    attributes = [[f"{row.sum():.1f}" for row in items]] if strategy == "hash_last" else None
    return resolve_collisions(codes, strategy, tokenizer=tokenizer, embeddings=items, attributes=attributes, **more)


@settings(deadline=None, max_examples=40)
@given(SEED, st.integers(1, 30))
def test_zcr_separates_everybody_and_moves_no_more_than_it_must(seed, n):
    tokenizer, items, codes = catalogue(seed, n, sizes=(3, 32), twins=n // 3)
    found = resolved("zcr", tokenizer, items, codes)
    assert found.unresolved == 0
    assert len(np.unique(found.codes, axis=0)) == n
    np.testing.assert_array_equal(found.codes[:, :-1], codes[:, :-1])
    assert found.changed_items == n - len(np.unique(codes, axis=0))
    alone = sizes_of(tuple_ids(codes)) == 1
    np.testing.assert_array_equal(found.codes[alone], codes[alone])
    assert found.added_distortion >= -1e-6


@settings(deadline=None, max_examples=25)
@given(SEED, st.integers(10, 40))
def test_zcr_falls_back_to_a_suffix_where_a_prefix_group_is_larger_than_the_codebook(seed, n):
    tokenizer, items, codes = catalogue(seed, n, sizes=(2, 4))
    found = resolved("zcr", tokenizer, items, codes)
    is_full = np.bincount(codes[:, 0], minlength=2)[codes[:, 0]] > 4
    assert found.unresolved == 0
    assert is_full.any()
    assert found.codes.shape[1] == 3
    assert found.decodable_levels == 2
    assert str(int(is_full.sum())) in found.notes[0]
    np.testing.assert_array_equal(found.codes[is_full][:, :2], codes[is_full])
    assert (found.codes[~is_full, 2] == 0).all()


@settings(deadline=None, max_examples=15)
@given(SEED, st.sampled_from(STRATEGIES))
def test_codes_stay_in_their_codebooks_and_the_report_agrees_with_them(seed, strategy):
    tokenizer, items, codes = catalogue(seed, 25, twins=4)
    found = resolved(strategy, tokenizer, items, codes)
    assert found.codes.dtype == np.int32
    assert found.codes.shape == (25, len(found.codebook_sizes))
    low = -1 if strategy == "variable_suffix" else 0
    assert (found.codes >= np.array([0, 0, low][: found.codes.shape[1]])).all()
    assert (found.codes < np.array(found.codebook_sizes)).all()
    assert found.unresolved == (sizes_of(tuple_ids(found.codes)) > 1).sum()
    assert found.changed_digits == (found.codes[:, :2] != codes).sum()
    assert found.changed_items == (found.codes[:, :2] != codes).any(axis=1).sum()
    if found.decodable_levels == 2:
        old = ((tokenizer.decode(codes) - items) ** 2).sum(1).mean()
        new = ((tokenizer.decode(found.codes[:, :2]) - items) ** 2).sum(1).mean()
        assert abs(found.added_distortion - (new - old)) < 1e-5


@settings(deadline=None, max_examples=15)
@given(SEED, st.sampled_from(STRATEGIES))
def test_the_order_of_rows_changes_nothing_where_items_have_ids(seed, strategy):
    tokenizer, items, codes = catalogue(seed, 24, sizes=(3, 16), twins=5)
    ids = [f"item {row}" for row in range(24)]
    shuffled = np.random.default_rng(seed).permutation(24)
    found = resolved(strategy, tokenizer, items, codes, item_ids=ids)
    moved = resolved(
        strategy, tokenizer, items[shuffled], codes[shuffled], item_ids=[ids[row] for row in shuffled.tolist()]
    )
    np.testing.assert_array_equal(moved.codes, found.codes[shuffled])


@settings(deadline=None, max_examples=15)
@given(SEED, st.sampled_from(WEIGHING))
def test_items_without_a_collision_in_their_prefix_group_are_left_alone(seed, strategy):
    tokenizer, items, codes = catalogue(seed, 12, sizes=(6, 24))
    shares = sizes_of(tuple_ids(codes)) > 1
    prefixes = codes[:, 0]
    calm = ~np.isin(prefixes, prefixes[shares])
    found = resolved(strategy, tokenizer, items, codes)
    np.testing.assert_array_equal(found.codes[calm], codes[calm])


@settings(deadline=None, max_examples=20)
@given(SEED, st.sampled_from([name for name in WEIGHING if name != "constrained"]))
def test_existing_tuples_are_avoided_where_there_is_room(seed, strategy):
    tokenizer, items, codes = catalogue(seed, 20, sizes=(3, 64))
    held = resolved(strategy, tokenizer, items[:10], codes[:10]).codes
    found = resolved(strategy, tokenizer, items[10:], codes[10:], existing=held)
    if strategy != "sinkhorn":
        assert found.unresolved == 0
        whole = np.concatenate([held, found.codes])
        assert len(np.unique(whole, axis=0)) == len(np.unique(held, axis=0)) + 10
    if strategy in ("zcr", "neighbour_repair"):
        calm = (sizes_of(tuple_ids(np.concatenate([codes[10:], held])))[:10]) == 1
        np.testing.assert_array_equal(found.codes[calm], codes[10:][calm])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 2), st.integers(0, 10**9)), max_size=30))
def test_tuple_ids_are_equal_exactly_for_equal_rows_and_follow_their_order(rows):
    codes = np.array(rows, dtype=np.int64).reshape(-1, 3)
    ids = tuple_ids(codes)
    names = sorted(set(rows))
    assert ids.tolist() == [names.index(row) for row in rows]


@given(st.lists(st.integers(0, 4), max_size=30), st.randoms())
def test_rank_in_group_counts_the_members_before(ids, shuffler):
    rank = list(range(len(ids)))
    shuffler.shuffle(rank)
    found = rank_in_group(np.array(ids, dtype=np.int64), np.array(rank, dtype=np.int64))
    expected = [
        sum(other == mine and place < own for other, place in zip(ids, rank, strict=True))
        for mine, own in zip(ids, rank, strict=True)
    ]
    assert found.tolist() == expected


def test_canonical_rank_is_the_order_of_the_ids():
    assert canonical_rank(4, ["b", "a\x00", "a", "c"]).tolist() == [2, 1, 0, 3]
    assert canonical_rank(3, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize("strategy", ["suffix", "variable_suffix"])
def test_new_items_count_on_from_the_largest_existing_digit(strategy):
    existing = np.array([[0, 0, 0], [0, 0, 5], [1, 1, 0]])
    codes = np.array([[0, 0], [0, 0], [1, 0]])
    found = resolve_collisions(codes, strategy, codebook_sizes=(2, 2), existing=existing)
    assert found.codes[:2, 2].tolist() == [6, 7]
    assert found.codebook_sizes == (2, 2, 8)
    assert found.unresolved == 0
