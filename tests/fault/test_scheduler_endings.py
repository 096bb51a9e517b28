"""How a run ends early: budgets, a dead server, answers that are none; and what is kept each time."""

import math
from concurrent.futures import Future

import numpy as np
import pytest
from support.journal_world import BatchModel, ServedModel, World, play

from recollect.agents.scheduler import Step, StepResult, run_steps
from recollect.backbones.budget import Budget
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Choice, Chosen, Message, Request
from recollect.errors import (
    BackboneError,
    BudgetReached,
    ConfigError,
    ContextTooLong,
    MalformedOutput,
    ServerAway,
)
from recollect.journal import Journal, MemoryWrite

AGENTS, STEPS = 12, 120


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return play(tmp_path_factory.mktemp("whole"), BatchModel(noise=False), World(AGENTS, STEPS))


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.sqlite", config={"agents": AGENTS}, resume=False)
    yield opened
    opened.close()


def run(journal, model, budget=None, world=None):
    world = world or World(AGENTS, STEPS)
    world.restore(journal)
    journaled = Journaled(model, journal, batch_size=4, budget=budget)
    world.embed = journaled.embed
    run_steps(world.steps(), journaled, journal)


@pytest.mark.parametrize("make", [lambda: BatchModel(noise=False), lambda: ServedModel(concurrency=8, delay=0.001)])
def test_a_budget_of_calls_is_never_exceeded_and_a_larger_one_goes_on(journal, tmp_path, expected, make):
    paid = []
    for calls in (1, 40, 41, 100):
        model = make()
        with pytest.raises(BudgetReached, match=f"budget of {calls} calls") as reached:
            run(journal, model, Budget(calls=calls))
        assert reached.value.exit_code == 75
        paid += [key for key in model.paid.keys if not key.startswith("embed:")]
        assert len(paid) == len(set(paid)) == journal.ledger()["requests"] <= calls
        if isinstance(model, ServedModel):
            assert len(paid) == calls
        assert journal.problems() == []
        journal.fold_check()
    run(journal, make(), Budget(calls=10_000))
    assert journal.export_events(tmp_path / "events.jsonl") == expected


@pytest.mark.parametrize("make", [lambda: BatchModel(noise=False), lambda: ServedModel(concurrency=2)])
def test_a_budget_of_tokens_stops_after_the_answers_in_flight(journal, tmp_path, expected, make):
    with pytest.raises(BudgetReached, match="budget of 300 tokens"):
        run(journal, make(), Budget(tokens=300))
    ledger = journal.ledger()
    assert ledger["prompt_tokens"] + ledger["completion_tokens"] >= 300
    with pytest.raises(BudgetReached):  # the run, not the session, is what is limited
        run(journal, make(), Budget(tokens=300))
    assert journal.ledger()["requests"] == ledger["requests"]
    run(journal, make())
    assert journal.export_events(tmp_path / "events.jsonl") == expected


def test_a_budget_of_seconds_counts_what_calls_took(journal):
    with pytest.raises(BudgetReached, match="seconds"):
        run(journal, BatchModel(noise=False, delay=0.01), Budget(seconds=0.05))
    assert journal.ledger()["seconds"] >= 0.05


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="budget of calls must be more than 0, got 0"):
        Budget(calls=0)


def test_a_dead_server_keeps_what_was_answered_and_the_run_goes_on(journal, tmp_path, expected):
    class Dying(ServedModel):
        left = 60

        def _one(self, call):
            self.left -= 1
            if self.left < 0:
                raise ServerAway("http://127.0.0.1:1 stayed away")
            return super()._one(call)

    dying = Dying(concurrency=1)
    with pytest.raises(ServerAway):
        run(journal, dying)
    dying._pool.shutdown(wait=True)
    # What had come in when the run stopped is recorded; calls still queued at the server then were never seen.
    assert 0 < journal.ledger()["requests"] <= 60
    recorded = {key for key, *_ in journal.calls()}
    second = ServedModel()
    run(journal, second)
    assert not recorded & set(second.paid.keys)
    assert journal.export_events(tmp_path / "events.jsonl") == expected


def test_a_failure_of_the_models_own_ends_the_run_as_it_is(journal):
    class Broken(ServedModel):
        def _one(self, call):
            raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError):
        run(journal, Broken())
    assert journal.n_committed == 0
    assert journal.failures() == []


def ask_once(number, caught):
    """A step that records a no-op where its question has no usable answer."""

    def begin():
        try:
            yield [
                Request((Message("user", f"fine {number}"),), site="fine"),
                Request((Message("user", f"bad {number}"),), site="bad"),
            ]
            ok = True
        except (MalformedOutput, ContextTooLong) as error:
            caught.append((number, type(error)))
            ok = False
        event = {"step": number, "kind": "ask", "ok": ok}
        return StepResult((event,), (MemoryWrite("a", str(number), "x"),), lambda: None)

    return Step(number, (f"own:{number}",), begin)


@pytest.mark.parametrize("dispatch", ["ready", "levels"])
@pytest.mark.parametrize("error", [MalformedOutput, ContextTooLong])
def test_a_call_without_a_usable_answer_is_the_agents_to_decide(journal, error, dispatch):
    class Babbling(ServedModel):
        def _one(self, call):
            if call.site == "bad" and "2" in call.messages[0].content:
                raise error("rubbish four times")
            return super()._one(call)

    caught: list = []
    run_steps(
        [ask_once(number, caught) for number in range(5)], Journaled(Babbling(), journal), journal, dispatch=dispatch
    )
    assert caught == [(2, error)]
    assert [event["ok"] for event in journal.events()] == [True, True, False, True, True]
    assert journal.count_events(ok=False) == 1
    (failure,) = journal.failures()
    assert (failure.site, failure.kind, failure.message) == ("bad", error.__name__, "rubbish four times")
    ledger = journal.ledger()
    assert (ledger["requests"], ledger["failures"]) == (9, 1)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_answer_with_numbers_that_are_not_finite_is_malformed(journal, value):
    class Overflowing(ServedModel):
        def choose(self, choices):
            return [Chosen((value, 0.0), 3) for _ in choices]

    class OverflowingBatch(BatchModel):
        choose = Overflowing.choose

    choice = Choice((Message("user", "?"),), ("A", "B"))
    for model in (Overflowing(), OverflowingBatch()):
        with pytest.raises(MalformedOutput, match="not finite"):
            Journaled(model, journal).answer([choice])
    assert journal.ledger()["requests"] == 0


def test_a_vector_that_is_not_finite_is_refused(journal):
    class Broken(BatchModel):
        def embed(self, texts):
            return np.full((len(texts), 3), np.nan, dtype=np.float32)

    with pytest.raises(BackboneError, match="not finite"):
        Journaled(Broken(), journal).embed(["text"])


def test_retries_that_the_server_counts_are_in_the_ledger(journal):
    class Retrying(ServedModel):
        n = 0

        def _one(self, call):
            self.n += 2
            return super()._one(call)

        def stats(self):
            return {"retries": self.n}

    run_steps([ask_once(n, []) for n in range(3)], Journaled(Retrying(concurrency=1), journal), journal)
    assert journal.ledger()["retries"] == 12


def test_an_answer_arriving_after_its_call_was_cancelled_is_an_error(journal):
    class Cancelling(BatchModel):
        def submit(self, call):
            future: Future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(BackboneError, match="cancelled"):
        Journaled(Cancelling(), journal).answer([Request((Message("user", "x"),))])


def test_two_steps_of_one_number_and_a_wrong_dispatch_are_refused(journal):
    model = Journaled(BatchModel(), journal)
    with pytest.raises(ConfigError, match="two steps have the number 3"):
        run_steps([ask_once(3, []), ask_once(3, [])], model, journal)
    with pytest.raises(ConfigError, match="use 'levels'"):
        run_steps([ask_once(3, [])], model, journal, dispatch="ready")
    with pytest.raises(ConfigError, match="batch_size"):
        Journaled(BatchModel(), journal, batch_size=0)


def test_a_step_must_return_its_result(journal):
    def begin():
        yield []

    with pytest.raises(TypeError, match="step 0 returned None"):
        run_steps([Step(0, (), begin)], Journaled(BatchModel(), journal), journal)
