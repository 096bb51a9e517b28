"""Bootstrap coverage, permutation p-values, Holm, and sameness of resampling."""

import math

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.eval.statistics import (
    bootstrap_ratios,
    bootstrap_statistic,
    bootstrap_two_histograms,
    cluster_bootstrap,
    clustered_standard_error,
    entry,
    holm,
    paired_difference,
    resample_weights,
)
from recollect.rng import stream


def users_with_habits(generator: np.random.Generator, n_users: int, per_user: int, shift: float = 0.0):
    """Values with a user effect as large as the noise, so that rows of a user move together."""
    users = np.repeat(np.arange(n_users), per_user)
    return shift + generator.normal(size=n_users)[users] + generator.normal(size=len(users)), users


def test_bootstrap_covers_in_93_to_97_percent_of_synthetic_logs():
    covered = plain = 0
    repetitions = 1000
    for repetition in range(repetitions):
        values, users = users_with_habits(stream(repetition, "coverage"), 80, 5, shift=0.3)
        interval = cluster_bootstrap(values, users, n=500, seed=repetition)
        covered += interval.low <= 0.3 <= interval.high
        naive = 1.96 * values.std() / math.sqrt(len(values))
        plain += abs(values.mean() - 0.3) <= naive
    assert 0.93 <= covered / repetitions <= 0.97
    assert plain / repetitions < 0.85, "an interval that ignores users must be seen to fail on these logs"


def test_permutation_p_values_are_uniform_under_the_null():
    from scipy.stats import kstest

    p_values = []
    for repetition in range(400):
        generator = stream(repetition, "null")
        a, users = users_with_habits(generator, 40, 3)
        b = a + users_with_habits(generator, 40, 3)[0]
        result = paired_difference(a, b, users, n=10, permutations=999, seed=repetition)
        p_values.append(result.p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_a_real_difference_is_found_and_its_users_counted():
    generator = stream(1, "difference")
    b, users = users_with_habits(generator, 60, 4)
    a = b + np.where(users < 50, 0.5 + 0.1 * generator.normal(size=len(b)), 0.0)
    result = paired_difference(a, b, users, seed=0)
    assert result.difference.low > 0.3
    assert result.p_value == pytest.approx(1 / 10_001)
    assert result.n_changed == 50


def test_equal_systems_have_p_one_and_difference_zero():
    values, users = users_with_habits(stream(2, "equal"), 20, 3)
    result = paired_difference(values, values, users, seed=0)
    assert (result.difference.value, result.p_value, result.n_changed) == (0.0, 1.0, 0)


def test_paired_test_agrees_with_the_paired_t_test_for_large_logs():
    from scipy.stats import ttest_rel

    generator = stream(3, "t")
    a = generator.normal(size=600)
    b = a + generator.normal(0.06, 1.0, size=600)
    ours = paired_difference(a, b, np.arange(600), n=10, seed=0).p_value
    assert ours == pytest.approx(ttest_rel(a, b).pvalue, abs=0.02)


def test_holm_worked_example_and_order():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.9])), [1.0, 1.0])


def test_chunking_does_not_change_the_draws():
    whole = np.concatenate(list(resample_weights(7, 50, 3)))
    pieces = np.concatenate(list(resample_weights(7, 50, 3, chunk=9)))
    np.testing.assert_array_equal(whole, pieces)
    np.testing.assert_array_equal(whole.sum(axis=1), 7)


def test_fast_paths_equal_the_bootstrap_of_an_arbitrary_statistic():
    generator = stream(4, "paths")
    values, users = users_with_habits(generator, 30, 4)
    slow = bootstrap_statistic(lambda w: float(np.average(values, weights=w)), users, n=200, seed=9)
    assert cluster_bootstrap(values, users, n=200, seed=9) == pytest.approx(slow)
    codes = generator.integers(0, 3, size=len(users))
    fast = bootstrap_two_histograms(
        {"share": lambda p, _: p[..., 0] / p.sum(axis=-1)},
        (codes, users),
        (codes, users),
        3,
        paired=True,
        n=200,
        seed=9,
    )["share"]
    slow = cluster_bootstrap(codes == 0, users, n=200, seed=9)
    assert (fast.value, fast.n) == (pytest.approx(slow.value), slow.n)
    assert fast.high - fast.low == pytest.approx(slow.high - slow.low)  # the same draws, moved onto the value
    assert fast.low == pytest.approx(slow.low, abs=0.02)


def test_the_interval_of_a_distance_holds_its_value_and_stays_above_zero():
    generator = stream(5, "distance")
    users = np.repeat(np.arange(40), 5)
    first, second = generator.integers(0, 12, size=(2, len(users)))  # equal truth: every resample is further apart
    distance = bootstrap_two_histograms(
        {"tv": lambda p, q: 0.5 * np.abs(p / p.sum(-1, keepdims=True) - q / q.sum(-1, keepdims=True)).sum(-1)},
        (first, users),
        (second, users),
        12,
        n=500,
        seed=0,
    )["tv"]
    assert 0 <= distance.low < distance.value < distance.high


def test_relabelling_or_reordering_rows_keeps_value_and_interval():
    values, users = users_with_habits(stream(5, "order"), 25, 4)
    order = stream(6, "order").permutation(len(values))
    before = cluster_bootstrap(values, users, n=300, seed=1)
    assert cluster_bootstrap(values[order], users[order], n=300, seed=1) == pytest.approx(before)
    assert cluster_bootstrap(values, np.array([f"u{u:03d}" for u in users]), n=300, seed=1) == pytest.approx(before)


def test_clustered_standard_error_matches_the_bootstrap():
    values, users = users_with_habits(stream(7, "error"), 200, 5)
    interval = cluster_bootstrap(values, users, seed=0)
    assert clustered_standard_error(values, users) == pytest.approx((interval.high - interval.low) / 3.92, rel=0.06)


def test_undefined_numbers_become_null_in_a_report():
    assert entry(cluster_bootstrap(np.array([1.0, 0.0]), np.array([4, 4]), seed=0)) == {
        "value": 0.5,
        "ci95": [None, None],
        "n": 2,
    }
    empty = bootstrap_ratios({"x": (np.zeros(3), np.zeros(3))}, np.arange(3), n=10, seed=0)["x"]
    assert entry(empty) == {"value": None, "ci95": [None, None], "n": 0}


def test_not_a_number_is_refused_not_averaged():
    with pytest.raises(InputError, match="1 values that are not finite"):
        cluster_bootstrap(np.array([1.0, np.nan]), np.array([0, 1]), seed=0)
