"""Chroma gives the hits of the exact index, on disk and over the wire, and comes back after any damage."""

import os
import shutil

import numpy as np
import pytest
from support.chroma_server import Server

from recollect.agents.chroma_index import ChromaIndex
from recollect.agents.chroma_store import ChromaStore
from recollect.agents.memory_index import ExactIndex, IndexRow
from recollect.errors import ConfigError, DataError, InputError, RecollectError, ServerAway

pytest.importorskip("chromadb")
from chromadb.errors import InternalError, NotFoundError

DIMENSION = 16


def some_rows(n, seed=0, start=0):
    vectors = np.random.default_rng(seed).normal(size=(n, DIMENSION))
    return [
        IndexRow(f"user{i % 7}|key|{i}", f"text {i}", vectors[i - start], {"owner": f"user{i % 7}", "part": i % 2})
        for i in range(start, start + n)
    ]


def some_queries(n=20, seed=9):
    return np.random.default_rng(seed).normal(size=(n, DIMENSION))


def assert_equal(index, exact, collection="memories", k=5):
    queries = some_queries()
    assert index.count(collection) == exact.count(collection)
    for where in (None, {"owner": "user3"}, {"owner": "user3", "part": 1}, {"owner": "nobody"}):
        assert index.query(collection, queries, k, where) == exact.query(collection, queries, k, where), where


def exact_of(rows, collection="memories"):
    exact = ExactIndex()
    exact.upsert(collection, rows)
    return exact


def test_hits_equal_the_exact_index_through_every_operation(tmp_path):
    index, exact = ChromaIndex(tmp_path / "index"), ExactIndex()
    for target in (index, exact):
        target.upsert("memories", some_rows(200))
        target.upsert("memories", some_rows(40, seed=1, start=30))  # replaced
        target.upsert("CDs & Vinyl/日本", some_rows(10))
        target.delete("memories", ["user0|key|0", "user1|key|1", "unknown"])
    assert_equal(index, exact)
    assert_equal(index, exact, "CDs & Vinyl/日本", k=50)
    assert index.query("unknown", some_queries(2), 3) == [[], []]
    assert index.rebuilt == 0
    index.close()
    with pytest.raises(RecollectError, match="closed"):
        index.upsert("memories", some_rows(1))


def test_many_rows_without_a_filter_are_found_by_the_graph_and_ranked_exactly(tmp_path):
    rows = some_rows(3000)
    index, exact = ChromaIndex(tmp_path / "index"), exact_of(rows)
    index.upsert("memories", rows)
    found, wanted = (target.query("memories", some_queries(100), 10) for target in (index, exact))
    share = np.mean([hits == best for hits, best in zip(found, wanted, strict=True)])
    assert share >= 0.98, "a graph search may miss a row; here it must hardly ever"
    for hits in found:
        assert hits == sorted(hits, key=lambda hit: (-hit.similarity, hit.id))
    index.close()


def test_equal_texts_do_not_hide_each_other(tmp_path):
    rows = [IndexRow(f"m{n:04d}", "same", np.ones(DIMENSION), {"owner": "u"}) for n in range(600)]
    index, exact = ChromaIndex(tmp_path / "index"), exact_of(rows)
    index.upsert("memories", rows)
    assert index.query("memories", np.ones((1, DIMENSION)), 5, {"owner": "u"}) == exact.query(
        "memories", np.ones((1, DIMENSION)), 5
    )
    assert len(index.query("memories", np.ones((1, DIMENSION)), 500)[0]) == 500
    index.close()


def source_of(rows):
    return lambda: (("memories", row) for row in rows)


def test_a_store_that_agrees_with_the_journal_is_kept(tmp_path):
    rows = some_rows(150)
    for _ in range(2):
        index = ChromaIndex(tmp_path / "index", source_of(rows))
        assert_equal(index, exact_of(rows))
        assert index.rebuilt == 0
        index.close()
    assert [path.name for path in sorted((tmp_path / "index").iterdir())] == ["lock", "store-0001"]


def rows_changed(change):
    rows = some_rows(150)
    if change == "one row more":
        rows += some_rows(1, seed=5, start=150)
    elif change == "one row less":
        rows = rows[:-1]
    elif change == "another text":
        rows[3] = rows[3]._replace(text="edited")
    elif change == "another vector":
        rows[3] = rows[3]._replace(vector=rows[3].vector + 1e-3)
    elif change == "another owner":
        rows[3] = rows[3]._replace(metadata={"owner": "user6", "part": 0})
    return rows


@pytest.mark.parametrize("change", ["one row more", "one row less", "another text", "another vector", "another owner"])
def test_a_store_that_differs_from_the_journal_is_rebuilt(tmp_path, change):
    index = ChromaIndex(tmp_path / "index", source_of(some_rows(150)))
    index.close()
    rows = rows_changed(change)
    index = ChromaIndex(tmp_path / "index", source_of(rows))
    assert index.rebuilt == 1
    assert_equal(index, exact_of(rows))
    index.close()


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty graph", "no database"])
def test_a_damaged_store_is_moved_away_and_rebuilt(tmp_path, damage):
    rows = some_rows(150)
    index = ChromaIndex(tmp_path / "index", source_of(rows), sync_threshold=50)
    index.close()
    store = tmp_path / "index" / "store-0001"
    graphs = sorted(store.glob("*/*.bin"))
    assert graphs, "the graph must have reached the disk for this test to mean something"
    if damage == "garbage":
        (store / "chroma.sqlite3").write_bytes(b"not a database" * 1000)
    elif damage == "truncated":
        os.truncate(store / "chroma.sqlite3", 5000)
    elif damage == "empty graph":
        for path in graphs:
            path.write_bytes(b"")
    else:
        (store / "chroma.sqlite3").unlink()
    index = ChromaIndex(tmp_path / "index", source_of(rows), sync_threshold=50)
    assert index.rebuilt == 1
    assert_equal(index, exact_of(rows))
    index.close()
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"lock", "broken-0001", "store-0002"}


def test_a_store_that_vanishes_under_a_running_index_is_rebuilt(tmp_path):
    rows = some_rows(60)
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", rows)
    index._store._handle("memories").delete(ids=[rows[0].id])  # behind the index's back
    assert_equal(index, exact_of(rows))
    assert index.rebuilt == 1
    index._store.drop_all()
    index.upsert("memories", some_rows(5, start=60))
    assert_equal(index, exact_of(rows + some_rows(5, start=60)))
    assert index.rebuilt == 2
    index.close()


def test_without_a_source_old_contents_are_forgotten(tmp_path):
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", some_rows(30))
    index.close()
    index = ChromaIndex(tmp_path / "index")
    assert index.count("memories") == 0
    assert index.query("memories", some_queries(1), 3) == [[]]
    assert index.rebuilt == 0
    index.close()


def test_a_second_holder_is_refused(tmp_path):
    index = ChromaIndex(tmp_path / "index")
    with pytest.raises(InputError, match="open in another process"):
        ChromaIndex(tmp_path / "index")
    index.close()
    ChromaIndex(tmp_path / "index").close()


def test_callers_mistakes_do_not_trigger_a_rebuild(tmp_path):
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", some_rows(3))
    with pytest.raises(DataError, match="non-empty id"):
        index.upsert("memories", [IndexRow("", "x", np.ones(DIMENSION), {})])
    with pytest.raises(DataError, match="finite number"):
        index.upsert("memories", [IndexRow("a", "x", np.ones(DIMENSION), {"owner": None})])
    with pytest.raises(DataError, match="surrogate"):
        index.upsert("memories", [IndexRow("\ud800", "x", np.ones(DIMENSION), {})])
    with pytest.raises(DataError, match="16 dimensions"):
        index.upsert("memories", [IndexRow("a", "x", np.ones(3), {})])
    with pytest.raises(DataError, match="16 dimensions"):
        index.query("memories", np.ones((1, 3)), 1)
    with pytest.raises(DataError, match="k must"):
        index.query("memories", some_queries(1), 0)
    index.upsert("memories", [IndexRow("s", "lone \ud800 surrogate", np.ones(DIMENSION), {})])
    assert index.count("memories") == 4
    assert index.rebuilt == 0
    index.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        ChromaIndex(tmp_path / "file")
    with pytest.raises(ConfigError, match="http://host:port"):
        ChromaIndex("ftp://somewhere")


def test_what_is_not_the_stores_fault_is_passed_on_without_a_rebuild(tmp_path, monkeypatch):
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", some_rows(5))
    for error in (TypeError("a programming error"), ValueError("another"), KeyboardInterrupt(), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(index._store, "candidates", raising(error))
            with pytest.raises(type(error)):
                index.query("memories", some_queries(1), 2)
    assert index.rebuilt == 0
    index.close()


Panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.mark.parametrize(
    "error", [InternalError("disk I/O error"), NotFoundError("gone"), Panic("index out of bounds"), OSError("gone")]
)
def test_a_failing_store_is_rebuilt_and_the_log_names_the_reason(tmp_path, monkeypatch, caplog, error):
    rows = some_rows(20)
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", rows)
    monkeypatch.setattr(index._store, "candidates", raising(error))  # the rebuilt store is another object
    assert_equal(index, exact_of(rows))
    assert index.rebuilt == 1
    assert f"rebuilt: {type(error).__name__}: {error}" in caplog.text
    index.close()


def test_a_store_that_fails_again_when_rebuilt_ends_in_one_clear_error(tmp_path, monkeypatch):
    index = ChromaIndex(tmp_path / "index")
    index.upsert("memories", some_rows(5))
    monkeypatch.setattr(ChromaStore, "candidates", raising(InternalError("database or disk is full")))
    with pytest.raises(RecollectError, match="fails even when rebuilt: InternalError: database or disk is full"):
        index.query("memories", some_queries(1), 2)
    index.close()


def raising(error):
    def fail(*_):
        raise error

    return fail


# -- a real server --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def test_a_server_gives_the_same_hits_and_its_death_is_survived(server):
    rows = some_rows(120)
    index, exact = ChromaIndex(server.url), exact_of(rows)
    other = ChromaIndex(server.url)  # another run on the same server
    index.upsert("memories", rows)
    other.upsert("memories", some_rows(5, seed=8))
    index.delete("memories", [rows[0].id])
    exact.delete("memories", [rows[0].id])
    assert_equal(index, exact)
    assert other.count("memories") == 5

    server.kill()
    with pytest.raises(ServerAway, match="does not answer") as caught:
        index.query("memories", some_queries(1), 3)
    assert caught.value.exit_code == 75
    late = some_rows(4, seed=2, start=120)
    with pytest.raises(ServerAway):
        index.upsert("memories", late)
    exact.upsert("memories", late)
    with pytest.raises(ServerAway):
        ChromaIndex(server.url)

    server.start()
    assert_equal(index, exact)
    assert index.rebuilt == 1, "the rows it could not send came with a rebuild"
    assert other.query("memories", some_queries(1), 9)[0]
    index.close()
    other.close()


def test_a_named_run_finds_its_collections_on_the_server_again(server):
    rows = some_rows(50)
    for expected in (0, 0):
        index = ChromaIndex(server.url, source_of(rows), namespace="run-1")
        assert_equal(index, exact_of(rows))
        assert index.rebuilt == expected
        index.close()
    index = ChromaIndex(server.url, source_of(rows[:-1]), namespace="run-1")
    assert index.rebuilt == 1
    assert_equal(index, exact_of(rows[:-1]))
    index.close()
    shutil.rmtree(server.folder, ignore_errors=True)
