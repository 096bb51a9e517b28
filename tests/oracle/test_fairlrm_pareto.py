"""Frontier and hyper-volume against brute force; draws shared by all methods."""

import numpy as np
import pytest

from recollect.eval.pareto import PairedDraws, frontier, hyper_volume


def test_hyper_volume_of_one_point_is_its_rectangle():
    assert hyper_volume(np.array([0.4]), np.array([0.25])) == pytest.approx(0.4 * 0.75)


def test_hyper_volume_equals_the_share_of_a_fine_grid_that_is_dominated():
    generator = np.random.default_rng(0)
    gain, cost = generator.random((2, 6))
    grid = (np.arange(400) + 0.5) / 400
    dominated = ((gain[:, None, None] >= grid[:, None]) & (cost[:, None, None] <= grid[None, :])).any(axis=0)
    assert hyper_volume(gain, cost) == pytest.approx(dominated.mean(), abs=0.005)


def test_a_dominated_point_adds_nothing_and_columns_are_independent():
    gain, cost = np.array([[0.5, 0.1], [0.4, 0.9], [0.2, 0.3]]), np.array([[0.2, 0.6], [0.3, 0.2], [0.1, 0.9]])
    both = hyper_volume(gain, cost)
    assert both == pytest.approx([hyper_volume(gain[:, at], cost[:, at]) for at in range(2)])
    assert both[0] == pytest.approx(hyper_volume(gain[[0, 2], 0], cost[[0, 2], 0]))


def test_frontier_holds_what_nobody_beats():
    assert frontier(np.array([0.5, 0.4, 0.2, 0.5]), np.array([0.2, 0.3, 0.1, 0.2])).tolist() == [
        True,
        False,
        True,
        True,
    ]


def test_draws_are_equal_for_equal_seeds_and_means_are_centred():
    values = np.random.default_rng(1).random(50)
    first, again = (PairedDraws(50, 400, 3) for _ in range(2))
    assert (first.mean(values) == again.mean(values)).all()
    assert first.mean(values).mean() == pytest.approx(values.mean(), abs=0.01)
    assert (first.mean(np.ones(50)) == 1).all()


def test_coverage_draws_are_centred_on_the_coverage_of_the_sample():
    generator = np.random.default_rng(2)
    lists = generator.integers(0, 60, (40, 5))
    counted = np.arange(60) >= 20
    draws = PairedDraws(40, 300, 0).coverage(lists, counted)
    held = np.zeros(60, bool)
    held[lists] = True
    assert draws.mean() == pytest.approx((held & counted).sum() / 40)
    assert draws.std() > 0
