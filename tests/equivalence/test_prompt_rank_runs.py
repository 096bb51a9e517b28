"""One result whatever the batches, the interruptions and the sessions of a run."""

import json

import pytest
from support.fair_worlds import long_tail_world

from recollect.backbones.scripted import ScriptedBackbone
from recollect.errors import ResumeRefused
from recollect.journal import Journal
from recollect.recommenders.prompt_rank import prompt_rank

OPTIONS = {
    "core": 1,
    "generator": "pop",
    "resamples": 20,
    "rerankers": ("cp",),
    "preset": ("base", "fairlrm"),
    "permutations": 2,
    "users": 18,
    "batch_size": 7,
}


def result(report):
    content = report.to_json()
    content["models"] = {
        name: {metric: value for metric, value in table.items() if metric != "seconds_per_user"}
        for name, table in content["models"].items()
    }
    drop = {"ledger", "run", "panels", "metrics", "baselines"}
    return json.dumps({key: value for key, value in content.items() if key not in drop}, sort_keys=True)


@pytest.fixture(scope="module")
def world():
    return long_tail_world(n_users=24, n_items=60)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return result(prompt_rank(world, backbone=ScriptedBackbone(name="hash"), out=out, **OPTIONS))


class Batches:
    """A model that answers in batches only, and is interrupted before the one after `last`."""

    def __init__(self, last=None):
        self._inner = ScriptedBackbone(name="hash")
        self.fingerprint, self.control_tokens = self._inner.fingerprint, self._inner.control_tokens
        self.score, self.generate, self.embed, self.close = (
            getattr(self._inner, name) for name in ("score", "generate", "embed", "close")
        )
        self._last = last
        self.paid = 0

    def choose(self, choices):
        if self._last == 0:
            raise KeyboardInterrupt
        self._last = None if self._last is None else self._last - 1
        self.paid += len(choices)
        return self._inner.choose(choices)


def test_an_interrupted_run_continues_pays_nothing_twice_and_ends_alike(world, undisturbed, tmp_path):
    options = {**OPTIONS, "out": tmp_path / "run"}
    paid = 0
    for last in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            prompt_rank(world, backbone=(model := Batches(last)), resume=True, **options)
        paid += model.paid
    report = prompt_rank(world, backbone=(model := Batches()), resume=True, **options)
    assert result(report) == undisturbed
    assert report.ledger["requests"] == paid + model.paid + 1  # and the label check


def test_batches_do_not_matter_to_a_model_that_reads_each_prompt_alone(world, undisturbed, tmp_path):
    other = {**OPTIONS, "batch_size": 64, "out": tmp_path / "run"}
    assert result(prompt_rank(world, backbone=ScriptedBackbone(name="hash"), **other)) == undisturbed


def test_a_resumed_run_may_ask_more_users_and_presets_and_keeps_what_it_has(world, undisturbed, tmp_path):
    small = {**OPTIONS, "out": tmp_path / "run", "users": 6, "preset": ("fairlrm",)}
    prompt_rank(world, backbone=ScriptedBackbone(name="hash"), **small)
    more = ScriptedBackbone(name="hash")
    report = prompt_rank(world, backbone=more, resume=True, **{**OPTIONS, "out": tmp_path / "run"})
    assert result(report) == undisturbed
    assert more.calls["choose"] < report.ledger["requests"] - 6 * 2 * 2


def test_another_kind_of_asking_is_refused(world, tmp_path):
    options = {**OPTIONS, "out": tmp_path / "run", "users": 4}
    prompt_rank(world, backbone=ScriptedBackbone(name="hash"), **options)
    with pytest.raises(ResumeRefused, match="permutations"):
        prompt_rank(world, backbone=ScriptedBackbone(name="hash"), resume=True, **{**options, "permutations": 3})


def test_dry_run_counts_the_calls_of_the_run(world, tmp_path):
    plan = prompt_rank(world, backbone="smollm2", dry_run=True, **OPTIONS)
    backbone = ScriptedBackbone(name="hash")
    prompt_rank(world, backbone=backbone, out=tmp_path / "run", **OPTIONS)
    assert plan.ledger["calls"] == backbone.calls["choose"]
    assert plan.ledger["users"] == 18


def test_costs_by_preset_add_up_to_the_ledger(world, tmp_path):
    options = {**OPTIONS, "out": tmp_path / "run", "users": 5}
    report = prompt_rank(world, backbone=ScriptedBackbone(name="hash"), **options)
    journal = Journal.open(tmp_path / "run" / "journal.sqlite", config={}, resume=True, read_only=True)
    try:
        costs = journal.costs()
    finally:
        journal.close()
    for name in ("requests", "prompt_tokens", "completion_tokens"):
        assert sum(cost[name] for cost in costs.values()) == report.ledger[name]
    told = report.sections["models"]["base"]["tokens_per_user"]["value"]
    assert told == costs["prompt-rank.base"]["prompt_tokens"] / 5
