"""Tables of a journal, their versions, and how SQLite's refusals become our errors."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from recollect.errors import JournalError, JournalLocked, StorageRefused

SCHEMA_VERSION = 1

# `memory` holds the latest version only: every earlier one is in the event that wrote it.
TABLES = """
CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (
    key TEXT NOT NULL UNIQUE, primitive TEXT NOT NULL, site TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, seconds REAL NOT NULL, checksum INTEGER NOT NULL, fingerprint TEXT NOT NULL,
    answer BLOB NOT NULL, call TEXT NOT NULL
);
CREATE TABLE embeddings (
    key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, checksum INTEGER NOT NULL, vector BLOB NOT NULL,
    text BLOB NOT NULL
);
CREATE TABLE steps (number INTEGER PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE events (
    step INTEGER NOT NULL REFERENCES steps (number), position INTEGER NOT NULL, kind TEXT NOT NULL,
    ok INTEGER NOT NULL, payload TEXT NOT NULL, PRIMARY KEY (step, position)
) WITHOUT ROWID;
CREATE INDEX events_not_ok ON events (step) WHERE ok = 0;
CREATE TABLE memory (
    owner BLOB NOT NULL, key BLOB NOT NULL, version INTEGER NOT NULL, step INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE failures (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, site TEXT NOT NULL, kind TEXT NOT NULL, message BLOB NOT NULL
);
"""

# From version n to n + 1; run inside one transaction, forward only.
MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {}

_DISK_CODES = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into `StorageRefused`, `JournalLocked` or `JournalError`, each naming the file."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.IntegrityError as error:
        raise JournalError(f"{path} refused a row: {error}; it was already written") from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # absent on errors of the Python module itself
        if code in _DISK_CODES:
            raise StorageRefused(f"cannot write {path}: {error}; free some space and resume") from error
        if code in _BUSY_CODES:
            raise JournalLocked(f"{path} is locked by another program: {error}; close it and resume") from error
        raise JournalError(f"{path} is damaged or is no journal: {error}") from error


def connect(path: Path, *, synchronous: Literal["NORMAL", "FULL"], read_only: bool) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions begin and end where the code says so."""
    with sqlite_errors(path):
        if read_only:
            connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
        else:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA busy_timeout = 10000")
            if not read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {synchronous}")
                connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
    return connection


def prepare(connection: sqlite3.Connection, path: Path, rows: Mapping[str, str], *, read_only: bool) -> None:
    """Create the tables with their first `run` rows, or bring an older journal forward.

    Raises:
        JournalError: a newer version wrote it, or it is too old to be read without writing.
    """
    with sqlite_errors(path):
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"{path} has journal version {version}, this program knows up to {SCHEMA_VERSION}; update recollect"
            )
        if version == SCHEMA_VERSION:
            return
        if read_only:
            raise JournalError(f"{path} has journal version {version}, not {SCHEMA_VERSION}; resume the run once first")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if version == 0:
                for statement in TABLES.split(";\n"):
                    connection.execute(statement)
                connection.executemany("INSERT INTO run VALUES (?, ?)", list(rows.items()))
            else:
                for old in range(version, SCHEMA_VERSION):
                    MIGRATIONS[old](connection)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
