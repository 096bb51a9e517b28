"""A finished run replays offline and equal; a change of one character, anywhere it matters, is found."""

import json
import shutil

import pytest
from support.agent_worlds import reader, with_log, with_titles

from recollect.agents.simulate import replay, simulate
from recollect.data import HarborConfig, build_harbor
from recollect.errors import InputError, ReplayMismatch
from recollect.prompts import render

SMALL = HarborConfig(n_users=6, n_domains=2, items_per_domain=24, min_events=7, max_events=8, shock_items=2)
OPTIONS = {"interactions_per_user": 2, "held_out": 1, "recall": False}
WRITTEN = {**OPTIONS, "writer": "llm", "decision": "generate", "max_failed": 1.0}


@pytest.fixture(scope="module")
def world():
    return build_harbor(SMALL, seed=6).dataset


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """{kind: (folder, report)} of finished runs."""
    runs = {}
    for name, options in (("structured", OPTIONS), ("written", WRITTEN)):
        folder = tmp_path_factory.mktemp(name) / "run"
        backbone = reader()
        runs[name] = folder, simulate(world, backbone=backbone, embedder=backbone, out=str(folder), **options)
    return runs


@pytest.fixture
def template(monkeypatch):
    """Change a template of this process by a function of its text."""

    def change(site, edit):
        sources = dict(render._sources())
        sources[site] = edit(sources[site])
        monkeypatch.setattr(render, "_sources", lambda: sources)
        render._template.cache_clear()

    yield change
    monkeypatch.undo()
    render._template.cache_clear()


@pytest.mark.parametrize("kind", ["structured", "written"])
def test_a_replay_asks_no_model_and_gives_the_same_report(world, finished, kind):
    folder, report = finished[kind]
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    again = replay(folder, dataset=world)
    assert json.dumps(again.metrics) == json.dumps(report.metrics)
    assert json.dumps(again.baselines) == json.dumps(report.baselines)
    assert again.warnings == report.warnings
    assert again.ledger["requests"] == report.ledger["requests"]
    assert again.ledger["prompt_tokens"] == report.ledger["prompt_tokens"]
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before, "replay wrote"


def test_simulate_replays_by_option(world, finished):
    folder, report = finished["structured"]
    assert simulate(world, backbone="smollm2", replay=str(folder)).metrics == report.metrics


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("structured", "choice"),
        ("structured", "rank_context"),
        ("structured", "rank_context_neutral"),
        ("structured", "rating"),
        ("structured", "shared"),
        ("written", "choice_explain"),
        ("written", "reflect_user"),
        ("written", "fuse_extract"),
        ("written", "fuse"),
        ("written", "reflect_items"),
        ("written", "tags"),
        ("written", "group_name"),
    ],
)
def test_one_character_more_in_a_template_is_found_at_its_call(world, finished, template, kind, site):
    folder, _ = finished[kind]

    def one_character_more(text):
        if site == "shared":
            return text.replace("You are a shopper", "You are a shoppers")
        start, end = text.rsplit("{% endblock %}", 1)
        return start.rstrip("\n") + "!\n{% endblock %}" + end

    template(site, one_character_more)
    with pytest.raises(ReplayMismatch) as caught:
        replay(folder, dataset=world)
    message = str(caught.value)
    if site != "shared":
        assert repr(site if site != "rank_context" else "rank").split("_context")[0][:5] in message
    assert "\n-" in message
    assert "\n+" in message


def test_one_character_more_in_a_title_is_found(world, finished):
    folder, _ = finished["structured"]
    shown = {name for line in (folder / "events.jsonl").read_text().splitlines() for name in json.loads(line)["items"]}
    item = next(at for at, name in enumerate(world.catalog.item_ids) if str(name) in shown)
    titles = [str(title) for title in world.catalog.titles]
    titles[item] += "s"
    with pytest.raises(ReplayMismatch) as caught:
        replay(folder, dataset=with_titles(world, titles))
    assert titles[item] in str(caught.value)


def test_other_interactions_are_found_before_anything_is_replayed(world, finished):
    folder, _ = finished["structured"]
    other = with_log(world, time=world.interactions.time + 1)
    with pytest.raises(ReplayMismatch, match="fingerprint"):
        replay(folder, dataset=other)


def test_an_edited_event_log_is_found_by_line_and_field(world, finished, tmp_path):
    folder, _ = finished["structured"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    number = next(at for at, line in enumerate(lines) if json.loads(line)["kind"] == "choice")
    event = json.loads(lines[number])
    event["probability"] = event["probability"] / 2
    lines[number] = json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    (copy / "events.jsonl").write_text("".join(lines))
    with pytest.raises(ReplayMismatch, match=f"event {number + 1} .*probability"):
        replay(copy, dataset=world)
    (copy / "events.jsonl").write_text("".join((folder / "events.jsonl").read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ReplayMismatch, match="number of events"):
        replay(copy, dataset=world)


def test_other_code_that_decides_otherwise_is_found(world, finished, monkeypatch):
    folder, _ = finished["structured"]
    from recollect.agents import memory

    monkeypatch.setattr(memory, "DECAY", 0.8)
    monkeypatch.setattr(memory.decayed_sum, "__defaults__", (0.8, 1.0))
    with pytest.raises(ReplayMismatch):
        replay(folder, dataset=world)


def test_a_folder_without_a_run_is_refused(tmp_path, world):
    with pytest.raises(InputError, match=r"run\.json"):
        replay(tmp_path, dataset=world)
    (tmp_path / "run.json").write_text(json.dumps({"command": "evaluate"}))
    with pytest.raises(InputError, match="holds no simulation"):
        replay(tmp_path, dataset=world)
