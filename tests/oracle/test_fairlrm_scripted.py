"""What scripted models must give end to end: oracles 1-5, 9, 14 and 15 of fairlrm 9, through `prompt_rank` itself."""

import numpy as np
import pytest
from support.fair_worlds import (
    by_popularity,
    echo,
    follows_quota,
    knows_targets,
    long_tail_world,
    make_dataset,
    reader,
    two_tastes_world,
)

from recollect.backbones.scripted import ScriptedBackbone
from recollect.data.splits import leave_one_out
from recollect.errors import ConfigError, InputError, UnknownName
from recollect.recommenders.popularity import Popularity
from recollect.recommenders.prompt_cases import draw_cases
from recollect.recommenders.prompt_metrics import Judge
from recollect.recommenders.prompt_rank import prompt_rank
from recollect.recommenders.prompt_rank_config import PromptRankConfig
from recollect.recommenders.rerank import quota

PLAIN = {"core": 1, "generator": "pop", "resamples": 50, "rerankers": ()}
IN_ORDER = {**PLAIN, "orders": "retrieval", "permutations": 1}
NDCG, RECALL, MRMC = "ndcg@10", "recall@10", "mrmc@10:head/tail"
TAIL, LTC = "tail_share@10:items20", "ltc@10:items20"


@pytest.fixture(scope="module")
def world():
    return long_tail_world()


def judged(dataset, **options):
    """The cases of a run and their judge."""
    config = PromptRankConfig(**{**PLAIN, **options})
    split = leave_one_out(dataset)
    cases = draw_cases(dataset, split, Popularity().fit(dataset, split), config)
    return cases, Judge(cases, config.k)


def run(dataset, backbone, tmp_path, **options):
    return prompt_rank(dataset, backbone=backbone, out=tmp_path / "run", overwrite=True, **{**IN_ORDER, **options})


@pytest.mark.parametrize("backend", ["label_logits", "generate"])
def test_echo_gives_every_metric_of_the_generator_exactly(world, tmp_path, backend):
    report = run(world, reader(echo, "echo"), tmp_path, preset=("base", "fairlrm"), backend=backend)
    models = report.sections["models"]
    for preset in ("base", "fairlrm"):
        costs = {"tokens_per_user", "seconds_per_user"}
        assert {name: value for name, value in models[preset].items() if name not in costs} == models["pop"]
    assert report.sections["user_side"]["verdict"] == "user-side facts not used by this model"


def test_oracle_gives_the_share_of_retrieved_targets(world, tmp_path):
    cases, judge = judged(world)
    titles = world.catalog.titles
    targets = {
        tuple(titles[item] for item in history[-20:]): titles[target]
        for history, target in zip(cases.histories, cases.targets, strict=True)
    }
    report = run(world, reader(knows_targets(targets), "oracle"), tmp_path, preset=("base",), controls=False)
    share = float(judge.retrieved.mean())
    assert 0.1 < share < 1
    assert report.metrics[NDCG]["value"] == pytest.approx(share, abs=1e-12)
    assert report.metrics[f"{NDCG}|retrieved"]["value"] == pytest.approx(1)
    assert report.protocol["retrieved_share"] == share


@pytest.mark.parametrize("deciles", [False, True])
def test_popularity_reader_equals_the_closed_form_resort(world, tmp_path, deciles):
    """Proves that I2 is in the prompt and correctly labelled."""
    cases, judge = judged(world, candidate_set="mixed")
    report = run(
        world,
        reader(by_popularity, "popularity"),
        tmp_path,
        preset=("item", "user"),
        candidate_set="mixed",
        deciles=deciles,
        permutations=4,
        orders="shuffled",
        backend="label_logits",
    )
    key = cases.popularity.decile if deciles else cases.popularity.is_popular.astype(int)
    # Orders are averaged, so only classes are determined; the tail share of the first ten is.
    classes = [-np.sort(-key[row])[:10] for row in cases.candidates]
    niche = ~cases.popularity.is_popular
    if not deciles:
        expected = np.mean([(row == 0).mean() for row in classes])
        assert report.sections["models"]["item"][TAIL]["value"] == pytest.approx(expected)
    in_order = run(
        world,
        reader(by_popularity, "popularity"),
        tmp_path,
        preset=("item", "user"),
        candidate_set="mixed",
        deciles=deciles,
    )
    lists = np.stack([row[np.argsort(-key[row], kind="stable")] for row in cases.candidates])
    for name, entry in judge.table(lists, resamples=50, seed=0).items():
        assert in_order.sections["models"]["item"][name] == entry, name
    # Without tags the same reader cannot tell: `user` says nothing about candidates.
    untold = judge.table(np.stack(cases.candidates), resamples=50, seed=0)
    assert in_order.sections["models"]["user"][TAIL] == untold[TAIL]
    assert niche.any()


def test_rule_follower_equals_quota(world, tmp_path):
    cases, _ = judged(world, candidate_set="mixed")
    report = run(
        world,
        reader(follows_quota, "rule"),
        tmp_path,
        preset=("base", "fairlrm"),
        candidate_set="mixed",
        rerankers=("quota",),
    )
    models = report.sections["models"]
    for metric in (NDCG, RECALL, MRMC, TAIL, LTC, "lpd@10"):
        assert models["fairlrm"][metric] == models["pop + quota"][metric], metric
    assert models["fairlrm"][MRMC]["value"] < models["base"][MRMC]["value"]
    assert report.sections["user_side"]["verdict"] == "user-side facts are used by this model"

    items = np.stack(cases.candidates)
    popular = cases.popularity.is_popular[items]
    wanted = np.array([profile.quota(10) for profile in cases.profiles])
    scores = np.broadcast_to(-np.arange(20.0), items.shape)
    taken = np.take_along_axis(popular, quota(scores, popular, wanted, 10), axis=1)[:, :10].sum(axis=1)
    reachable = (popular.sum(axis=1) >= wanted) & ((~popular).sum(axis=1) >= 10 - wanted)
    assert reachable.mean() > 0.5
    assert (taken == wanted)[reachable].all()


RUBBISH = (
    "I would love to help! Here are some thoughts.",
    '["A", "A", "B", "Nowhere Land", "A"]',
    '```json\n["C", "D", "E"',
    "1. **Title 003**\n2. Imaginary Film (1999)\n- A\n",
    "",
    '{"ranking": [[[[[[[[[[1]]]]]]]]]]}',
    "\x00\ud800 A, B, C, D",
    "[" * 5000,
)


def test_rubbish_never_raises_and_invents_no_item(world, tmp_path):
    def generate(request):
        return RUBBISH[len(request.messages[-1].content) % len(RUBBISH)]

    report = run(
        world, ScriptedBackbone(generate=generate, name="rubbish"), tmp_path, preset=("base",), backend="generate"
    )
    written = report.sections["written"]["base"]
    assert 0 < written["invalid_rate"] <= 1
    assert written["filled"] > 0
    assert written["fill"] == "backbone"
    assert any("completed in backbone order" in warning for warning in report.warnings)
    assert report.metrics[RECALL]["n"] == 60
    cases, _ = judged(world)
    assert report.protocol["fill"] == "backbone"
    assert set(np.concatenate(cases.candidates)) <= set(range(world.n_items))


def test_label_sensitivity_of_the_popularity_reader_is_negative_for_everybody(world, tmp_path):
    report = run(
        world,
        reader(by_popularity, "popularity"),
        tmp_path,
        preset=("fairlrm",),
        candidate_set="mixed",
        orders="shuffled",
        permutations=2,
    )
    found = report.sections["label_sensitivity"]
    assert found["n"] == 60
    assert found["negative"] == 60
    assert found["change"]["ci95"][1] < 0
    assert found["p_sign"] < 1e-12
    blind = run(world, reader(echo, "echo"), tmp_path, preset=("fairlrm",), candidate_set="mixed")
    assert blind.sections["label_sensitivity"]["change"]["value"] == 0
    assert blind.sections["label_sensitivity"]["p_sign"] == 1


def test_following_the_user_side_raises_the_recall_of_niche_users_and_a_class_blind_reader_cannot(tmp_path):
    dataset = two_tastes_world()
    options = {"candidates": 26, "preset": ("base", "fairlrm"), "resamples": 200}
    told = run(dataset, reader(follows_quota, "rule"), tmp_path, **options)
    blind = run(dataset, reader(echo, "echo"), tmp_path, **options)
    recall = {
        name: {preset: report.sections["groups"][preset][RECALL]["niche"]["value"] for preset in ("base", "fairlrm")}
        for name, report in {"told": told, "blind": blind}.items()
    }
    assert recall["told"]["fairlrm"] > recall["told"]["base"] + 0.1
    assert recall["blind"]["fairlrm"] == recall["blind"]["base"] == recall["told"]["base"]


def test_shuffled_profiles_cost_the_rule_follower_and_the_report_says_so_of_one_who_does_not_read_them(tmp_path):
    dataset = two_tastes_world()
    options = {"candidates": 26, "preset": ("fairlrm",), "resamples": 400}
    told = run(dataset, reader(follows_quota, "rule"), tmp_path, **options)
    blind = run(dataset, reader(echo, "echo"), tmp_path, **options)
    assert told.sections["user_side"]["verdict"] == "user-side facts are used by this model"
    assert told.sections["user_side"]["mrmc"]["difference"]["ci95"][1] < 0
    assert "user-side facts not used by this model" not in told.warnings
    assert "user-side facts not used by this model" in blind.warnings
    assert "user-side facts not used by this model" in (tmp_path / "run" / "report.html").read_text()


def test_attributes_are_measured_one_at_a_time(world, tmp_path):
    def by_gender(chat, shown):
        backwards = "gender: F" in chat[-1].content
        return list(range(len(shown)))[:: -1 if backwards else 1]

    report = run(world, reader(by_gender, "gender"), tmp_path, preset=("base",), attributes=("gender",), candidates=20)
    overlap = report.sections["stability"]["gender"]["jaccard"]["value"]
    assert overlap == pytest.approx(0.5)  # half the users' lists are turned round: nothing of the first ten stays
    assert report.sections["stability"]["gender"]["prag"]["value"] == pytest.approx(0.5)
    options = {"preset": ("base",), "attributes": ("gender",), "candidates": 10}
    turned = run(world, reader(by_gender, "gender"), tmp_path, **options).sections["stability"]["gender"]
    assert turned["jaccard"]["value"] == pytest.approx(1.0)  # the same ten items, half of the lists backwards
    assert turned["prag"]["value"] == pytest.approx(0.5)
    with pytest.raises(InputError, match="occupation"):
        run(world, reader(echo, "echo"), tmp_path, preset=("base",), attributes=("occupation",))


def test_inserted_targets_are_named_in_every_metric(world, tmp_path):
    report = run(world, reader(echo, "echo"), tmp_path, preset=("base",), insert_target=True)
    assert all("~inserted" in name for name in report.metrics if "per_user" not in name)
    assert report.protocol["retrieved_share"] == 1
    assert any("say nothing" in warning for warning in report.warnings)
    # Other models' lists hold no inserted target, so they cannot stand under these names.
    assert set(report.sections["models"]) == {"pop", "base"}


def test_further_conventional_models_are_rows_and_may_be_left_out(world, tmp_path):
    options = {"preset": ("base",), "resamples": 5}
    some = run(world, reader(echo, "echo"), tmp_path, compare=("markov", "ease", "pop"), **options)
    assert {"markov", "ease"} <= set(some.sections["models"])
    assert not any(name.endswith("|retrieved") for name in some.sections["models"]["ease"])
    assert "not every strong baseline is in this table: sasrec missing; add to --compare" in some.warnings
    none = run(world, reader(echo, "echo"), tmp_path, compare=("none",), **options)
    assert set(none.sections["models"]) == {"pop", "base"}
    with pytest.raises(UnknownName, match="ease"):
        run(world, reader(echo, "echo"), tmp_path, compare=("eese",), **options)


def test_the_gap_between_mainstream_and_niche_users_is_stated_for_every_setting(tmp_path):
    dataset = two_tastes_world()
    options = {"candidates": 26, "preset": ("fairlrm",), "resamples": 200, "rerankers": ("cp",), "compare": ("none",)}
    report = run(dataset, reader(follows_quota, "rule"), tmp_path, **options)
    found = report.sections["niche_gap"]
    groups = report.sections["groups"]["pop"][NDCG]
    assert found["reference"] == "pop"
    assert found["n"] == {name: groups[name]["n"] for name in ("mainstream", "niche")}
    assert found["gap"]["value"] == pytest.approx(groups["mainstream"]["value"] - groups["niche"]["value"])
    assert found["gap"]["value"] > 0
    rows = {(row["method"], row["value"]): row for row in found["rows"]}
    assert {method for method, _ in rows} == {"pop + cp", "fairlrm + cp"}
    untouched = rows["pop + cp", 0.0]
    assert (untouched["closed"], untouched["change"], untouched["within"]) == (0.0, 0.0, False)
    assert untouched["reduction"]["ci95"] == [0.0, 0.0]
    for row in found["rows"]:
        assert row["closed"] == pytest.approx(1 - row["gap"]["value"] / found["gap"]["value"])
        assert row["within"] == (row["closed"] >= 0.5 and row["change"] >= -0.02)
        assert row["supported"] <= row["within"]
        assert row["gap"]["ci95"][0] <= row["gap"]["value"] <= row["gap"]["ci95"][1]
    assert "gap between mainstream and niche users" in (tmp_path / "run" / "report.html").read_text()


def test_report_holds_curves_with_intervals_and_hyper_volumes(world, tmp_path):
    report = run(
        world,
        reader(follows_quota, "rule"),
        tmp_path,
        preset=("all",),
        rerankers=("cp", "poppen", "xquad", "mmr", "quota"),
    )
    curves = {curve["method"]: curve for curve in report.sections["curves"]["calibration"]["curves"]}
    assert {"pop + cp", "pop + poppen", "fairlrm + cp", "pop mixed with anti"} <= set(curves)
    first = curves["pop + cp"]["points"]
    assert len(first) == 11
    assert first[0][MRMC]["value"] == pytest.approx(report.sections["models"]["pop"][MRMC]["value"])
    assert first[0][NDCG]["ci95"][0] <= first[0][NDCG]["value"] <= first[0][NDCG]["ci95"][1]
    values = [point[MRMC]["value"] for point in first]
    assert values[-1] < values[0]
    for plane in report.sections["curves"].values():
        assert plane["reference"] == "pop + cp"
        for curve in plane["curves"]:
            assert 0 <= curve["hypervolume"]["value"] <= 1
            assert (curve["difference"] is None) == (curve["method"] == "pop + cp")
    groups = report.sections["groups"]["fairlrm"][NDCG]
    means = [groups[name]["value"] for name in ("niche", "balanced", "mainstream")]
    low, high = groups["gap"]["ci95"]
    assert groups["gap"]["value"] == pytest.approx(max(means) - min(means))
    assert 0 <= low <= groups["gap"]["value"] <= high
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") >= 2
    assert "hyper-volume" in page
    assert report.protocol["fingerprint"]


def test_lift_and_exposure_of_a_group_are_those_of_its_users_alone(world):
    cases, judge = judged(world)
    items = np.stack(cases.candidates)
    groups = judge.groups(items, resamples=40, seed=0)
    count, log = cases.popularity.count, cases.dataset.interactions
    lifts = {}
    for name in ("niche", "balanced", "mainstream"):
        inside = np.flatnonzero(cases.groups == name)
        of_lists = np.mean([count[items[row, :10]].mean() for row in inside])
        own = [log.item[cases.cases.start[row] : cases.cases.end[row]] for row in inside]
        lifts[name] = of_lists / np.mean([count[history].mean() for history in own]) - 1
        found = groups["dgap@10"][name]
        assert found["value"] == pytest.approx(lifts[name])
        assert found["ci95"][0] <= found["value"] <= found["ci95"][1]
        assert found["n"] == len(inside)
        shown = np.unique(items[inside, :10])
        assert groups["coverage@10"][name]["value"] == pytest.approx(len(shown) / len(count))
        assert groups[LTC][name]["value"] == pytest.approx(judge.tail[shown].sum() / judge.tail.sum())
    assert len({round(value, 6) for value in lifts.values()}) == 3
    assert groups["dgap@10"]["gap"]["value"] == pytest.approx(max(lifts.values()) - min(lifts.values()))
    # Coverage grows with the size of a group, so groups of 20, 60 and 20 % are not set against each other.
    assert groups["coverage@10"]["gap"] is None
    assert groups["gini@10"]["worst"] is None


def curves_of(report, plane="calibration"):
    return {curve["method"]: curve for curve in report.sections["curves"][plane]["curves"]}


def values_of(curve, metric):
    return [(point["value"], point[metric]["value"]) for point in curve["points"]]


def test_a_curve_over_the_candidate_mix_asks_about_other_candidates(world, tmp_path):
    cases, judge = judged(world, mix=(0.75, 1.0))
    titles = world.catalog.titles
    targets = {
        tuple(titles[item] for item in history[-20:]): titles[target]
        for history, target in zip(cases.histories, cases.targets, strict=True)
    }
    options = {"preset": ("base",), "controls": False, "mix": (0.75, 1.0), "rerankers": ("cp",)}
    report = run(world, reader(knows_targets(targets), "oracle"), tmp_path, **options)
    curves = curves_of(report)
    retrieved = {0.0: judge.retrieved.mean()} | {share: other.retrieved.mean() for share, other in cases.mixes.items()}
    assert len(set(retrieved.values())) == 3
    assert dict(values_of(curves["base over the candidate mix"], NDCG)) == pytest.approx(retrieved)
    assert f"{NDCG}|retrieved" not in report.sections["models"]["base (mix 0.75)"]
    told = report.sections["models"]["base (mix 1)"]
    assert told[TAIL]["value"] == pytest.approx(1), "every candidate is niche"
    titles = [panel["title"] for panel in report.sections["panels"]]
    assert "NDCG against MRMC (lower is better), over the candidate mix" in titles
    assert "base over the candidate mix" in (tmp_path / "run" / "report.html").read_text()


def test_echo_gives_the_generators_curve_over_the_mix_and_a_run_may_be_given_one_later(world, tmp_path):
    options = {**IN_ORDER, "preset": ("base", "fairlrm"), "out": tmp_path / "later", "candidate_set": "mixed"}
    prompt_rank(world, backbone=reader(echo, "echo"), **options)
    model = reader(echo, "echo")
    report = prompt_rank(world, backbone=model, resume=True, mix=(0.0, 0.5, 0.75), **options)
    assert model.calls["choose"] == 2 * 2 * len(judged(world)[0]), "the run's own share is asked once"
    for plane, cost in (("calibration", MRMC), ("coverage", LTC)):
        curves = curves_of(report, plane)
        for metric in (NDCG, cost):
            expected = values_of(curves["pop over the candidate mix"], metric)
            assert [share for share, _ in expected] == [0.0, 0.5, 0.75]
            assert values_of(curves["base over the candidate mix"], metric) == expected
            assert values_of(curves["fairlrm over the candidate mix"], metric) == expected
    plan = prompt_rank(world, backbone="smollm2", dry_run=True, **{**options, "out": None}, mix=(0.0, 0.5, 0.75))
    assert plan.ledger["calls"] == report.ledger["requests"] - 1  # the check of labels


def test_a_curve_over_temperature_starts_at_the_method_itself_and_is_the_same_every_time(world, tmp_path):
    options = {"preset": ("base",), "rerankers": ("softmax", "cp")}
    report = run(world, reader(by_popularity, "popularity"), tmp_path, **options)
    curves, models = curves_of(report), report.sections["models"]
    for method in ("pop", "base"):
        for metric in (NDCG, MRMC):
            first = values_of(curves[f"{method} + softmax"], metric)[0]
            assert first == (0.0, pytest.approx(models[method][metric]["value"]))
    curve = values_of(curves["pop + softmax"], MRMC)
    assert [value for value, _ in curve] == [0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0]
    assert len({value for _, value in curve}) > 5
    titles = [panel["title"] for panel in report.sections["panels"]]
    assert "NDCG against long-tail coverage (higher is better), over temperature" in titles
    again = run(world, reader(by_popularity, "popularity"), tmp_path, **options)
    assert values_of(curves_of(again)["pop + softmax"], MRMC) == curve


def test_a_reader_of_places_is_called_one(world, tmp_path):
    options = {"preset": ("base",), "orders": "shuffled", "permutations": 2}
    places = run(world, reader(echo, "echo"), tmp_path, **options)
    assert abs(places.sections["orders"]["base"]["kendall_tau"]["value"]) < 0.15
    assert any("ranks items rather than places and labels" in warning for warning in places.warnings)

    def by_title(chat, shown):
        return sorted(range(len(shown)), key=lambda at: shown[at].title)

    items = run(world, reader(by_title, "titles"), tmp_path, **options)
    assert items.sections["orders"]["base"]["kendall_tau"]["value"] == 1
    assert not any("places and labels" in warning for warning in items.warnings)


def test_a_global_temporal_split_is_judged_on_the_last_event_after_the_cut(world, tmp_path):
    report = run(world, reader(echo, "echo"), tmp_path, preset=("base",), protocol="gts", candidates=10)
    assert "global_temporal" in report.protocol["split"]
    assert "target=last" in report.protocol["split"]
    assert report.metrics[NDCG] == report.sections["models"]["pop"][NDCG]


def test_nan_scores_of_the_generator_and_users_without_a_past_are_refused(world, tmp_path, monkeypatch):
    def broken(self, histories, candidates=None):
        return np.full((len(histories), self.n_items), np.nan, dtype=np.float32)

    monkeypatch.setattr(Popularity, "score", broken)
    with pytest.raises(InputError, match="the candidate generator gave NaN scores"):
        run(world, reader(echo, "echo"), tmp_path)
    monkeypatch.undo()
    short = make_dataset([(user, item) for user in range(6) for item in (0, 1)], 6, 30)
    with pytest.raises(InputError, match="no test user of 'fair' has a training history; use a longer log"):
        run(short, reader(echo, "echo"), tmp_path, candidates=4, k=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": ("fair",)}, UnknownName, "fairlrm-without-I1"),
        ({"generator": "popular"}, UnknownName, "ease"),
        ({"k": 30}, ConfigError, "number of candidates"),
        ({"candidate_set": "full"}, ConfigError, "title_loglik or yes_no"),
        ({"permutations": 3}, ConfigError, "one retrieval order"),
        ({"backend": "generate", "calibrate": True}, ConfigError, "label scores"),
        ({"candidates": 80}, InputError, "fewer than 80 unseen|fewer"),
        ({"candidates": 800}, InputError, "fewer candidates"),
        ({"users": 0}, ConfigError, "at least 1"),
        ({"rerankers": ("best",)}, ConfigError, "xquad"),
        ({"mix": (0.5, 1.5)}, ConfigError, "mix must hold shares between 0 and 1, got 1.5"),
        ({"mix": (0.5, 0.5)}, ConfigError, "mix names a share more than once"),
        ({"mix": (0.5,), "candidate_set": "full", "backend": "yes_no"}, ConfigError, "full catalogue is not mixed"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(world, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(world, reader(echo, "echo"), tmp_path, **options)
