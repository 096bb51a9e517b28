"""Micro and macro checks: constant answers, real against itself, shuffled users, answers known, planted distances."""

import math

import numpy as np
import pytest

from recollect.errors import InputError
from recollect.eval.agreement import (
    constant_rows,
    distribution_agreement,
    noise_ceiling,
    pairwise_choice,
    ranking,
    rating_agreement,
    reliability,
    split_half,
    taste_discrimination,
)
from recollect.eval.detectability import detectability
from recollect.eval.distances import kolmogorov_smirnov, wasserstein1
from recollect.eval.slates import Slates
from recollect.rng import stream


def planted_log(n_users: int = 400, per_user: int = 20, seed: int = 0):
    """Tastes of users, items and ratings that follow them; half of each user's items liked."""
    generator = stream(seed, "log")
    taste, style = generator.normal(size=(n_users, 4)), generator.normal(size=(500, 4))
    users = np.repeat(np.arange(n_users), per_user)
    items = generator.integers(500, size=len(users))
    affinity = (taste[users] * style[items]).sum(axis=1) + 0.5 * generator.normal(size=len(users))
    rating = np.clip(np.round(3.4 + 0.6 * affinity), 1, 5)
    return users, items, affinity, rating


@pytest.mark.parametrize(
    ("m", "f1", "no_accuracy"), [(1, 0.667, 0.5), (2, 0.5, 0.667), (3, 0.4, 0.75), (9, 0.182, 0.9)]
)
def test_constant_and_random_agents_give_the_closed_forms(m, f1, no_accuracy):
    positives = 20 // (1 + m)
    truth = np.tile(np.arange(positives * (1 + m)) < positives, 50)
    users = np.repeat(np.arange(50), positives * (1 + m))
    expected = constant_rows(m)
    assert expected["always-yes"]["taste/f1"] == pytest.approx(f1, abs=5e-4)
    assert expected["always-no"]["taste/accuracy"] == pytest.approx(no_accuracy, abs=5e-4)
    for name, answer in (("always-yes", 1.0), ("always-no", 0.0)):
        found = taste_discrimination(np.full(len(truth), answer), truth, users, seed=0)
        for metric, value in expected[name].items():
            assert found[metric]["value"] == pytest.approx(value, abs=1e-12), (name, metric)
    coin = taste_discrimination(stream(m, "coin").random(len(truth)), truth, users, seed=0)
    for metric in ("taste/balanced_accuracy", "taste/auc"):
        assert abs(coin[metric]["value"] - 0.5) < 4 * (coin[metric]["ci95"][1] - coin[metric]["ci95"][0]) / 3.92


def test_taste_metrics_equal_scikit_learn_user_by_user():
    from sklearn import metrics

    generator = stream(1, "taste")
    users = np.repeat(np.arange(30), 20)
    truth = generator.random(600) < 0.4
    probability = np.round(generator.random(600), 1)
    found = taste_discrimination(probability, truth, users, seed=0)
    yes = probability >= 0.5
    rows = {
        "taste/accuracy": metrics.accuracy_score,
        "taste/precision": lambda t, y: metrics.precision_score(t, y, zero_division=0),
        "taste/recall": metrics.recall_score,
        "taste/f1": metrics.f1_score,
        "taste/balanced_accuracy": metrics.balanced_accuracy_score,
    }
    for name, function in rows.items():
        expected = np.mean([function(truth[users == u], yes[users == u]) for u in range(30)])
        assert found[name]["value"] == pytest.approx(expected, abs=1e-12), name
    areas = [metrics.roc_auc_score(truth[users == u], probability[users == u]) for u in range(30)]
    assert found["taste/auc"]["value"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert (found["taste/auc"]["n"], found["taste/accuracy"]["n"]) == (30, 600)


def test_users_with_one_class_count_for_accuracy_only():
    truth, users = np.array([True, False, True, True]), np.array([0, 0, 1, 1])
    found = taste_discrimination(np.array([1.0, 0.0, 0.0, 0.0]), truth, users, seed=0)
    assert found["taste/accuracy"]["value"] == 0.5
    assert (found["taste/balanced_accuracy"]["value"], found["taste/balanced_accuracy"]["n"]) == (1.0, 1)
    with pytest.raises(InputError, match="no user has both"):
        taste_discrimination(np.ones(2), np.array([True, True]), np.array([0, 1]), seed=0)


def test_agent_that_always_answers_first_gets_exactly_half():
    log_odds = stream(2, "first").normal(3.0, 0.5, size=500)
    found = pairwise_choice(log_odds, -log_odds, np.arange(500) % 50, seed=0)
    assert found["choice/accuracy"]["value"] == 0.5
    assert found["choice/accuracy_positive_first"]["value"] == 1.0
    assert found["choice/first_option_share"]["value"] == 1.0
    assert found["choice/flip_rate"]["value"] == 1.0


def test_swapping_both_orders_mirrors_pairwise_accuracy():
    generator = stream(3, "swap")
    first, second = generator.normal(0.5, 1.0, size=(2, 400))
    users = np.arange(400) % 40
    ours = pairwise_choice(first, second, users, seed=0)["choice/accuracy"]["value"]
    theirs = pairwise_choice(-second, -first, users, seed=0)["choice/accuracy"]["value"]
    assert ours + theirs == pytest.approx(1.0, abs=1e-12)


def test_own_answers_lift_every_micro_check_to_one():
    users, _, affinity, rating = planted_log(60)
    truth = affinity > 0
    assert taste_discrimination(truth * 0.98 + 0.01, truth, users, seed=0)["taste/balanced_accuracy"]["value"] == 1.0
    slates = Slates(
        *(np.arange(60),) * 4, np.tile(np.arange(10), (60, 1)), np.arange(60) % 10, np.zeros(60, dtype=bool)
    )
    known = np.zeros((60, 10))
    known[np.arange(60), slates.target] = 1.0
    assert ranking(known, slates, seed=0)["ranking/mrr"]["value"] == 1.0
    found = rating_agreement(rating, rating, users, seed=0)
    assert (found["rating/mae"]["value"], found["rating/w1"]["value"]) == (0.0, 0.0)
    assert (found["rating/preference_estimation"]["value"], found["rating/variance_ratio"]["value"]) == (1.0, 1.0)


def test_shuffled_users_fail_micro_checks_and_pass_macro_checks():
    users, _, affinity, rating = planted_log()
    own = 1.0 / (1.0 + np.exp(-affinity))
    truth = affinity > 0
    # Whole users change places: everybody answers with somebody else's taste.
    other = np.roll(np.arange(len(users)), 20)
    honest = taste_discrimination(own, truth, users, seed=0)["taste/balanced_accuracy"]
    shuffled = taste_discrimination(own[other], truth, users, seed=0)["taste/balanced_accuracy"]
    assert honest["value"] == 1.0
    assert shuffled["ci95"][0] < 0.5 < shuffled["ci95"][1]
    macro = distribution_agreement(rating[other], rating, "rating", simulated_users=users, real_users=users, seed=0)
    assert all(entry["value"] == 0.0 for entry in macro["metrics"].values())


def test_real_against_itself_is_at_noise_level():
    users, _, _, rating = planted_log()

    def distance(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
        return {
            "w1": wasserstein1(rating[first], rating[second]),
            "ks": kolmogorov_smirnov(rating[first], rating[second]),
        }

    ceiling = noise_ceiling(distance, users, seed=0)
    assert 0 < ceiling["w1"]["value"] < 0.08
    assert 0 < ceiling["ks"]["value"] < 0.04
    shifted = np.minimum(rating + (stream(4, "shift").random(len(rating)) < 0.4), 5)
    assert wasserstein1(shifted, rating) > ceiling["w1"]["ci95"][1]


def test_halves_hold_whole_users_and_are_even():
    users = np.repeat(np.arange(11), 3)
    half = split_half(users, seed=0)
    assert len(set(users[half]) & set(users[~half])) == 0
    assert len(set(users[half])) == 6
    assert (half != split_half(users, seed=0, repeat=1)).any()


def test_detectability_is_half_for_real_against_itself_and_high_for_a_planted_difference():
    generator = stream(5, "sessions")
    sessions = generator.gamma(2.0, 3.0, size=(4000, 3))
    half = split_half(np.arange(4000), seed=1)
    same = detectability(sessions[half], sessions[~half], ["length", "mean", "span"], seed=0, resamples=200)
    assert abs(same["auc"]["value"] - 0.5) < 0.03
    planted = sessions[half] + np.array([0.0, 6.0, 0.0])
    found = detectability(planted, sessions[~half], ["length", "mean", "span"], seed=0, resamples=200)
    assert found["auc"]["ci95"][0] > 0.8
    assert found["top_features"][0][0] == "mean"
    assert found["top_features"][0][1] > 0


def test_rating_agreement_equals_direct_computation():
    users, _, _, actual = planted_log(80)
    predicted = np.clip(0.5 * actual + 2.2 + 0.1 * stream(6, "predicted").normal(size=len(actual)), 1, 5)
    found = {name: entry["value"] for name, entry in rating_agreement(predicted, actual, users, seed=0).items()}
    error = predicted - actual
    per_user = np.array([error[users == u].mean() for u in range(80)])
    within = [np.sum([np.var(values[users == u]) * 20 for u in range(80)]) for values in (predicted, actual)]
    assert found["rating/mae"] == pytest.approx(np.abs(error).mean())
    assert found["rating/rmse"] == pytest.approx(math.sqrt((error**2).mean()))
    assert found["rating/preference_estimation"] == pytest.approx(1 - np.abs(error).mean() / 5)
    assert found["rating/bias"] == pytest.approx(per_user.mean())
    assert found["rating/bias_spread"] == pytest.approx(per_user.std())
    assert found["rating/variance_ratio"] == pytest.approx(within[0] / within[1])
    assert found["rating/w1"] == pytest.approx(wasserstein1(predicted, actual))


def test_intervals_hold_their_value_and_preference_estimation_keeps_its_order():
    users, _, _, actual = planted_log(80)
    found = rating_agreement(np.full(len(actual), 3.5), actual, users, seed=0)
    for name, row in found.items():
        low, high = row["ci95"]
        if low is not None:
            assert low <= high, name
    mae, estimation = found["rating/mae"], found["rating/preference_estimation"]
    assert estimation["ci95"][0] == pytest.approx(1 - mae["ci95"][1] / 5)
    assert found["rating/variance_ratio"]["value"] == 0.0


def test_distribution_agreement_reports_distances_and_histograms():
    generator = stream(7, "marginals")
    simulated, real = generator.geometric(0.1, size=300), generator.geometric(0.05, size=500)
    found = distribution_agreement(simulated, real, "activity", seed=0)
    assert found["metrics"]["activity/w1"]["value"] == pytest.approx(wasserstein1(simulated, real))
    assert found["metrics"]["activity/ks"]["value"] == pytest.approx(kolmogorov_smirnov(simulated, real))
    histogram = found["histogram"]
    assert histogram["labels"][:3] == ["1", "2-3", "4-7"]
    gap = np.abs(np.array(histogram["simulated"]) - np.array(histogram["real"])).sum() / 2
    assert found["metrics"]["activity/tv"]["value"] == pytest.approx(gap)
    assert math.fsum(histogram["real"]) == pytest.approx(1.0)


def test_categories_have_no_order_and_long_tails_are_joined():
    generator = stream(8, "categories")
    names = np.array([f"kind {i:02d}" for i in range(50)])
    weight = 1.0 / np.arange(1, 51)
    simulated, real = (generator.choice(names, size=3000, p=weight / weight.sum()) for _ in range(2))
    found = distribution_agreement(simulated, real, "category", seed=0)
    assert set(found["metrics"]) == {"category/tv", "category/js"}
    assert (len(found["histogram"]["labels"]), found["histogram"]["labels"][-1]) == (31, "other")
    assert found["metrics"]["category/tv"]["value"] < 0.06


def test_popularity_bins_keep_items_nobody_bought():
    found = distribution_agreement(np.array([0, 0, 1, 5]), np.array([0, 2, 3, 300]), "popularity", seed=0)
    assert found["histogram"]["labels"][0] == "0"
    assert found["histogram"]["simulated"][0] == 0.5


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="0 simulated and 3 real values of rating"):
        distribution_agreement(np.zeros(0), np.ones(3), "rating", seed=0)


def test_reliability_of_honest_probabilities_is_near_the_diagonal():
    generator = stream(9, "honest")
    probability = generator.random(20_000)
    users = np.arange(20_000) % 500
    found = reliability(probability, generator.random(20_000) < probability, users, seed=0)
    assert len(found["predicted"]) == 10
    assert found["ece"]["value"] < 0.02
    inside = [low <= p <= high for p, low, high in zip(found["predicted"], found["low"], found["high"], strict=True)]
    assert sum(inside) >= 7
    assert sum(found["counts"]) == found["ece"]["n"] == 20_000


def test_reliability_worked_example():
    found = reliability(np.array([0.15, 0.15, 0.95, 1.0]), np.array([1, 0, 1, 0]), seed=0)
    assert (found["counts"], found["observed"]) == ([2, 2], [0.5, 0.5])
    assert found["ece"]["value"] == pytest.approx((0.7 + 0.95) / 4)
    with pytest.raises(InputError, match="between 0 and 1"):
        reliability(np.array([1.2]), np.array([1]), seed=0)
