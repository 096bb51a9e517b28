"""Data sets by name: where they are looked for, and how a download is checked."""

import dataclasses
import hashlib
import http.server
import threading
import zipfile

import pytest

from recollect.data import build_harbor, fetch, fingerprint, load_dataset, registered, registry, write_folder
from recollect.errors import DataError, InputError, UnknownName

DATA = "2\t10\t3\t881250949\n1\t10\t5\t881250950\n"
ITEM = "10|Story (1995)|01-Jan-1995||http://x|" + "|".join(["0"] * 19) + "\n"
USERS = "1|24|M|technician|85711\n2|53|F|other|94043\n"


def fill(folder):
    folder.mkdir(parents=True)
    for name, text in (("u.data", DATA), ("u.item", ITEM), ("u.user", USERS)):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RECOLLECT_DATA", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    return tmp_path


@pytest.mark.parametrize("inside", ["two/ml-100k", "one/recsys/ml-100k", "cache/datasets/ml-100k"])
def test_a_set_is_found_in_every_documented_place(places, inside):
    folder = fill(places / inside)
    assert fetch("ml-100k") == folder
    assert len(load_dataset("ml-100k").interactions) == 2
    assert next(row for row in registered() if row["name"] == "ml-100k")["found"] == str(folder)


def test_the_searched_folder_may_be_the_set_itself(places, monkeypatch):
    folder = fill(places / "elsewhere" / "ml-100k")
    monkeypatch.setenv("RECOLLECT_DATA", str(folder))
    assert fetch("ml-100k") == folder


def test_an_earlier_folder_wins_and_an_imported_folder_counts(places):
    fill(places / "two" / "ml-100k")
    write_folder(build_harbor(seed=0).dataset, places / "one" / "ml-100k")
    assert fetch("ml-100k") == places / "one" / "ml-100k"
    assert load_dataset("ml-100k").name == "harbor"


def test_shared_names_are_known(shared_data, monkeypatch):
    monkeypatch.setenv("RECOLLECT_DATA", str(shared_data))
    found = {row["name"]: row["found"] for row in registered()}
    assert all(found.values())
    assert found["amazon-arts-office"].endswith("amazon_cross_arts_office")
    assert all(row["licence"] for row in registered())


def test_a_set_without_an_address_says_where_it_was_sought_and_where_to_get_it(places):
    with pytest.raises(DataError) as caught:
        fetch("amazon-beauty")
    for part in (str(places / "one"), str(places / "two"), str(places / "cache"), "RECOLLECT_DATA", "github.com"):
        assert part in str(caught.value)
    with pytest.raises(UnknownName, match="ml-1m"):
        fetch("ml-2m")


def pack(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def served(tmp_path, monkeypatch, places):
    """Serve `ml-100k.zip` from this machine and register its address; returns a function that sets its content."""
    root = tmp_path / "www"
    root.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(root), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def publish(members, checksum=None):
        path = pack(root / "ml-100k.zip", members)
        checksum = checksum or "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/ml-100k.zip"
        entry = dataclasses.replace(registry.SETS["ml-100k"], url=url, checksum=checksum)
        monkeypatch.setitem(registry.SETS, "ml-100k", entry)

    yield publish
    server.shutdown()
    server.server_close()


MEMBERS = {"ml-100k/u.data": DATA, "ml-100k/u.item": ITEM, "ml-100k/u.user": USERS}


def test_a_set_is_fetched_once_checked_and_kept(served, places, monkeypatch):
    served(MEMBERS)
    first = load_dataset("ml-100k")
    folder = places / "cache" / "datasets" / "ml-100k"
    assert sorted(path.name for path in folder.iterdir()) == ["u.data", "u.item", "u.user"]
    assert [path.name for path in folder.parent.iterdir()] == ["ml-100k"]
    broken = dataclasses.replace(registry.SETS["ml-100k"], url="http://127.0.0.1:1/no")
    monkeypatch.setitem(registry.SETS, "ml-100k", broken)
    assert fingerprint(load_dataset("ml-100k")) == fingerprint(first)


@pytest.mark.parametrize(
    ("members", "checksum", "error", "message"),
    [
        (MEMBERS, "md5:" + "0" * 32, DataError, "nothing was kept"),
        (MEMBERS | {"ml-100k/../../escaped": "x"}, None, InputError, "not allowed"),
        ({"/absolute": "x", "other/y": "y"}, None, InputError, "not allowed"),
    ],
)
def test_a_wrong_archive_leaves_nothing_behind(served, places, members, checksum, error, message):
    served(members, checksum)
    with pytest.raises(error, match=message):
        fetch("ml-100k")
    assert list((places / "cache" / "datasets").iterdir()) == []
    assert not (places / "cache" / "escaped").exists()


def test_offline_the_error_names_the_address_and_the_places(places, monkeypatch):
    entry = dataclasses.replace(registry.SETS["ml-100k"], url="http://127.0.0.1:1/ml-100k.zip")
    monkeypatch.setitem(registry.SETS, "ml-100k", entry)
    with pytest.raises(DataError) as caught:
        fetch("ml-100k")
    for part in ("http://127.0.0.1:1/ml-100k.zip", str(places / "one"), "RECOLLECT_DATA", "cannot be reached"):
        assert part in str(caught.value)
    assert list((places / "cache" / "datasets").iterdir()) == []


def test_published_checksums_are_well_formed():
    for entry in registry.SETS.values():
        assert (entry.url is None) == (entry.checksum is None)
        if entry.checksum:
            algorithm, digest = entry.checksum.split(":")
            assert len(bytes.fromhex(digest)) == hashlib.new(algorithm, usedforsecurity=False).digest_size
