"""Filters against brute force on random bipartite graphs."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.data import deduplicate, drop_consecutive_repeats, fingerprint, k_core, min_counts
from recollect.errors import ConfigError, DataError
from recollect.types import Catalog, Dataset, Interactions, Users


def objects(values):
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result


def dataset_of(events):
    """A data set of (user, item, time) triples with ids u0, i0, …; every number below the maximum exists."""
    events = sorted((user, time, row, item) for row, (user, item, time) in enumerate(events))
    user, time, row, item = (np.array(column, dtype=np.int64) for column in zip(*events, strict=True))
    n_users, n_items = int(user.max()) + 1, int(item.max()) + 1
    catalog = Catalog(
        item_ids=objects([f"i{number}" for number in range(n_items)]),
        titles=objects([f"title {number}" for number in range(n_items)]),
        domain=np.zeros(n_items, dtype=np.int16),
        categories=tuple((f"category {number}",) for number in range(n_items)),
        texts=objects([None] * n_items),
        extra={"number": np.arange(n_items)},
    )
    users = Users(objects([f"u{number}" for number in range(n_users)]), {"number": np.arange(n_users)})
    log = Interactions(user, item, time, domain=np.zeros(len(user), dtype=np.int16), row=row)
    return Dataset("random", log, catalog, users, ("things",), {"clock": "unix"})


EVENTS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=60)


def ids(dataset):
    log = dataset.interactions
    return [
        (dataset.users.user_ids[user], dataset.catalog.item_ids[item], int(time))
        for user, item, time in zip(log.user, log.item, log.time, strict=True)
    ]


def brute_force_core(triples, k, generator):
    """Drop one deficient user or item at a time, in random order."""
    triples = list(triples)
    while True:
        short = []
        for side in (0, 1):
            names = {triple[side] for triple in triples}
            short += [(side, n) for n in sorted(names) if sum(triple[side] == n for triple in triples) < k]
        if not short:
            return triples
        side, name = generator.choice(short)
        triples = [triple for triple in triples if triple[side] != name]


@settings(max_examples=120, deadline=None)
@given(events=EVENTS, k=st.integers(1, 4), seed=st.integers(0, 10))
def test_core_is_the_fixed_point_whatever_the_order_of_dropping(events, k, seed):
    dataset = dataset_of(events)
    expected = sorted(brute_force_core(ids(dataset), k, random.Random(seed)))
    if not expected:
        with pytest.raises(DataError, match="leaves nothing"):
            k_core(dataset, k)
        return
    core = k_core(dataset, k)
    assert sorted(ids(core)) == expected
    assert np.bincount(core.interactions.user, minlength=core.n_users).min() >= k
    assert np.bincount(core.interactions.item, minlength=core.n_items).min() >= k


@settings(max_examples=80, deadline=None)
@given(events=EVENTS, k=st.integers(1, 3))
def test_filtered_ids_are_dense_and_agree_with_catalogue_and_users(events, k):
    try:
        core = k_core(dataset_of(events), k)
    except DataError:
        return
    log = core.interactions
    assert sorted(set(log.user.tolist())) == list(range(core.n_users))
    assert sorted(set(log.item.tolist())) == list(range(core.n_items))
    for number, item_id in enumerate(core.catalog.item_ids):
        original = int(item_id[1:])
        assert core.catalog.titles[number] == f"title {original}"
        assert core.catalog.categories[number] == (f"category {original}",)
        assert core.catalog.extra["number"][number] == original
    assert [f"u{number}" for number in core.users.attributes["number"]] == core.users.user_ids.tolist()
    order = np.lexsort((log.row, log.time, log.user))
    assert (order == np.arange(len(log))).all()
    by_time = log.item[np.lexsort((log.row, log.time))]
    first = np.sort(np.unique(by_time, return_index=True)[1])
    assert by_time[first].tolist() == list(range(core.n_items))  # numbered by first appearance in (time, row)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_duplicates_keep_the_first_or_the_last_event_of_each_pair(events):
    dataset = dataset_of(events)
    triples = ids(dataset)
    first, last = {}, {}
    for user, item, time in triples:
        first.setdefault((user, item), time)
        last[user, item] = time
    assert deduplicate(dataset, "all") is dataset
    assert sorted(ids(deduplicate(dataset, "first"))) == sorted((*pair, time) for pair, time in first.items())
    assert sorted(ids(deduplicate(dataset, "last"))) == sorted((*pair, time) for pair, time in last.items())


def test_one_pass_counts_are_not_iterated():
    # u1's only item falls with i1, yet u1 stays counted on the log as given
    dataset = dataset_of([(0, 0, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0), (2, 2, 0)])
    kept = min_counts(dataset, min_user=1, min_item=2)
    assert sorted(ids(kept)) == [("u0", "i0", 0), ("u0", "i1", 1), ("u0", "i1", 2), ("u1", "i0", 0)]
    both = min_counts(dataset, min_user=2, min_item=2)
    assert sorted(ids(both)) == [("u0", "i0", 0), ("u0", "i1", 1), ("u0", "i1", 2)]  # i0 has one event left and stays


def test_only_consecutive_repeats_go():
    dataset = dataset_of([(0, 1, 0), (0, 1, 1), (0, 2, 2), (0, 1, 3), (1, 1, 4)])
    assert ids(drop_consecutive_repeats(dataset)) == [
        ("u0", "i1", 0),
        ("u0", "i2", 2),
        ("u0", "i1", 3),
        ("u1", "i1", 4),
    ]


def test_filters_are_part_of_the_fingerprint():
    dataset = dataset_of([(user, item, user + item) for user in range(3) for item in range(3)])
    core = k_core(dataset, 2)
    assert ids(core) == ids(dataset)
    assert core.meta["rules"] == ["k_core(2)"]
    prints = {fingerprint(dataset), fingerprint(core), fingerprint(k_core(dataset, 3))}
    assert len(prints) == 3


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_core_below_one_is_refused(wrong):
    with pytest.raises(ConfigError, match="at least 1"):
        k_core(dataset_of([(0, 0, 0)]), wrong)
