"""A recorded run replays without a model; a changed question stops it at that question, with the difference."""

import numpy as np
import pytest
from support.journal_world import BatchModel, Paid, ServedModel, World, play

from recollect.agents.scheduler import run_steps
from recollect.backbones.journaled import Journaled, Replay
from recollect.backbones.protocol import Choice, Message, Request
from recollect.errors import ReplayMismatch
from recollect.journal import Journal

AGENTS, STEPS = 15, 200


def replay(recorded_folder, folder, world) -> str:
    recorded = Journal.open(recorded_folder / "journal.sqlite", config={}, resume=True, read_only=True)
    journal = Journal.open(folder / "journal.sqlite", config={}, resume=False)
    try:
        model = Replay(recorded, BatchModel.fingerprint)
        world.embed = model.embed
        run_steps(world.steps(), model, journal)
        return journal.export_events(folder / "events.jsonl")
    finally:
        journal.close()
        recorded.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, play(folder, BatchModel(), World(AGENTS, STEPS))


def test_a_replay_equals_the_run_and_reads_only(run, tmp_path):
    folder, digest = run
    before = (folder / "journal.sqlite").read_bytes()
    assert replay(folder, tmp_path, World(AGENTS, STEPS)) == digest
    assert (folder / "journal.sqlite").read_bytes() == before


def test_a_run_on_a_server_replays(tmp_path):
    digest = play(tmp_path / "run", ServedModel(concurrency=16, delay=0.001), World(AGENTS, STEPS))
    (tmp_path / "replay").mkdir()
    assert replay(tmp_path / "run", tmp_path / "replay", World(AGENTS, STEPS)) == digest


@pytest.mark.parametrize("changed", [0, 5, 77, 150, 198])
def test_one_changed_character_is_found_at_its_call(run, tmp_path, changed):
    world = World(
        AGENTS, STEPS, edit=lambda number, text: text.replace("feels", "feel5") if number == changed else text
    )
    with pytest.raises(ReplayMismatch) as found:
        replay(run[0], tmp_path, world)
    lines = str(found.value).split("\n")
    removed, added = (next(line[1:] for line in lines if line.startswith(sign) and "step" in line) for sign in "-+")
    assert "site 'choice'" in lines[0]
    assert f"step {changed} shows" in removed
    assert removed.replace("feels", "feel5") == added
    # Every step that does not depend on the changed one was replayed, none that does.
    assert world.begun[changed] == 1
    later_barriers = [n for n in range(changed, STEPS) if n % world.barrier_every == world.barrier_every - 1]
    assert not any(world.begun[n] for n in later_barriers)


def asked(tmp_path, call) -> str:
    journal = Journal.open(tmp_path / "journal.sqlite", config={}, resume=False)
    model = BatchModel(Paid(None))
    Journaled(model, journal).answer([Request((Message("user", "line one\nline two"),), max_tokens=40, site="write")])
    with pytest.raises(ReplayMismatch) as found:
        Replay(journal, model.fingerprint).answer([call])
    journal.close()
    return str(found.value)


def test_a_changed_parameter_is_shown(tmp_path):
    message = asked(tmp_path, Request((Message("user", "line one\nline two"),), max_tokens=41, site="write"))
    assert "-max_tokens: 40\n+max_tokens: 41" in message
    assert "line two" not in message


def test_a_site_that_never_asked_is_named(tmp_path):
    message = asked(tmp_path, Choice((Message("user", "new question"),), ("A", "B"), site="fresh"))
    assert "no call of site 'fresh'" in message
    assert "new question" in message


def test_another_model_is_told_from_another_question(tmp_path):
    journal = Journal.open(tmp_path / "journal.sqlite", config={}, resume=False)
    call = Request((Message("user", "same"),), site="write")
    Journaled(BatchModel(), journal).answer([call])
    with pytest.raises(ReplayMismatch, match="another model than 'scripted/other'"):
        Replay(journal, "scripted/other").answer([call])
    journal.close()


def test_a_text_that_was_not_embedded_is_shown_beside_the_nearest(tmp_path):
    journal = Journal.open(tmp_path / "journal.sqlite", config={}, resume=False)
    model = BatchModel()
    vectors = Journaled(model, journal).embed(["red shoes", "blue sky", "red shoes"])
    replayed = Replay(journal, model.fingerprint)
    np.testing.assert_array_equal(replayed.embed(["red shoes", "blue sky", "red shoes"]), vectors)
    with pytest.raises(ReplayMismatch, match="-red shoes\n\\+red shoe5"):
        replayed.embed(["red shoe5"])
    assert len(model.paid.keys) == 2
    journal.close()
