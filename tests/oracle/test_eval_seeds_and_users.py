"""The interval of a mean over seeds and users: how often it holds the truth, over made samples whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from recollect.errors import InputError
from recollect.eval.seeds_and_users import over_seeds_and_users

SAMPLES = 800


def sample(generator, seeds, users, *, of_seed, of_user, of_cell):
    """(S, C) values of mean 0: an effect per seed, one per user, one per cell."""
    return (
        of_seed * generator.normal(size=(seeds, 1))
        + of_user * generator.normal(size=users)
        + of_cell * generator.normal(size=(seeds, users))
    )


def coverage(seeds, users, **spread):
    """Share of samples whose interval holds 0; the p-value must say the same."""
    generator = np.random.default_rng(5)
    held = []
    for number in range(SAMPLES):
        found = over_seeds_and_users(sample(generator, seeds, users, **spread), resamples=200, seed=number)
        held.append(found.low <= 0 <= found.high)
        assert held[-1] == (found.p_value >= 0.05)
    return np.mean(held)


@pytest.mark.parametrize(
    "spread",
    [
        {"of_seed": 3.0, "of_user": 1.0, "of_cell": 0.3},  # seeds: 100 users average to .1 against 3 of a seed
        {"of_seed": 0.0, "of_user": 1.0, "of_cell": 0.2},  # users
        {"of_seed": 0.15, "of_user": 1.0, "of_cell": 0.2},  # both, of one size
    ],
    ids=["seeds", "users", "both"],
)
def test_three_seeds_give_intervals_that_hold_the_truth_in_95_of_100_samples(spread):
    assert 0.925 <= coverage(3, 100, **spread) <= 0.975


def test_where_seeds_count_somewhat_more_than_users_three_of_them_give_somewhat_too_narrow_intervals():
    """The worst place of Satterthwaite's approximation: .922 in the limit of many samples."""
    assert 0.9 <= coverage(3, 100, of_seed=0.5, of_user=1.0, of_cell=0.0) <= 0.95


def test_where_noise_of_single_cells_dominates_the_interval_is_wide_never_narrow():
    assert coverage(3, 100, of_seed=0.0, of_user=0.0, of_cell=1.0) >= 0.95


def test_one_seed_is_students_interval_over_users():
    column = np.random.default_rng(0).normal(0.1, 1, 200)
    found = over_seeds_and_users([column], resamples=20_000, seed=0)
    expected = stats.t.interval(0.95, 199, column.mean(), stats.sem(column, ddof=0))
    assert (found.low, found.high) == pytest.approx(expected, abs=2e-3)
    assert found.freedom == pytest.approx(199)
    assert found.p_value == pytest.approx(stats.ttest_1samp(column, 0).pvalue, abs=0.01)


def test_seeds_that_are_constant_over_users_give_students_interval_over_seeds():
    means = np.array([0.2, 0.5, 0.3])
    found = over_seeds_and_users(np.repeat(means[:, None], 50, axis=1), resamples=50, seed=0)
    expected = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.freedom == pytest.approx(2)
    assert found.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


def test_the_interval_of_a_rate_is_cut_at_its_bounds_and_constants_have_none():
    columns = [np.r_[1.0, np.zeros(9)], np.r_[np.ones(9), 0.0]]
    free = over_seeds_and_users(columns, resamples=200, seed=0)
    cut = over_seeds_and_users(columns, resamples=200, seed=0, bounds=(0.0, 1.0))
    assert free.low < 0 < 1 < free.high
    assert (cut.low, cut.high) == (0.0, 1.0)
    assert over_seeds_and_users([np.full(7, 0.1)] * 3, resamples=9, seed=0)[1:4] == pytest.approx((0.1, 0.1, 0))
    assert over_seeds_and_users([np.zeros(7)] * 3, resamples=9, seed=0)[:4] == (0, 0, 0, 1)


def test_one_user_has_no_interval_and_unequal_columns_are_refused():
    assert np.isnan(over_seeds_and_users([np.ones(1)] * 2, resamples=9, seed=0)[1:5]).all()
    with pytest.raises(InputError, match=r"lengths \[2, 3\]"):
        over_seeds_and_users([np.ones(2), np.ones(3)], resamples=9, seed=0)
