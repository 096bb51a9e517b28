"""Rows in and out of one Chroma client, and the check of a store that a child process runs before we open it.

Collections are named by a hash, since Chroma allows few characters; their metadata keep the real name. Vectors are
always ours (Chroma's own embedding function would fetch a model). Every row carries a digest of its text, metadata
and vector, so a store can be compared with the source of truth without reading vectors.
Run as `python -m recollect.agents.chroma_store FOLDER NAMESPACE`: prints the summary of an embedded store as JSON, or
dies as the store makes it die.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.agents.memory_index import IndexRow, Scalar, unit_rows
from recollect.errors import DataError, RecollectError
from recollect.io import canonical_json, sha256_text

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

PAGE = 1000
OVERSAMPLING = 4
SEARCHED_AT_LEAST = 256
ROW_DIGEST = "recollect_row"
NAME, NAMESPACE = "recollect_collection", "recollect_namespace"

Summary = dict[str, tuple[int, str]]


class StoreBroken(RecollectError):
    """The store answers, but not with what was put in."""


def is_fault_of_the_store(error: BaseException) -> bool:
    """Whether Chroma, its native part or the way to its server failed, and not the code that called it.

    Known to come from Chroma 1.5: its own error classes (damaged, locked or vanished files; a collection that is
    gone), a panic of the native part (derived from BaseException, of a module that cannot be imported), httpx errors,
    a bare `Exception` with the body of an HTTP error it does not know, and operating system errors.
    """
    import httpx
    from chromadb.errors import ChromaError

    if isinstance(error, StoreBroken | ChromaError | httpx.HTTPError | OSError):
        return True
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


def embedded_client(folder: Path) -> ClientAPI:
    """A client of the store in `folder`; sends no telemetry."""
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(path=str(folder), settings=Settings(anonymized_telemetry=False))


def server_client(host: str, port: int, *, ssl: bool) -> ClientAPI:
    """A client of a Chroma server; sends no telemetry."""
    import chromadb
    from chromadb.config import Settings

    return chromadb.HttpClient(host=host, port=port, ssl=ssl, settings=Settings(anonymized_telemetry=False))


def row_digest(row: IndexRow, vector: np.ndarray) -> str:
    """Hex digest of everything a row holds; `vector` is its float32 unit vector."""
    digest = hashlib.sha256(canonical_json([row.id, row.text, dict(row.metadata)]).encode("utf-8", "surrogatepass"))
    digest.update(vector.tobytes())
    return digest.hexdigest()


def summary_of(contents: Mapping[str, Sequence[IndexRow]]) -> Summary:
    """{collection: (rows, digest)} of rows in memory; empty collections are left out."""
    return {
        name: _summed(map(row_digest, rows, unit_rows(np.stack([row.vector for row in rows]))))
        for name, rows in contents.items()
        if rows
    }


def _summed(digests: Iterator[str]) -> tuple[int, str]:
    ordered = sorted(digests)
    return len(ordered), sha256_text("".join(ordered))


class ChromaStore:
    """Our collections in one client. Raises whatever Chroma raises, and `StoreBroken`."""

    def __init__(self, client: ClientAPI, namespace: str, sync_threshold: int = 1000) -> None:
        self._client = client
        self._namespace = namespace
        self._sync_threshold = sync_threshold
        self._handles: dict[str, Any] = {}

    def _handle(self, collection: str) -> Any:
        if collection not in self._handles:
            self._handles[collection] = self._client.get_or_create_collection(
                f"recollect-{sha256_text(self._namespace + chr(31) + collection)[:32]}",
                embedding_function=None,
                metadata={NAME: collection, NAMESPACE: self._namespace},
                configuration={
                    "hnsw": {
                        "space": "cosine",
                        "ef_construction": 200,
                        "ef_search": 200,
                        "max_neighbors": 32,
                        "sync_threshold": self._sync_threshold,
                    }
                },
            )
        return self._handles[collection]

    def upsert(self, collection: str, rows: Sequence[IndexRow]) -> None:
        """Write rows in pages; a row is whole or absent, a call is not."""
        vectors = unit_rows(np.stack([np.asarray(row.vector) for row in rows]))
        for start in range(0, len(rows), PAGE):
            page = rows[start : start + PAGE]
            self._handle(collection).upsert(
                ids=[row.id for row in page],
                embeddings=vectors[start : start + PAGE],
                documents=[row.text.encode("utf-8", "replace").decode() for row in page],
                metadatas=[
                    {**row.metadata, ROW_DIGEST: row_digest(row, vectors[start + place])}
                    for place, row in enumerate(page)
                ],
            )

    def candidates(
        self, collection: str, queries: np.ndarray, k: int, where: Mapping[str, Scalar] | None, n_rows: int
    ) -> list[list[str]]:
        """For each of (B, D) queries the ids among which its k best are to be looked for.

        With a filter, or where the graph search comes back short, every matching row; otherwise the nearest
        max(4 k, 256) by the graph, which may miss one in larger collections.

        Args:
            n_rows: how many rows the collection must hold.

        Raises:
            StoreBroken: it holds another number.
        """
        handle = self._handle(collection)
        if (held := handle.count()) != n_rows:
            raise StoreBroken(f"collection {collection!r} holds {held} rows instead of {n_rows}")
        if where:
            each = [{name: value} for name, value in where.items()]
            return [self._all_ids(handle, each[0] if len(each) == 1 else {"$and": each})] * len(queries)
        wanted = min(n_rows, max(OVERSAMPLING * k, SEARCHED_AT_LEAST))
        found = handle.query(query_embeddings=queries, n_results=wanted, include=[])["ids"]
        if any(len(ids) < wanted for ids in found):
            return [self._all_ids(handle, None)] * len(queries)
        return found

    @staticmethod
    def _all_ids(handle: Any, where: Any) -> list[str]:
        ids: list[str] = []
        while page := handle.get(where=where, limit=PAGE, offset=len(ids), include=[])["ids"]:
            ids += page
        return ids

    def delete(self, collection: str, ids: Sequence[str]) -> None:
        """Forget rows."""
        for start in range(0, len(ids), PAGE):
            self._handle(collection).delete(ids=list(ids[start : start + PAGE]))

    def _ours(self) -> Iterator[tuple[str, Any]]:
        for found in self._client.list_collections():
            metadata = found.metadata or {}
            if metadata.get(NAMESPACE) == self._namespace:
                yield str(metadata.get(NAME, "")), self._client.get_collection(found.name, embedding_function=None)

    def drop_all(self) -> None:
        """Delete every collection of the namespace."""
        for _, handle in list(self._ours()):
            self._client.delete_collection(handle.name)
        self._handles.clear()

    def summary(self) -> Summary:
        """What is stored; compare with `summary_of`.

        Raises:
            StoreBroken: the graph does not reach every row, or a stored vector is not a unit vector.
        """
        held: Summary = {}
        for name, handle in self._ours():
            ids: list[str] = []
            digests: list[str] = []
            first = None
            while True:
                page = handle.get(limit=PAGE, offset=len(ids), include=["metadatas", "embeddings"])
                if not page["ids"]:
                    break
                ids += page["ids"]
                digests += [str((metadata or {}).get(ROW_DIGEST, "")) for metadata in page["metadatas"]]
                vectors = np.asarray(page["embeddings"], dtype=np.float64)
                squares = (vectors * vectors).sum(axis=1)
                if not ((np.abs(squares - 1) < 1e-3) | (squares < 1e-3)).all():
                    raise StoreBroken(f"collection {name!r} holds damaged vectors")
                first = vectors[:1] if first is None else first
            if first is None:
                continue
            reached = handle.query(query_embeddings=first, n_results=len(ids), include=[])["ids"][0]
            if set(reached) != set(ids):
                raise StoreBroken(f"the graph of {name!r} reaches {len(reached)} of {len(ids)} rows")
            held[name] = _summed(iter(digests))
        return held


def checked_metadata(row: IndexRow) -> None:
    """Refuse what Chroma would refuse, before anything is written.

    Raises:
        DataError: an empty id, a metadata value that is not a finite scalar, or text that is not Unicode.
    """
    if not row.id:
        raise DataError("an index row needs a non-empty id")
    for name, value in (("id", row.id), *row.metadata.items()):
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{name!r} of index row {row.id!r} holds an unpaired surrogate; clean it first")
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise DataError(f"metadata {name!r} of index row {row.id!r} must be text or a finite number, got {value!r}")


def main(folder: str, namespace: str) -> None:
    """Print the summary of the store in `folder`; end at once when whoever asked has died (its end of stdin closes)."""

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    summary = ChromaStore(embedded_client(Path(folder)), namespace).summary()
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
