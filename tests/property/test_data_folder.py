"""The dataset folder: what is written is what is read, and nothing is ever half-written."""

import errno
import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.data import describe, fingerprint, import_dataset, read_folder, write_folder
from recollect.data.assemble import RawTables, assemble
from recollect.errors import DataError, InputError, StorageRefused

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=6)
EVENT = st.tuples(
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(0, 2_000_000_000),
    st.none() | st.integers(1, 5),
    st.integers(0, 1),
)


@st.composite
def datasets(draw):
    users = draw(st.lists(NAMES, min_size=5, max_size=5, unique=True))
    items = draw(st.lists(NAMES, min_size=6, max_size=6, unique=True))
    events = draw(st.lists(EVENT, min_size=1, max_size=30))
    titles = draw(st.lists(st.text(max_size=8), min_size=6, max_size=6).filter(lambda x: _encodable(x)))
    log = pa.table(
        {
            "user_id": pa.array([users[event[0]] for event in events]),
            "item_id": pa.array([items[event[1]] for event in events]),
            "timestamp": pa.array([event[2] for event in events], pa.int64()),
            "rating": pa.array([event[3] for event in events], pa.float32()),
            "domain": pa.array([("x", "y")[event[4]] for event in events]),
            "seconds_looked": pa.array([0.5 * event[1] for event in events], pa.float32()),
        }
    )
    catalogue = pa.table(
        {
            "item_id": pa.array(items),
            "title": pa.array(titles),
            "categories": pa.array([[str(n)] * (n % 3) for n in range(6)], pa.list_(pa.string())),
            "text": pa.array([None if n % 2 else f"text {n}" for n in range(6)], pa.string()),
            "price": pa.array([1.5, None, 2.0, 3.0, 4.0, 5.0]),
            "year": pa.array([1990 + n for n in range(6)], pa.int64()),
        }
    )
    people = pa.table({"user_id": pa.array(users), "country": pa.array(["a", None, "c", "d", "e"])})
    return assemble(
        RawTables("drawn", log, "log", items=catalogue, items_file="items", users=people, users_file="users")
    )


def _encodable(texts):
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def same(first, second):
    return all(
        (a == b) or (a != a and b != b)
        for a, b in zip(np.asarray(first).tolist(), np.asarray(second).tolist(), strict=True)
    )


def assert_equal(first, second):
    one, two = first.interactions, second.interactions
    for name in ("user", "item", "time", "row", "domain"):
        assert same(getattr(one, name), getattr(two, name)), name
    assert (one.rating is None) == (two.rating is None)
    assert one.rating is None or same(one.rating, two.rating)
    assert one.context.keys() == two.context.keys()
    for name in one.context:
        assert same(one.context[name], two.context[name])
    assert same(first.catalog.item_ids, second.catalog.item_ids)
    assert same(first.catalog.titles, second.catalog.titles)
    assert same(first.catalog.texts, second.catalog.texts)
    assert same(first.catalog.domain, second.catalog.domain)
    assert first.catalog.categories == second.catalog.categories
    for name in first.catalog.extra:
        assert same(first.catalog.extra[name], second.catalog.extra[name])
    assert same(first.users.user_ids, second.users.user_ids)
    for name in first.users.attributes:
        assert same(first.users.attributes[name], second.users.attributes[name])
    assert (first.domains, first.name, first.clock) == (second.domains, second.name, second.clock)


@settings(max_examples=40, deadline=None)
@given(dataset=datasets())
def test_round_trip_changes_nothing(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trip") / "set"
    write_folder(dataset, folder)
    again = read_folder(folder)
    assert_equal(dataset, again)
    assert fingerprint(again) == fingerprint(dataset) == again.meta["fingerprint"]
    write_folder(again, folder, overwrite=True)
    assert_equal(dataset, read_folder(folder))


@settings(max_examples=40, deadline=None)
@given(dataset=datasets(), seed=st.integers(0, 100))
def test_fingerprint_does_not_depend_on_the_order_of_rows_or_ids(dataset, seed):
    log, generator = dataset.interactions, np.random.default_rng(seed)
    order = generator.permutation(len(log))
    table = pa.table(
        {
            "user_id": pa.array(dataset.users.user_ids[log.user[order]], pa.string()),
            "item_id": pa.array(dataset.catalog.item_ids[log.item[order]], pa.string()),
            "timestamp": pa.array(log.time[order]),
        }
    )
    shuffled = assemble(RawTables("other name", table, "log"))
    assert fingerprint(shuffled) == fingerprint(dataset)
    moved = table.set_column(2, "timestamp", pa.array(log.time[order] + (np.arange(len(log)) == 0)))
    assert fingerprint(assemble(RawTables("moved", moved, "log"))) != fingerprint(dataset)


def small(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "interactions.csv").write_text("user_id,item_id,timestamp\na,x,1\na,y,2\nb,x,3\n")
    (source / "items.csv").write_text("item_id,title\nx,First\ny,Second\n")
    return source


def test_the_contract_columns_are_on_disk(tmp_path):
    import_dataset("csv", small(tmp_path), tmp_path / "out")
    kinds = {name: str(kind) for name, kind in zip(*_schema(tmp_path / "out" / "interactions.parquet"), strict=True)}
    assert kinds == {
        "user_id": "string",
        "item_id": "string",
        "timestamp": "int64",
        "rating": "float",
        "domain": "string",
        "row": "int64",
    }
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["counts"] == {"users": 2, "items": 2, "interactions": 3}
    assert {"name", "version", "source", "licence", "domains", "fingerprint", "created_with", "clock"} <= set(described)
    assert described["fingerprint"] == fingerprint(read_folder(tmp_path / "out"))


def _schema(path):
    schema = pq.read_schema(path)
    return schema.names, schema.types


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    dataset = import_dataset("csv", small(tmp_path), tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        for target in ("fresh", "out"):
            with pytest.raises(StorageRefused, match="free some space"):
                write_folder(dataset, tmp_path / target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_equal(read_folder(tmp_path / "out"), dataset)


def test_a_failed_exchange_keeps_the_old_folder(tmp_path, monkeypatch):
    dataset = import_dataset("csv", small(tmp_path), tmp_path / "out")
    import os

    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageRefused):
        write_folder(dataset, tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert_equal(read_folder(tmp_path / "out"), dataset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_existing_data_is_not_replaced_unasked(tmp_path):
    source = small(tmp_path)
    import_dataset("csv", source, tmp_path / "out")
    with pytest.raises(InputError, match="overwrite"):
        import_dataset("csv", source, tmp_path / "out")
    import_dataset("csv", source, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="not a dataset folder"):
        import_dataset("csv", source, source, overwrite=True)
    assert (source / "items.csv").exists()


def test_a_changed_folder_is_noticed(tmp_path):
    import_dataset("csv", small(tmp_path), tmp_path / "out")
    path = tmp_path / "out" / "interactions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, "timestamp", pa.array([1, 2, 4])), path)
    assert any("fingerprint" in warning for warning in describe(read_folder(tmp_path / "out"))["warnings"])
    pq.write_table(table.slice(0, 2), path)
    with pytest.raises(DataError, match=r"dataset\.json says"):
        read_folder(tmp_path / "out")
