"""Tables of models and seeds, paired tests with shared draws, user groups, list stability."""

import numpy as np
import pytest
from support.ranking_worlds import FixedScores, MostPopular, log_dataset, random_world

from recollect.data import global_temporal, leave_one_out, refit_mask
from recollect.errors import InputError, UnknownName
from recollect.eval.comparison import compare_models
from recollect.eval.list_metrics import list_totals
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.statistics import cluster_bootstrap, holm, paired_difference, paired_differences
from recollect.eval.user_groups import (
    activity_groups,
    attribute_groups,
    group_fairness,
    head_share_groups,
    jaccard,
    rank_agreement,
)
from recollect.rng import stream


@pytest.fixture(scope="module")
def world():
    return random_world(31, n_users=80)


def noisy_table(world, split, seed: int, strength: float = 0.0):
    """Random scores with the target pushed up by `strength`."""
    scores = stream(seed, "noisy").normal(size=(len(split.test_row), world.n_items)).astype(np.float32)
    scores[np.arange(len(scores)), world.interactions.item[split.test_row]] += strength
    return evaluate_ranker(FixedScores(scores), world, split, ks=(5, 10), seed=seed, name="noisy")


def test_paired_intervals_cover_a_known_difference_in_93_to_97_percent_and_null_p_values_are_uniform():
    from scipy.stats import kstest

    n_users, repetitions, difference = 150, 1000, 0.2
    generator = stream(1, "paired")
    habit = generator.normal(size=(repetitions, n_users))
    a = habit + difference + generator.normal(size=habit.shape)
    b = habit + generator.normal(size=habit.shape)
    columns = {f"real {index}": row for index, row in enumerate(a - b)}
    columns |= {f"null {index}": row - difference for index, row in enumerate(a - b)}
    found = paired_differences(columns, np.arange(n_users), n=1000, permutations=999, seed=3)
    covered = [
        found[f"real {i}"].difference.low <= difference <= found[f"real {i}"].difference.high
        for i in range(repetitions)
    ]
    assert 0.93 <= np.mean(covered) <= 0.97
    p_values = [found[f"null {index}"].p_value for index in range(repetitions)]
    assert kstest(p_values, "uniform").pvalue > 0.01
    one = paired_difference(a[7], b[7], np.arange(n_users), n=1000, permutations=999, seed=3)
    np.testing.assert_allclose(one.difference, found["real 7"].difference, atol=1e-12)
    assert one.p_value == found["real 7"].p_value


def test_paired_test_agrees_with_the_fisher_randomisation_of_ranx():
    statistical = pytest.importorskip("ranx.statistical_tests")
    generator = stream(2, "fisher")
    a, b = generator.random(60), generator.random(60) - 0.06
    theirs = statistical.fisher_randomization_test(a, b, n_permutations=4000, random_seed=1)[0]
    ours = paired_difference(a, b, np.arange(60), n=10, permutations=4000, seed=0).p_value
    sigma = np.sqrt(max(ours * (1 - ours), 1e-4) / 4000)
    assert abs(ours - float(theirs)) < 6 * sigma


def test_a_table_holds_means_intervals_seeds_and_paired_differences(world):
    split = leave_one_out(world)
    weak = [noisy_table(world, split, seed) for seed in (1, 2, 3)]
    strong = [noisy_table(world, split, seed, 2.0) for seed in (4, 5, 6)]
    popular = evaluate_ranker(MostPopular(world, split.train), world, split, ks=(5, 10))
    totals = {
        name: [list_totals(table, world, split, resamples=20) for table in tables]
        for name, tables in {"weak": weak, "strong": strong, "popular": [popular]}.items()
    }
    found = compare_models(
        {"weak": weak, "strong": strong, "popular": popular},
        metrics=["hr@10", "ndcg@10"],
        against="weak",
        totals=totals,
        resamples=500,
        permutations=500,
    )
    cell = found.models["strong"]["ndcg@10"]
    assert cell["per_seed"] == pytest.approx([table.mean("ndcg@10") for table in strong])
    assert cell["value"] == pytest.approx(np.mean(cell["per_seed"]))
    assert cell["sd"] == pytest.approx(np.std(cell["per_seed"], ddof=1))
    assert (cell["n_seeds"], found.models["popular"]["ndcg@10"]["sd"]) == (3, None)
    per_user = np.mean([table.per_user("ndcg@10")[1] for table in strong], axis=0)
    alone = cluster_bootstrap(per_user, np.arange(len(per_user)), n=500, seed=0)
    assert cell["ci95"] == pytest.approx([alone.low, alone.high])
    assert [(row["model"], row["against"]) for row in found.differences] == [
        ("strong", "weak"),
        ("popular", "weak"),
    ] * 2
    row = found.differences[2]
    base = np.mean([table.per_user("ndcg@10")[1] for table in weak], axis=0)
    assert row["metric"] == "ndcg@10"
    assert row["value"] == pytest.approx((per_user - base).mean())
    assert row["users_changed"] == int((per_user != base).sum())
    assert row["relative"] == pytest.approx(row["value"] / base.mean())
    raw = [found.differences[i]["p"] for i in (2, 3)]
    assert [found.differences[i]["p_holm"] for i in (2, 3)] == pytest.approx(holm(np.array(raw)).tolist())
    assert row["p_holm"] < 0.05
    assert found.protocols["strong"]["seeds"] == [4, 5, 6]
    assert found.models["weak"]["coverage@10"]["per_seed"] == [row["coverage@10"]["value"] for row in totals["weak"]]
    text = found.to_text(["ndcg@10", "coverage@10"])
    assert "| popular | 1 seed |" in text
    assert "| strong | 3 seeds |" in text
    assert "| strong - weak | ndcg@10 | +" in text
    assert world.name in text
    assert found.to_json()["protocol_hashes"]["weak"] == found.to_json()["protocol_hashes"]["popular"]


def test_rows_without_a_protocol_are_not_printed(world):
    split = leave_one_out(world)
    table = noisy_table(world, split, 1)
    bare = type(table)(**{**vars(table), "protocol": {}})
    with pytest.raises(InputError, match="'bare' has no complete protocol block"):
        compare_models({"good": table, "bare": bare}, resamples=10, permutations=10)
    found = compare_models({"good": table}, resamples=10, permutations=10)
    del found.protocols["good"]["mask"]
    with pytest.raises(InputError, match=r"missing: mask"):
        found.to_text()


def test_rows_of_different_protocols_need_permission_and_then_say_what_differs(world):
    split = leave_one_out(world)
    masked = evaluate_ranker(MostPopular(world, split.train), world, split, ks=(5,))
    unmasked = evaluate_ranker(MostPopular(world, split.train), world, split, ks=(5,), mask="none")
    tables = {"masked": masked, "unmasked": unmasked}
    with pytest.raises(InputError, match="mask: masked='history', unmasked='none'"):
        compare_models(tables, resamples=10, permutations=10)
    found = compare_models(tables, allow_mixed=True, resamples=10, permutations=10)
    assert list(found.mixed) == ["mask"]
    assert "- mask: masked='history', unmasked='none'" in found.to_text()
    assert found.unpaired == ()
    other = global_temporal(world, 0.7, "last")
    later = evaluate_ranker(MostPopular(world, other.train), world, other, ks=(5,))
    found = compare_models({"masked": masked, "later": later}, allow_mixed=True, resamples=10, permutations=10)
    assert {"split", "n_cases"} <= set(found.mixed)
    assert found.unpaired == (("later", "masked"),)
    assert not found.differences


def test_a_row_fitted_on_validation_events_is_labelled_refit(world):
    split = leave_one_out(world)
    rows = refit_mask(world, split)
    plain = evaluate_ranker(MostPopular(world, split.train), world, split, ks=(5,))
    refit = evaluate_ranker(MostPopular(world, rows), world, split, ks=(5,), rows=rows)
    text = compare_models({"a": plain, "b": refit}, resamples=10, permutations=10).to_text(["hr@5"])
    assert "| a | 1 seed |" in text
    assert "| b, refit (train and validation) | 1 seed |" in text
    assert refit.popularity.sum() == rows.sum() > plain.popularity.sum()


def test_names_that_are_no_row_or_column_are_refused(world):
    split = leave_one_out(world)
    table = noisy_table(world, split, 1)
    with pytest.raises(UnknownName, match="unknown model 'best'"):
        compare_models({"one": table}, against="best", resamples=10)
    with pytest.raises(InputError, match="has no metric 'auc'"):
        compare_models({"one": table}, metrics=["auc"], resamples=10)
    with pytest.raises(InputError, match="a table for every model"):
        compare_models({"one": []}, resamples=10)
    short = noisy_table(world, global_temporal(world, 0.7, "last"), 2)
    with pytest.raises(InputError, match=r"cannot stand in one table|different cases"):
        compare_models({"one": [table, short]}, resamples=10)


# Groups of users


def test_activity_and_head_share_groups_have_the_sizes_they_promise(world):
    split = leave_one_out(world)
    activity = activity_groups(world, split.train)
    count = np.bincount(world.interactions.user[split.train], minlength=world.n_users)
    assert activity.names == ("q1", "q2", "q3")
    assert np.bincount(activity.code).tolist() == [27, 26, 27]
    assert count[activity.code == 0].max() <= count[activity.code == 2].min()
    taste = head_share_groups(world, split.train)
    assert taste.names == ("niche", "balanced", "mainstream")
    assert np.bincount(taste.code).tolist() == [16, 48, 16]
    nothing = split.train & (world.interactions.user != 5)
    assert activity_groups(world, nothing).code[5] == -1


def test_group_gap_is_that_of_the_means_and_its_interval_covers_it():
    n_users = 400
    group = np.where(np.arange(n_users) % 4 == 0, "f", "m").astype(object)
    group[:8] = ""
    user = np.repeat(np.arange(n_users), 4)
    item = stream(3, "items").integers(20, size=len(user))
    attributes = {"gender": group}
    world = log_dataset(user, item, np.arange(len(user)), 20, attributes=attributes)
    split = leave_one_out(world)
    scores = stream(4, "scores").normal(size=(n_users, 20)).astype(np.float32)
    target = world.interactions.item[split.test_row]
    scores[np.arange(n_users), target] += np.where(group == "f", 3.0, 0.0)
    table = evaluate_ranker(FixedScores(scores), world, split, ks=(5,))
    found = group_fairness(table, "hr@5", attribute_groups(world, "gender"), resamples=500)
    column = table.column("hr@5")
    means = {name: column[group == name].mean() for name in ("f", "m")}
    assert {name: row["value"] for name, row in found["groups"].items()} == pytest.approx(means)
    assert {name: row["n"] for name, row in found["groups"].items()} == {"f": 98, "m": 294}
    assert found["gap"]["value"] == pytest.approx(means["f"] - means["m"])
    assert found["gap"]["ci95"][0] < found["gap"]["value"] < found["gap"]["ci95"][1]
    assert found["gap"]["ci95"][0] > 0
    assert found["worst"] == {"group": "m", "value": pytest.approx(means["m"])}
    assert found["ratio"] == pytest.approx(means["m"] / means["f"])
    assert found["n_ungrouped"] == 8
    with pytest.raises(UnknownName, match="unknown user attribute 'age'; known: gender"):
        attribute_groups(world, "age")


def test_stability_of_lists_worked_examples():
    first = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, -1, -1], [-1, -1, -1], [1, 2, -1]])
    second = np.array([[1, 2, 3], [3, 2, 1], [1, 9, 8], [4, 5, 6], [-1, -1, -1], [-1, -1, -1]])
    np.testing.assert_allclose(jaccard(first, second), [1, 1, 1 / 5, 1 / 3, 1, 0])
    # Third row: 1 is kept before both missing items, which are not kept among themselves.
    np.testing.assert_allclose(rank_agreement(first, second), [1, 0, 2 / 3, 1, 1, 0])
    with pytest.raises(InputError, match="two lists per case"):
        jaccard(first, second[:2])
