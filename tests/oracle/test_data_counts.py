"""Counts of the real data sets that the evaluation and AgentCF++ specifications state."""

import numpy as np
import pytest

from recollect.data import (
    agentcf_candidates,
    describe,
    fingerprint,
    history_bounds,
    k_core,
    leave_one_out,
    load_dataset,
    tied_event_share,
    tied_target_share,
)
from recollect.errors import DataError


@pytest.fixture
def searched(shared_data, monkeypatch):
    monkeypatch.setenv("RECOLLECT_DATA", str(shared_data))
    return shared_data


def sizes(dataset):
    return dataset.n_users, dataset.n_items, len(dataset.interactions)


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("ml-100k", 5, (943, 1_349, 99_287)),
        ("ml-100k", 10, (943, 1_152, 97_953)),
        ("ml-1m", 5, (6_040, 3_416, 999_611)),
        ("amazon-beauty", 5, (22_363, 12_101, 198_502)),
    ],
)
def test_core_counts(searched, name, k, expected):
    assert sizes(k_core(load_dataset(name), k)) == expected


def test_ml_100k_ties(searched):
    dataset = load_dataset("ml-100k")
    split = leave_one_out(dataset)
    assert round(tied_event_share(dataset), 3) == 0.758
    assert round(tied_target_share(dataset, split) * len(split.test_row)) == 415
    assert len(split.test_row) == 943


def test_item_numbers_reproduce_the_list_metrics_of_ml_100k(searched):
    """Markov1 lists are cut by item index among many ties, so coverage and Gini pin the numbering of the items."""
    dataset = k_core(load_dataset("ml-100k"), 5)
    log, split = dataset.interactions, leave_one_out(dataset)
    counts = np.zeros((dataset.n_items, dataset.n_items), dtype=np.int64)
    pair = np.flatnonzero((log.user[1:] == log.user[:-1]) & split.train[1:] & split.train[:-1])
    np.add.at(counts, (log.item[pair], log.item[pair + 1]), 1)
    recommended = np.zeros(dataset.n_items, dtype=np.int64)
    for start, end in zip(*history_bounds(dataset, split), strict=True):
        scores = counts[log.item[end - 1]].astype(float)
        scores[log.item[start:end]] = -np.inf
        np.add.at(recommended, np.argsort(-scores, kind="stable")[:10], 1)
    ascending, n = np.sort(recommended), dataset.n_items
    gini = ((2 * np.arange(1, n + 1) - n - 1) * ascending).sum() / (n * ascending.sum())
    assert round((recommended > 0).mean(), 5) == 0.66864
    assert round(gini, 5) == 0.73214


@pytest.mark.parametrize(
    ("name", "expected", "domains", "clock"),
    [
        ("ml-100k", (943, 1_682, 100_000), ("movies",), "unix"),
        ("ml-1m", (6_040, 3_883, 999_611), ("movies",), "position"),
        ("amazon-beauty", (22_363, 12_101, 198_502), ("beauty",), "position"),
        ("amazon-scientific", (8_317, 4_344, 58_492), ("scientific",), "position"),
        ("amazon-arts-office", (9_577, 38_396, 208_541), ("arts", "office"), "position"),
        ("agentcf-cds-dense", (100, 269, 800), ("cds",), "position"),
        ("agentcf-cds-sparse", (100, 704, 800), ("cds",), "position"),
        ("amazon-grocery", (14_681, 8_713, 121_892), ("grocery",), "unix"),
        ("book-crossing", (2_946, 17_384, 272_678), ("books",), "position"),
        ("steam", (12_393, 5_155, 129_511), ("games",), "position"),
    ],
)
def test_registered_sets_load_whole(searched, name, expected, domains, clock):
    dataset = load_dataset(name)
    assert (sizes(dataset), dataset.domains, dataset.clock) == (expected, domains, clock)
    log = dataset.interactions
    assert (np.lexsort((log.row, log.time, log.user)) == np.arange(len(log))).all()


def test_known_facts_of_single_sets(searched):
    movies = load_dataset("ml-100k")
    first = int(np.flatnonzero(movies.catalog.item_ids == "1")[0])
    assert movies.catalog.titles[first] == "Toy Story"
    assert movies.catalog.categories[first] == ("Animation", "Children's", "Comedy")
    assert movies.users.attributes["occupation"][0] == "technician"
    assert describe(movies)["ratings"] == {"1": 6110, "2": 11370, "3": 27145, "4": 34174, "5": 21201, "missing": 0}
    books = load_dataset("book-crossing")
    assert int((~np.isnan(books.interactions.rating)).sum()) == 62_656
    games = load_dataset("steam")
    assert int((~np.isnan(games.interactions.context["hours"])).sum()) >= 70_477
    science = load_dataset("amazon-scientific")
    assert sum(text is not None and text != "" for text in science.catalog.texts) == 4_221
    assert describe(load_dataset("amazon-beauty"))["warnings"] == ["1 of 12101 items have an empty title"]


def test_both_final_targets_of_a_cross_domain_user_share_the_last_position(searched):
    dataset = load_dataset("amazon-arts-office")
    log = dataset.interactions
    last = np.flatnonzero(np.r_[log.user[1:] != log.user[:-1], True])
    assert (log.time[last] == log.time[last - 1]).all()
    assert (log.row[last] == log.row[last - 1] + 1).all()
    splits, counts = np.unique(dataset.users.attributes["split"].astype(str), return_counts=True)
    assert dict(zip(splits, counts, strict=True)) == {"test": 1_000, "train": 8_000, "valid": 577}
    assert [dataset.catalog.item_ids[item] for item in log.item[:4]] == ["0", "28442", "1", "22560"]


@pytest.mark.parametrize(("which", "visited", "never_in_training"), [("dense", 26, None), ("sparse", None, 91)])
def test_agentcf_candidates_follow_the_published_rule(searched, which, visited, never_in_training):
    dataset = load_dataset(f"agentcf-cds-{which}")
    lists = agentcf_candidates(searched / "recsys" / "agentcf_cds", which)
    log, ids = dataset.interactions, dataset.catalog.item_ids
    history = {user: [] for user in dataset.users.user_ids}
    for user, item in zip(log.user, log.item, strict=True):
        history[dataset.users.user_ids[user]].append(ids[item])
    assert len(lists) == 100
    for user, candidates in lists.items():
        assert len(candidates) == 10
        assert candidates[-1] == history[user][-1]
        assert candidates[-1] not in candidates[:-1]
        assert set(candidates) <= set(ids)
    if visited is not None:
        met = sum(item in history[user][:-1] for user, candidates in lists.items() for item in candidates[:-1])
        assert met == visited
    if never_in_training is not None:  # "training" = the seven history items of all users
        seen = {item for events in history.values() for item in events[:-1]}
        assert sum(candidates[-1] not in seen for candidates in lists.values()) == never_in_training


def test_the_goodbooks_catalogue_alone_is_refused_clearly(searched):
    with pytest.raises(DataError, match=r"ratings\.csv"):
        load_dataset("goodbooks-10k")


def test_fingerprint_of_ml_100k_equals_its_definition(searched):
    import hashlib

    dataset = load_dataset("ml-100k")
    log = dataset.interactions
    user_ids, item_ids = dataset.users.user_ids, dataset.catalog.item_ids
    triples = sorted(
        (user_ids[user], item_ids[item], int(time))
        for user, item, time in zip(log.user, log.item, log.time, strict=True)
    )
    text = "".join(f"{user}\t{item}\t{time}\n" for user, item, time in triples)
    assert fingerprint(dataset) == hashlib.sha256(text.encode()).hexdigest()
