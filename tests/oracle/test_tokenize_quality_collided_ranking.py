"""Item-level gains under collisions are the expectation over random order inside groups (semantic_ids O11)."""

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.rng import stream
from recollect.tokenize.behaviour import item_level_gains, target_positions


def test_gains_are_the_mean_over_random_orders_of_each_group():
    draw = stream(0, "collided ranking")
    sizes = np.array([1, 3, 2, 5, 1, 4, 2])
    ranked = np.array([3, 0, 5, 1, 6, 2, 4])
    k, n_orders = 10, 20_000
    for target in range(len(sizes)):
        position = target_positions(ranked[None], np.array([target]), sizes)
        hit, ndcg = item_level_gains(position, sizes[[target]], k)
        start = sizes[ranked[: np.flatnonzero(ranked == target)[0]]].sum()  # items before the group
        ranks = 1 + start + draw.integers(sizes[target], size=n_orders)
        in_list = ranks <= k
        gains = np.where(in_list, 1 / np.log2(ranks + 1), 0)
        assert hit[0] == pytest.approx(in_list.mean(), abs=4 * in_list.std() / n_orders**0.5 + 1e-12)
        assert ndcg[0] == pytest.approx(gains.mean(), abs=4 * gains.std() / n_orders**0.5 + 1e-12)


def test_gains_are_exact_by_enumeration_of_places():
    for size in range(1, 8):
        for start in range(1, 15):
            for k in (1, 5, 10):
                ranks = np.arange(start, start + size)
                hit, ndcg = item_level_gains(np.array([start]), np.array([size]), k)
                assert hit[0] == pytest.approx((ranks <= k).mean())
                assert ndcg[0] == pytest.approx(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0).mean())


def test_without_collisions_they_are_plain_hit_and_ndcg():
    ranked = np.array([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4], [1, 0, 2, 4, 3]])
    target = np.array([0, 4, 3])
    position = target_positions(ranked, target, np.ones(5, dtype=np.int64))
    assert position.tolist() == [3, 5, 5]
    hit, ndcg = item_level_gains(position, np.ones(3, dtype=np.int64), 4)
    assert hit.tolist() == [1, 0, 0]
    assert ndcg.tolist() == pytest.approx([0.5, 0, 0])


def test_invalid_outputs_take_no_place_and_doubled_ids_count_once():
    sizes = np.array([2, 3, 1])
    ranked = np.array([[-1, 1, 1, -1, 0], [2, 2, -1, 2, -1]])
    assert target_positions(ranked, np.array([0, 1]), sizes).tolist() == [4, 0]
    hit, ndcg = item_level_gains(np.array([4, 0]), sizes[[0, 1]], 10)
    assert hit.tolist() == [1, 0]
    assert ndcg[1] == 0


def test_unknown_ids_and_empty_lists_are_refused():
    with pytest.raises(InputError, match=r"numbered 0\.\.2"):
        target_positions(np.array([[0, 3]]), np.array([1]), np.ones(3, dtype=np.int64))
    with pytest.raises(InputError, match="k >= 1"):
        item_level_gains(np.array([1]), np.array([1]), 0)
