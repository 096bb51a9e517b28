"""Fitted layers recover what was planted, and calibration removes a simulator's slot bias."""

import json

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.eval.agreement import reliability
from recollect.eval.choice_layer import AcceptLayer, ChoiceLayer
from recollect.eval.rating_layer import RatingLayer
from recollect.rng import stream


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-log_odds))


def standard_errors(layer) -> np.ndarray:
    return (layer.high - layer.low) / 3.92


# Choice layer


def planted_choices(n_cases: int = 3000, seed: int = 0):
    generator = stream(seed, "choices")
    features = generator.normal(size=(n_cases, 6, 4)) * np.array([1.0, 3.0, 0.5, 1.0]) + np.array([5.0, 0.0, -2.0, 1.0])
    truth = np.array([0.8, -0.3, 0.0, 1.5])
    utility = features @ truth + generator.gumbel(size=(n_cases, 6))
    return features, utility.argmax(axis=1), np.arange(n_cases) % 300, truth


def test_planted_choice_coefficients_are_recovered_within_two_standard_errors():
    inside = []
    for seed in range(20):
        features, target, users, truth = planted_choices(800, seed)
        layer = ChoiceLayer.fit(features, target, users, ["a", "b", "c", "d"], l2=0.0, resamples=500)
        inside += (np.abs(layer.coefficients - truth * layer.scale) < 2 * standard_errors(layer)).tolist()
    assert np.mean(inside) >= 0.9, "2 standard errors hold the truth 95 times in 100"
    entries = layer.coefficient_entries()
    assert entries["c"]["ci95"][0] < 0 < entries["c"]["ci95"][1]
    assert entries["a"]["ci95"][0] > 0


def test_choice_intervals_equal_those_of_refitting_each_resample():
    features, target, users, _ = planted_choices(450)
    layer = ChoiceLayer.fit(features, target, users, ["a", "b", "c", "d"], l2=1.0)
    generator = stream(5, "refit")
    refits = []
    for _ in range(80):
        rows = np.concatenate([np.flatnonzero(users == user) for user in generator.integers(300, size=300)])
        again = ChoiceLayer.fit(features[rows], target[rows], users[rows], list("abcd"), l2=1.0, resamples=1)
        refits.append(again.coefficients / again.scale * layer.scale)
    spread = np.std(refits, axis=0)
    np.testing.assert_allclose(standard_errors(layer), spread, rtol=0.3)


def test_choice_probabilities_sum_to_one_and_ignore_constants_per_slate():
    features, target, users, _ = planted_choices(400)
    layer = ChoiceLayer.fit(features, target, users, ["a", "b", "c", "d"])
    probability = layer.probabilities(features)
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    shifted = layer.probabilities(features + stream(1, "shift").normal(size=(len(features), 1, 4)))
    np.testing.assert_allclose(shifted, probability, rtol=0, atol=1e-10)
    assert layer.log_loss(features, target).mean() < np.log(6)


def test_cross_validation_shrinks_features_that_mean_nothing():
    generator = stream(2, "noise")
    features = generator.normal(size=(200, 5, 8))
    target = generator.integers(5, size=200)
    layer = ChoiceLayer.fit(features, target, np.arange(200) % 50, [f"f{i}" for i in range(8)])
    assert layer.penalty >= 100
    assert np.abs(layer.coefficients).max() < 0.2


def test_constant_feature_gets_coefficient_zero():
    features, target, users, _ = planted_choices(400)
    features = np.concatenate([features, np.full((400, 6, 1), 7.0)], axis=2)
    layer = ChoiceLayer.fit(features, target, users, [*"abcd", "constant"])
    assert layer.coefficients[4] == 0.0


def test_choice_layer_survives_json_exactly():
    features, target, users, _ = planted_choices(400)
    layer = ChoiceLayer.fit(features, target, users, ["a", "b", "c", "d"])
    again = ChoiceLayer.from_json(json.loads(json.dumps(layer.to_json())))
    np.testing.assert_array_equal(again.probabilities(features), layer.probabilities(features))
    assert again.coefficient_entries() == layer.coefficient_entries()


def test_order_of_cases_does_not_matter():
    features, target, users, _ = planted_choices(300)
    order = stream(3, "order").permutation(300)
    before = ChoiceLayer.fit(features, target, users, list("abcd"))
    after = ChoiceLayer.fit(features[order], target[order], users[order], list("abcd"))
    assert after.penalty == before.penalty
    np.testing.assert_allclose(after.coefficients, before.coefficients, atol=1e-6)


def test_too_few_cases_are_refused_with_the_numbers():
    features, target, users, _ = planted_choices(20)
    with pytest.raises(InputError, match="needs at least 30 cases from 10 users, got 20 cases from 20 users"):
        ChoiceLayer.fit(features, target, users, list("abcd"))


def test_feature_that_is_not_a_number_is_named():
    features, target, users, _ = planted_choices(100)
    features[3, 2, 1] = np.nan
    with pytest.raises(InputError, match="these are not: b"):
        ChoiceLayer.fit(features, target, users, list("abcd"))


# Accept layer: the planted simulator p = sigmoid(theta * true + kappa * slot)

THETA, KAPPA = 1.2, -0.5


def planted_page_clicks(n_users: int = 400, seed: int = 0):
    """Relevance, slots 0..3, a simulator that leans on the slot, and people who do not."""
    generator = stream(seed, "slots")
    n = n_users * 20
    users, slots = np.repeat(np.arange(n_users), 20), np.tile(np.arange(4), n_users * 5)
    truth = generator.normal(size=n)
    habit = 0.7 * generator.normal(size=n_users)
    simulated_log_odds = THETA * truth + KAPPA * slots
    people = generator.random(n) < sigmoid(-0.4 + THETA * truth + habit[users])
    simulated = generator.random(n) < sigmoid(simulated_log_odds)
    return users, slots, truth, simulated_log_odds, simulated, people


def test_planted_slot_bias_is_recovered_within_two_standard_errors():
    users, slots, truth, _, simulated, _ = planted_page_clicks()
    layer = AcceptLayer.fit(truth, simulated, users, slots=slots, slot_form="linear", l2=0.0)
    estimate = layer.coefficient_entries()["slot"]
    error = (estimate["ci95"][1] - estimate["ci95"][0]) / 3.92
    assert abs(estimate["value"] - KAPPA) < 2 * error
    assert layer.coefficients[1] / layer.scale[0] == pytest.approx(
        THETA, abs=2 * standard_errors(layer)[1] / layer.scale[0]
    )
    assert layer.user_variance < 0.05, "the simulator has no habits"


def test_calibration_removes_the_slot_bias():
    users, slots, truth, log_odds, _, people = planted_page_clicks()
    first, second = users < 200, users >= 200
    layer = AcceptLayer.fit(log_odds[first], people[first], users[first], slots=slots[first])
    calibrated = layer.probabilities(log_odds[second], slots=slots[second])
    raw = sigmoid(log_odds[second])
    curve = [
        np.array([values[slots[second] == slot].mean() for slot in range(4)])
        for values in (raw, calibrated, people[second])
    ]
    assert np.abs(curve[0] - curve[2]).max() > 0.15, "uncorrected, the slot must show"
    assert np.abs(curve[1] - curve[2]).max() < 0.05
    clicks = stream(8, "calibrated").random(second.sum()) < calibrated
    again = AcceptLayer.fit(truth[second], clicks, users[second], slots=slots[second], slot_form="linear", l2=0.0)
    low, high = again.coefficient_entries()["slot"]["ci95"]
    assert low < 0 < high
    before = reliability(raw, people[second], users[second], seed=0)["ece"]["value"]
    after = reliability(calibrated, people[second], users[second], seed=0)["ece"]["value"]
    assert after < before / 3


def test_user_effects_are_estimated_and_used():
    users, _, truth, _, _, people = planted_page_clicks()
    layer = AcceptLayer.fit(truth, people, users)
    assert layer.user_variance == pytest.approx(0.49, rel=0.35)
    known = layer.probabilities(truth, users=users)
    unknown = layer.probabilities(truth)

    def surprise(p: np.ndarray) -> float:
        return float(-np.log(np.where(people, p, 1 - p)).mean())

    assert surprise(known) < surprise(unknown) - 0.01
    assert known.mean() == pytest.approx(people.mean(), abs=0.01)
    assert unknown.mean() == pytest.approx(people.mean(), abs=0.02)


def test_accept_layer_survives_json_exactly_and_refuses_unknown_slots():
    users, slots, truth, _, simulated, _ = planted_page_clicks(40)
    layer = AcceptLayer.fit(truth, simulated, users, slots=slots)
    again = AcceptLayer.from_json(json.loads(json.dumps(layer.to_json())))
    expected = layer.probabilities(truth, slots=slots, users=users)
    np.testing.assert_array_equal(again.probabilities(truth, slots=slots, users=users), expected)
    with pytest.raises(InputError, match=r"slots \[9\] were never seen"):
        layer.probabilities(truth[:1], slots=np.array([9]))


def test_accept_layer_needs_both_answers():
    users, _, truth, *_ = planted_page_clicks(40)
    with pytest.raises(InputError, match="0% of the answers are yes"):
        AcceptLayer.fit(truth, np.zeros(len(truth), dtype=bool), users)


# Rating layer


def planted_ratings(n: int = 6000, seed: int = 0):
    generator = stream(seed, "ratings")
    score, group = generator.normal(3.0, 2.0, size=n), generator.integers(2, size=n)
    thresholds = np.array([[-2.0, -1.0, 0.5, 2.0], [-3.5, -2.5, -1.5, 0.0]])  # the second group is generous
    latent = 0.9 * (score - 3.0) / 2.0 + generator.logistic(size=n)
    return score, 1.0 + (latent[:, None] > thresholds[group]).sum(axis=1), np.arange(n) % 300, group, thresholds


def test_planted_thresholds_and_slope_are_recovered():
    score, rating, users, group, thresholds = planted_ratings()
    layer = RatingLayer.fit(score, rating, users, group, l2=0.01)
    assert layer.slope == pytest.approx(0.9, abs=0.1)
    for label in (0, 1):
        np.testing.assert_allclose(layer.thresholds[label], thresholds[label], atol=0.2)


def test_rating_probabilities_sum_to_one_and_meet_the_observed_shares():
    score, rating, users, group, _ = planted_ratings()
    layer = RatingLayer.fit(score, rating, users, group)
    probability = layer.probabilities(score, group)
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    for label in (0, 1):
        observed = np.bincount(rating[group == label].astype(int), minlength=6)[1:] / (group == label).sum()
        np.testing.assert_allclose(probability[group == label].mean(axis=0), observed, atol=0.01)
    drawn = layer.draw(score, stream(1, "draw"), group)
    assert drawn.mean() == pytest.approx(rating.mean(), abs=0.05)
    assert layer.expected(score, group).std() < rating.std()


def test_higher_score_never_lowers_the_expected_rating():
    score, rating, users, _, _ = planted_ratings(1500)
    layer = RatingLayer.fit(score, rating, users)
    assert (np.diff(layer.expected(np.linspace(-10, 20, 50))) >= 0).all()


def test_rating_layer_survives_json_exactly():
    score, rating, users, group, _ = planted_ratings(800)
    layer = RatingLayer.fit(score, rating, users, group)
    again = RatingLayer.from_json(json.loads(json.dumps(layer.to_json())))
    np.testing.assert_array_equal(again.probabilities(score, group), layer.probabilities(score, group))
    np.testing.assert_array_equal(again.probabilities(score[:2], np.array([7, 7])), layer.probabilities(score[:2]))


def test_rating_layer_refuses_one_level_and_few_ratings():
    score, rating, users, _, _ = planted_ratings(200)
    with pytest.raises(InputError, match="at least two rating levels"):
        RatingLayer.fit(score, np.full(200, 4.0), users)
    with pytest.raises(InputError, match=r"a rating layer on \d features needs at least 30 cases"):
        RatingLayer.fit(score[:20], rating[:20], users[:20])
