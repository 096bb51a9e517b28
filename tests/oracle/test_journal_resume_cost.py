"""Going on with a run costs the same after a hundred and after a hundred thousand calls (counted, not timed)."""

import sqlite3

import pytest
from support.journal_world import BatchModel

from recollect.agents.scheduler import Step, StepResult, run_steps
from recollect.backbones.journaled import Journaled
from recollect.backbones.protocol import Message, Request
from recollect.journal import Journal, MemoryWrite, RecordedCall, StepCommit, database

AGENTS = 50
INSTRUCTIONS_PER_TICK = 100


def history(path, n_calls):
    """A run of `n_calls` steps with one call each, by `AGENTS` agents."""
    journal = Journal.open(path, config={}, resume=False)
    for start in range(0, n_calls, 10_000):
        numbers = range(start, min(n_calls, start + 10_000))
        journal.record(
            [
                RecordedCall(
                    f"{n:064x}", "generate", "site", "model", {"prompt": f"{n} " * 40}, {"text": f"{n}"}, 40, 1, 0.1
                )
                for n in numbers
            ]
        )
        journal.commit(
            [
                StepCommit(
                    n, ({"step": n, "kind": "act", "text": f"{n}"},), (MemoryWrite(f"user:{n % AGENTS}", "m", f"{n}"),)
                )
                for n in numbers
            ]
        )
    journal.close()


def resumed(path, number, monkeypatch) -> int:
    """SQLite instructions (in hundreds) from opening to the end of the first new step."""
    ticks = 0

    def tick():
        nonlocal ticks
        ticks += 1

    connect = database.connect

    def counted(*arguments, **options) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_progress_handler(tick, INSTRUCTIONS_PER_TICK)
        return connection

    monkeypatch.setattr(database, "connect", counted)

    def begin():
        (answer,) = yield [Request((Message("user", "new"),))]
        return StepResult(({"step": number, "kind": "act", "text": answer.text},), (), lambda: None)

    journal = Journal.open(path, config={}, resume=True)
    assert (journal.last_step, journal.n_committed) == (number - 1, number)
    assert len(journal.memories()) == AGENTS
    model = BatchModel()
    run_steps([Step(number, ("user:0",), begin)], Journaled(model, journal), journal)
    assert len(model.paid.keys) == 1
    counted_until_here = ticks
    journal.close()
    monkeypatch.undo()
    return counted_until_here


def test_resuming_costs_the_same_after_a_thousand_times_as_many_calls(tmp_path, monkeypatch):
    history(tmp_path / "short", 100)
    history(tmp_path / "long", 100_000)
    short = resumed(tmp_path / "short", 100, monkeypatch)
    long = resumed(tmp_path / "long", 100_000, monkeypatch)
    assert long <= short + 10


@pytest.mark.parametrize("n", [0, 1, 500])
def test_the_ledger_is_the_sum_over_the_recorded_calls(tmp_path, n):
    history(tmp_path / "journal", n)
    ledger = Journal.open(tmp_path / "journal", config={}, resume=True, read_only=True).ledger()
    assert ledger["requests"] == n
    assert ledger["prompt_tokens"] == 40 * n
    assert ledger["completion_tokens"] == n
    assert ledger["seconds"] == pytest.approx(0.1 * n)
