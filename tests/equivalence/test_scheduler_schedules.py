"""Whatever the dispatch, the concurrency, the order of visits: the log of one step after the other, byte for byte."""

import random
import time

import pytest
from support.journal_world import BatchModel, ServedModel, World, play

from recollect.agents.scheduler import run_steps
from recollect.backbones.journaled import Journaled
from recollect.journal import Journal, StepCommit


def one_by_one(folder, model, world) -> str:
    """The plain loop that every schedule must equal: no scheduler, one step after the other."""
    folder.mkdir(parents=True)
    journal = Journal.open(folder / "journal.sqlite", config={}, resume=False)
    journaled = Journaled(model, journal)
    world.embed = journaled.embed
    for step in world.steps():
        generator, result = step.run(), None
        calls = next(generator)
        while result is None:
            try:
                calls = generator.send(journaled.answer(calls))
            except StopIteration as end:
                result = end.value
        journal.commit([StepCommit(step.number, result.events, result.memory)])
        result.apply()
    journal.fold_check()
    digest = journal.export_events(folder / "events.jsonl")
    journal.close()
    return digest


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    return one_by_one(tmp_path_factory.mktemp("sequential") / "run", BatchModel(noise=False), World(15, 300))


@pytest.mark.parametrize("dispatch", ["ready", "levels"])
@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_a_server_gives_the_log_of_one_step_after_the_other(tmp_path, sequential, concurrency, dispatch):
    model = ServedModel(concurrency=concurrency, delay=0.001)
    assert play(tmp_path, model, World(15, 300), dispatch=dispatch) == sequential
    assert len(model.paid.keys) == len(set(model.paid.keys))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_give_the_log_of_one_step_after_the_other(tmp_path, sequential, batch_size):
    model = BatchModel(noise=False)
    assert play(tmp_path, model, World(15, 300), batch_size=batch_size) == sequential
    assert max(model.batches) <= batch_size


def test_the_order_in_which_steps_are_given_does_not_matter(tmp_path, sequential):
    class Shuffled(World):
        def steps(self):
            found = super().steps()
            random.Random(5).shuffle(found)
            return found

    assert play(tmp_path / "served", ServedModel(concurrency=8), Shuffled(15, 300)) == sequential
    assert play(tmp_path / "batch", BatchModel(noise=False), Shuffled(15, 300)) == sequential


def test_neither_the_clock_nor_the_global_generator_is_asked(tmp_path, sequential, monkeypatch):
    def refuse(*_):
        raise AssertionError("the step path asked for the time or for a global random number")

    for module, name in [(time, "time"), (time, "time_ns"), (random, "random"), (random, "getrandbits")]:
        monkeypatch.setattr(module, name, refuse)
    assert play(tmp_path, ServedModel(concurrency=8), World(15, 300)) == sequential


def test_a_step_begins_only_after_the_steps_it_waits_for(tmp_path):
    done: list[int] = []

    class Watched(World):
        def steps(self):
            self.all = super().steps()
            return self.all

        def _result(self, number, kind, writes, **fields):
            result = super()._result(number, kind, writes, **fields)
            done.append(number)
            return result

    world = Watched(10, 200)
    play(tmp_path, ServedModel(concurrency=16, delay=0.002), world)
    place = {number: at for at, number in enumerate(done)}
    assert sorted(place) == list(range(200))
    for later in world.all:
        for earlier in world.all[: later.number]:
            if earlier.barrier or later.barrier or set(earlier.touches) & set(later.touches):
                assert place[earlier.number] < place[later.number]
    assert done != sorted(done)  # independent steps do overtake each other


def test_a_resumed_level_has_the_batches_of_an_undisturbed_one(tmp_path):
    """The scripted floats depend on the company in a batch, so any other cut would show in the log."""
    undisturbed = BatchModel()
    expected = play(tmp_path / "whole", undisturbed, World(15, 300))
    for stop_after in (1, 7, 40, 66):

        class Dying(BatchModel):
            left = stop_after

            def _company(self, calls):
                if not self.left:
                    raise ConnectionError("died")
                self.left -= 1
                return super()._company(calls)

        folder = tmp_path / str(stop_after)
        with pytest.raises(ConnectionError):
            play(folder, Dying(), World(15, 300))
        assert play(folder, BatchModel(), World(15, 300), resume=True) == expected


def test_a_run_that_changes_from_batches_to_a_server_goes_on(tmp_path, sequential):
    stops = iter([False, False, True])
    play(tmp_path, BatchModel(noise=False), World(15, 300), stop=lambda: next(stops), export=False)
    model = ServedModel(concurrency=8)
    assert play(tmp_path, model, World(15, 300), resume=True) == sequential


def test_finished_steps_are_not_begun_again(tmp_path, sequential):
    asked = iter([False] * 40 + [True] * 1000)
    play(tmp_path, ServedModel(concurrency=4), World(15, 300), stop=lambda: next(asked), export=False)
    journal = Journal.open(tmp_path / "journal.sqlite", config={}, resume=True, read_only=True)
    finished = [number for number in range(300) if journal.has_step(number)]
    assert 40 <= len(finished) == journal.n_committed < 300
    journal.close()
    world = World(15, 300)
    assert play(tmp_path, ServedModel(concurrency=4), world, resume=True) == sequential
    assert not set(finished) & set(world.begun)
    again = World(15, 300)
    play(tmp_path, ServedModel(), again, resume=True)
    assert not again.begun


def test_progress_counts_every_step_once(tmp_path):
    told: list[int] = []
    play(tmp_path, ServedModel(concurrency=4), World(9, 120), on_progress=told.append)
    assert sum(told) == 120


def test_an_identical_question_in_flight_is_paid_once(tmp_path):
    from recollect.backbones.protocol import Message, Scoring

    model = ServedModel(concurrency=8, delay=0.01)
    journal = Journal.open(tmp_path / "journal.sqlite", config={}, resume=False)
    journaled = Journaled(model, journal)
    question = Scoring((Message("user", "same"),), ("x",), site="same")
    answers = journaled.answer([question] * 20)
    assert len(set(answers)) == 1
    assert len(model.paid.keys) == 1
    assert journal.ledger()["requests"] == 1
    assert journal.ledger()["cached"] == 19
    run_steps([], journaled, journal)
    journal.close()
