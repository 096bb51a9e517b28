"""Balanced RQ-KMeans: sizes, and cost beside the k-means-constrained package."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from recollect.tokenize.balanced import (
    BalancedRQKMeans,
    filling_prices,
    fitting_shares,
    flow_prices,
    greedy_fill,
)
from recollect.tokenize.baseline_options import BalancedConfig


def uneven(n: int, dimension: int = 6, seed: int = 0) -> np.ndarray:
    """Clusters of very different sizes."""
    generator = np.random.default_rng(seed)
    middle = generator.normal(0, 2, (10, dimension))
    chosen = np.minimum(generator.geometric(0.4, n) - 1, 9)
    return (middle[chosen] + generator.normal(0, 0.5, (n, dimension))).astype(np.float32)


def test_greedy_fill_gives_each_centre_in_turn_its_nearest_free_items():
    cost = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 9.0], [4.0, 9.0]])
    assert greedy_fill(cost, np.array([2, 2])).tolist() == [0, 0, 1, 1]
    assert greedy_fill(cost[:, ::-1], np.array([2, 2])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("n", "n_codes"), [(10, 4), (9, 8), (8, 8), (100, 7)])
def test_shares_differ_by_at_most_one_and_leave_no_code_empty(n, n_codes):
    shares = fitting_shares(n, n_codes)
    assert shares.sum() == n
    assert shares.max() - shares.min() <= 1
    assert shares.min() >= 1


def test_greedy_codes_of_the_fitted_items_are_nearly_balanced_where_plain_k_means_is_not():
    points = uneven(1200)
    tokenizer = BalancedRQKMeans(BalancedConfig(levels=2, codebook_size=16)).fit(points)
    for level in range(2):
        counts = np.bincount(tokenizer.encode(points).codes[:, level], minlength=16)
        assert counts.max() <= 1.1 * 75
        assert counts.min() >= 0.9 * 75
    nearest = ((points[:, None] - tokenizer.arrays()["codebook.0"][None]) ** 2).sum(-1).argmin(1)
    assert np.bincount(nearest, minlength=16).max() > 1.1 * 75


def test_constrained_sizes_lie_inside_the_bounds_at_the_packages_own_cost():
    package = pytest.importorskip("k_means_constrained")
    points = uneven(300)
    tokenizer = BalancedRQKMeans(BalancedConfig(levels=1, codebook_size=12, balancing="constrained")).fit(points)
    found = tokenizer.encode(points)
    counts = np.bincount(found.codes[:, 0], minlength=12)
    assert counts.min() >= 300 // 12 - 1
    assert counts.max() <= 300 // 12 + 1
    theirs = package.KMeansConstrained(12, size_min=24, size_max=26, n_init=1, random_state=0).fit(points)
    assert found.distance.sum() <= 1.01 * theirs.inertia_


def test_tiny_scales_do_not_blur_the_constrained_assignment():
    """The package rounds distances to thousandths; rows of length 1e-4 would all look alike to it."""
    pytest.importorskip("k_means_constrained")
    points = uneven(240)
    config = BalancedConfig(levels=1, codebook_size=8, balancing="constrained")
    plain = BalancedRQKMeans(config).fit(points)
    small = BalancedRQKMeans(config).fit(points * np.float32(2.0**-13))
    np.testing.assert_array_equal(plain.encode(points).codes, small.encode(points * np.float32(2.0**-13)).codes)


def test_flow_prices_reproduce_an_optimal_assignment():
    generator = np.random.default_rng(5)
    cost = generator.uniform(size=(60, 6))
    seats = np.repeat(np.arange(6), 10)
    _, seat = linear_sum_assignment(cost[:, seats])
    labels = seats[seat]
    assert (cost.argmin(1) != labels).any()
    np.testing.assert_array_equal((cost + flow_prices(cost, labels)).argmin(1), labels)


def test_flow_prices_keep_everybody_out_of_an_empty_code():
    cost = np.array([[1.0, 0.0, 5.0], [1.0, 0.5, 5.0], [0.0, 4.0, 5.0]])
    labels = np.array([1, 1, 0])
    np.testing.assert_array_equal((cost + flow_prices(cost, labels)).argmin(1), labels)


def test_filling_prices_balance_random_costs():
    generator = np.random.default_rng(6)
    cost = torch.tensor((generator.uniform(size=(2000, 20)) + 0.3 * np.arange(20) / 20).astype(np.float32))
    counts = np.bincount((cost + filling_prices(cost, np.full(20, 100)).float()).argmin(1).numpy(), minlength=20)
    assert np.bincount(cost.argmin(1).numpy(), minlength=20).max() > 150
    assert counts.min() >= 97
    assert counts.max() <= 103


def test_a_code_per_item_leaves_later_levels_nothing_to_tell_apart():
    pytest.importorskip("k_means_constrained")
    points = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    tokenizer = BalancedRQKMeans(BalancedConfig(levels=2, codebook_size=12, balancing="constrained")).fit(points)
    assert len(set(tokenizer.encode(points).codes[:, 0].tolist())) == 12
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(points).codes), points, atol=1e-5)
