"""The retrieval index in Chroma: an embedded store of the run, or a server; always derived, never trusted.

A killed writer can leave an embedded store that does not open, or that crashes the interpreter on opening, which
nothing can catch. So a child process opens it first and compares it with the source of truth; one process at a time
holds it (file lock); whatever goes wrong in the store, it is moved away and rebuilt, and the rebuild is counted and
logged with its reason. What is not the store's fault (`is_fault_of_the_store`) is never answered by a rebuild.
Not covered: a store that passes the probe and crashes the process later; several writers of one store.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

import numpy as np

from recollect.agents.chroma_store import (
    ChromaStore,
    StoreBroken,
    Summary,
    checked_metadata,
    embedded_client,
    is_fault_of_the_store,
    server_client,
    summary_of,
)
from recollect.agents.memory_index import ExactIndex, Hit, IndexRow, Scalar, checked_k, unit_rows
from recollect.errors import ConfigError, DataError, InputError, RecollectError, ServerAway
from recollect.io import disk_errors

logger = logging.getLogger("recollect.agents.chroma_index")

Source = Callable[[], Iterable[tuple[str, IndexRow]]]
Result = TypeVar("Result")

PROBE_SECONDS = 300
LOCK_TRIES, LOCK_PAUSE_SECONDS = 8, 0.25
_STORE, _BROKEN = "store", "broken"


class ChromaIndex:
    """`MemoryIndex` in Chroma.

    Args:
        location: folder of an embedded store (made if absent), or `http://host:port` of a server.
        source: gives every (collection, row) that must be in the index (the journal's), the later row of an id
            winning; read once, on opening. None: the index starts empty, whatever was stored. Either way the rows,
            later ones included, are mirrored in memory, and a failing store is rebuilt from the mirror.
        namespace: keeps runs that share a server apart. Default: "run" for a folder; for a server a fresh one, whose
            collections are deleted on `close`.
        sync_threshold: after how many rows Chroma writes its graph to disk.

    Raises:
        InputError: another process holds the folder.
        ServerAway: the server does not answer.
    """

    def __init__(
        self, location: str | Path, source: Source | None = None, *, namespace: str = "", sync_threshold: int = 1000
    ) -> None:
        self.rebuilt = 0
        self._url = str(location) if str(location).startswith(("http://", "https://")) else ""
        if not self._url and "://" in str(location):
            raise ConfigError(f"a Chroma location is a folder or http://host:port, got {str(location)!r}")
        self._forget_on_close = bool(self._url) and not namespace
        self._namespace = namespace or (uuid.uuid4().hex[:16] if self._url else "run")
        self._sync_threshold = sync_threshold
        self._source = source
        self._truth = ExactIndex()
        self._lock: IO[str] | None = None
        self._store: ChromaStore | None = None
        self._client: object = None
        if source is not None:
            self._read_source()
        if self._url:
            self._guarded(self._open_server)
        else:
            self._folder = Path(location)
            self._lock = _locked(self._folder)
            try:
                self._guarded(self._open_embedded)
            except BaseException:
                self._lock.close()
                raise

    # -- the protocol -----------------------------------------------------------------------------------------------

    def upsert(self, collection: str, rows: Sequence[IndexRow]) -> None:
        """Add or replace rows.

        Raises:
            DataError: wrong dimension, a non-finite value, an empty id, metadata that are not scalars.
            ServerAway: the server does not answer; the rows reach it with the next rebuild.
        """
        if not rows:
            return
        for row in rows:
            checked_metadata(row)
        unique = list({row.id: row for row in rows}.values())
        self._truth.upsert(collection, unique)
        self._attempt(lambda store: store.upsert(collection, unique))

    def query(
        self, collection: str, vectors: np.ndarray, k: int, where: Mapping[str, Scalar] | None = None
    ) -> list[list[Hit]]:
        """The same hits as `ExactIndex`; without `where`, in collections above max(4 k, 256) rows, a graph search.

        Raises:
            DataError: k below 1, a wrong dimension or a non-finite value.
            ServerAway: the server does not answer.
        """
        queries = unit_rows(vectors)
        checked_k(k)
        n_rows = self._truth.count(collection)
        if n_rows == 0:
            return [[] for _ in queries]
        dimension = self._truth.dimension(collection)
        if queries.shape[1] != dimension:
            raise DataError(f"queries must have {dimension} dimensions, got {queries.shape[1]}")

        def search(store: ChromaStore) -> list[list[Hit]]:
            found = store.candidates(collection, queries, k, where, n_rows)
            # Ranked from the mirror: Chroma renormalises vectors, which moves last bits.
            try:
                return [
                    self._truth.best_of(collection, ids, query, k) for ids, query in zip(found, queries, strict=True)
                ]
            except KeyError as error:
                raise StoreBroken(f"collection {collection!r} holds a row {error} that nobody put there") from error

        return self._attempt(search)

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Forget rows; unknown ids are no error."""
        if ids and self._truth.count(collection):
            self._truth.delete(collection, ids)
            self._attempt(lambda store: store.delete(collection, ids))

    def count(self, collection: str) -> int:
        """Rows the collection must hold; every query checks that the store agrees."""
        return self._truth.count(collection)

    def close(self) -> None:
        """Let go of the store; on a server, delete collections that nobody could find again."""
        if self._store is not None and self._forget_on_close:
            store = self._store
            with contextlib.suppress(ServerAway):
                self._guarded(store.drop_all)
        self._let_go()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # -- opening and rebuilding ---------------------------------------------------------------------------------------

    def _read_source(self) -> None:
        assert self._source is not None
        pages: dict[str, list[IndexRow]] = {}
        for collection, row in self._source():
            checked_metadata(row)
            pages.setdefault(collection, []).append(row)
        for collection, rows in pages.items():
            self._truth.upsert(collection, rows)

    def _open_server(self) -> None:
        parts = urlsplit(self._url)
        if not parts.hostname:
            raise ConfigError(f"a Chroma location is a folder or http://host:port, got {self._url!r}")
        ssl = parts.scheme == "https"
        try:
            self._use(server_client(parts.hostname, parts.port or (443 if ssl else 8000), ssl=ssl))
        except Exception as error:
            if not isinstance(error, ValueError):  # which the constructor makes of most that happens to it
                self._raise_unless_store(error)
            self._raise_if_away(error)
            raise ConfigError(f"what answers at {self._url} is no usable Chroma server: {_said(error)}") from error
        assert self._store is not None
        expected = summary_of(self._truth.contents())
        try:
            held = self._store.summary()
        except BaseException as error:
            self._raise_unless_store(error)
            self._rebuild(f"the server's collections cannot be read: {_said(error)}")
            return
        if held and held != expected:
            self._rebuild("the server's collections differ from the journal", counted=self._source is not None)
        elif expected and not held:
            self._fill()

    def _open_embedded(self) -> None:
        assert self._lock is not None
        expected = summary_of(self._truth.contents())
        current = self._current()
        if current is None or self._source is None:
            if current is not None:
                shutil.rmtree(current)
            self._start_afresh()
            return
        problem = _probe(current, self._namespace, expected, self._lock)
        if not problem:
            try:
                self._use(embedded_client(current))
                return
            except BaseException as error:
                self._raise_unless_store(error)
                problem = f"it opens in another process only: {_said(error)}"
        self._rebuild(problem)

    def _current(self) -> Path | None:
        stores = sorted(self._folder.glob(f"{_STORE}-*"))
        return stores[-1] if stores else None

    def _use(self, client: object) -> None:
        self._client = client
        self._store = ChromaStore(client, self._namespace, self._sync_threshold)  # type: ignore[arg-type]

    def _let_go(self) -> None:
        client, self._client, self._store = self._client, None, None
        if client is not None and not self._url:
            try:
                client.close()  # type: ignore[attr-defined]
            except BaseException as error:  # a broken store may refuse even this; it is left or moved away all the same
                self._raise_unless_store(error)
                logger.warning("the retrieval index in %s did not close: %s", self._folder, _said(error))

    def _start_afresh(self) -> None:
        """A new, numbered folder: Chroma remembers by path what it opened in this process."""
        used = [int(path.name.rpartition("-")[2]) for path in self._folder.glob("*-*") if path.is_dir()]
        folder = self._folder / f"{_STORE}-{max(used, default=0) + 1:04d}"
        with disk_errors(folder):
            folder.mkdir()
        self._use(embedded_client(folder))
        self._fill()

    def _fill(self) -> None:
        assert self._store is not None
        for collection, rows in self._truth.contents().items():
            if rows:
                self._store.upsert(collection, rows)

    def _rebuild(self, reason: str, *, counted: bool = True) -> None:
        if counted:
            self.rebuilt += 1
            logger.warning("retrieval index in %s rebuilt: %s", self._url or self._folder, reason)
        if self._url:
            assert self._store is not None
            self._store.drop_all()
            self._fill()
            return
        self._let_go()
        current = self._current()
        if current is not None:
            for old in self._folder.glob(f"{_BROKEN}-*"):
                shutil.rmtree(old)
            os.rename(current, current.with_name(current.name.replace(_STORE, _BROKEN, 1)))
        self._start_afresh()

    # -- failures ---------------------------------------------------------------------------------------------------

    def _attempt(self, operation: Callable[[ChromaStore], Result]) -> Result:
        """Do it; when the store fails, rebuild it and do it once more."""
        try:
            return operation(self._opened())
        except BaseException as error:
            self._raise_unless_store(error)
            reason = _said(error)
        self._guarded(lambda: self._rebuild(reason))
        return self._guarded(lambda: operation(self._opened()))

    def _opened(self) -> ChromaStore:
        if self._store is None:
            raise RecollectError("the retrieval index is closed")
        return self._store

    def _guarded(self, operation: Callable[[], Result]) -> Result:
        """Do it; a store that fails here has nothing left to be rebuilt from, or was rebuilt just now."""
        try:
            return operation()
        except BaseException as error:
            self._raise_unless_store(error)
            raise RecollectError(
                f"the retrieval index in {self._url or self._folder} fails even when rebuilt: {_said(error)}; "
                "check the disk, or use another folder or server"
            ) from error

    def _raise_unless_store(self, error: BaseException) -> None:
        """Pass on what is not the store's fault, and a server's absence as `ServerAway`.

        A handler that calls this first may catch BaseException: a panic of Chroma's native part is nothing less.
        """
        self._raise_if_away(error)
        if not is_fault_of_the_store(error):
            raise error

    def _raise_if_away(self, error: BaseException) -> None:
        import httpx

        if not self._url:
            return
        away = (httpx.TransportError, ConnectionError, TimeoutError)
        if isinstance(error, away) or (isinstance(error, ValueError) and isinstance(error.__context__, away)):
            raise ServerAway(
                f"the Chroma server at {self._url} does not answer ({error}); start it with `chroma run` and resume"
            ) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _locked(folder: Path) -> IO[str]:
    """Take the folder for this process until the handle is closed."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the retrieval index needs a folder, {folder} is a file")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 held until close()
    for patience in range(LOCK_TRIES, 0, -1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if patience > 1:  # a killed run's probe may take a moment to end
                time.sleep(LOCK_PAUSE_SECONDS)
                continue
            handle.close()
            raise InputError(
                f"the retrieval index in {folder} is open in another process; wait for it or use another folder"
            ) from None
        break
    return handle


def _probe(folder: Path, namespace: str, expected: Summary, lock: IO[str]) -> str:
    """Open a store in a child process; "" when it holds what is expected, else what is wrong.

    The child shares the lock, so that nobody opens the store while it lives, and ends when this process does.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    watched, held_open = os.pipe()
    try:
        child = subprocess.run(
            [sys.executable, "-m", "recollect.agents.chroma_store", str(folder), namespace],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=watched,
            capture_output=True,
            pass_fds=(lock.fileno(),),
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"opening it took over {PROBE_SECONDS} s"
    finally:
        os.close(watched)
        os.close(held_open)
    if child.returncode != 0:
        said = child.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"the probe ended with status {child.returncode}: {said[-1] if said else 'no message'}"
    try:
        lines = child.stdout.decode("utf-8", "replace").strip().splitlines()
        held = {name: (int(n), str(digest)) for name, (n, digest) in json.loads(lines[-1]).items()}
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        return f"the probe's answer is unreadable: {error}"
    return "" if held == expected else "its rows differ from the journal"
