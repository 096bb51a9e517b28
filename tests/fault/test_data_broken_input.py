"""Broken input ends in one DataError line that names the file and the row."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recollect.data import import_dataset, load_dataset, read_folder, read_kind, write_folder
from recollect.data.tables import BLOCK_BYTES
from recollect.errors import DataError, UnknownName

LOG = "user_id,item_id,timestamp,rating\na,x,10,5\na,y,20,4\nb,x,30,\n"
ITEMS = "item_id,title,categories\nx,First,one|two\ny,Second,\n"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "interactions.csv").write_text(LOG)
    (folder / "items.csv").write_text(ITEMS)
    return folder


def refused(kind, folder, *parts):
    with pytest.raises(DataError) as caught:
        read_kind(kind, folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_the_example_itself_is_sound(source):
    dataset = read_kind("csv", source)
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (2, 2, 3)


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("interactions.csv", "user_id,item_id\na,x\n", ("timestamp", "column")),
        ("interactions.csv", "", ("empty",)),
        ("interactions.csv", "user_id,item_id,timestamp\n", ("empty",)),
        ("interactions.csv", LOG.replace("20", "soon"), ("row 2", "timestamp", "soon")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,y,,4"), ("row 2", "timestamp is missing")),
        ("interactions.csv", LOG.replace("20", "nan"), ("row 2", "timestamp is missing")),
        ("interactions.csv", LOG.replace("20", "-1"), ("row 2", "timestamp -1")),
        ("interactions.csv", LOG.replace("20", "20.5"), ("row 2", "20.5")),
        ("interactions.csv", LOG.replace("20", "1e400"), ("row 2", "inf")),
        ("interactions.csv", LOG.replace("20", "1700000000000"), ("row 2", "milliseconds")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,y,20,good"), ("row 2", "rating", "good")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,y,20,inf"), ("row 2", "rating")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,y"), ("row 2", "columns")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,z,20,4"), ("row 2", "'z'", "items.csv")),
        ("interactions.csv", LOG.replace("a,y,20,4", ",y,20,4"), ("row 2", "user_id is empty")),
        ("interactions.csv", LOG.replace("a,y,20,4", "a,,20,4"), ("row 2", "item_id is empty")),
        ("interactions.csv", LOG.replace("rating", "item_id"), ("twice",)),
        ("items.csv", ITEMS + "x,Again,\n", ("row 3", "'x'", "twice")),
        ("items.csv", ITEMS.replace("y,Second", ",Second"), ("row 2", "empty")),
        ("items.csv", ITEMS.replace("title", "name"), ("title",)),
        ("items.csv", "item_id,title\n", ("empty",)),
        ("users.csv", "user_id,age\na,1\nb,2\na,3\n", ("row 3", "'a'", "twice")),
        ("users.csv", "age\n1\n", ("user_id",)),
    ],
)
def test_a_broken_cell_is_named_with_file_and_row(source, file, text, parts):
    (source / file).write_text(text)
    refused("csv", source, file, *parts)


@pytest.mark.parametrize(("file", "row"), [("interactions.csv", "row 2"), ("items.csv", "row 2")])
def test_a_wrong_encoding_is_named(source, file, row):
    text = (source / file).read_bytes().replace(b"a,y,20", b"\xe9,y,20").replace(b"y,Second", b"y,Caf\xe9")
    (source / file).write_bytes(text)
    refused("csv", source, file, row, "UTF-8")


def test_a_missing_file_is_named(source):
    (source / "items.csv").unlink()
    refused("csv", source, "items.csv")
    refused("csv", source / "nowhere", "does not exist")
    refused("csv", source / "interactions.csv", "is a file")


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_gzip_is_named(source, keep):
    rows = "".join(f"a,x,{number}\n" for number in range(50_000))
    packed = gzip.compress(f"user_id,item_id,timestamp\n{rows}".encode())
    (source / "interactions.csv").unlink()
    (source / "interactions.csv.gz").write_bytes(packed[: int(len(packed) * keep)])
    refused("csv", source, "interactions.csv.gz", "gzip")


def test_a_file_that_only_claims_to_be_gzip_is_named(source):
    (source / "interactions.csv").rename(source / "interactions.csv.gz")
    refused("csv", source, "interactions.csv.gz", "gzip")


def test_a_row_without_end_is_refused_not_held_in_memory(source):
    with open(source / "interactions.csv", "w") as handle:
        handle.write(LOG)
        handle.write("a" * (2 * BLOCK_BYTES + 1000) + ",x,5,1\n")
    refused("csv", source, "interactions.csv", "longer")


def test_empty_titles_are_kept_and_counted(source):
    (source / "items.csv").write_text(ITEMS.replace("Second", ""))
    dataset = read_kind("csv", source)
    assert dataset.catalog.titles.tolist() == ["First", ""]
    assert dataset.meta["warnings"] == ["1 of 2 items have an empty title"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("empty",)),
        ("1\n", ("row 1", "no item")),
        ("1 5 6\n2\n", ("row 2", "no item")),
        ("1 5 6\n\n1 7\n", ("row 3", "'1'", "already")),
    ],
)
def test_broken_sequences_are_named(tmp_path, text, parts):
    (tmp_path / "sequences.txt").write_text(text)
    refused("sequences", tmp_path, "sequences.txt", *parts)


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        ('{"item_id": "5", "title": "x"\n', ("row 1", "JSON")),
        ('{"item_id": "5"}\n["6"]\n', ("row 2", "object")),
        ('{"title": "x"}\n', ("row 1", "item_id")),
        ('{"item_id": "5"}\n{"item_id": "5"}\n', ("row 2", "twice")),
        ('{"item_id": "5"}\n', ("'6'", "items.jsonl")),
        ("", ("empty",)),
        ("[" * 100_000, ("row 1", "JSON")),
    ],
)
def test_broken_item_texts_are_named(tmp_path, items, parts):
    (tmp_path / "sequences.txt").write_text("1 5 6\n")
    (tmp_path / "items.jsonl").write_text(items)
    refused("sequences", tmp_path, *parts)


REVIEW = {"user_id": "u", "parent_asin": "A", "rating": 5.0, "timestamp": 1_700_000_000_000}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ("not json", ("row 2", "JSON")),
        (REVIEW | {"timestamp": "soon"}, ("row 2", "timestamp", "soon")),
        (REVIEW | {"user_id": 7}, ("row 2", "user_id", "7")),
        (REVIEW | {"user_id": None}, ("row 2", "user_id is missing")),
        (REVIEW | {"timestamp": None}, ("row 2", "timestamp is missing")),
    ],
)
def test_broken_reviews_are_named(tmp_path, changed, parts):
    second = changed if isinstance(changed, str) else json.dumps(changed)
    (tmp_path / "Books.jsonl").write_text(json.dumps(REVIEW) + "\n" + second + "\n")
    refused("amazon", tmp_path, "Books.jsonl", *parts)


def test_metadata_is_never_evaluated(tmp_path):
    (tmp_path / "Books.jsonl").write_text(json.dumps(REVIEW) + "\n")
    marker = tmp_path / "ran"
    (tmp_path / "meta_Books.json").write_text(f"{{'asin': open({str(marker)!r}, 'w').write('x')}}\n")
    refused("amazon", tmp_path, "meta_Books.json", "row 1")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("user_id:token\titem_id:token\tstamp:float", ("timestamp",)),
        ("user_id\titem_id\ttimestamp", ("name:type",)),
        ("user_id:token\titem_id:picture\ttimestamp:float", ("name:type",)),
    ],
)
def test_broken_recbole_headers_are_named(tmp_path, header, parts):
    (tmp_path / "x.inter").write_text(header + "\n1\t2\t3\n")
    refused("recbole", tmp_path, "x.inter", *parts)


def test_two_recbole_logs_in_one_folder_are_refused(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n")
    refused("recbole", tmp_path, "several .inter files")


@pytest.mark.parametrize(
    ("file", "spoil", "parts"),
    [
        ("interactions.parquet", lambda path: path.write_bytes(b"PAR1 no"), ("damaged",)),
        ("items.parquet", lambda path: path.write_bytes(path.read_bytes()[:-40]), ("damaged",)),
        ("items.parquet", lambda path: path.unlink(), ("does not exist",)),
        ("interactions.parquet", lambda path: _rewrite(path, lambda t: t.drop_columns(["timestamp"])), ("timestamp",)),
        ("interactions.parquet", lambda path: _rewrite(path, lambda t: t.slice(0, 0)), ("empty",)),
        ("interactions.parquet", lambda path: _rewrite(path, _text_times), ("timestamp", "int64")),
        ("interactions.parquet", lambda path: _rewrite(path, _null_user), ("row 2", "user_id is missing")),
        ("items.parquet", lambda path: _rewrite(path, lambda t: pa.concat_tables([t, t])), ("row 3", "twice")),
        ("items.parquet", lambda path: _rewrite(path, lambda t: t.slice(0, 1)), ("'y'", "items.parquet")),
        ("dataset.json", lambda path: path.write_text("{"), ("JSON",)),
        ("dataset.json", lambda path: path.write_text("[]"), ("name",)),
        ("dataset.json", lambda path: path.write_text('{"name": "x", "clock": "sundial"}'), ("clock", "sundial")),
    ],
)
def test_a_broken_dataset_folder_is_named(source, tmp_path, file, spoil, parts):
    folder = tmp_path / "set"
    write_folder(read_kind("csv", source), folder)
    spoil(folder / file)
    with pytest.raises(DataError) as caught:
        read_folder(folder)
    for part in (file, *parts):
        assert part in str(caught.value)


def _rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def _text_times(table):
    return table.set_column(2, "timestamp", table["timestamp"].cast(pa.string()))


def _null_user(table):
    return table.set_column(0, "user_id", pa.array(["a", None, "b"]))


def test_a_failed_import_writes_nothing(source, tmp_path):
    (source / "items.csv").write_text("item_id,title\nx,First\n")
    with pytest.raises(DataError):
        import_dataset("csv", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UnknownName, match="harbor") as caught:
        load_dataset("harbour")
    assert "ml-100k" in str(caught.value)
    with pytest.raises(UnknownName, match="recbole"):
        read_kind("parquet", tmp_path)
    with pytest.raises(DataError, match="data import"):
        load_dataset(tmp_path)
