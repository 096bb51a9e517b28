"""Classes of items and groups of users: closed forms, ties, invariances, and the measured figures of ML-100K."""

import math

import numpy as np
import pytest
from support.fair_worlds import long_tail_world

from recollect.errors import ConfigError, DataError, InputError
from recollect.eval.popularity_profiles import GROUPS, PopularityProfile, UserProfiles


def profile_of(counts, convention="items20"):
    return PopularityProfile.of(np.repeat(np.arange(len(counts)), counts), len(counts), convention)


@pytest.mark.parametrize("n_items", [1, 4, 5, 6, 10, 37, 100])
def test_popular_items_are_the_most_counted_fifth_rounded_up(n_items):
    counts = np.random.default_rng(n_items).integers(0, 6, n_items)
    counts[0] = 3
    profile = profile_of(counts)
    assert profile.n_popular == math.ceil(0.2 * n_items)
    lowest_popular = counts[profile.is_popular].min()
    assert (counts[~profile.is_popular] <= lowest_popular).all()
    tied = np.flatnonzero(counts == lowest_popular)  # of equal counts the lower index is popular
    assert list(profile.is_popular[tied]) == sorted(profile.is_popular[tied], reverse=True)


def test_mass80_is_the_shortest_run_that_holds_four_fifths():
    profile = profile_of([40, 30, 10, 9, 8, 3], "mass80")
    assert profile.is_popular.tolist() == [True, True, True, False, False, False]
    assert profile.popular_share == 0.8


def test_facts_of_a_small_catalogue():
    profile = profile_of([0, 0, 0, 10])
    assert profile.gini == 0.75
    assert profile.popular_share == 1.0
    assert profile.rank.tolist() == [1, 2, 3, 0]
    assert profile.percentile.tolist() == [0.75, 0.5, 0.25, 1.0]
    assert profile_of(list(range(10, 0, -1))).decile.tolist() == list(range(10, 0, -1))


def test_bands_are_a_fifth_three_fifths_a_fifth_of_the_items():
    assert np.bincount(profile_of(list(range(20, 0, -1))).band).tolist() == [4, 12, 4]


def test_groups_hold_a_fifth_three_fifths_a_fifth_of_users_without_ties():
    counts = [50] * 2 + [1] * 8
    popularity = profile_of(counts)
    histories = [np.r_[np.zeros(n, int), np.full(100 - n, 5)] for n in range(1, 51)]
    users = UserProfiles.of(popularity, histories)
    groups = [users.describe(history).group for history in histories]
    assert [groups.count(group) for group in GROUPS] == [10, 30, 10]


def test_equal_shares_are_in_one_group_and_all_equal_means_no_outer_group():
    popularity = profile_of([9, 1, 1, 1, 1])
    same = [np.array([0, 1]), np.array([0, 2]), np.array([3, 0])]
    users = UserProfiles.of(popularity, same)
    assert {users.describe(history).group for history in same} == {"balanced"}


def test_two_group_mode_splits_at_one_half():
    popularity = profile_of([9, 1, 1, 1, 1])
    users = UserProfiles.of(popularity, [np.array([0, 1])], "half")
    assert users.group_of(0.49) == "niche"
    assert users.group_of(0.5) == "mainstream"


def test_groups_do_not_change_when_items_are_relabelled():
    log = long_tail_world().interactions
    n_items = 90
    relabelled = np.random.default_rng(1).permutation(n_items)
    counts = np.bincount(log.item, minlength=n_items) * 1000 + np.arange(n_items)  # distinct: no tie to settle

    def groups(names):
        popularity = PopularityProfile.of(np.repeat(names, counts), n_items)
        histories = [names[log.item[log.user == user]] for user in range(60)]
        users = UserProfiles.of(popularity, histories)
        return [users.describe(history).group for history in histories]

    assert groups(np.arange(n_items)) == groups(relabelled)


def test_smoothing_pulls_short_histories_to_the_global_share():
    popularity = profile_of([6, 1, 1, 1, 1])
    users = UserProfiles.of(popularity, [np.array([0]), np.array([1])])
    described = users.describe(np.array([1]))
    assert described.popular_share == 0
    assert described.smoothed_share == pytest.approx((5 * 0.6 + 0) / 6)
    assert described.quota(10) == 5
    assert users.describe(np.zeros(0, int)).smoothed_share == pytest.approx(0.6)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="items20, mass80"):
        profile_of([1, 2], "half")
    with pytest.raises(DataError, match="at least one"):
        PopularityProfile.of(np.zeros(0, int), 3)
    with pytest.raises(InputError, match=r"0 and 2"):
        PopularityProfile.of(np.array([3]), 3)


def test_head_share_of_ml_100k_users_is_as_measured(shared_data, monkeypatch):
    from recollect.data import k_core, leave_one_out, load_dataset
    from recollect.data.examples import training_sequences

    monkeypatch.setenv("RECOLLECT_DATA", str(shared_data / "recsys"))
    dataset = k_core(load_dataset("ml-100k"), 5)
    split = leave_one_out(dataset)
    sequences = training_sequences(dataset, split.train)
    popularity = PopularityProfile.of(sequences.items, dataset.n_items)
    assert popularity.n_popular == 270
    shares = [popularity.is_popular[sequences[index]].mean() for index in range(len(sequences))]
    assert np.quantile(shares, [0, 0.2, 0.5, 0.8, 1]) == pytest.approx([0.21, 0.53, 0.65, 0.77, 0.96], abs=0.006)
