"""Interest groups and their shared memory against slow, obvious versions of themselves (oracle 7)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from support.agent_worlds import tiny_dataset

from recollect.agents.groups import (
    Group,
    GroupViews,
    build_groups,
    cluster_count,
    cluster_vectors,
    dump_groups,
    groups_of_histories,
    load_groups,
    rank_clusters,
)
from recollect.agents.population import in_time_order
from recollect.backbones.scripted import hashed_words

TAGS = ["sea", "sea stories", "dark films", "dark", "cosy mugs", "cosy", "trains", "old trains", "music", "choir music"]


def unit(text):
    vector = hashed_words(text)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


tags_of_users = st.dictionaries(
    st.integers(0, 12), st.lists(st.sampled_from(TAGS), min_size=1, max_size=5, unique=True), min_size=2, max_size=10
)


@pytest.mark.parametrize("seed", range(5))
def test_labels_equal_those_of_scikit_learn(seed):
    vectors = np.random.default_rng(seed).normal(size=(60, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = KMeans(n_clusters=7, n_init=4, random_state=seed).fit(vectors).labels_
    assert np.array_equal(cluster_vectors(vectors, 7, seed), expected)


def test_there_are_a_quarter_as_many_clusters_as_distinct_tags_within_bounds():
    assert [cluster_count(n, 384) for n in (1, 4, 5, 400, 1536, 5000)] == [1, 1, 2, 100, 384, 384]


@settings(max_examples=30, deadline=None)
@given(tags_of_users, st.integers(0, 3), st.sampled_from(["coverage", "occurrences"]))
def test_users_with_the_same_tags_are_in_the_same_groups(tags, seed, by):
    vectors = {tag: unit(tag) for tag in TAGS}
    twin = max(tags) + 1
    tags[twin] = list(tags[min(tags)])
    groups = build_groups(tags, vectors, kept=10, most_clusters=4, by=by, seed=seed)
    for group in groups:
        assert (twin in group.members) == (min(tags) in group.members)
        for member in group.members:
            assert set(tags[member]) & set(group.tags)
        for tag in group.tags:  # every owner of a tag of the group is a member
            assert {user for user, owned in tags.items() if tag in owned} <= set(group.members)


@settings(max_examples=30, deadline=None)
@given(tags_of_users, st.integers(0, 3))
def test_groups_do_not_depend_on_the_order_in_which_users_come(tags, seed):
    vectors = {tag: unit(tag) for tag in TAGS}
    options = {"kept": 5, "most_clusters": 4, "by": "coverage", "seed": seed}
    backwards = dict(reversed(list(tags.items())))
    assert build_groups(tags, vectors, **options) == build_groups(backwards, vectors, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 8), st.sets(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=9),
    st.sampled_from(["coverage", "occurrences"]),
)
def test_coverage_never_falls_with_the_number_of_groups_kept(members, by):
    occurrences = {label: len(who) + label % 3 for label, who in members.items()}
    covered = [
        len({user for label in rank_clusters(members, occurrences, kept, by) for user in members[label]})
        for kept in range(1, 10)
    ]
    assert covered == sorted(covered)
    longest = rank_clusters(members, occurrences, 9, by)
    assert all(longest[:kept] == rank_clusters(members, occurrences, kept, by) for kept in range(1, 9))
    assert all(len(members[label]) >= 2 for label in longest)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 8), st.sets(st.integers(0, 12), min_size=2, max_size=6), min_size=2, max_size=9))
def test_the_first_group_kept_by_coverage_is_the_largest_of_at_most_half_of_the_users(members):
    occurrences = {label: len(who) for label, who in members.items()}
    (first,) = rank_clusters(members, occurrences, 1, "coverage")
    half = len(set().union(*members.values())) / 2
    communities = [len(who) for who in members.values() if len(who) <= half]
    assert len(members[first]) == max(communities or [len(who) for who in members.values()])


def test_a_cluster_of_nearly_everybody_comes_after_the_communities():
    members = {0: set(range(9)), 1: {0, 1, 2}, 2: {5, 6}}
    occurrences = {label: len(who) for label, who in members.items()}
    assert rank_clusters(members, occurrences, 3, "coverage") == [1, 2, 0]
    assert rank_clusters(members, occurrences, 3, "occurrences") == [0, 1, 2]


def test_by_occurrences_ranks_by_user_tag_pairs_not_by_users():
    members = {0: {1, 2, 3}, 1: {1, 2}}
    assert rank_clusters(members, {0: 3, 1: 5}, 2, "occurrences") == [1, 0]
    assert rank_clusters(members, {0: 3, 1: 5}, 2, "coverage") == [0, 1]


def test_groups_survive_a_round_trip_as_text():
    groups = [Group('the "sea"', ("sea", "mer é"), (1, 5)), Group("x", (), (0, 2))]
    assert load_groups(dump_groups(groups)) == groups


def test_histories_split_users_into_groups_that_cover_everybody_once():
    rng = np.random.default_rng(0)
    vectors = {user: rng.normal(size=8) for user in range(20)}
    groups = groups_of_histories(vectors, kept=5, seed=0)
    assert sorted(member for group in groups for member in group.members) == list(range(20))


# ---- views -------------------------------------------------------------------------------------------------------


events = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=60)


def made(listed):
    items = [(f"i{at}", f"Title {at}", f"domain{at % 2}", (), None) for at in range(10)]
    users = sorted({user for user, _, _ in listed})
    dataset = tiny_dataset([(f"u{user}", f"i{item}", time) for user, item, time in listed], items)
    rows = in_time_order(dataset, np.arange(len(dataset.interactions)))
    return dataset, GroupViews(dataset.interactions, rows, 2), len(users)


def brute_force(dataset, members, domain, now, user):
    """Rows of other members in the domain before now, oldest first, by a loop over the whole log."""
    log = dataset.interactions
    order = sorted(range(len(log)), key=lambda row: (log.time[row], log.user[row], row))
    return [
        row
        for row in order
        if log.user[row] in members and log.user[row] != user and log.domain[row] == domain and log.time[row] < now
    ]


@settings(max_examples=150, deadline=None)
@given(events, st.sets(st.integers(0, 5)), st.integers(0, 1), st.integers(-1, 32), st.integers(0, 5), st.integers(1, 7))
def test_a_view_equals_a_filter_over_the_whole_log(listed, members, domain, now, user, count):
    dataset, views, n_users = made(listed)
    members = tuple(sorted(member for member in members if member < n_users))
    rows = brute_force(dataset, members, domain, now, user)
    found = views.recent(Group("g", (), members), domain, now, user, count)
    assert found.tolist() == dataset.interactions.item[rows[-count:]].tolist()


def weighted(dataset, rows):
    """{item: sum of 2^(-age/50)}, the last row of age 0."""
    counts = {}
    for age, row in enumerate(reversed(rows)):
        item = int(dataset.interactions.item[row])
        counts[item] = counts.get(item, 0.0) + 2.0 ** (-age / 50.0)
    return counts


@settings(max_examples=100, deadline=None)
@given(
    events,
    st.lists(st.sets(st.integers(0, 5)), max_size=3),
    st.integers(0, 1),
    st.integers(-1, 32),
    st.integers(0, 5),
)
def test_popularity_in_groups_is_the_mean_of_their_memories_in_inverse_proportion_to_size(
    listed, drawn, domain, now, user
):
    dataset, views, n_users = made(listed)
    groups = [Group("g", (), tuple(sorted(member for member in members if member < n_users))) for members in drawn]
    held = [group for group in groups if group.members]
    expected = {}
    for group in held:
        share = (1 / len(group.members)) / sum(1 / len(other.members) for other in held)
        for item, count in weighted(dataset, brute_force(dataset, group.members, domain, now, user)).items():
            expected[item] = expected.get(item, 0.0) + share * count
    assert views.popularity(groups, domain, now, user) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(events, st.sets(st.integers(0, 5)), st.integers(0, 1), st.integers(-1, 32), st.integers(0, 5))
def test_a_group_that_is_listed_twice_says_no_more_than_once(listed, members, domain, now, user):
    _, views, n_users = made(listed)
    group = Group("g", (), tuple(sorted(member for member in members if member < n_users)))
    once = views.popularity([group], domain, now, user)
    assert views.popularity([group, group], domain, now, user) == pytest.approx(once)


@settings(max_examples=100, deadline=None)
@given(events, st.integers(0, 1), st.integers(0, 32), st.integers(0, 5))
def test_an_own_or_a_future_event_never_shows(listed, domain, now, user):
    dataset, views, n_users = made(listed)
    log = dataset.interactions
    everybody = Group("all", (), tuple(range(n_users)))
    allowed = set(log.item[(log.user != user) & (log.time < now)].tolist())
    assert set(views.recent(everybody, domain, now, user, 5).tolist()) <= allowed
    assert set(views.popularity([everybody], domain, now, user)) <= allowed
    before = views.recent(everybody, domain, now, user, 5).tolist()
    kept = (log.user != user) & (log.time < now)
    rows = in_time_order(dataset, np.flatnonzero(kept))
    assert GroupViews(log, rows, 2).recent(everybody, domain, now, user, 5).tolist() == before
