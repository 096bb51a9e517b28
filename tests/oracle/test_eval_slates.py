"""Slates and null scorers on synthetic logs: what negatives may be, and that matching silences the null scorers."""

import numpy as np
import pytest

from recollect.errors import ConfigError, InputError
from recollect.eval.null_scorers import audit, null_scores
from recollect.eval.slates import sample_slates
from recollect.rng import stream
from recollect.types import Catalog, Dataset, Interactions, Users


def popular_world(
    n_users: int = 400, n_items: int = 1200, per_user: int = 12, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """Users who buy by popularity alone (Zipf), in two domains; the last two events of each are held out."""
    generator = stream(seed, "popular-world")
    domain = (np.arange(n_items) % 2).astype(np.int16)
    weight = 1.0 / np.arange(1, n_items + 1) ** 0.8
    items = np.stack(
        [generator.choice(n_items, size=per_user, replace=False, p=weight / weight.sum()) for _ in range(n_users)]
    )
    user = np.repeat(np.arange(n_users), per_user)
    log = Interactions(user=user, item=items.ravel(), time=np.tile(np.arange(per_user), n_users))
    train = np.tile(np.arange(per_user) < per_user - 2, n_users)
    catalog = Catalog(
        item_ids=np.array([f"i{i}" for i in range(n_items)], dtype=object),
        titles=np.array([f"word{generator.integers(10, 60)} item{i:05d}" for i in range(n_items)], dtype=object),
        domain=domain,
        categories=[(f"kind{i % 7}",) for i in range(n_items)],
        texts=np.full(n_items, None, dtype=object),
    )
    users = Users(np.array([f"u{u}" for u in range(n_users)], dtype=object))
    return Dataset("popular", log, catalog, users, ("even", "odd")), train


@pytest.fixture(scope="module")
def world() -> tuple[Dataset, np.ndarray]:
    return popular_world()


def slates_of(dataset: Dataset, train: np.ndarray, rows: np.ndarray | None = None, **options):
    rows = np.flatnonzero(~train) if rows is None else rows
    options = {"seed": 1, "train_rows": train, "domains": dataset.domains, **options}
    return sample_slates(dataset.interactions, dataset.n_items, dataset.catalog.domain, rows, **options)


@pytest.mark.parametrize("matching", ["matched", "uniform"])
def test_negatives_are_distinct_untouched_and_of_the_same_domain(world, matching):
    dataset, train = world
    slates = slates_of(dataset, train, matching=matching)
    log, domain = dataset.interactions, dataset.catalog.domain
    np.testing.assert_array_equal(slates.positive, log.item[slates.row])
    assert (domain[slates.candidates] == slates.domain[:, None]).all()
    assert all(len(set(row)) == slates.size for row in slates.candidates.tolist())
    for case in range(len(slates)):
        touched = set(log.item[log.user == slates.user[case]].tolist())
        assert set(slates.candidates[case].tolist()) & touched == {int(slates.positive[case])}


def test_matched_negatives_are_seen_exactly_where_the_positive_is(world):
    dataset, train = world
    slates = slates_of(dataset, train)
    popularity = np.bincount(dataset.interactions.item[train], minlength=dataset.n_items)
    strict = ~slates.relaxed
    assert strict.mean() > 0.95
    seen = popularity[slates.candidates[strict]] > 0
    assert (seen == seen[:, :1]).all()


def test_matching_silences_every_scorer_that_should_know_nothing(world):
    dataset, train = world
    slates = slates_of(dataset, train)
    scores = null_scores(slates, dataset, train_rows=train, seed=1)
    assert [finding.text for finding in audit(scores, slates)] == []


def test_a_trivial_gap_of_a_scorer_that_nearly_always_ties_is_no_finding(world):
    dataset, train = world
    slates = slates_of(dataset, train)
    scores = np.zeros(slates.candidates.shape)
    scores[0, slates.target[0]] = scores[1, slates.target[1]] = 1.0
    assert audit({"seen-first": scores}, slates) == []


def test_uniform_negatives_are_caught_by_the_audit(world):
    dataset, train = world
    slates = slates_of(dataset, train, matching="uniform")
    found = {finding.scorer for finding in audit(null_scores(slates, dataset, train_rows=train, seed=1), slates)}
    assert {"popularity", "anti-popularity", "seen-first"} <= found
    assert not found & {"random", "candidate-position"}


def test_a_case_is_drawn_alike_alone_and_among_others(world):
    dataset, train = world
    together = slates_of(dataset, train)
    alone = slates_of(dataset, train, rows=together.row[[17]])
    np.testing.assert_array_equal(alone.candidates[0], together.candidates[17])
    assert (slates_of(dataset, train, seed=2).candidates != together.candidates).any()


def test_position_of_the_positive_is_uniform(world):
    from scipy.stats import chisquare

    dataset, train = world
    assert chisquare(np.bincount(slates_of(dataset, train).target, minlength=10)).pvalue > 0.001


def test_small_domain_is_refused_by_name_and_sizes():
    dataset, train = popular_world(n_users=3, n_items=16, per_user=3)
    with pytest.raises(
        InputError, match=r"domain '(even|odd)' has 8 items, of which user \d left \d untouched; a slate"
    ):
        slates_of(dataset, train, size=10)


def test_scarce_kin_falls_back_to_strangers_and_says_so():
    dataset, train = popular_world(n_users=60, n_items=40, per_user=6)
    slates = slates_of(dataset, train, size=8)
    popularity = np.bincount(dataset.interactions.item[train], minlength=dataset.n_items)
    seen = popularity[slates.candidates] > 0
    np.testing.assert_array_equal(slates.relaxed, (seen != (popularity[slates.positive] > 0)[:, None]).any(axis=1))


def test_unknown_matching_and_tiny_slates_are_refused(world):
    dataset, train = world
    with pytest.raises(ConfigError, match="matching must be 'matched' or 'uniform', got 'close'"):
        slates_of(dataset, train, matching="close")
    with pytest.raises(ConfigError, match="at least 2 candidates, got 1"):
        slates_of(dataset, train, size=1)


def test_case_rows_among_training_rows_are_refused(world):
    dataset, train = world
    slates = slates_of(dataset, train)
    with pytest.raises(InputError, match="800 of 800 case rows are training rows"):
        null_scores(slates, dataset, train_rows=np.ones(len(train), dtype=bool), seed=0)


def test_a_history_that_reaches_the_future_is_refused(world):
    dataset, train = world
    slates = slates_of(dataset, train)
    histories = [np.array([row]) for row in slates.row]
    with pytest.raises(InputError, match="not earlier or not its user's"):
        null_scores(slates, dataset, histories, train_rows=train, seed=0)


def test_later_events_change_no_null_score(world):
    dataset, train = world
    rows = np.flatnonzero(~train)[::2]  # the first of the two held-out events
    slates = slates_of(dataset, train, rows=rows)
    before = null_scores(slates, dataset, train_rows=train, seed=1)
    log = dataset.interactions
    item = log.item.copy()
    item[rows + 1] = stream(9, "future").permutation(item[rows + 1])
    changed = Dataset(
        dataset.name, Interactions(log.user, item, log.time), dataset.catalog, dataset.users, dataset.domains
    )
    after = null_scores(slates, changed, train_rows=train, seed=1)
    for name, scores in before.items():
        np.testing.assert_array_equal(scores, after[name], err_msg=name)


def test_factorisation_gives_cold_items_zero_and_finds_planted_groups():
    generator = stream(3, "groups")
    n_users, n_items = 120, 60
    group = np.arange(n_users) % 2
    user = np.repeat(np.arange(n_users), 8)
    own = generator.integers(0, 25, size=len(user)) * 2 + group[user]  # items 50..59 stay cold
    from recollect.eval.factorisation import implicit_factors

    of_user, of_item = implicit_factors(user, own, n_users, n_items, seed=0)
    assert (of_item[50:] == 0).all()
    scores = of_user @ of_item[:50].T
    same = (np.arange(50) % 2)[None, :] == group[:, None]
    assert scores[same].mean() > 10 * abs(scores[~same].mean())
    again = implicit_factors(user, own, n_users, n_items, seed=0)
    np.testing.assert_array_equal(again[1], of_item)


def test_optional_scorers_appear_when_their_arrays_are_given(world):
    dataset, train = world
    slates = slates_of(dataset, train).take(np.arange(20))
    vectors = stream(4, "vectors").normal(size=(dataset.n_items, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    length = np.ones(slates.candidates.shape)
    scores = null_scores(
        slates, dataset, train_rows=train, seed=0, memory_length=length, item_vectors=vectors, with_text=True
    )
    assert {"memory-length", "minilm-history"} <= set(scores)
    assert all(table.shape == slates.candidates.shape for table in scores.values())
