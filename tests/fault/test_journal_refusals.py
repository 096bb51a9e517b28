"""What a journal refuses, and that it says why: other options, other writers, damage, newer versions, a full disk."""

import fcntl
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from recollect.errors import JournalError, JournalLocked, ResumeRefused, StorageRefused
from recollect.journal import Journal, MemoryWrite, RecordedCall, StepCommit, remove, schema

STORED = Path(__file__).resolve().parents[1] / "support" / "journal_v1.sql"


def begin(path, **config):
    return Journal.open(path, config=config, resume=False)


def a_call(key="k", text="hello"):
    return RecordedCall(key, "generate", "site", "model", {"q": text}, {"text": text}, 3, 2, 0.5)


def a_step(number, text="new"):
    event = {"step": number, "kind": "write", "owner": "user:1", "key": "taste", "after": text}
    return StepCommit(number, (event,), (MemoryWrite("user:1", "taste", text),))


def decode(primitive, value):
    return value["text"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def test_other_options_are_refused_by_name(path):
    begin(path, options={"seed": 0, "users": 5}, data="abc").close()
    with pytest.raises(ResumeRefused) as refused:
        Journal.open(path, config={"options": {"seed": 1, "users": 5}, "extra": None}, resume=True)
    assert "options.seed: 0 -> 1" in str(refused.value)
    assert "data: 'abc' -> absent" in str(refused.value)
    assert "extra: absent -> None" in str(refused.value)
    assert "users" not in str(refused.value)


def test_a_permitted_change_of_options_is_taken_over(path):
    begin(path, seed=0).close()
    Journal.open(path, config={"seed": 1}, resume=True, allow_config_change=True).close()
    Journal.open(path, config={"seed": 1}, resume=True).close()


def test_options_given_as_tuples_are_those_read_back_as_lists(path):
    begin(path, kinds=("a", "b")).close()
    Journal.open(path, config={"kinds": ("a", "b")}, resume=True).close()


@pytest.mark.parametrize("write", [lambda j: j.record([a_call()]), lambda j: j.commit([a_step(0)])])
def test_a_run_is_not_begun_over_another(path, write):
    journal = begin(path)
    write(journal)
    journal.close()
    with pytest.raises(ResumeRefused, match="already holds a run"):
        begin(path)


def test_a_journal_that_nothing_was_written_to_is_begun_again(path):
    begin(path, seed=0).close()
    begin(path, seed=1).close()
    Journal.open(path, config={"seed": 1}, resume=True).close()


def test_a_second_writer_in_the_same_process_is_refused(path):
    journal = begin(path)
    with pytest.raises(JournalLocked, match=f"process {os.getpid()};"):
        Journal.open(path, config={}, resume=True)
    with pytest.raises(JournalLocked):
        remove(path)
    journal.close()
    remove(path)
    assert not path.exists()
    remove(path)


def test_a_lock_left_by_a_dead_process_does_not_lock(path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    path.with_name(f"{path.name}-lock").write_bytes(ended.stdout)
    begin(path).close()


def test_a_holder_that_cannot_be_named_is_still_respected(path):
    descriptor = os.open(path.with_name(f"{path.name}-lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(JournalLocked, match="unknown"):
        begin(path)
    os.close(descriptor)


def test_a_running_journal_can_be_read_but_not_written(path):
    writer = begin(path)
    writer.record([a_call()])
    reader = Journal.open(path, config={"any": 1}, resume=True, read_only=True)
    writer.commit([a_step(0)])
    assert reader.answers(["k"], decode) == {"k": "hello"}
    assert [event["step"] for event in reader.events()] == [0]
    for write in (lambda: reader.record([a_call("x")]), lambda: reader.commit([a_step(1)])):
        with pytest.raises(JournalError, match="reading only"):
            write()
    reader.close()
    writer.close()


def test_a_closed_journal_is_one_file_that_reads_from_a_read_only_folder(path):
    journal = begin(path)
    journal.commit([a_step(0)])
    journal.close()
    journal.close()
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}-lock"}
    path.parent.chmod(0o500)
    try:
        reader = Journal.open(path, config={}, resume=True, read_only=True)
        assert reader.n_committed == 1
        reader.close()
    finally:
        path.parent.chmod(0o700)


def test_there_is_nothing_to_read_where_there_is_no_journal(path):
    with pytest.raises(JournalError, match="no journal to read"):
        Journal.open(path, config={}, resume=True, read_only=True)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 8000])
def test_a_file_that_is_no_journal_is_refused_by_name(path, content):
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        Journal.open(path, config={}, resume=True)
    assert path.read_bytes() == content


def test_events_must_name_their_step_and_kind(path):
    journal = begin(path)
    for event in ({"kind": "x"}, {"step": 1, "kind": "x"}, {"step": 0}):
        with pytest.raises(JournalError, match="must hold that step and a kind"):
            journal.commit([StepCommit(0, (event,), ())])
    assert journal.n_committed == 0
    journal.close()


def test_changed_events_and_memories_are_noticed(path):
    journal = begin(path)
    journal.commit([a_step(0), a_step(1, "newer"), a_step(3)])
    journal.fold_check()
    assert journal.problems() == []
    execute = journal._database.connection.execute
    execute("UPDATE events SET payload = replace(payload, 'newer', 'forged') WHERE step = 1")
    assert journal.problems() == ["step 1 is not what was committed"]
    execute("UPDATE events SET payload = replace(payload, 'forged', 'newer') WHERE step = 1")
    execute("UPDATE memory SET text = CAST('forged' AS BLOB)")
    with pytest.raises(JournalError, match=r"\('user:1', 'taste'\)"):
        journal.fold_check()
    execute("DELETE FROM events WHERE step = 0")
    execute("DELETE FROM steps WHERE number = 0")
    assert journal.problems() == ["the steps up to 1 do not add up to the recorded digest"]
    journal.close()


def test_a_gap_in_the_events_of_a_step_is_not_exported(path, tmp_path):
    journal = begin(path)
    journal.commit([StepCommit(0, ({"step": 0, "kind": "a"}, {"step": 0, "kind": "b"}), ())])
    journal._database.connection.execute("DELETE FROM events WHERE position = 0")
    with pytest.raises(JournalError, match="events of step 0 are missing"):
        journal.export_events(tmp_path / "events.jsonl")
    assert not (tmp_path / "events.jsonl").exists()
    journal.close()


def test_a_full_database_refuses_whole_transactions_and_stays_sound(path):
    journal = begin(path)
    connection = journal._database.connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 6}")
    recorded = 0

    def fill():
        nonlocal recorded
        while True:
            journal.record([a_call(f"{recorded}-{n}", "x" * 700) for n in range(3)])
            recorded += 3

    with pytest.raises(StorageRefused, match="free some space and resume") as refused:
        fill()
    assert refused.value.exit_code == 74
    assert recorded > 0
    assert journal.ledger()["requests"] == recorded
    with pytest.raises(StorageRefused):
        journal.commit([a_step(0, "y" * 50_000)])
    assert journal.n_committed == 0
    assert journal.problems() == []
    connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    journal.commit([a_step(0, "y" * 50_000)])
    assert journal.memories()["user:1", "taste"].text == "y" * 50_000
    journal.close()


def test_a_write_locked_by_a_foreign_program_is_named(path):
    journal = begin(path)
    foreign = sqlite3.connect(path, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    journal._database.connection.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(JournalLocked, match="another program"):
        journal.record([a_call()])
    foreign.close()
    journal.record([a_call()])
    journal.close()


def test_a_journal_of_a_newer_version_is_refused(path):
    journal = begin(path)
    journal._database.connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    journal.close()
    with pytest.raises(JournalError, match="update recollect"):
        Journal.open(path, config={}, resume=True)


def stored(path):
    connection = sqlite3.connect(path)
    connection.executescript(STORED.read_text(encoding="utf-8"))
    connection.close()


def test_the_stored_journal_of_version_1_resumes_and_exports_as_it_did(path, tmp_path):
    stored(path)
    journal = Journal.open(path, config={"seed": 7}, resume=True)
    assert (journal.last_step, journal.n_committed) == (1, 3)
    assert journal.problems() == []
    journal.fold_check()
    assert journal.answers(["key-a"], decode) == {"key-a": "Zürich \ud800"}
    assert journal.embeddings(["key-e"])["key-e"].tolist() == [0.5, -0.25]
    assert journal.memories()["user:ü", "taste"].version == 2
    assert journal.ledger()["cached"] == 4
    journal.export_events(tmp_path / "events.jsonl")
    assert [event["after"] for event in journal.events()] == ["eins", "zwei", "vier"]
    journal.commit([a_step(2)])
    assert journal.last_step == 3
    journal.close()


def test_an_older_journal_is_brought_forward_once_and_wholly(path, monkeypatch):
    stored(path)

    def add_note(connection):
        connection.execute("ALTER TABLE failures ADD COLUMN note TEXT NOT NULL DEFAULT ''")

    def fail(connection):
        add_note(connection)
        raise sqlite3.OperationalError("interrupted half-way")

    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(schema.MIGRATIONS, 1, fail)
    with pytest.raises(JournalError, match="half-way"):
        Journal.open(path, config={"seed": 7}, resume=True)
    with pytest.raises(JournalError, match="resume the run once first"):
        Journal.open(path, config={}, resume=True, read_only=True)
    monkeypatch.setitem(schema.MIGRATIONS, 1, add_note)
    for _ in range(2):
        journal = Journal.open(path, config={"seed": 7}, resume=True)
        assert journal._database.row("PRAGMA user_version") == (2,)
        assert journal._database.row("SELECT COUNT(note) FROM failures") == (1,)
        assert journal.n_committed == 3
        journal.close()
