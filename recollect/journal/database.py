"""One SQLite connection with its lock: transactions that are whole or absent, and counters that ride along."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from recollect.errors import JournalError
from recollect.journal import hooks
from recollect.journal.interrupts import Interrupts
from recollect.journal.lock import WriterLock
from recollect.journal.schema import connect, sqlite_errors

Execute = Callable[..., sqlite3.Cursor]

_ADD = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"


class Database:
    """The file of a journal. `pending` counters are stored by the next transaction, or at close."""

    def __init__(self, path: Path, *, synchronous: Literal["NORMAL", "FULL"], read_only: bool) -> None:
        """Connect, as the only writer unless `read_only`.

        Raises:
            JournalLocked: another process writes.  StorageRefused: the disk refuses.  JournalError: not a journal.
        """
        self.path = path
        self.is_read_only = read_only
        self.interrupts = Interrupts()
        self.pending: Counter[str] = Counter()
        self._lock = None if read_only else WriterLock(path)
        try:
            self.connection = connect(path, synchronous=synchronous, read_only=read_only)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[Execute]:
        """`execute` of the connection, with SQLite's errors named."""
        with sqlite_errors(self.path):
            yield self.connection.execute

    def row(self, statement: str, *values: Any) -> Any:
        """The first row of a query, or None."""
        with sqlite_errors(self.path):
            return self.connection.execute(statement, values).fetchone()

    @contextlib.contextmanager
    def transaction(self, name: str) -> Iterator[Execute]:
        """All writes of the block or none; signals wait for its end."""
        if self._lock is None:
            raise JournalError(f"{self.path} was opened for reading only, or is closed")
        connection = self.connection
        with self.interrupts.deferred(), sqlite_errors(self.path):
            hooks.trigger(f"{name}:begin")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection.execute
                if self.pending:
                    connection.executemany(_ADD, list(self.pending.items()))
                hooks.trigger(f"{name}:written")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            self.pending.clear()
            hooks.trigger(f"{name}:committed")

    def close(self) -> None:
        """Store the counters, fold the write-ahead log into the file, release the lock; safe to call twice."""
        try:
            if self._lock is not None:
                if self.pending:
                    with self.transaction("counters"):
                        pass
                # A finished journal is one file that opens on read-only media; a live reader only postpones that.
                with contextlib.suppress(sqlite3.OperationalError):
                    self.connection.execute("PRAGMA busy_timeout = 0")
                    self.connection.execute("PRAGMA journal_mode = DELETE")
        finally:
            self.connection.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None
