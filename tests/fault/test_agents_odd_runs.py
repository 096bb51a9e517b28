"""Runs at the edge of what can be said: the report is written whole, and what cannot be said is left out or null."""

import json

import numpy as np
import pytest
from support.agent_worlds import reader, tiny_dataset, with_log

from recollect.agents.simulate import simulate
from recollect.data import HarborConfig, build_harbor
from recollect.types import Dataset, Interactions

SMALL = HarborConfig(n_users=12, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2)
OPTIONS = {"interactions_per_user": 2, "held_out": 1, "recall": False}


@pytest.fixture(scope="module")
def world():
    return build_harbor(SMALL, seed=6).dataset


def run(dataset, folder, backbone=None, **options):
    backbone = backbone or reader()
    report = simulate(dataset, backbone=backbone, embedder=backbone, out=str(folder), **{**OPTIONS, **options})
    assert json.loads((folder / "report.json").read_text())["metrics"] == json.loads(json.dumps(report.metrics))
    assert "<svg" in (folder / "report.html").read_text()
    assert (folder / "events.jsonl").stat().st_size
    return report


@pytest.mark.parametrize("users", [1, 2])
def test_few_users_get_a_report_without_intervals_that_mean_nothing(world, tmp_path, users):
    report = run(world, tmp_path / "out", users=users)
    assert report.metrics["ranking/mrr"]["n"] == users
    assert 0 < report.metrics["ranking/mrr"]["value"] <= 1
    if users == 1:
        assert report.metrics["ranking/mrr"]["ci95"] == [None, None]
    assert any("choice layer was not fitted" in warning for warning in report.warnings)


def unrated(dataset):
    log = dataset.interactions
    bare = Interactions(user=log.user, item=log.item, time=log.time, domain=log.domain, row=log.row)
    return Dataset(dataset.name, bare, dataset.catalog, dataset.users, dataset.domains, {**dataset.meta, "world": None})


def test_a_log_without_ratings_asks_for_none(world, tmp_path):
    dataset = unrated(world)
    report = run(dataset, tmp_path / "out")
    assert not any(name.startswith("rating/") for name in report.metrics)
    assert any("no ratings" in warning for warning in report.warnings)
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()}
    assert "rate" not in kinds


def test_a_log_of_which_some_rows_are_rated_asks_for_those(world, tmp_path):
    rating = np.array(world.interactions.rating)
    rating[::2] = np.nan
    dataset = with_log(world, rating=rating)
    run(dataset, tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    rated = sum(event["kind"] == "rate" for event in events)
    assert 0 < rated < sum(event["kind"] == "rank" and event["part"] in ("calibrate", "test") for event in events)


def test_a_log_of_positions_says_that_time_across_users_means_nothing(world, tmp_path):
    position = np.concatenate([np.arange(np.sum(world.interactions.user == user)) for user in range(world.n_users)])
    dataset = with_log(world, time=position)
    dataset = Dataset(
        dataset.name,
        dataset.interactions,
        dataset.catalog,
        dataset.users,
        dataset.domains,
        {**dataset.meta, "clock": "position"},
    )
    report = run(dataset, tmp_path / "out")
    assert any("positions instead of clock times" in warning for warning in report.warnings)


def test_a_world_of_certain_choices_has_a_finite_divergence_from_the_truth(tmp_path):
    config = HarborConfig(
        n_users=12, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2, temperature=0.001
    )
    report = run(build_harbor(config, seed=1).dataset, tmp_path / "out")
    assert report.metrics["truth/kl"]["value"] >= 0
    assert report.metrics["truth/kl_of_uniform"]["value"] == pytest.approx(np.log(10), abs=0.1)
    assert report.metrics["truth/best_mrr"]["value"] == pytest.approx(1.0)


@pytest.mark.parametrize("ranking", ["pmi", "listwise"])
def test_a_model_that_only_talks_rubbish_gets_a_report_that_says_so(world, tmp_path, ranking):
    backbone = reader(generate=lambda request: "no", name="rubbish")
    options = {"writer": "llm", "decision": "generate", "ranking": ranking, "max_failed": 1.0}
    report = run(world, tmp_path / "out", backbone, **options)
    assert any("unusable model output" in warning for warning in report.warnings)
    if ranking == "listwise":  # every slate is tied: exactly chance
        alone = report.baselines["language-model-alone"]["ranking/mrr"]["value"]
        assert alone == pytest.approx(0.292897, abs=1e-5)


def test_every_way_to_simulate_writes_a_report(world, tmp_path):
    for method in ("agentcf", "agentcf+dual", "agentcf+shared", "agentcf++-no-group"):
        report = run(world, tmp_path / method, method=method, candidates=5)
        assert report.protocol["method"] == method
    for number, options in enumerate(
        ({"ranking": "pairwise", "candidates": 3}, {"order": "paper"}, {"matching": "uniform", "held_out": 2})
    ):
        run(world, tmp_path / str(number), **options)


def test_items_nobody_can_describe_still_make_a_run(tmp_path):
    items = [(f"i{at}", f"{at}", "x", (), None) for at in range(60)]
    events = [(f"u{user}", f"i{(user * 7 + at) % 60}", 100 * at + user) for user in range(12) for at in range(6)]
    report = run(tiny_dataset(events, items), tmp_path / "out")
    assert report.metrics["ranking/mrr"]["n"] == 12
