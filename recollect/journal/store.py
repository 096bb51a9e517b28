"""The journal of a run: one SQLite file behind a handful of verbs.

Every write is one transaction. Opening costs O(1) in the number of recorded calls: only the finished prefix of steps
and the few finished steps beyond it are read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from recollect.errors import JournalError, ResumeRefused
from recollect.io import atomic_open, canonical_json
from recollect.journal import checks, hooks
from recollect.journal.database import Database
from recollect.journal.lock import WriterLock
from recollect.journal.records import (
    Failure,
    MemoryRow,
    RecordedCall,
    RecordedText,
    StepCommit,
    StepRows,
    checksum,
    differences,
    from_bytes,
    rolled,
    step_rows,
    stored_json,
    to_bytes,
)
from recollect.journal.schema import prepare

Decoded = TypeVar("Decoded")

_SIDE_FILES = ("", "-wal", "-shm")
_NO_STEP = -1
_SUMS = (
    "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
    "COALESCE(SUM(seconds), 0.0) FROM calls"
)


def remove(path: str | Path) -> None:
    """Delete a journal and its side files; nothing happens where there is none.

    Raises:
        JournalLocked: a process is writing it.
    """
    path = Path(path)
    if not path.exists():
        return
    lock = WriterLock(path)
    try:
        for suffix in _SIDE_FILES:
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    finally:
        lock.release()


class Journal:
    """Use `Journal.open`. Methods belong to one thread; `interrupts` guards every write against signals.

    `last_step` is the end of the finished prefix (-1: nothing), `n_committed` the number of finished steps.
    """

    def __init__(self, database: Database) -> None:
        self.path = database.path
        self.interrupts = database.interrupts
        self._database = database
        self.last_step, self._digest = _NO_STEP, ""
        self._ahead: dict[int, str] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        resume: bool,
        allow_config_change: bool = False,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        read_only: bool = False,
    ) -> Journal:
        """Open the journal of a run, or begin one.

        Args:
            path: the SQLite file; beside it live its `-wal`, `-shm` and `-lock` files.
            config: JSON values that decide what the run does; a resumed run must have equal ones.
            resume: go on where the journal ends; a missing journal is begun (the run died before its first write).
            allow_config_change: take the new config over instead of refusing.
            synchronous: "FULL" also survives the loss of power, at some ms per commit.
            read_only: look at a finished or a running journal; `config` is not compared and no lock is taken.

        Raises:
            ResumeRefused: the journal was made with other options (all are named), or exists and `resume` is false.
            JournalLocked: another process writes it.  JournalError: it is damaged or from a newer version.
            StorageRefused: the disk refuses.
        """
        path = Path(path)
        if read_only and not path.is_file():
            raise JournalError(f"{path} does not exist; there is no journal to read")
        database = Database(path, synchronous=synchronous, read_only=read_only)
        journal = cls(database)
        config = json.loads(canonical_json(config))
        try:
            prepare(database.connection, path, {"config": canonical_json(config)}, read_only=read_only)
            if not read_only:
                journal._accept(config, resume=resume, allow_config_change=allow_config_change)
            journal._find_position()
        except BaseException:
            database.close()
            raise
        return journal

    def _accept(self, config: Mapping[str, Any], *, resume: bool, allow_config_change: bool) -> None:
        row = self._database.row
        if not resume and (row("SELECT 1 FROM calls LIMIT 1") or row("SELECT 1 FROM steps LIMIT 1")):
            raise ResumeRefused(f"{self.path} already holds a run; resume it, or overwrite it")
        changed = differences(self.config, config)
        if changed and resume and not allow_config_change:
            raise ResumeRefused(
                f"{self.path} was made with other options: {'; '.join(changed)}; resume with the same ones"
            )
        if changed:
            with self._database.transaction("config") as execute:
                execute("UPDATE run SET value = ? WHERE name = 'config'", (canonical_json(config),))

    def _find_position(self) -> None:
        row = self._database.row
        self.last_step = int((row("SELECT value FROM run WHERE name = 'last_step'") or (_NO_STEP,))[0])
        self._digest = (row("SELECT value FROM run WHERE name = 'digest'") or ("",))[0]
        with self._database.reading() as execute:
            self._ahead = dict(execute("SELECT number, digest FROM steps WHERE number > ?", (self.last_step,)))

    @property
    def config(self) -> dict[str, Any]:
        """The options the run was begun with."""
        row = self._database.row("SELECT value FROM run WHERE name = 'config'")
        if row is None:
            raise JournalError(f"{self.path} holds no options; it is damaged")
        return json.loads(row[0])

    # ---- calls ---------------------------------------------------------------------------------------------------

    def answers(self, keys: Iterable[str], decode: Callable[[str, dict[str, Any]], Decoded]) -> dict[str, Decoded]:
        """Recorded answers by key; unknown keys are left out.

        Every answer is checked again: `decode(primitive, value)` raises KeyError, TypeError or ValueError on a value
        that is none. A poisoned row is dropped, counted as `poisoned`, and will be asked again.
        """
        found = {}
        with self._database.reading() as execute:
            for key in keys:
                row = execute("SELECT primitive, answer, checksum FROM calls WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                try:
                    if checksum(key, row[1]) != row[2]:
                        raise ValueError("checksum differs")
                    found[key] = decode(row[0], json.loads(row[1]))
                except (KeyError, TypeError, ValueError):
                    self._drop("DELETE FROM calls WHERE key = ?", key)
        return found

    def record(self, calls: Sequence[RecordedCall]) -> None:
        """Record answers in one transaction: all or none. A key that is known keeps its first answer."""
        rows = []
        for call in calls:
            answer = canonical_json(call.answer).encode("utf-8", "surrogatepass")
            rows.append(
                (
                    call.key,
                    call.primitive,
                    call.site,
                    call.prompt_tokens,
                    call.completion_tokens,
                    call.seconds,
                    checksum(call.key, answer),
                    call.fingerprint,
                    answer,
                    stored_json(call.call),
                )
            )
        with self._database.transaction("record"):
            self._database.connection.executemany(
                "INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )

    def calls(self, site: str | None = None) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
        """(key, site, primitive, call) of recorded calls, of one site or of all, in the order of recording."""
        where, values = ("", ()) if site is None else ("WHERE site = ? ", (site,))
        with self._database.reading() as execute:
            for key, place, primitive, call in execute(
                f"SELECT key, site, primitive, call FROM calls {where}ORDER BY rowid", values
            ):
                yield key, place, primitive, json.loads(call)

    def embeddings(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """Recorded vectors, (D,) float32 each, by key; a damaged one is dropped and counted as `poisoned`."""
        found = {}
        with self._database.reading() as execute:
            for key in keys:
                row = execute("SELECT vector, checksum FROM embeddings WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                if checksum(key, row[0]) == row[1] and len(row[0]) % 4 == 0:
                    found[key] = np.frombuffer(row[0], dtype="<f4").astype(np.float32)
                else:
                    self._drop("DELETE FROM embeddings WHERE key = ?", key)
        return found

    def record_embeddings(self, fingerprint: str, rows: Sequence[RecordedText]) -> None:
        """Record vectors in one transaction. A key that is known keeps its first vector."""
        stored = []
        for row in rows:
            vector = np.ascontiguousarray(row.vector, dtype="<f4").tobytes()
            stored.append((row.key, fingerprint, checksum(row.key, vector), vector, to_bytes(row.text)))
        with self._database.transaction("embeddings"):
            self._database.connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?, ?, ?)", stored)

    def embedded_texts(self) -> Iterator[str]:
        """Every text whose vector is recorded, in the order of recording."""
        with self._database.reading() as execute:
            for (text,) in execute("SELECT text FROM embeddings ORDER BY rowid"):
                yield from_bytes(text)

    def record_failure(self, *, key: str, site: str, kind: str, message: str) -> None:
        """A call got no usable answer; `kind` is the error's class name."""
        with self._database.transaction("failure") as execute:
            execute(
                "INSERT INTO failures (key, site, kind, message) VALUES (?, ?, ?, ?)",
                (key, site, kind, to_bytes(message)),
            )

    def failures(self) -> list[Failure]:
        """Calls without a usable answer, in the order they were noticed."""
        with self._database.reading() as execute:
            rows = execute("SELECT key, site, kind, message FROM failures ORDER BY id").fetchall()
        return [Failure(key, site, kind, from_bytes(message)) for key, site, kind, message in rows]

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of the ledger (`cached`, `retries`, `poisoned`); stored with the next write or at close."""
        if by:
            self._database.pending[name] += by

    def ledger(self) -> dict[str, Any]:
        """What the run cost: sums over the recorded calls, `cached` answers that cost nothing, `retries`, `failures`.

        `seconds` adds up the time of every call, so concurrent calls count side by side.
        """
        with self._database.reading() as execute:
            requests, prompt_tokens, completion_tokens, seconds = execute(_SUMS).fetchone()
            counters = Counter(dict(execute("SELECT name, value FROM counters"))) + self._database.pending
            failures = execute("SELECT COUNT(*) FROM failures").fetchone()[0]
        return {
            "requests": requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cached": counters["cached"],
            "retries": counters["retries"],
            "failures": failures,
            "seconds": seconds,
            **({"poisoned": counters["poisoned"]} if counters["poisoned"] else {}),
        }

    def costs(self) -> dict[str, dict[str, float]]:
        """{call site: {"requests", "prompt_tokens", "completion_tokens", "seconds"}}, sums over the recorded calls."""
        names = ("requests", "prompt_tokens", "completion_tokens", "seconds")
        sums = _SUMS.replace("SELECT ", "SELECT site, ", 1)
        with self._database.reading() as execute:
            rows = execute(f"{sums} GROUP BY site ORDER BY site").fetchall()
        return {site: dict(zip(names, numbers, strict=True)) for site, *numbers in rows}

    # ---- steps ---------------------------------------------------------------------------------------------------

    @property
    def n_committed(self) -> int:
        """Number of finished steps."""
        return self.last_step + 1 + len(self._ahead)

    @property
    def digest(self) -> str:
        """SHA-256 rolled over the finished prefix; equal for equal logs, however they came about."""
        return self._digest

    def has_step(self, number: int) -> bool:
        """Whether a step is finished."""
        return number <= self.last_step or number in self._ahead

    def commit(self, steps: Sequence[StepCommit]) -> None:
        """Finish steps, in an order that respects their dependencies: events, memories and step rows, all or none.

        Raises:
            JournalError: a step is finished already, appears twice, or an event does not name its step and kind.
        """
        fresh: dict[int, StepRows] = {}
        for step in steps:
            if step.number < 0 or self.has_step(step.number) or step.number in fresh:
                raise JournalError(f"step {step.number!r} cannot be committed to {self.path}: it was, or is negative")
            fresh[step.number] = step_rows(step)
        last_step, digest = self.last_step, self._digest
        while (
            reached := fresh[last_step + 1][0] if last_step + 1 in fresh else self._ahead.get(last_step + 1)
        ) is not None:
            last_step += 1
            digest = rolled(digest, reached)
        with self.interrupts.deferred():
            with self._database.transaction("commit") as execute:
                self._write_steps(fresh)
                execute("INSERT OR REPLACE INTO run VALUES ('last_step', ?)", (str(last_step),))
                execute("INSERT OR REPLACE INTO run VALUES ('digest', ?)", (digest,))
            self._ahead.update((number, rows[0]) for number, rows in fresh.items())
            for number in range(self.last_step + 1, last_step + 1):
                del self._ahead[number]
            self.last_step, self._digest = last_step, digest

    def _write_steps(self, fresh: Mapping[int, StepRows]) -> None:
        self._database.connection.executemany(
            "INSERT INTO steps VALUES (?, ?)", [(number, rows[0]) for number, rows in fresh.items()]
        )
        self._database.connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)", [event for _, events, _ in fresh.values() for event in events]
        )
        self._database.connection.executemany(
            "INSERT INTO memory VALUES (?, ?, 1, ?, ?) ON CONFLICT (owner, key) DO UPDATE "
            "SET version = version + 1, step = excluded.step, text = excluded.text",
            [write for _, _, writes in fresh.values() for write in writes],
        )

    def memories(self) -> dict[tuple[str, str], MemoryRow]:
        """The latest state of every memory by (owner, key); costs O(state), not O(history)."""
        with self._database.reading() as execute:
            rows = execute("SELECT owner, key, text, version, step FROM memory ORDER BY owner, key")
            return {
                (from_bytes(owner), from_bytes(key)): MemoryRow(from_bytes(text), version, step)
                for owner, key, text, version, step in rows
            }

    def events(self, kinds: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Events in step order, of some kinds or of all."""
        where = "" if kinds is None else f"WHERE kind IN ({', '.join('?' * len(kinds))}) "
        with self._database.reading() as execute:
            for (payload,) in execute(f"SELECT payload FROM events {where}ORDER BY step, position", tuple(kinds or ())):
                yield json.loads(payload)

    def count_events(self, *, ok: bool) -> int:
        """Number of events that say `ok` (or do not say); those that are not ok are counted through an index."""
        with self._database.reading() as execute:
            condition = "ok = 1" if ok else "ok = 0"  # literal, so that the partial index serves
            return int(execute(f"SELECT COUNT(*) FROM events WHERE {condition}").fetchone()[0])

    def export_events(self, path: str | Path) -> str:
        """Write the canonical event log: one JSON object a line, in step order, whole or not at all.

        Returns:
            Hex SHA-256 of the file.

        Raises:
            JournalError: a number of events differs from what was committed.  StorageRefused: the disk refuses.
        """
        digest = hashlib.sha256()
        hooks.trigger("export:begin")
        with self.interrupts.deferred(), atomic_open(path, "wb") as handle:
            for _, lines in self._lines_by_step():
                block = "".join(f"{line}\n" for line in lines).encode()
                digest.update(block)
                handle.write(block)
            hooks.trigger("export:written")
        hooks.trigger("export:done")
        return digest.hexdigest()

    def _lines_by_step(self) -> Iterator[tuple[int, list[str]]]:
        with self._database.reading() as execute:
            rows = execute("SELECT step, position, payload FROM events ORDER BY step, position")
            for number, group in groupby(rows, key=lambda row: row[0]):
                listed = list(group)
                if [row[1] for row in listed] != list(range(len(listed))):
                    raise JournalError(f"{self.path} is damaged: events of step {number} are missing")
                yield number, [row[2] for row in listed]

    # ---- checks --------------------------------------------------------------------------------------------------

    def fold_check(self) -> None:
        """The memories equal the fold of the log: the last `after` of every (owner, key) that events name.

        Raises:
            JournalError: naming the first memory that differs.
        """
        name = checks.first_unfolded(self.events(), self.memories())
        if name is not None:
            raise JournalError(f"{self.path}: memory {name!r} is not what its events say; the journal is damaged")

    def problems(self) -> list[str]:
        """What is wrong with the file, for `doctor`: pages, digests of steps, the rolling digest; [] when nothing."""
        with self._database.reading() as execute:
            found = [row[0] for row in execute("PRAGMA integrity_check") if row[0] != "ok"]
            stored = dict(execute("SELECT number, digest FROM steps ORDER BY number"))
        return found + checks.wrong_steps(stored, dict(self._lines_by_step()), self.last_step, self._digest)

    def _drop(self, statement: str, key: str) -> None:
        if not self._database.is_read_only:
            self.count("poisoned")
            with self._database.transaction("drop") as execute:
                execute(statement, (key,))

    def close(self) -> None:
        """Store the counters, fold the write-ahead log into the file and let others write; safe to call twice."""
        self._database.close()
