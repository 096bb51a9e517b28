"""What the checks of a run can see: leaks in the slates, agents of the wrong users, agents that know the answer."""

from unittest import mock

import numpy as np
import pytest
from support.agent_worlds import InProcess, options_of, reader

from recollect.agents import validation
from recollect.agents.agentcf import AgentCF
from recollect.agents.layers import Scored
from recollect.agents.plan import make_plan
from recollect.agents.simulate import simulate
from recollect.data import HarborConfig, build_harbor
from recollect.eval.agreement import ranking
from recollect.eval.metrics import chance
from recollect.types import Report

OPTIONS = {"interactions_per_user": 2, "held_out": 2, "recall": False}


def run(dataset, folder, **options):
    backbone = reader()
    return simulate(dataset, backbone=InProcess(backbone), embedder=backbone, out=str(folder), **{**OPTIONS, **options})


# ---- the audit ---------------------------------------------------------------------------------------------------

LEAKY = HarborConfig(
    n_users=48, n_domains=1, items_per_domain=150, min_events=12, max_events=14, quality_weight=3.0, shared_weight=0.3,
    shock_strength=0.0, conflict_share=0.0,
)  # fmt: skip


def findings(report):
    return {finding["scorer"] for finding in report.sections["audit"]}


def test_uniform_negatives_on_a_log_of_popular_items_put_a_warning_into_the_report(tmp_path):
    dataset = build_harbor(LEAKY, seed=0).dataset
    report = run(dataset, tmp_path / "uniform", matching="uniform")
    assert "popularity" in findings(report)
    (warning,) = [text for text in report.warnings if "null scorer 'popularity'" in text]
    assert "standard errors" in warning
    assert report.baselines["popularity"]["ranking/mrr"]["value"] > 0.45
    assert "null scorer" in (tmp_path / "uniform" / "report.html").read_text()


def test_matched_negatives_on_the_same_log_do_not(tmp_path):
    report = run(build_harbor(LEAKY, seed=0).dataset, tmp_path / "matched", matching="matched")
    assert not findings(report) & {"popularity", "anti-popularity", "seen-first", "random", "candidate-position"}
    low, high = report.baselines["popularity"]["ranking/mrr"]["ci95"]
    assert low - 0.05 < chance(10)["ranking/mrr"] < high + 0.05


def test_the_report_holds_the_null_scorers_it_promises(tmp_path):
    report = run(build_harbor(LEAKY, seed=1).dataset, tmp_path / "out")
    promised = {"random", "popularity", "anti-popularity", "seen-first", "tfidf-history", "bm25-history", "mf"}
    assert promised <= report.baselines.keys()
    assert {"title-length", "memory-length", "candidate-position"} <= report.baselines.keys()
    metrics = {"ranking/mrr", "ranking/ndcg@10", "ranking/hr@1", "choice/accuracy", "rating/mae", "rating/w1"}
    assert {*metrics, "taste/balanced_accuracy"} <= report.metrics.keys()
    for entry in report.metrics.values():
        assert set(entry) == {"value", "ci95", "n"}
    ledger = {"requests", "prompt_tokens", "completion_tokens", "cached", "retries", "failures", "seconds"}
    assert ledger <= report.ledger.keys()


# ---- agents of the wrong users (sim_validation, oracle 1) -----------------------------------------------------------


@pytest.fixture(scope="module")
def lovers():
    """A world of strong tastes that differ from user to user, its slates, and its true choice probabilities."""
    config = HarborConfig(
        n_users=120, n_domains=1, items_per_domain=120, min_events=12, max_events=14, n_groups=120, group_share=0.0,
        conflict_share=0.0, shared_weight=2.5, domain_weight=0.0, quality_weight=0.0, shock_strength=0.0,
    )  # fmt: skip
    world = build_harbor(config, seed=2)
    plan = make_plan(world.dataset, options_of(world.dataset, held_out=4, users=120))

    def logits(slates, who):
        utility = [
            world.truth.utilities(int(who[user]), items, int(time))
            for user, items, time in zip(slates.user, slates.candidates, slates.time, strict=True)
        ]
        return np.array(utility)

    return world, plan, logits


def checked(lovers, who):
    """M1, M3 and A1 of agents that choose by the true taste of user who[u] in the place of user u."""
    world, plan, logits = lovers
    utilities = [logits(slates, who) for slates in (plan.calibration, plan.test)]
    weights = np.exp(utilities[1] - utilities[1].max(axis=1, keepdims=True))
    scored = Scored(
        agent=weights / weights.sum(axis=1, keepdims=True),
        rivals={},
        ablations={},
        memories={},
        layers=(),
        calibration_utility=utilities[0],
        test_utility=utilities[1],
    )
    report = Report("simulate", {}, ranking(scored.agent, plan.test, seed=0))
    accepted = validation._taste(report, plan, scored, 0)
    validation._distributions(report, world.dataset, plan, scored, accepted, "none", 0)
    return report.metrics


def test_agents_of_other_users_fall_to_chance_one_by_one_but_not_as_a_crowd(lovers):
    """Micro checks see what macro checks cannot."""
    n_users = lovers[0].dataset.n_users
    own = checked(lovers, np.arange(n_users))
    others = checked(lovers, np.random.default_rng(0).permutation(n_users))
    at_chance = chance(10)
    assert own["ranking/mrr"]["value"] > 0.6
    assert own["taste/balanced_accuracy"]["value"] > 0.7
    assert others["ranking/mrr"]["value"] == pytest.approx(at_chance["ranking/mrr"], abs=0.05)
    assert others["ranking/hr@1"]["value"] == pytest.approx(at_chance["ranking/hr@1"], abs=0.05)
    assert others["taste/balanced_accuracy"]["value"] == pytest.approx(0.5, abs=0.05)
    for name in ("popularity/tv", "category/tv"):
        assert others[name]["value"] == pytest.approx(own[name]["value"], abs=0.06)
        assert others[name]["value"] < 0.25


# ---- agents that know the answer (sim_validation, oracle 7) ---------------------------------------------------------


def test_agents_told_their_own_test_items_come_out_near_one(tmp_path):
    """The harness can see success: M1, M2 and M3 rise to (almost) 1 when the answer stands in the memory."""
    dataset = build_harbor(
        HarborConfig(n_users=40, n_domains=2, items_per_domain=60, min_events=10, max_events=12), seed=3
    ).dataset
    plan = make_plan(dataset, options_of(dataset, **OPTIONS))
    log = dataset.interactions
    answers = {}
    for row in plan.population.held_out.tolist():
        answers.setdefault(int(log.user[row]), []).append(str(dataset.catalog.titles[log.item[row]]).lower())
    honest = AgentCF.read_memory

    def told(self, user, domain, now, *, training):
        memory = honest(self, user, domain, now, training=training)
        return memory if training else {**memory, "private": f"Likes {', '.join(answers[user])}.", "fused": ""}

    blind = run(dataset, tmp_path / "honest")
    with mock.patch.object(AgentCF, "read_memory", told):
        leaked = run(dataset, tmp_path / "told")
    assert leaked.metrics["ranking/mrr"]["value"] > 0.97
    assert leaked.metrics["ranking/hr@1"]["value"] > 0.95
    assert leaked.metrics["choice/accuracy"]["value"] > 0.97
    assert leaked.metrics["taste/balanced_accuracy"]["value"] > 0.9
    assert blind.metrics["ranking/mrr"]["value"] < 0.7
    comparison = leaked.sections["comparisons"]["ranking/mrr"]
    assert comparison["difference"]["value"] >= -1e-9 or comparison["baseline"] == "language-model-alone"
    without = leaked.sections["ablations"]["agent-without-language-model"]
    assert without["gain"]["value"] > 0.2
    assert without["gain"]["ci95"][0] > 0


def test_a_model_without_an_opinion_leaves_the_agents_what_their_memories_say(tmp_path):
    """A language model that likes everything the same is exactly at chance by itself."""
    dataset = build_harbor(
        HarborConfig(n_users=40, n_domains=2, items_per_domain=60, min_events=10, max_events=12), seed=3
    ).dataset
    backbone = reader(sharpness=0.0)
    report = simulate(dataset, backbone=InProcess(backbone), embedder=backbone, out=str(tmp_path / "out"), **OPTIONS)
    assert report.baselines["language-model-alone"]["ranking/mrr"]["value"] == pytest.approx(0.292897, abs=1e-4)
    assert report.metrics["choice/accuracy"]["value"] == 0.5
    alone = report.sections["memories_alone"]
    parts = alone["ablations"]
    assert set(parts) == {"memories-alone-without-groups", "memories-alone-without-fusion"}
    for part in parts.values():
        gain = alone["ranking/mrr"]["value"] - part["ranking/mrr"]["value"]
        assert part["gain"]["value"] == pytest.approx(gain, abs=1e-9)
    (table,) = (panel for panel in report.sections["panels"] if "memories alone" in panel["title"])
    assert [row[0] for row in table["rows"]] == ["nothing", "groups", "fusion"]
