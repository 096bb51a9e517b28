"""Collision strategies against brute force and direct definitions."""

import warnings
from itertools import permutations, product

import numpy as np
import pytest
from support.additive_tokenizer import GivenCodebooks, crowded_items, random_codebooks

from recollect.tokenize.collisions import CollisionConfig, resolve_collisions
from recollect.tokenize.last_digit import bounded_assignment, fewest_moves, nearest_pairs_first


def best_distinct(cost, own, free):
    """(moves, cost) of the best plan over all injective assignments."""
    rows = np.arange(len(cost))
    plans = (np.array(plan) for plan in permutations(free, len(cost)))
    return min((int((plan != own).sum()), float(cost[rows, plan].sum())) for plan in plans)


@pytest.mark.parametrize("seed", range(12))
def test_fewest_moves_equals_brute_force_over_all_plans(seed):
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 6))
    size = int(generator.integers(n, 8))
    cost = generator.random((n, size)) * 10.0 ** generator.integers(-3, 4)
    own = generator.integers(0, size, n) if seed % 2 else np.zeros(n, dtype=np.int64)
    found = fewest_moves(cost, own, np.ones(size, dtype=bool))
    moves, least = best_distinct(cost, own, range(size))
    assert len(set(found.tolist())) == n
    assert (found != own).sum() == moves
    assert cost[np.arange(n), found].sum() == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_zcr_of_a_whole_prefix_group_equals_brute_force(seed):
    """Seven items, seven codes: settled ones are no special case of the definition, only of the algorithm."""
    generator = np.random.default_rng(seed)
    tokenizer = GivenCodebooks(np.zeros((1, 3)), generator.normal(size=(7, 3)))
    items = (0.6 * generator.normal(size=(7 - seed % 3, 3))).astype(np.float32)
    codes = tokenizer.encode(items).codes
    found = resolve_collisions(codes, "zcr", tokenizer=tokenizer, embeddings=items)
    cost = ((items[:, None].astype(np.float64) - tokenizer.codebooks[1][None]) ** 2).sum(-1)
    moves, least = best_distinct(cost, codes[:, 1], range(7))
    rows = np.arange(len(items))
    assert found.changed_items == found.changed_digits == moves
    assert cost[rows, found.codes[:, 1]].sum() == pytest.approx(least, rel=1e-6)
    before = cost[rows, codes[:, 1]].sum()
    assert found.added_distortion == pytest.approx((least - before) / len(items), rel=1e-4, abs=1e-7)
    assert found.unresolved == 0


@pytest.mark.parametrize("seed", range(8))
def test_nearest_pairs_first_is_the_greedy_over_all_sorted_pairs(seed):
    generator = np.random.default_rng(seed)
    n, size = 12, 5
    cost = generator.integers(0, 6, (n, size)).astype(float) if seed % 2 else generator.random((n, size))
    places = np.array([3, 0, 4, 4, 2])
    left, expected = places.copy(), np.full(n, -1)
    for _, row, code in sorted((cost[row, code], row, code) for row in range(n) for code in range(size)):
        if expected[row] < 0 and left[code]:
            expected[row] = code
            left[code] -= 1
    np.testing.assert_array_equal(nearest_pairs_first(cost, places), expected)


@pytest.mark.parametrize("seed", range(8))
def test_bounded_assignment_is_the_cheapest_inside_its_bounds(seed):
    generator = np.random.default_rng(seed)
    n, size = 6, 3
    cost = generator.random((n, size))
    lower, upper = np.array([1, 0, 2]), np.array([2, 3, 3])
    found = bounded_assignment(cost, lower, upper)
    counts = np.bincount(found, minlength=size)
    assert (counts >= lower).all()
    assert (counts <= upper).all()
    legal = [
        sum(cost[row, code] for row, code in enumerate(plan))
        for plan in product(range(size), repeat=n)
        if all(low <= plan.count(code) <= high for code, (low, high) in enumerate(zip(lower, upper, strict=True)))
    ]
    assert cost[np.arange(n), found].sum() == pytest.approx(min(legal))


def test_bounded_assignment_costs_no_more_than_the_assignment_step_of_constrained_kmeans():
    package = pytest.importorskip("k_means_constrained", reason="k-means-constrained is not installed")
    generator = np.random.default_rng(0)
    items, centres = generator.normal(size=(60, 4)), generator.normal(size=(8, 4))
    lower, upper = 60 // 8 - 1, 60 // 8 + 1
    model = package.KMeansConstrained(8, size_min=lower, size_max=upper, init=centres, n_init=1, max_iter=1, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that one iteration is few
        labels = model.fit(items).labels_
    final = model.cluster_centers_
    cost = ((items[:, None] - final[None]) ** 2).sum(-1)
    found = bounded_assignment(cost, np.full(8, lower), np.full(8, upper))
    assert cost[np.arange(60), found].sum() <= 1.01 * cost[np.arange(60), labels].sum()


def test_constrained_keeps_the_sizes_of_constrained_kmeans_in_every_prefix_group():
    tokenizer = random_codebooks((2, 4), seed=3)
    items = crowded_items(tokenizer, 90)
    codes = tokenizer.encode(items).codes
    found = resolve_collisions(codes, "constrained", tokenizer=tokenizer, embeddings=items)
    assert found.unresolved > 0  # 90 items do not fit 8 tuples
    for prefix in range(2):
        members = found.codes[codes[:, 0] == prefix, 1]
        counts = np.bincount(members, minlength=4)
        if len(members) > 4:
            assert counts.min() >= len(members) // 4 - 1
            assert counts.max() <= len(members) // 4 + 1


def test_capacity_limits_the_uses_of_a_tuple():
    tokenizer = random_codebooks((4, 32), seed=1)
    items = crowded_items(tokenizer, 60)
    codes = tokenizer.encode(items).codes
    for capacity in (1, 2, 3):
        config = CollisionConfig(capacity=capacity)
        found = resolve_collisions(codes, "capacity", tokenizer=tokenizer, embeddings=items, config=config)
        groups = np.bincount(codes[:, 0], minlength=4)
        allowed = np.maximum(capacity, -(-groups // 32))
        for prefix in range(4):
            members = found.codes[found.codes[:, 0] == prefix, 1]
            if len(members):
                assert np.bincount(members).max() <= allowed[prefix]


def test_neighbour_repair_takes_the_closest_unused_tuple_of_the_product():
    tokenizer = random_codebooks((6, 6), dimension=3, seed=2)
    items = np.repeat(np.random.default_rng(5).normal(size=(1, 3)), 9, axis=0).astype(np.float32)
    items[8] = -items[0]
    codes = tokenizer.encode(items).codes
    found = resolve_collisions(codes, "neighbour_repair", tokenizer=tokenizer, embeddings=items)
    alternatives = tokenizer.encode(items[:1], top_m=5).alternatives[0]
    tuples = np.array(list(product(*alternatives)), dtype=np.int32)
    error = ((tokenizer.decode(tuples).astype(np.float64) - items[0]) ** 2).sum(-1)
    ranked = [tuple(row) for row in tuples[np.argsort(error, kind="stable")].tolist()]
    expected = [row for row in ranked if row not in (tuple(codes[0]), tuple(codes[8]))][:7]
    assert [tuple(row) for row in found.codes[1:8].tolist()] == expected
    np.testing.assert_array_equal(found.codes[[0, 8]], codes[[0, 8]])
    assert found.unresolved == 0
    assert found.changed_items == 7


def test_suffix_is_the_rank_inside_the_group():
    codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2], [0, 1]])
    found = resolve_collisions(codes, "suffix", codebook_sizes=(2, 3))
    np.testing.assert_array_equal(found.codes[:, 2], [0, 0, 1, 2, 0])
    assert found.codebook_sizes == (2, 3, 3)
    assert found.decodable_levels == 2
    assert (found.unresolved, found.extended_items, found.changed_digits, found.added_distortion) == (0, 3, 0, 0.0)
    ids = ["e", "d", "c", "b", "a"]
    np.testing.assert_array_equal(
        resolve_collisions(codes, "suffix", codebook_sizes=(2, 3), item_ids=ids).codes[:, 2], [2, 0, 1, 0, 0]
    )


def test_variable_suffix_leaves_unique_items_their_length_and_no_tuple_begins_another():
    codes = np.array([[1, 2], [0, 0], [1, 2], [0, 1]])
    found = resolve_collisions(codes, "variable_suffix", codebook_sizes=(2, 3))
    np.testing.assert_array_equal(found.codes[:, 2], [0, -1, 1, -1])
    assert found.codebook_sizes == (2, 3, 2)


def test_hash_last_depends_on_the_attributes_alone_and_fills_the_codes_evenly():
    n = 4000
    codes = np.zeros((n, 2), dtype=np.int32)
    brand, price = [f"brand {row % 500}" for row in range(n)], np.arange(n) // 500
    found = resolve_collisions(codes, "hash_last", codebook_sizes=(1, 64), attributes=[brand, price])
    digits = found.codes[:, 1]
    assert found.decodable_levels == 1
    counts = np.bincount(digits, minlength=64)
    assert counts.min() > 30
    assert counts.max() < 100
    again = resolve_collisions(codes[:1], "hash_last", codebook_sizes=(1, 64), attributes=[[brand[7]], [price[7]]])
    assert again.codes[0, 1] == digits[7]
    swapped = resolve_collisions(codes, "hash_last", codebook_sizes=(1, 64), attributes=[price, brand])
    assert (swapped.codes[:, 1] != digits).any()


def test_hash_digits_are_the_same_on_every_machine():
    found = resolve_collisions(
        np.zeros((3, 1), dtype=np.int32), "hash_last", codebook_sizes=(1000,), attributes=[["a", "b", "é"], [1, 2, 3]]
    )
    assert found.codes[:, 0].tolist() == [693, 274, 265]
