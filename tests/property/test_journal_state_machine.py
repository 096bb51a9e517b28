"""The journal against a model of it in plain dictionaries, through closes, crashes and refused transactions."""

import json
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from recollect.errors import JournalError
from recollect.io import sha256_file
from recollect.journal import Journal, MemoryRow, MemoryWrite, RecordedCall, RecordedText, StepCommit, hooks
from recollect.journal.records import stored_json

anything = st.text(st.characters(), max_size=12)  # lone surrogates, NUL and all
keys = st.sampled_from([f"{n:064x}" for n in range(6)])
names = st.one_of(st.sampled_from(["user:1", "item:1"]), anything)


class Refused(Exception):
    pass


def decode(primitive, value):
    return primitive, value["text"]


class JournalMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="journal-"))
        self.calls: dict[str, RecordedCall] = {}
        self.vectors: dict[str, list[float]] = {}
        self.steps: dict[int, StepCommit] = {}
        self.memory: dict[tuple[str, str], MemoryRow] = {}
        self.counted = {"cached": 0, "poisoned": 0}
        self.unsaved = {"cached": 0, "poisoned": 0}
        self.n_failures = 0

    @initialize()
    def begin(self):
        self.journal = self.open()

    def open(self):
        return Journal.open(self.folder / "j.sqlite", config={"a": [1, "x"]}, resume=True)

    def saved(self):
        for name, value in self.unsaved.items():
            self.counted[name] += value
            self.unsaved[name] = 0

    def refused(self, write, place):
        """The transaction is refused at its end: nothing of it may stay."""

        def trigger(name):
            if name.endswith(place):
                raise Refused(name)

        hooks.trigger = trigger
        try:
            with pytest.raises(Refused):
                write()
        finally:
            hooks.trigger = lambda name: None

    @rule(rows=st.lists(st.tuples(keys, anything, st.integers(0, 99)), max_size=4), refuse=st.booleans())
    def record(self, rows, refuse):
        calls = [
            RecordedCall(key, "generate", "site", "model", {"prompt": text}, {"text": text}, n, n // 2, n / 4)
            for key, text, n in rows
        ]
        if refuse:
            self.refused(lambda: self.journal.record(calls), ":written")
            return
        self.journal.record(calls)
        self.saved()
        for call in calls:
            self.calls.setdefault(call.key, call)

    @rule(key=keys, text=anything, seed=st.integers(0, 9))
    def embed(self, key, text, seed):
        vector = np.random.default_rng(seed).normal(size=5).astype(np.float32)
        self.journal.record_embeddings("embedder", [RecordedText(key, text, vector)])
        self.saved()
        self.vectors.setdefault(key, vector.tolist())

    @rule(data=st.data(), refuse=st.booleans())
    def commit(self, data, refuse):
        free = [number for number in range(len(self.steps) + 4) if number not in self.steps]
        numbers = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=3, unique=True))
        steps = []
        for number in numbers:
            writes = data.draw(st.dictionaries(st.tuples(names, anything), anything, max_size=2))
            events = tuple(
                {"step": number, "kind": "write", "owner": owner, "key": key, "after": after}
                for (owner, key), after in writes.items()
            )
            events += ({"step": number, "kind": "look", "ok": data.draw(st.booleans()), "text": data.draw(anything)},)
            steps.append(StepCommit(number, events, tuple(MemoryWrite(*name, text) for name, text in writes.items())))
        if refuse:
            self.refused(lambda: self.journal.commit(steps), ":written")
            return
        self.journal.commit(steps)
        self.saved()
        for step in steps:
            self.steps[step.number] = step
            for write in step.memory:
                old = self.memory.get((write.owner, write.key))
                self.memory[write.owner, write.key] = MemoryRow(write.text, old.version + 1 if old else 1, step.number)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def commit_again(self, data):
        number = data.draw(st.sampled_from(sorted(self.steps)))
        with pytest.raises(JournalError, match="cannot be committed"):
            self.journal.commit([StepCommit(number, (), ())])

    @rule(by=st.integers(0, 3))
    def count(self, by):
        self.journal.count("cached", by)
        self.unsaved["cached"] += by

    @rule(message=anything)
    def fail(self, message):
        self.journal.record_failure(key="k", site="s", kind="MalformedOutput", message=message)
        self.saved()
        self.n_failures += 1
        assert self.journal.failures()[-1].message == message

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def poison(self, data):
        """A flipped byte, a truncation or another row's answer: dropped, counted, asked again."""
        key = data.draw(st.sampled_from(sorted(self.calls)))
        connection = self.journal._database.connection
        (answer,) = connection.execute("SELECT answer FROM calls WHERE key = ?", (key,)).fetchone()
        damage = data.draw(st.integers(0, len(answer) - 1))
        broken = (
            answer[:damage]
            if data.draw(st.booleans())
            else bytes([*answer[:damage], answer[damage] ^ 1, *answer[damage + 1 :]])
        )
        connection.execute("UPDATE calls SET answer = ? WHERE key = ?", (broken, key))
        assert self.journal.answers([key], decode) == {}
        del self.calls[key]
        self.unsaved["poisoned"] += 1
        self.saved()  # dropping the row is a write

    @rule()
    def close_and_open(self):
        self.journal.close()
        self.saved()
        self.journal = self.open()

    @rule()
    def crash_and_open(self):
        """The process dies: what no transaction has written is gone, nothing else."""
        self.journal._database.connection.close()
        self.journal._database._lock.release()
        self.unsaved = dict.fromkeys(self.unsaved, 0)
        self.journal = self.open()

    @invariant()
    def equals_the_model(self):
        if not hasattr(self, "journal"):
            return
        journal = self.journal
        found = journal.answers([f"{n:064x}" for n in range(6)], decode)
        assert found == {key: ("generate", call.answer["text"]) for key, call in self.calls.items()}
        vectors = journal.embeddings([f"{n:064x}" for n in range(6)])
        assert {key: vector.tolist() for key, vector in vectors.items()} == self.vectors
        prefix = next(n for n in range(len(self.steps) + 1) if n not in self.steps) - 1
        assert (journal.last_step, journal.n_committed) == (prefix, len(self.steps))
        assert all(journal.has_step(n) == (n in self.steps) for n in range(len(self.steps) + 4))
        assert journal.memories() == self.memory
        events = [event for _, step in sorted(self.steps.items()) for event in step.events]
        assert list(journal.events()) == events
        assert list(journal.events(["look"])) == [event for event in events if event["kind"] == "look"]
        assert journal.count_events(ok=False) == sum(event.get("ok") is False for event in events)
        ledger = journal.ledger()
        calls = self.calls.values()
        assert ledger["requests"] == len(calls)
        assert ledger["prompt_tokens"] == sum(call.prompt_tokens for call in calls)
        assert ledger["completion_tokens"] == sum(call.completion_tokens for call in calls)
        assert ledger["seconds"] == pytest.approx(sum(call.seconds for call in calls))
        assert ledger["cached"] == self.counted["cached"] + self.unsaved["cached"]
        assert ledger.get("poisoned", 0) == self.counted["poisoned"]
        assert ledger["failures"] == self.n_failures

    def teardown(self):
        if hasattr(self, "journal"):
            out = self.folder / "events.jsonl"
            assert self.journal.export_events(out) == sha256_file(out)
            events = [event for _, step in sorted(self.steps.items()) for event in step.events]
            assert out.read_text(encoding="utf-8") == "".join(stored_json(event) + "\n" for event in events)
            assert [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]] == events
            assert self.journal.problems() == []
            self.journal.close()
        shutil.rmtree(self.folder)


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
