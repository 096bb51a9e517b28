"""Re-rankers against brute force and closed forms (fairlrm 9.11 and 6)."""

import itertools

import numpy as np
import pytest

from recollect.errors import ConfigError, InputError
from recollect.eval.class_calibration import miscalibration
from recollect.recommenders.rerank import (
    calibrated_popularity,
    divergence,
    maximal_marginal_relevance,
    order_by,
    popularity_penalty,
    quota,
    softmax_order,
    standard_relevance,
    unit_relevance,
    xquad,
)


def world(seed, users=40, candidates=12, n_classes=2):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(users, candidates))
    classes = generator.integers(n_classes, size=(users, candidates))
    target = generator.dirichlet(np.ones(n_classes), size=users)
    return scores, classes, target


def shares(classes, order, k, n_classes=2):
    taken = np.take_along_axis(classes, order, axis=1)[:, :k]
    return np.stack([(taken == value).mean(axis=1) for value in range(n_classes)], axis=1)


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_strength_zero_returns_the_ranking_given(kind):
    scores, classes, target = world(0)
    given = order_by(scores)
    counts, features = np.random.default_rng(1).integers(1, 99, (2, *scores.shape))
    for order in (
        calibrated_popularity(scores, classes, target, 0.0, kind),
        xquad(scores, classes, target, 0.0),
        popularity_penalty(scores, counts, 0.0),
        softmax_order(scores, 0.0, features.astype(np.float64)),
        maximal_marginal_relevance(scores, features[..., None] > 50, 0.0),
    ):
        assert (order == given).all()


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_full_strength_minimises_the_divergence_over_all_lists(k):
    scores, classes, target = world(2, users=30, candidates=9)
    order = calibrated_popularity(scores, classes, target, 1.0)
    found = divergence(target, shares(classes, order, k))
    for user in range(len(scores)):
        every = itertools.combinations(classes[user], k)
        best = min(float(divergence(target[user], np.bincount(chosen, minlength=2) / k)) for chosen in every)
        assert found[user] == pytest.approx(best, abs=1e-12)


def test_every_pick_is_the_best_of_what_is_left():
    scores, classes, target = world(3, users=6, candidates=8, n_classes=3)
    relevance = unit_relevance(scores)
    order = calibrated_popularity(scores, classes, target, 0.6)
    for user in range(6):
        held = np.zeros(3)
        for step, picked in enumerate(order[user]):
            left = [at for at in range(8) if at not in order[user, :step]]
            value = {
                at: 0.4 * relevance[user, at]
                - 0.6 * float(divergence(target[user], (held + np.eye(3)[classes[user, at]]) / (step + 1)))
                for at in left
            }
            assert value[picked] == pytest.approx(max(value.values()), abs=1e-12)
            held[classes[user, picked]] += 1


def test_more_calibration_means_less_miscalibration_on_average():
    scores, classes, target = world(4, users=300, candidates=20)
    levels = []
    for strength in np.linspace(0, 1, 11):
        order = calibrated_popularity(scores, classes, target, float(strength))
        running = [miscalibration(target, shares(classes, order, k)) for k in range(1, 11)]
        levels.append(float(np.mean(running)))
    assert (np.diff(levels) <= 1e-9).all()
    assert levels[-1] < 0.5 * levels[0]


@pytest.mark.parametrize("seed", range(5))
def test_quota_holds_exactly_the_wanted_number_wherever_the_set_allows(seed):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(50, 20))
    popular = generator.random((50, 20)) < 0.6
    wanted = generator.integers(0, 11, 50)
    order = quota(scores, popular, wanted, 10)
    assert (np.sort(order, axis=1) == np.arange(20)).all()
    got = np.take_along_axis(popular, order, axis=1)[:, :10].sum(axis=1)
    n_popular = popular.sum(axis=1)
    possible = np.clip(wanted, 10 - (20 - n_popular), n_popular)
    assert (got == possible).all()
    for user in range(50):  # best within each class, by score
        for value in (True, False):
            places = [at for at in order[user, :10] if popular[user, at] == value]
            best = [at for at in order_by(scores)[user] if popular[user, at] == value][: len(places)]
            assert places == best


def test_penalty_orders_equal_scores_by_count():
    assert popularity_penalty(np.zeros((1, 3)), np.array([[5, 1, 9]]), 1.0).tolist() == [[1, 0, 2]]


def test_mmr_puts_the_unlike_item_second():
    features = np.array([[[1, 0], [1, 0], [0, 1]]], dtype=bool)
    scores = np.array([[1.0, 0.9, 0.0]])
    assert maximal_marginal_relevance(scores, features, 0.6).tolist() == [[0, 2, 1]]
    assert maximal_marginal_relevance(scores, features, 0.1).tolist() == [[0, 1, 2]]


def test_xquad_fills_an_uncovered_class_in_proportion_to_the_profile():
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    classes = np.array([[0, 0, 0, 1]])
    assert xquad(scores, classes, np.array([[0.5, 0.5]]), 0.9)[0, 1] == 3
    assert xquad(scores, classes, np.array([[1.0, 0.0]]), 0.9).tolist() == [[0, 1, 2, 3]]


def test_constant_scores_keep_the_order_and_bad_input_is_named():
    _, classes, target = world(5, users=3, candidates=4)
    assert (order_by(unit_relevance(np.ones((3, 4)))) == np.arange(4)).all()
    with pytest.raises(ConfigError, match="between 0 and 1"):
        xquad(np.ones((3, 4)), classes, target, 1.1)
    with pytest.raises(InputError, match="finite"):
        calibrated_popularity(np.full((3, 4), np.nan), classes, target, 0.5)
    with pytest.raises(ConfigError, match="beta"):
        popularity_penalty(np.ones((3, 4)), np.ones((3, 4)), -1.0)


def test_softmax_draws_every_order_with_its_plackett_luce_probability():
    scores, temperature, n = np.array([1.0, 0.2, -0.5]), 0.7, 40_000
    noise = np.random.default_rng(0).gumbel(size=(n, 3))
    orders = softmax_order(np.tile(scores, (n, 1)), temperature, noise)
    weight = np.exp(standard_relevance(scores[None])[0] / temperature)
    for order in itertools.permutations(range(3)):
        left, probability = list(order), 1.0
        for item in order:
            probability *= weight[item] / weight[left].sum()
            left.remove(item)
        share = (orders == order).all(axis=1).mean()
        assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / n), order


def test_a_high_temperature_forgets_the_scores_and_an_illegal_one_is_refused():
    scores, _, _ = world(5, users=4000, candidates=5)
    first = softmax_order(scores, 1e6, np.random.default_rng(1).gumbel(size=scores.shape))[:, 0]
    assert (first == order_by(scores)[:, 0]).mean() == pytest.approx(0.2, abs=0.03)
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="temperature must be a finite number, 0 or more"):
            softmax_order(scores, value, scores)
