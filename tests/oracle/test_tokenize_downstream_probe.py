"""The click model that codes are tried in: its statistic, its intervals, and what it can and cannot find."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support.token_worlds import themed_log

from recollect.data import leave_one_out
from recollect.errors import InputError
from recollect.eval.statistics import resample_weights
from recollect.tokenize.downstream import (
    ProbeBudget,
    auc,
    auc_by_user,
    numbered_fields,
    run_probe,
    wins_by_user,
)
from recollect.tokenize.downstream_cases import make_cases

BUDGET = ProbeBudget(width=8, hidden=(16,), epochs=3, batch=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def cases():
    dataset = themed_log(n_users=240, n_items=60, length=9)
    return dataset, make_cases(dataset, leave_one_out(dataset), history=5, test_negatives=4, seed=1)


def scores(n=300, m=3, seed=0, gap=0.7):
    generator = np.random.default_rng(seed)
    return np.round(generator.normal(gap, 1, n), 1), np.round(generator.normal(0, 1, (n, m)), 1)


def test_auc_is_that_of_scikit_learn_with_ties():
    clicked, skipped = scores()
    truth = np.r_[np.ones(len(clicked)), np.zeros(skipped.size)]
    assert auc(clicked, skipped) == pytest.approx(roc_auc_score(truth, np.r_[clicked, skipped.ravel()]), abs=1e-12)
    assert auc(np.zeros(5), np.zeros((5, 2))) == 0.5


def test_pseudo_values_average_to_the_auc_and_resample_like_the_exact_bootstrap():
    clicked, skipped = scores()
    values = auc_by_user(clicked, skipped)
    assert values.mean() == pytest.approx(auc(clicked, skipped), abs=1e-12)
    exact, linear = [], []
    for weights in resample_weights(len(clicked), 400, 5):
        for row in weights:
            users = np.repeat(np.arange(len(clicked)), row.astype(int))
            exact.append(auc(clicked[users], skipped[users]))
            linear.append(values[users].mean())
    assert np.corrcoef(exact, linear)[0, 1] > 0.999
    assert np.std(linear) == pytest.approx(np.std(exact), rel=0.03)
    assert np.abs(np.subtract(exact, linear)).max() < 0.2 * np.std(exact)


def test_wins_count_the_own_non_clicks_below_and_half_of_the_ties():
    assert wins_by_user(np.array([1.0]), np.array([[0.0, 1.0, 2.0]])).tolist() == [0.5]


def test_histories_end_before_the_click_and_non_clicks_are_untouched_and_as_popular(cases):
    dataset, made = cases
    log = dataset.interactions
    touched = {(user, item) for user, item in zip(log.user.tolist(), log.item.tolist(), strict=True)}
    for part in (made.train, made.valid, made.test):
        assert not any(
            (user, item) in touched for user, row in zip(part.user, part.skipped, strict=True) for item in row
        )
    for row in range(0, len(made.test), 37):
        user = int(made.test.user[row])
        own = log.item[log.user == user]
        assert made.test.clicked[row] == own[-1]
        np.testing.assert_array_equal(made.test.history[row], own[-6:-1])
        assert made.valid.clicked[row] == own[-2]
    counts = made.popularity
    assert abs(auc(counts[made.test.clicked], counts[made.test.skipped]) - 0.5) < 0.06


def test_cases_do_not_depend_on_codes_and_are_the_same_for_a_seed(cases):
    dataset, made = cases
    again = make_cases(dataset, leave_one_out(dataset), history=5, test_negatives=4, seed=1)
    other = make_cases(dataset, leave_one_out(dataset), history=5, test_negatives=4, seed=2)
    np.testing.assert_array_equal(made.train.skipped, again.train.skipped)
    assert not np.array_equal(made.train.skipped, other.train.skipped)
    few = make_cases(dataset, leave_one_out(dataset), train_cases=50)
    assert len(few.train) == 50


def test_codes_that_follow_taste_are_found_and_codes_that_do_not_are_not(cases):
    dataset, made = cases
    themes = (np.arange(dataset.n_items) % 6)[:, None]
    shuffled = np.random.default_rng(0).permutation(themes)
    found = {
        name: run_probe(numbered_fields(codes), made, BUDGET, seed=0)
        for name, codes in (("themes", themes), ("shuffled", shuffled), ("none", np.zeros_like(themes)))
    }
    value = {name: auc(result.clicked, result.skipped) for name, result in found.items()}
    assert value["themes"] > 0.85
    assert value["shuffled"] < value["themes"] - 0.15
    assert value["none"] == 0.5


def test_the_same_seed_gives_the_same_scores_and_another_one_does_not(cases):
    dataset, made = cases
    fields = numbered_fields((np.arange(dataset.n_items) % 6)[:, None])
    budget = ProbeBudget(width=4, hidden=(8,), epochs=1, batch=128)
    one, two, other = (run_probe(fields, made, budget, seed=seed).clicked for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_fields_number_levels_and_prefixes():
    codes = np.array([[0, 5], [0, 7], [3, 5], [0, 5]])
    assert numbered_fields(codes, "levels").tolist() == [[0, 0], [0, 1], [1, 0], [0, 0]]
    assert numbered_fields(codes, "prefixes").tolist() == [[0, 0], [0, 1], [1, 2], [0, 0]]
    assert numbered_fields(codes, "both").shape == (4, 3)


def test_a_user_who_touched_everything_and_a_log_without_histories_are_refused():
    everything, short = (themed_log(n_users=4, n_items=6, length=length) for length in (6, 2))
    with pytest.raises(InputError, match="touched every item"):
        make_cases(everything, leave_one_out(everything))
    with pytest.raises(InputError, match="no user with enough events"):
        make_cases(short, leave_one_out(short))
