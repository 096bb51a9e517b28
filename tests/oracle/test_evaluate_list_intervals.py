"""Groups of users, category calibration, and intervals of coverage, Gini and dGAP where the truth is planted."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.ranking_worlds import FixedScores, log_dataset, random_world

import recollect
from recollect.data import leave_one_out
from recollect.errors import InputError
from recollect.eval.comparison import compare_models
from recollect.eval.list_metrics import exposure_intervals, popularity_lift, spread_interval
from recollect.eval.ranking import evaluate_ranker
from recollect.eval.statistics import bootstrap_table
from recollect.eval.user_groups import UserGroups, group_lift
from recollect.recommenders.evaluate_groups import user_groups
from recollect.rng import stream

N_ITEMS = 90


def served_by_activity(hit_rate: tuple[float, float, float]):
    """90 users with 6, 9 or 12 events of a log, and a case table whose hits fall on a planted share of each third."""
    length = np.repeat([6, 9, 12], 30)
    user = np.repeat(np.arange(90), length)
    world = log_dataset(user, stream(1, "items").integers(N_ITEMS, size=len(user)), np.arange(len(user)), N_ITEMS)
    split = leave_one_out(world)
    table = evaluate_ranker(FixedScores(np.zeros((90, N_ITEMS), dtype=np.float32)), world, split, ks=(10,))
    hit = np.concatenate([np.arange(30) < share * 30 for share in hit_rate]).astype(np.float64)
    return world, split, table.with_columns({"ndcg@10": hit})


def test_a_planted_gap_between_activity_groups_is_found_with_its_worst_group_and_averaged_over_seeds():
    world, split, first = served_by_activity((0.1, 0.4, 0.8))
    second = served_by_activity((0.3, 0.4, 0.6))[2]
    even = served_by_activity((0.4, 0.4, 0.4))[2]
    found = user_groups({"uneven": [first, second], "even": [even]}, world, split, "ndcg@10", seed=0)
    assert list(found) == ["activity", "head share"]
    uneven = found["activity"]["uneven"]
    assert {name: row["value"] for name, row in uneven["groups"].items()} == pytest.approx(
        {"q1": 0.2, "q2": 0.4, "q3": 0.7}
    )
    assert {name: row["n"] for name, row in uneven["groups"].items()} == {"q1": 30, "q2": 30, "q3": 30}
    assert uneven["worst"] == {"group": "q1", "value": pytest.approx(0.2)}
    low, high = uneven["gap"]["ci95"]
    assert uneven["gap"]["value"] == pytest.approx(0.5)
    assert 0.2 < low < 0.5 < high < 0.8
    # Resampled groups are always apart; the shift lets the interval of an even row reach 0.
    assert found["activity"]["even"]["gap"]["value"] == pytest.approx(0.0)
    assert found["activity"]["even"]["gap"]["ci95"][0] == 0.0
    sizes = {name: row["n"] for name, row in found["head share"]["even"]["groups"].items()}
    assert sizes == {"niche": 18, "balanced": 54, "mainstream": 18}


def test_groups_are_made_from_training_events_only():
    world, split, table = served_by_activity((0.1, 0.4, 0.8))
    before = user_groups({"row": [table]}, world, split, "ndcg@10", seed=0)
    item = world.interactions.item.copy()
    item[~split.train] = stream(2, "others").integers(N_ITEMS, size=int((~split.train).sum()))
    seen = np.bincount(world.interactions.item[split.train], minlength=N_ITEMS) > 0
    item[~split.train] = np.where(seen[item[~split.train]], item[~split.train], world.interactions.item[~split.train])
    other = replace(world, interactions=replace(world.interactions, item=item))
    assert user_groups({"row": [table]}, other, split, "ndcg@10", seed=0) == before


def test_a_gap_planted_in_an_attribute_is_found_and_shown(tmp_path):
    # Odd users take item 41 after item 40, as they did before; even users take something nobody else has.
    generator = stream(9, "odd")
    first = [generator.choice(40, size=4, replace=False).tolist() for _ in range(60)]
    sequences = [
        items + ([40, 41, 40, 41] if user % 2 else [40, items[0], 40, 42 + user]) for user, items in enumerate(first)
    ]
    user = np.repeat(np.arange(60), 8)
    world = log_dataset(user, np.concatenate(sequences), np.arange(len(user)), 110)
    told = {
        "side": np.array([("odd" if user % 2 else "even") if user < 50 else "" for user in range(60)], dtype=object),
        "number": np.array([str(user) for user in range(60)], dtype=object),
    }
    world = replace(world, users=replace(world.users, attributes=told))
    options = {"models": ("pop", "markov"), "core": 0}
    report = recollect.evaluate(world, attributes=("side",), out=tmp_path / "run", **options)
    found = report.sections["user_groups"]["side"]["markov"]
    assert {name: row["n"] for name, row in found["groups"].items()} == {"even": 25, "odd": 25}
    assert found["n_ungrouped"] == 10
    assert found["worst"]["group"] == "even"
    assert found["groups"]["odd"]["value"] > 0.9
    assert found["groups"]["even"]["value"] < 0.1 < 0.8 < found["gap"]["ci95"][0]
    table = next(panel for panel in report.sections["panels"] if panel["title"] == "NDCG@10 by side of users")
    assert table["columns"] == ["model", "even", "odd", "gap", "worst"]
    assert "even 25, odd 25" in table["note"]
    assert "NDCG@10 by side of users" in (tmp_path / "run" / "report.html").read_text()
    for name, message in (
        ("height", "unknown user attribute 'height'"),
        ("number", r"'number' of 'toy' has 60 values where 1 to 30"),
        ("activity", "a partition that is always there"),
    ):
        with pytest.raises(InputError, match=message):
            recollect.evaluate(world, attributes=(name,), out=tmp_path / name, **options)
        assert not (tmp_path / name).exists()


@pytest.fixture(scope="module")
def popular_half(tmp_path_factory):
    """Histories are half "common", half "rare"; the 12 common items are the popular ones, so `pop` lists only them."""
    generator = stream(3, "halves")
    user = np.repeat(np.arange(60), 9)
    item = np.empty(len(user), dtype=np.int64)
    for start in range(0, len(user), 9):
        item[start : start + 9 : 2] = generator.choice(12, size=5, replace=False)
        item[start + 1 : start + 9 : 2] = 12 + generator.choice(120, size=4, replace=False)
    categories = [("common",) if index < 12 else ("rare",) for index in range(132)]
    world = log_dataset(user, item, np.arange(len(user)), 132, categories=categories)
    out = tmp_path_factory.mktemp("halves") / "run"
    return out, recollect.evaluate(world, models=("pop", "markov"), core=0, mask="none", out=out)


def test_categories_that_a_popular_list_lacks_are_measured_by_their_closed_form(popular_half):
    _, report = popular_half
    found = report.sections["models"]["pop"]
    # p = (1/2, 1/2), q = (1, 0), smoothed by 1 %.
    kl = 0.5 * np.log(0.5 / 0.995) + 0.5 * np.log(0.5 / 0.005)
    js = 0.5 * np.log2(1 / 0.75) + 0.5 * (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25))
    assert found["calibration_kl@10:category"]["value"] == pytest.approx(kl, abs=1e-9)
    assert found["calibration_js@10:category"]["value"] == pytest.approx(js, abs=1e-9)
    assert found["mrmc@10:category"]["value"] == pytest.approx(kl / np.log(100), abs=1e-9)
    assert found["calibration_kl@10:category"]["ci95"] == pytest.approx([kl, kl], abs=1e-9)


def test_page_and_json_hold_both_tables_and_exposure_with_intervals(popular_half):
    out, report = popular_half
    stored = json.loads((out / "report.json").read_text())
    assert set(stored["user_groups"]) == {"activity", "head share"}
    assert set(stored["user_groups"]["activity"]["pop"]) >= {"groups", "gap", "worst", "ratio", "n_ungrouped"}
    panels = {panel["title"]: panel for panel in report.sections["panels"]}
    by_group = panels["NDCG@10 by group of users"]
    assert [row[:2] for row in by_group["rows"]] == [
        [partition, label] for partition in ("activity", "head share") for label in ("pop", "markov")
    ]
    assert "niche 12, balanced 36, mainstream 12" in by_group["note"]
    assert "Are the categories of a list those of the history?" in panels
    # Everybody is shown the same ten items, in every resample.
    shown = report.sections["models"]["pop"]["coverage@10"]
    assert shown["ci95"] == pytest.approx([shown["value"]] * 2)
    even = panels["How evenly the catalogue is shown"]
    assert even["columns"][1:5] == ["entropy@10", "entropy_share@10", "ltc@10:items20", "ltc@10:mass80"]
    for cell in (cell for row in even["rows"] for cell in row[1:]):
        assert (cell["value"] is None) == (cell["ci95"] == [None, None])
        if cell["value"] is not None:
            assert cell["ci95"][0] - 1e-12 <= cell["value"] <= cell["ci95"][1] + 1e-12
    page = (out / "report.html").read_text()
    assert "NDCG@10 by group of users" in page
    assert "Are the categories of a list those of the history?" in page


def test_intervals_of_what_all_lists_have_together_hold_the_expected_values_which_raw_draws_of_users_do_not():
    n_users, k, per_place, repetitions = 200, 5, 40, 100
    share = 1 / np.arange(1, per_place + 1)
    share /= share.sum()
    expected = 1 - ((1 - share) ** n_users).mean()  # of the share of items shown; the places show different items
    candidate = np.ones(k * per_place, dtype=bool)
    generator = stream(5, "exposure")
    found = []
    for repetition in range(repetitions):
        lists = generator.choice(per_place, size=(n_users, k), p=share) + per_place * np.arange(k)
        options = {"tails": {":rare": np.arange(k * per_place) % per_place >= 8}, "resamples": 200, "seed": repetition}
        found.append(exposure_intervals(lists, np.arange(n_users), candidate, **options))
        assert found[-1]["coverage"].n == n_users
    means = {name: np.mean([one[name].value for one in found]) for name in ("gini", "entropy", "entropy_share")}
    rare = 1 - ((1 - share[8:]) ** n_users).mean()
    for name, truth in (("coverage", expected), ("ltc:rare", rare), *means.items()):
        held = np.mean([one[name].low <= truth <= one[name].high for one in found])
        assert held >= 0.85, (name, held)
    assert np.mean([one["coverage"].value for one in found]) == pytest.approx(expected, abs=0.01)
    # Without the shift, a resample of the last sample shows far fewer items than the sample itself.
    drawn = [len(np.unique(lists[generator.integers(n_users, size=n_users)])) / len(candidate) for _ in range(100)]
    assert np.mean(np.array(drawn) < found[-1]["coverage"].value) > 0.97


@pytest.mark.parametrize(("of_head", "of_tail", "least"), [(0.3, 0.1, 0.9), (0.2, 0.2, 0.9), (0.05, 0.0, 1.0)])
def test_intervals_of_equal_exposure_hold_the_planted_spread(of_head, of_tail, least):
    n_users, possible, repetitions = 150, np.array([4, 16]), 60
    generator = stream(7, "spread", round(of_head * 100))
    truth = abs(of_head - of_tail) / (of_head + of_tail)
    held, raw = [], []
    for repetition in range(repetitions):
        shown = generator.binomial(possible, [of_head, of_tail], size=(n_users, 2))
        found = spread_interval(
            shown, np.tile(possible, (n_users, 1)), np.arange(n_users), resamples=200, seed=repetition
        )
        assert 0 <= found.low <= found.high <= 1
        held.append(found.low <= truth <= found.high)
        raw.append(found.value)
    assert np.mean(held) >= least
    assert np.mean(raw) == pytest.approx(truth, abs=0.06)


def test_the_spread_of_one_user_or_of_nothing_has_no_interval():
    one = spread_interval(np.array([[2, 1]]), np.array([[4, 4]]), np.array([7]))
    assert one.value == pytest.approx(1 / 3)
    assert np.isnan([one.low, one.high]).all()
    nothing = spread_interval(np.zeros((5, 2), dtype=int), np.zeros((5, 2), dtype=int), np.arange(5))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_the_interval_of_dgap_over_seeds_is_that_of_the_mean_list_not_of_each_seed():
    world = random_world(31, n_users=80)
    split = leave_one_out(world)
    table = evaluate_ranker(FixedScores(np.zeros((80, world.n_items), dtype=np.float32)), world, split, ks=(10,))
    noise = stream(6, "noise").normal(size=80)
    profile = np.full(80, 4.0)
    seeds = [table.with_columns({"arp@10": 6.0 + sign * noise, "gap_profile": profile}) for sign in (1, -1)]
    lifts = [popularity_lift(run.user, run.column("arp@10"), profile, 500, 0) for run in seeds]
    totals = [
        {
            "dgap@10": {"value": lift.value, "ci95": [lift.low, lift.high], "n": 80},
            "coverage@10": {"value": shown, "ci95": [shown - 0.1, shown + 0.1], "n": 80},
        }
        for lift, shown in zip(lifts, (0.2, 0.4), strict=True)
    ]

    def compared(chosen):
        return compare_models(
            {"row": [seeds[index] for index in chosen]},
            metrics=["arp@10"],
            totals={"row": [totals[index] for index in chosen]},
            resamples=500,
            permutations=10,
        ).models["row"]

    one = compared([0])["dgap@10"]
    assert one["ci95"] == pytest.approx([lifts[0].low, lifts[0].high])
    assert one["ci95"][1] - one["ci95"][0] > 0.05
    # The noise of the two seeds cancels user by user: every resample has a lift of exactly 6 / 4 - 1.
    both = compared([0, 1])
    assert both["dgap@10"]["value"] == pytest.approx(0.5)
    assert both["dgap@10"]["ci95"] == pytest.approx([0.5, 0.5])
    assert (both["dgap@10"]["n_seeds"], both["dgap@10"]["sd"] > 0) == (2, True)
    assert compared([0, 0])["dgap@10"]["ci95"] == pytest.approx(one["ci95"])
    assert both["coverage@10"]["ci95"] == pytest.approx([0.2, 0.4])
    per_user = bootstrap_table({"arp": seeds[0].column("arp@10") / 4 - 1}, seeds[0].user, n=500, seed=0)["arp"]
    assert one["ci95"] == pytest.approx(per_user["ci95"])


def lifted(of_list: np.ndarray, of_profile: np.ndarray):
    """A case table of one case per user with planted popularity of lists and histories."""
    n_users = len(of_list)
    world = random_world(31, n_users=n_users)
    table = evaluate_ranker(
        FixedScores(np.zeros((n_users, world.n_items), dtype=np.float32)), world, leave_one_out(world), ks=(10,)
    )
    return table.with_columns({"arp@10": of_list, "gap_profile": of_profile})


def test_the_lift_of_a_group_is_its_lists_over_its_own_histories():
    # Niche users are shown what everybody is shown: for them alone it is a lift, though all lists are alike.
    profile = np.where(np.arange(80) < 20, 2.0, 8.0) + np.tile([-0.5, 0.5], 40)
    table = lifted(np.full(80, 8.0), profile)
    groups = UserGroups(np.repeat([0, 1, 2, -1], 20), ("niche", "balanced", "mainstream"))
    found = group_lift(table, groups, resamples=400)
    values = {name: row["value"] for name, row in found["groups"].items()}
    assert values == pytest.approx({"niche": 3.0, "balanced": 0.0, "mainstream": 0.0})
    assert {name: row["n"] for name, row in found["groups"].items()} == {"niche": 20, "balanced": 20, "mainstream": 20}
    assert (found["metric"], found["n_ungrouped"]) == ("dgap@10", 20)
    assert found["furthest"] == {"group": "niche", "value": pytest.approx(3.0)}
    assert found["gap"]["value"] == pytest.approx(3.0)
    low, high = found["gap"]["ci95"]
    assert 2.5 < low < 3.0 < high < 3.6
    # The ratio of the group's means, not the mean of its users' ratios, which is above it.
    assert np.mean(8.0 / profile[:20] - 1) > 3.2
    # All users as one group have the overall dGAP, interval and all.
    whole = group_lift(table, UserGroups(np.zeros(80, dtype=int), ("all",)), resamples=400)["groups"]["all"]
    overall = popularity_lift(table.user, np.full(80, 8.0), profile, 400, 0)
    assert [whole["value"], *whole["ci95"]] == pytest.approx([overall.value, overall.low, overall.high])


def test_a_group_without_any_history_has_no_lift_and_decides_no_gap():
    profile = np.where(np.arange(40) < 20, 0.0, 4.0)
    groups = UserGroups(np.repeat([0, 1], 20), ("new", "known"))
    found = group_lift(lifted(np.full(40, 2.0), profile), groups, resamples=50)
    assert found["groups"]["new"] == {"value": None, "ci95": [None, None], "n": 20}
    assert found["groups"]["known"]["value"] == pytest.approx(-0.5)
    assert (found["gap"]["value"], found["furthest"]["group"]) == (0.0, "known")
    json.dumps(found, allow_nan=False)
    with pytest.raises(InputError, match="the groups cover 3 users"):
        group_lift(lifted(np.full(40, 2.0), profile), UserGroups(np.zeros(3, dtype=int), ("all",)))


def test_the_report_holds_the_lift_of_every_partition_averaged_over_the_lists_of_all_seeds(popular_half):
    out, report = popular_half
    found = report.sections["lift_groups"]
    assert list(found) == list(report.sections["user_groups"])
    for partition, rows in found.items():
        for label, row in rows.items():
            sizes = {name: entry["n"] for name, entry in row["groups"].items()}
            theirs = report.sections["user_groups"][partition][label]["groups"]
            assert sizes == {name: entry["n"] for name, entry in theirs.items()}
            whole = report.sections["models"][label]["dgap@10"]["value"]
            values = [entry["value"] for entry in row["groups"].values()]
            assert min(values) - 1e-9 <= whole <= max(values) + 1e-9
    page = (out / "report.html").read_text()
    assert "Popularity lift (dgap@10) by group of users" in page
